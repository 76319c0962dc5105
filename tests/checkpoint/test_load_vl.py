"""Filling a vision-language model: what real files may vary, and every way they can be wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.files import bare_module, random_tensors, write_single
from checkpoint.vl_cases import config_of
from support.models import small_config
from torch import Tensor, nn

from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.load import LoadReport, fill
from ernie_lab.checkpoint.names import VL_RELEASED, VL_TRANSFORMERS, detect
from ernie_lab.checkpoint.reader import Reader

MLP = "model.layers.1.mlp."
BIAS = MLP + "moe_statics.e_score_correction_bias"
GATES = {"text": MLP + "gate.weight", "vision": MLP + "gate.weight_1"}
ROUTER = "blocks.1.moe.{}.router.weight_ED"
HEAD, EMBED = "lm_head.weight", "model.language_model.embed_tokens.weight"


def load(
    folder: Path, tensors: dict[str, Tensor], config: ModelConfig | None = None
) -> tuple[nn.Module, LoadReport]:
    module = bare_module(config or config_of())
    reader = Reader.open(write_single(folder, tensors))
    layout = detect(reader.tensors)
    report = fill(module, reader, layout, device="cpu", dtype=torch.float32, progress=False)
    return module, report


def released(variant: str = "shared, tied", layout: Layout = VL_RELEASED) -> dict[str, Tensor]:
    return random_tensors(config_of(variant), layout)


def test_gates_either_way(tmp_path: Path) -> None:
    """No released shard was opened, so the header's word counts, gate by gate."""
    tensors = released()
    turned = {**tensors, GATES["vision"]: tensors[GATES["vision"]].T.contiguous()}
    for stored in (tensors, turned):
        module, _ = load(tmp_path, stored)
        for bank, key in GATES.items():
            assert torch.equal(module.get_parameter(ROUTER.format(bank)), tensors[key].T)


def test_of_a_square_gate_the_layout_decides(tmp_path: Path) -> None:
    tensors = released("square gates")
    assert tensors[GATES["text"]].shape == (32, 32)
    module, _ = load(tmp_path, tensors, config_of("square gates"))
    assert torch.equal(module.get_parameter(ROUTER.format("text")), tensors[GATES["text"]].T)


def test_biases_come_from_one_tensor_of_any_dtype(tmp_path: Path) -> None:
    tensors = {key: t.bfloat16() for key, t in released().items()}
    module, report = load(tmp_path, tensors)
    for row, bank in enumerate(("text", "vision")):
        bias_E = module.get_parameter(f"blocks.1.moe.{bank}.router.correction_bias_E")
        assert bias_E.dtype == torch.float32
        assert torch.equal(bias_E, tensors[BIAS][row].float())
    assert report.n_tensors == len(tensors)


def test_multi_token_prediction_is_passed_over(tmp_path: Path) -> None:
    extra = {"model.mtp_linear_proj.0.weight": torch.ones(3)}
    _, report = load(tmp_path, released() | extra)
    assert report.unused == tuple(extra)


def test_an_equal_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    tensors = released(layout=VL_TRANSFORMERS)
    load(tmp_path, {**tensors, HEAD: tensors[EMBED].clone()})
    with pytest.raises(CheckpointError, match=rf"'{HEAD}' differs from '{EMBED}'"):
        load(tmp_path, {**tensors, HEAD: tensors[EMBED] + 1})


def drop(key: str) -> Callable[[dict[str, Tensor]], None]:
    def harm(tensors: dict[str, Tensor]) -> None:
        del tensors[key]

    return harm


def replace(key: str, value: Tensor) -> Callable[[dict[str, Tensor]], None]:
    def harm(tensors: dict[str, Tensor]) -> None:
        tensors[key] = value

    return harm


WRONG = torch.ones(7, 32)
TWO_BIASES = (
    r"expected \[2, 6\] for blocks.1.moe.text.router.correction_bias_E and "
    r"blocks.1.moe.vision.router.correction_bias_E"
)
NAN = torch.tensor([[0.0] * 6, [0.0] * 5 + [float("nan")]])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop("vision_model.ln.bias"), r"1 tensors missing from .*: vision_model.ln.bias"),
        (drop(GATES["vision"]), r"1 tensors missing .*gate.weight_1"),
        (replace("vision_model.blocks.2.norm1.bias", WRONG), r"1 .*not in the model: vision_mod"),
        (replace(GATES["text"], WRONG), r"gate.weight is \[7, 32\], expected \[32, 6\] for bloc"),
        (replace(BIAS, torch.ones(1, 6)), r"correction_bias is \[1, 6\], " + TWO_BIASES),
        (replace(BIAS, torch.ones(6, 2)), r"correction_bias is \[6, 2\], " + TWO_BIASES),
        (replace(BIAS, NAN), r"correction_bias' .* has 1 NaN or infinite values of 12"),
    ],
)
def test_refusals_name_the_tensor(
    tmp_path: Path, harm: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = released()
    harm(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors)


def test_config_and_weights_of_different_kinds(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"describes a text model, .* named as in a vision-language model"
    ):
        load(tmp_path, released(), small_config())
    with pytest.raises(
        CheckpointError, match=r"describes a vision-language model, .* named as in a text model"
    ):
        load(tmp_path, random_tensors(small_config()), config_of())
