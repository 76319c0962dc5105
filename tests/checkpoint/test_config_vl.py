"""Vision-language configs: what both styles mean, what is refused, and the way back."""

from dataclasses import replace
from typing import Any, Literal

import pytest
from checkpoint.released_configs import VL_28B, VL_28B_PADDLE, VL_424B, VL_CONFIGS
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, Ernie4_5_VLMoeConfig

from ernie_lab.checkpoint.config import ConfigError, VisualIds, VLConfig
from ernie_lab.checkpoint.config_json import Style, read_config, write_config

STYLES: tuple[Literal["released", "transformers"], ...] = ("released", "transformers")

IDS = VisualIds(
    image=100295,
    video=100295,
    image_start=101304,
    image_end=101305,
    video_start=101306,
    video_end=101307,
)


def read_vl(raw: dict[str, Any]) -> VLConfig:
    config = read_config(raw)
    assert isinstance(config, VLConfig)
    assert config.text.moe is not None
    return config


def test_28b() -> None:
    config = read_vl(VL_28B)
    assert config.text.moe is not None
    assert config.text.moe.layers == tuple(range(1, 28))  # [29, 28] lie beyond the last layer
    assert (config.text.moe.expert_hidden, config.vision_expert_hidden) == (1536, 512)
    assert config.text.moe.shared_hidden == 3072
    assert config.text.rope.sections == (22, 22, 20)
    assert config.text.tied
    assert config.ids == IDS
    assert (config.vision.depth, config.vision.width, config.vision.hidden) == (32, 1280, 5120)


def test_paddle_file_lacks_fields_and_means_the_same() -> None:
    assert read_config(VL_28B_PADDLE) == read_config(VL_28B)


def test_424b_has_scalars_and_no_shared_experts() -> None:
    config = read_vl(VL_424B)
    assert config.text.moe is not None
    assert config.text.moe.layers == tuple(range(3, 54))
    assert config.text.moe.n_shared == 0
    assert config.vision_expert_hidden == 1536
    assert not config.text.tied
    assert config.decoder is config.text is config.text.decoder


@pytest.mark.parametrize("start", [3, [3, 3]])
@pytest.mark.parametrize("end", [53, -1, None, [55, 54], [None, -1], "absent"])
@pytest.mark.parametrize("n_experts", [64, [64, 64]])
def test_one_value_or_one_a_bank(start: Any, end: Any, n_experts: Any) -> None:
    """The 424B file was seen with scalars; its -PT twin may have lists."""
    raw = {**VL_424B, "moe_layer_start_index": start, "moe_num_experts": n_experts}
    if end != "absent":
        raw["moe_layer_end_index"] = end
    assert read_config(raw) == read_config(VL_424B)


def test_transformers_native() -> None:
    ours, theirs = read_vl(VL_28B), read_vl(Ernie4_5_VLMoeConfig().to_dict())
    assert theirs.vision == ours.vision
    assert theirs.text.moe == ours.text.moe
    assert theirs.vision_expert_hidden == 512
    assert theirs.text.rope == ours.text.rope
    assert theirs.ids.video == 103367  # a token transformers added
    assert read_vl({**Ernie4_5_VLMoeConfig().to_dict(), "eos_token_id": 2}).text.ids.eos == (2,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"moe_num_experts": [64, 32]}, r"moe_num_experts of the two banks: 64 and 32"),
        ({"moe_layer_end_index": [27, 20]}, r"mixture layers of the two banks"),
        ({"moe_layer_start_index": [1, 1, 1]}, r"must be one value or two"),
        ({"rope_3d": False}, r"rope_3d=False"),
        ({"moe_use_hard_gate": False}, r"moe_use_hard_gate=False"),
        ({"temporal_conv_size": 4}, r"temporal_conv_size=4"),
        ({"mm_vocab_size": 8192}, r"mm_vocab_size=8192"),
        ({"vision_config": None}, r"vision_config=None must be an object"),
        ({"vision_config": {"hidden_act": "gelu"}}, r"vision_config field hidden_act='gelu'"),
        ({"vision_config": {"window_size": 7}}, r"unknown vision_config field window_size=7"),
        ({"vision_config": {"hidden_size": 640}}, r"vision width: 1280 and 640"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, r"'yarn' is not supported with 3-D"),
        (
            {"rope_scaling": {"type": "default", "mrope_section": [20, 22, 22]}},
            r"mrope_section=\[20, 22, 22\]",
        ),
        ({"head_dim": 8, "rope_scaling": None}, r"mrope_section=\[-8, -8, 20\].*at least 1"),
        ({"freq_allocation": 16}, r"time's share of the rotary pairs: 20 and 16 must be equal"),
        ({"vision_config": {"embed_dim": 84, "num_heads": 2}}, r"vision width: 84 and 1280"),
        ({"vision_config": {"num_heads": 128}}, r"vision width=1280 .* 4 x n_heads=128"),
        ({"vision_config": {"depth": 0}}, r"depth=0 must be at least 1"),
        ({"vision_config": {"num_heads": -1}}, r"num_heads=-1 must be at least 1"),
        ({"moe_intermediate_size": [1536, 0]}, r"vision_expert_hidden=0 must be at least 1"),
    ],
)
def test_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config({**VL_28B, **change})


def test_unknown_fields_of_the_tower_can_be_passed_over() -> None:
    tower = {**VL_28B["vision_config"], "mood": "fine"}
    assert read_config({**VL_28B, "vision_config": tower}, ignore=("mood",)) == read_config(VL_28B)
    native = Ernie4_5_VLMoeConfig().to_dict()
    tower = {**native["vision_config"], "mood": "fine"}
    assert read_config({**native, "vision_config": tower}, ignore=("mood",)) == read_config(native)


def test_native_refusals() -> None:
    raw = Ernie4_5_VLMoeConfig().to_dict()
    with pytest.raises(ConfigError, match="mlp_layer_types"):
        read_config({**raw, "text_config": {**raw["text_config"], "mlp_layer_types": ["dense"]}})
    with pytest.raises(ConfigError, match="unknown text_config field"):
        read_config({**raw, "text_config": {**raw["text_config"], "qk_norm": True}})


def test_native_defaults_are_those_of_transformers() -> None:
    """Baidu's 424B means none by leaving shared experts out, transformers means two."""
    raw = Ernie4_5_VLMoeConfig().to_dict()
    sparse = {k: v for k, v in raw["text_config"].items() if k != "moe_num_shared_experts"}
    assert read_config({**raw, "text_config": sparse}) == read_config(raw)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", VL_CONFIGS)
def test_released_configs_survive_a_round_trip(name: str, style: Style) -> None:
    config = read_vl(VL_CONFIGS[name])
    assert read_config(write_config(config, "bfloat16", style)) == config


def test_what_we_write_is_what_baidu_wrote() -> None:
    """Where the released file has a field, ours has it, at a value that means the same."""
    written = write_config(read_vl(VL_28B), "bfloat16")
    # [29, 28] lie beyond the last layer; the others are no part of the model.
    same = VL_28B.keys() & written.keys() - {"moe_layer_end_index", "vision_config"}
    assert {name: written[name] for name in same} == {name: VL_28B[name] for name in same}
    assert written["moe_layer_end_index"] == [27, 27]
    unsaid = {"attn_implementation", "vit_first_fwd_bsz"}
    tower = {k: v for k, v in VL_28B["vision_config"].items() if k not in unsaid}
    assert written["vision_config"] == tower


def test_transformers_reads_what_we_write() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [22, 22, 20]}
    theirs = Ernie4_5_VLMoeConfig(text_config={"rope_parameters": rope})
    written = write_config(read_vl(theirs.to_dict()), style="transformers")
    again = AutoConfig.for_model(**written)
    assert isinstance(again, Ernie4_5_VLMoeConfig)
    ours, reference = again.to_dict(), theirs.to_dict()
    # Its class does not declare `head_dim`, and honours it.
    assert ours["text_config"].pop("head_dim") == 128
    # The two that tell of weights: who saved them, and as what.
    assert (ours["architectures"], ours["dtype"]) == (written["architectures"], "float32")
    assert {**ours, "architectures": None, "dtype": None} == reference


@given(
    n_layers=st.integers(2, 7),
    sparse=st.sets(st.integers(0, 6), min_size=1),
    tied=st.booleans(),
    bias=st.booleans(),
    shared=st.integers(0, 3),
    hidden=st.integers(1, 200),
    eos=st.lists(st.integers(0, 99), max_size=3),
    video=st.sampled_from([100295, 103367]),
)
def test_any_config_survives_or_is_refused(
    n_layers: int,
    sparse: set[int],
    tied: bool,
    bias: bool,
    shared: int,
    hidden: int,
    eos: list[int],
    video: int,
) -> None:
    raw = write_config(read_vl(VL_28B), style="transformers")
    kinds = ["sparse" if i in sparse else "dense" for i in range(n_layers)]
    if "sparse" not in kinds:
        return
    text = {
        **raw["text_config"],
        "num_hidden_layers": n_layers,
        "mlp_layer_types": kinds,
        "use_bias": bias,
        "moe_num_shared_experts": shared,
        "eos_token_id": eos,
    }
    tower = {**raw["vision_config"], "hidden_size": 48, "num_heads": 3, "intermediate_size": hidden}
    raw |= {"tie_word_embeddings": tied, "video_token_id": video}
    config = read_vl({**raw, "text_config": text, "vision_config": tower})
    assert config.text.tied == tied
    assert read_config(write_config(config, style="transformers")) == config
    refused = ""
    try:
        assert read_config(write_config(config)) == config
    except ConfigError as error:
        refused = str(error)
    # Gaps between mixture layers, a width that no ratio gives, or two placeholders.
    reasons = ("mixture layers", "vision.hidden", "ids.video")
    assert not refused or any(reason in refused for reason in reasons)
    assert bool(refused) >= (video == 103367)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("ids", {"video": 7}, r"ids.video=7 would be read as 100295"),
        ("vision", {"norm_eps": 1e-5}, r"vision.norm_eps=1e-05 would be read as 1e-06"),
        ("vision", {"rope_theta": 1e5}, r"vision.rope_theta=100000.0 would be"),
        ("vision", {"temporal_merge_size": 4}, r"temporal_conv_size=4 is not supported"),
        ("text", {"head_bias": True}, r"text.head_bias=True would be read as False"),
    ],
)
def test_what_baidus_style_cannot_say(part: str, change: dict[str, Any], message: str) -> None:
    config = read_vl(VL_28B)
    other = replace(config, **{part: replace(getattr(config, part), **change)})
    with pytest.raises(ConfigError, match=message):
        write_config(other)
    if part == "text":
        with pytest.raises(ConfigError, match=message):
            write_config(other, style="transformers")
    else:
        assert read_config(write_config(other, style="transformers")) == other


def test_a_text_without_mixture_or_sections() -> None:
    config = read_vl(VL_28B)
    with pytest.raises(ConfigError, match="its text has none"):
        replace(config, text=replace(config.text, moe=None))
    flat = replace(config.text.rope, sections=None)
    with pytest.raises(ConfigError, match="needs the rope sections"):
        replace(config, text=replace(config.text, rope=flat))
