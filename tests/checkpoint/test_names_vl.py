"""The tables of vision-language keys, and what tells the layouts apart."""

import pytest
import torch
from checkpoint.files import bare_module, random_tensors
from checkpoint.released_configs import VL_28B, VL_424B, VL_CONFIGS
from checkpoint.vl_cases import config_of
from support.models import small_config

from ernie_lab.checkpoint.config import VLConfig
from ernie_lab.checkpoint.config_json import read_config
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.names import (
    LAYOUTS,
    VL_LAYOUTS,
    VL_RELEASED,
    VL_TRANSFORMERS,
    VL_TRANSFORMERS_RELEASED,
    detect,
)
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.model.vl import VLModel

BIAS = "blocks.1.moe.{}.router.correction_bias_E"


@pytest.mark.parametrize("name", VL_CONFIGS)
def test_shapes_are_those_of_the_model(name: str) -> None:
    config = read_config(VL_CONFIGS[name])
    assert isinstance(config, VLConfig)
    with torch.device("meta"):
        model = VLModel(config)
    assert parameter_shapes(config) == {n: tuple(p.shape) for n, p in model.named_parameters()}


def test_vision_experts_are_numbered_after_the_text_ones() -> None:
    shape = (3, 8, 5)
    text = VL_RELEASED.pieces("blocks.1.moe.text.experts.down_EDF", shape)
    vision = VL_RELEASED.pieces("blocks.1.moe.vision.experts.down_EDF", shape)
    keys = [piece.key for piece in (*text, *vision)]
    assert keys == [f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(6)]
    assert [piece.index for piece in vision] == [(0,), (1,), (2,)]


def test_both_biases_stand_in_one_tensor() -> None:
    text_E, vision_E = torch.zeros(4), torch.ones(4)
    parameters = {BIAS.format("vision"): vision_E, BIAS.format("text"): text_E}
    ((key, stored),) = VL_RELEASED.stored(parameters).items()
    assert key == "model.layers.1.mlp.moe_statics.e_score_correction_bias"
    assert stored.shape == (2, 4)
    assert stored.names == (BIAS.format("text"), BIAS.format("vision"))
    assert stored.assembled().tolist() == [[0.0] * 4, [1.0] * 4]
    assert stored.destination[0].data_ptr() == text_E.data_ptr()
    assert len(VL_TRANSFORMERS.stored(parameters)) == 2


def test_gates_are_stored_transposed() -> None:
    ours_ED = torch.arange(12.0).view(3, 4)
    (stored,) = VL_RELEASED.stored({"blocks.2.moe.vision.router.weight_ED": ours_ED}).values()
    assert stored.shape == (4, 3)
    assert stored.views[0].data_ptr() == ours_ED.data_ptr()
    assert stored.fitted((3, 4)).shape == (3, 4)
    assert stored.fitted((3, 5)).shape == (4, 3)  # fits neither way: refused later, as expected
    (native,) = VL_TRANSFORMERS.pieces("blocks.2.moe.vision.router.weight_ED", (3, 4))
    assert native.of(ours_ED).shape == (3, 4)


@pytest.mark.parametrize("layout", VL_LAYOUTS.values(), ids=VL_LAYOUTS)
@pytest.mark.parametrize("variant", ["shared, tied", "as 424B", "biases, wide heads"])
def test_each_parameter_is_covered_exactly_once(layout: Layout, variant: str) -> None:
    shapes = parameter_shapes(config_of(variant))
    ours = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for stored in layout.stored(ours).values():
        for view in stored.views:
            view.add_(1)
    assert all(torch.equal(x, torch.ones_like(x)) for x in ours.values())


@pytest.mark.parametrize(("raw", "n_layers"), [(VL_28B, 28), (VL_424B, 54)])
def test_the_whole_model_has_its_number_of_tensors(raw: dict[str, object], n_layers: int) -> None:
    config = read_config(raw)
    parameters = dict(bare_module(config).named_parameters())
    tied = config.decoder.tied
    moe = config.decoder.moe
    assert moe is not None
    # Router by router; one bias for both; 128 experts of 3 matrices.
    mixture = 2 + 1 + 128 * 3 + (3 if moe.n_shared else 0)
    n_dense = n_layers - len(moe.layers)
    decoder = 2 + (not tied) + 6 * n_layers + 3 * n_dense + len(moe.layers) * mixture
    assert len(VL_RELEASED.stored(parameters)) == decoder + (1 + 32 * 12 + 2) + (12 + 3)


@pytest.mark.parametrize("layout", VL_LAYOUTS.values(), ids=VL_LAYOUTS)
def test_layout_is_told_by_the_keys(layout: Layout) -> None:
    keys = random_tensors(config_of(), layout).keys()
    assert detect(keys) is layout
    # A tower alone still tells.
    assert detect([key for key in keys if "vision" in key and "moe" not in key]) is layout


def test_text_and_vision_language_do_not_mix() -> None:
    text = [*random_tensors(small_config()), *random_tensors(small_config(), LAYOUTS["released"])]
    assert detect(text).kind == "text"
    assert detect([*text, "vision_model.ln.weight"]).kind == "vision-language"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("model.vision_model.ln.weight", "mixes two layouts"),
        ("model.language_model.norm.weight", "mixes two layouts"),
        ("ernie.resampler_model.mlp.weight", "Paddle's layout"),
        ("vision_model.blocks.0.attn.qkv.qweight", "quantised"),
    ],
)
def test_refusals(key: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        detect([*random_tensors(config_of(), VL_RELEASED), key])
    assert key in str(caught.value)


def test_unused_parts() -> None:
    for key in ("model.mtp_block.0.norm.weight", "model.language_model.mtp_emb_norm.0.weight"):
        assert all(layout.is_unused(key) for layout in VL_LAYOUTS.values())
    for layout in (VL_TRANSFORMERS_RELEASED, VL_TRANSFORMERS):
        assert not any(map(layout.is_unused, random_tensors(config_of(), layout)))
