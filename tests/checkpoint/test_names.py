"""The tables of keys: what each of our parameters is called, and which layout keys show."""

import pytest
import torch
from checkpoint.files import bare_module, random_tensors
from checkpoint.released_configs import TEXT_21B, TEXT_CONFIGS
from support.models import small_config

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.checkpoint.config_json import read_config
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.names import LAYOUTS, RELEASED, TRANSFORMERS, detect
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.model.text import TextModel

UNTIED = {"tied": False, "head_bias": True}


def keys_of(layout: Layout, name: str, shape: tuple[int, ...]) -> list[str]:
    return [piece.key for piece in layout.pieces(name, shape)]


@pytest.mark.parametrize("name", TEXT_CONFIGS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = read_config(TEXT_CONFIGS[name])
    assert isinstance(config, TextConfig)
    with torch.device("meta"):
        model = TextModel(config)
    assert parameter_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_keys_of_the_released_layout() -> None:
    assert keys_of(RELEASED, "embed_VD", (9, 4)) == ["model.embed_tokens.weight"]
    assert keys_of(RELEASED, "blocks.3.norm2.gain_D", (4,)) == [
        "model.layers.3.post_attention_layernorm.weight"
    ]
    assert keys_of(RELEASED, "blocks.0.attn.q.bias", (4,)) == [
        "model.layers.0.self_attn.q_proj.bias"
    ]
    assert keys_of(RELEASED, "blocks.12.moe.experts.gate_up_E2FD", (2, 2, 3, 4)) == [
        "model.layers.12.mlp.experts.0.gate_proj.weight",
        "model.layers.12.mlp.experts.0.up_proj.weight",
        "model.layers.12.mlp.experts.1.gate_proj.weight",
        "model.layers.12.mlp.experts.1.up_proj.weight",
    ]
    (bias,) = RELEASED.pieces("blocks.1.moe.router.correction_bias_E", (5,))
    assert bias.key == "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    assert bias.of(torch.zeros(5)).shape == (1, 5)


def test_keys_of_the_transformers_layout() -> None:
    (experts,) = TRANSFORMERS.pieces("blocks.1.moe.experts.gate_up_E2FD", (2, 2, 3, 4))
    assert experts.key == "model.layers.1.mlp.experts.gate_up_proj"
    ours_E2FD = torch.arange(48.0).view(2, 2, 3, 4)
    stored = experts.of(ours_E2FD)
    assert stored.shape == (2, 6, 4)
    assert torch.equal(stored[1, :3], ours_E2FD[1, 0])  # the gate comes first
    assert stored.data_ptr() == ours_E2FD.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("overrides", [{}, UNTIED, {"moe": None}])
def test_pieces_cover_each_parameter_exactly_once(
    layout: Layout, overrides: dict[str, bool]
) -> None:
    seen: set[str] = set()
    for name, shape in parameter_shapes(small_config(**overrides)).items():
        ours = torch.zeros(shape)
        for piece in layout.pieces(name, shape):
            assert piece.key not in seen
            seen.add(piece.key)
            piece.of(ours).add_(1)
        assert torch.equal(ours, torch.ones(shape)), name


def test_a_parameter_without_a_rule() -> None:
    with pytest.raises(CheckpointError, match=r"'released' has no rule for .*'blocks.0.extra'"):
        RELEASED.pieces("blocks.0.extra", (3,))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_is_told_by_the_keys(layout: Layout) -> None:
    assert detect(random_tensors(small_config(), layout)) is layout


def test_dense_keys_are_alike_in_both_layouts() -> None:
    dense = small_config(moe=None)
    assert random_tensors(dense, RELEASED).keys() == random_tensors(dense, TRANSFORMERS).keys()
    assert detect(random_tensors(dense)) is RELEASED


def test_multi_token_prediction_is_recognised() -> None:
    keys = [
        "model.mtp_block.0.self_attn.q_proj.weight",
        "model.mtp_emb_norm.0.weight",
        "model.mtp_hidden_norm.0.weight",
        "model.mtp_linear_proj.0.weight",
    ]
    assert all(RELEASED.is_unused(key) for key in keys)
    assert not any(RELEASED.is_unused(key) for key in random_tensors(small_config()))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ernie.layers.0.mlp.up_gate_proj.weight", "Paddle's layout"),
        ("model.layers.0.mlp.up_proj.qweight", "quantised"),
    ],
)
def test_foreign_layouts(key: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        detect([*random_tensors(small_config()), key])
    assert key in str(caught.value)


def test_mixed_layouts() -> None:
    mixed = random_tensors(small_config()) | random_tensors(small_config(), TRANSFORMERS)
    with pytest.raises(CheckpointError, match="mixes two layouts"):
        detect(mixed)


def test_the_whole_21b_has_its_number_of_tensors() -> None:
    config = read_config(TEXT_21B)
    assert isinstance(config, TextConfig)
    module = bare_module(config)
    keys = [p.key for n, t in module.named_parameters() for p in RELEASED.pieces(n, t.shape)]
    # embed, norm; 6 a layer; a dense MLP; 27 mixtures of 64 x 3, router, bias and 3 shared.
    assert len(keys) == len(set(keys)) == 2 + 28 * 6 + 3 + 27 * (64 * 3 + 2 + 3)
