"""Vision-language models against transformers: everything that flows, for every kind of prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.taps import Collect
from support.vl_inputs import Inputs, Prompt, image, video
from support.vl_oracle import (
    Flow,
    Pair,
    load,
    ours_sees,
    pair,
    shared_placeholder_pair,
    theirs_sees,
)
from torch import Tensor

from ernie_lab.inputs.media import Grid
from ernie_lab.model.vl import VLModel

CLOSE = {"atol": 1e-5, "rtol": 1e-5}

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "untied": {"tied": False},
    "no-shared": {"text": {"moe_num_shared_experts": 0}, "tied": False},
    "one-shared": {"text": {"moe_num_shared_experts": 1, "moe_intermediate_size": [8, 40]}},
    "biases": {"text": {"use_bias": True}},
    "all-sparse": {"text": {"mlp_layer_types": ["sparse"] * 3}},
    "mixed-layers": {
        "text": {
            "num_hidden_layers": 5,
            "mlp_layer_types": ["dense", "sparse", "dense", "dense", "sparse"],
        }
    },
    "head-dim": {"text": {"head_dim": 20}, "sections": (3, 3, 4)},
    "little-time": {"text": {"head_dim": 24}, "sections": (5, 5, 2)},
    "odd-heads": {
        "text": {"hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1},
        "sections": (2, 2, 2),
    },
    "full-attention": {"text": {"num_attention_heads": 3, "num_key_value_heads": 3},
                       "sections": (3, 3, 2)},
    "top-1": {"text": {"moe_k": 1, "moe_num_experts": 4}},
    "all-chosen": {"text": {"moe_k": 4, "moe_num_experts": 4}},
    "clamped": {"text": {"moe_norm_min": 0.5, "rms_norm_eps": 1e-2}},
    "deep-tower": {"tower": {"depth": 5, "hidden_size": 24, "num_heads": 3, "rms_norm_eps": 1e-2}},
    "odd-tower": {
        "tower": {
            "patch_size": 3,
            "in_channels": 1,
            "hidden_size": 12,
            "num_heads": 1,
            "intermediate_size": 7,
            "rope_parameters": {"rope_type": "axial", "rope_theta": 50.0},
        }
    },
    "patch-14": {"tower": {"patch_size": 14, "depth": 1, "hidden_size": 64, "num_heads": 4}},
}  # fmt: skip

TEXT = [5, 6, 7, 8]
PROMPTS: dict[str, list[Prompt]] = {
    "text": [[*TEXT, 9]],
    "image": [[*TEXT, image(4, 6), 9, 3]],
    "two-sizes": [[3, image(2, 8), 4, 5, image(6, 4), 6]],
    "video": [[3, 4, video(4, 4, 6), 5]],
    "image-and-video": [[3, image(4, 4), 4, video(2, 6, 4), 5, 6]],
    "video-and-image": [[3, video(2, 2, 2), image(2, 4), 4, video(4, 2, 4), 5]],
    "picture-first": [[image(4, 2), 5, 6]],
    "picture-last": [[3, 4, video(2, 4, 4, bare=True)]],
    "unequal": [TEXT, [3, image(4, 6), 4, video(4, 4, 2), 5], [6, image(2, 2), 7]],
    "several-each": [
        [3, image(2, 2), image(4, 6), 4, video(2, 2, 4)],
        [5, video(4, 4, 6), 6, image(4, 2), 7, video(2, 4, 2), image(2, 6), 8],
    ],
    "bare-neighbours": [[3, image(4, 4, bare=True), video(2, 4, 2, bare=True), 5, 6]],
}


@pytest.fixture(scope="module", params=CONFIGS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    name = request.param
    return pair(tmp_path_factory.mktemp("vl"), seed=len(name), **CONFIGS[name])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("vl"))


def agree(both: Pair, inputs: Inputs, theirs: Flow, logits: Tensor, tap: Collect) -> None:
    """Logits and every site of every layer and bank, on real tokens."""
    real_BS = inputs.mask_BS.bool()
    torch.testing.assert_close(logits[real_BS], theirs.logits_BSV[real_BS], **CLOSE)
    by_bank = {"text": real_BS[inputs.bank_BS == 0], "vision": real_BS[inputs.bank_BS == 1]}
    for site, value in theirs.sites.items():
        ours = tap[site]
        if site.startswith("blocks"):
            bank = next((name for name in by_bank if f"moe.{name}." in site), None)
            real = by_bank[bank] if bank else real_BS
            ours, value = ours[real], value[real].reshape(ours[real].shape)
        assert ours.shape == value.shape, site
        if site.endswith("expert_ids"):
            assert torch.equal(ours, value), site
        else:
            torch.testing.assert_close(ours, value, **CLOSE, msg=lambda m, s=site: f"{s}: {m}")
    # A bank that transformers never called has no rows here.
    for layer in both.config.text.moe.layers:
        for bank, real_N in by_bank.items():
            at = f"blocks.{layer}.moe.{bank}.router_logits"
            assert (at in theirs.sites) == bool(len(real_N))
            assert len(tap[at]) == len(real_N)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_kind_of_prompt(plain: Pair, prompt: str) -> None:
    inputs = Inputs.of(*PROMPTS[prompt], config=plain.config)
    theirs = theirs_sees(plain.theirs, inputs)
    agree(plain, inputs, theirs, *ours_sees(plain.ours, inputs))


@pytest.mark.parametrize("prompt", ["text", "unequal", "several-each"])
def test_every_kind_of_model(both: Pair, prompt: str) -> None:
    inputs = Inputs.of(*PROMPTS[prompt], config=both.config)
    theirs = theirs_sees(both.theirs, inputs)
    agree(both, inputs, theirs, *ours_sees(both.ours, inputs))


@pytest.mark.parametrize("prompt", ["unequal", "several-each"])
def test_right_padding(plain: Pair, prompt: str) -> None:
    inputs = Inputs.of(*PROMPTS[prompt], config=plain.config, side="right")
    theirs = theirs_sees(plain.theirs, inputs)
    agree(plain, inputs, theirs, *ours_sees(plain.ours, inputs))


class TestPositions:
    """Of tokens, and of what follows a clip that is longer than wide."""

    LONG: tuple[Prompt, ...] = ([3, video(12, 4, 4), 5, 6, image(4, 4), 7], [3, 4])

    def test_as_transformers(self, plain: Pair) -> None:
        inputs = Inputs.of(*self.LONG, config=plain.config)
        theirs = theirs_sees(plain.theirs, inputs)
        logits, tap = ours_sees(plain.ours, inputs, positions="transformers")
        agree(plain, inputs, theirs, logits, tap)

    def test_the_reference_rule_does_not_overlap(self, plain: Pair) -> None:
        """And is what transformers computes from such positions: only the rule differs."""
        inputs = Inputs.of(self.LONG[0], config=plain.config)
        n_clip, after = 24, 2 + 6
        t, h, w = torch.meshgrid(*map(torch.arange, (6, 2, 2)), indexing="ij")
        clip = torch.stack([t, h, w], -1).reshape(n_clip, 3) + 2
        text = torch.arange(after, after + 4)[:, None].expand(-1, 3)
        picture = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]) + after + 4
        end = torch.tensor([[after + 6] * 3, [after + 7] * 3])
        start = torch.tensor([[0] * 3, [1] * 3])
        by_hand = torch.cat([start, clip, text, picture, end])
        theirs = theirs_sees(plain.theirs, inputs, position_ids=by_hand.T[:, None])
        logits, tap = ours_sees(plain.ours, inputs)
        agree(plain, inputs, theirs, logits, tap)
        overlapping = theirs_sees(plain.theirs, inputs).logits_BSV
        assert (logits - overlapping).abs().max() > 0.1

    @pytest.mark.parametrize("prompt", [*PROMPTS, "long"])
    def test_are_equal(self, plain: Pair, prompt: str) -> None:
        """The numbers themselves, since rotary attention sees only differences."""
        from ernie_lab.inputs.visual_layout import visual_layout

        prompts = self.LONG if prompt == "long" else PROMPTS[prompt]
        inputs = Inputs.of(*prompts, config=plain.config)
        theirs = theirs_sees(plain.theirs, inputs)
        layout = visual_layout(
            inputs.ids_BS,
            plain.config.ids,
            inputs.grids("image"),
            inputs.grids("video"),
            inputs.mask_BS,
            "transformers",
        )
        real_BS = inputs.mask_BS.bool()
        assert torch.equal(layout.bank_BS, inputs.bank_BS)
        assert torch.equal(layout.modality_BS, inputs.kinds_BS)
        assert torch.equal(layout.positions_BSR[real_BS], theirs.positions_BSR[real_BS])
        if inputs.pixels:
            next_B = plain.theirs.model.rope_deltas[:, 0] + real_BS.sum(1)
            assert torch.equal(layout.next_position_B, next_B)


def test_adjacent_images(plain: Pair) -> None:
    """transformers takes them for one; given positions, it agrees."""
    inputs = Inputs.of([3, image(4, 4, bare=True), image(2, 4, bare=True), 5], config=plain.config)
    positions = [[0] * 3, [1, 1, 1], [1, 1, 2], [1, 2, 1], [1, 2, 2], [3] * 3, [3, 3, 4], [5] * 3]
    theirs = theirs_sees(
        plain.theirs, inputs, position_ids=torch.tensor(positions).T[:, None].clone()
    )
    agree(plain, inputs, theirs, *ours_sees(plain.ours, inputs))


@pytest.mark.parametrize("prompt", ["image-and-video", "video-and-image", "unequal"])
def test_one_placeholder_for_both_kinds(tmp_path: Path, prompt: str) -> None:
    """As in the released configs; the delimiter before a run says what it is."""
    both = shared_placeholder_pair(tmp_path)
    assert both.config.ids.image == both.config.ids.video
    inputs = Inputs.of(*PROMPTS[prompt], config=both.config)
    theirs = theirs_sees(both.theirs, inputs)
    agree(both, inputs, theirs, *ours_sees(both.ours, inputs))


@pytest.mark.parametrize("native", [False, True])
def test_layouts_hold_the_same_model(tmp_path: Path, native: bool) -> None:
    both = pair(tmp_path, native=native, text={"use_bias": True}, tied=False)
    inputs = Inputs.of(*PROMPTS["unequal"], config=both.config)
    theirs = theirs_sees(both.theirs, inputs)
    agree(both, inputs, theirs, *ours_sees(both.ours, inputs))


def test_features(both: Pair) -> None:
    """`get_image_features` and `get_video_features`, one tensor a picture."""
    inputs = Inputs.of(*PROMPTS["several-each"], config=both.config)
    given = inputs.visual()
    with torch.no_grad():
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            pixels, grids = given[name], given[f"{kind}_grid_thw"]
            theirs = getattr(both.theirs, f"get_{kind}_features")(pixels, grids).pooler_output
            ours = getattr(both.ours, f"get_{kind}_features")(pixels, grids)
            assert [len(x) for x in ours] == [Grid(*g).n_tokens for g in grids.tolist()]
            for mine, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, other, **CLOSE)


def test_attention_maps(both: Pair) -> None:
    inputs = Inputs.of(*PROMPTS["unequal"], config=both.config)
    both.theirs.set_attn_implementation("eager")
    try:
        theirs = theirs_sees(both.theirs, inputs, output_attentions=True)
    finally:
        both.theirs.set_attn_implementation("sdpa")
    tap = Collect()
    with torch.no_grad():
        both.ours(**inputs.given(), tap=tap)
    real_BS = inputs.mask_BS.bool()
    for layer, pattern in enumerate(theirs.output.attentions):
        ours_BSHT = tap[f"blocks.{layer}.attn.pattern"].movedim(1, 2)
        torch.testing.assert_close(ours_BSHT[real_BS], pattern.movedim(1, 2)[real_BS], **CLOSE)


def test_losses(both: Pair) -> None:
    """With labels and the auxiliary loss, in transformers' conventions."""
    inputs = Inputs.of(*PROMPTS["unequal"], config=both.config)
    # Not the first token of a sequence: what transformers predicts it from is padding.
    first_BS = inputs.mask_BS.cumsum(1) == 1
    labels = inputs.ids_BS.masked_fill((inputs.mask_BS == 0) | first_BS, -100)
    labels = labels.masked_fill(inputs.kinds_BS > 0, -100)
    ours_in = inputs.given()
    for more in ({"labels": labels}, {"labels": labels, "output_router_logits": True}):
        theirs = theirs_sees(both.theirs, inputs, **more).output
        with torch.no_grad():
            ours = both.ours(**ours_in, **more)
        torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    torch.testing.assert_close(ours.aux_loss_transformers, theirs.aux_loss, **CLOSE)
    assert set(ours.aux_loss) == {"text", "vision"}


def test_logits_to_keep_and_inputs_embeds(plain: Pair) -> None:
    inputs = Inputs.of(*PROMPTS["image"], config=plain.config)
    logits, tap = ours_sees(plain.ours, inputs)
    for keep in (1, 3, torch.tensor([0, 5])):
        theirs = theirs_sees(plain.theirs, inputs, logits_to_keep=keep).logits_BSV
        ours, _ = ours_sees(plain.ours, inputs, logits_to_keep=keep)
        torch.testing.assert_close(ours, theirs, **CLOSE)
    positions_BSR = theirs_sees(plain.theirs, inputs).positions_BSR
    with torch.no_grad():
        again = plain.ours(
            inputs_embeds=tap["embed_in"], position_ids=positions_BSR, bank=inputs.bank_BS
        )
    assert torch.equal(again.logits, logits)


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, VLModel]:
    folder = tmp_path_factory.mktemp("vl")
    theirs = pair(folder).theirs.to(torch.bfloat16)
    for layer in theirs.model.language_model.layers[1:]:
        for moe in (layer.mlp.text_moe, layer.mlp.vision_moe):
            moe.gate.float()
    return theirs, load(folder, torch.bfloat16)


def test_bf16_routes_alike(in_bf16: tuple[Any, VLModel]) -> None:
    """Almost everywhere: the routers are fp32 in both, the rounding of what they read is not."""
    theirs, ours = in_bf16
    prompts = [[*range(3, 20), image(4, 6), *range(20, 60), video(4, 8, 4)] for _ in range(3)]
    inputs = Inputs.of(*prompts, config=ours.config)
    expected = theirs_sees(theirs, inputs)
    logits, tap = ours_sees(ours, inputs)
    for bank in ("text", "vision"):
        at = f"blocks.1.moe.{bank}.expert_ids"
        same = (tap[at].sort(-1).values == expected.sites[at].sort(-1).values).all(-1)
        assert same.float().mean() > 0.95
    spread = expected.logits_BSV.float().std()
    assert (logits - expected.logits_BSV).float().abs().mean() < 0.05 * spread
