"""Filling a module: every parameter once and true, at its dtype, or a refusal with names."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint.files import CONFIG, bare_module, random_tensors, write_sharded, write_single
from support.models import small_config
from torch import Tensor

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.load import LoadReport, fill, is_finite
from ernie_lab.checkpoint.names import LAYOUTS, RELEASED, stays_float32
from ernie_lab.checkpoint.reader import Reader

GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load(
    folder: Path,
    tensors: dict[str, Tensor],
    config: TextConfig = CONFIG,
    layout: Layout = RELEASED,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.nn.Module, LoadReport]:
    module = bare_module(config)
    reader = Reader.open(write_single(folder, tensors))
    return module, fill(module, reader, layout, device="cpu", dtype=dtype, progress=False)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("overrides", [{}, {"tied": False, "head_bias": True}, {"moe": None}])
def test_every_value_arrives(
    tmp_path: Path, layout: Layout, dtype: torch.dtype, overrides: dict[str, bool]
) -> None:
    config = small_config(**overrides)
    tensors = random_tensors(config, layout)
    module, report = load(tmp_path, tensors, config, layout, dtype)
    for name, parameter in module.named_parameters():
        expected = torch.float32 if stays_float32(name) else dtype
        assert parameter.dtype == expected, name
        for piece in layout.pieces(name, tuple(parameter.shape)):
            assert torch.equal(piece.of(parameter), tensors[piece.key].to(expected)), piece.key
    assert report.n_tensors == len(tensors)
    assert report.n_bytes == sum(t.nbytes for t in tensors.values())
    assert (report.layout, report.unused) == (layout.name, ())
    assert report.seconds_reading > 0 < report.seconds_checking


def test_shards_are_joined(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    module = bare_module(CONFIG)
    reader = Reader.open(write_sharded(tmp_path, tensors, 4))
    fill(module, reader, RELEASED, device="cpu", dtype=torch.float32, progress=False)
    gate_up_E2FD = module.get_parameter("blocks.1.moe.experts.gate_up_E2FD")
    assert torch.equal(gate_up_E2FD[3, 0], tensors[GATE])


def test_gradients_are_asked_for_as_the_model_was_built(tmp_path: Path) -> None:
    module = bare_module(CONFIG)
    module.get_parameter("blocks.1.moe.router.correction_bias_E").requires_grad_(False)
    reader = Reader.open(write_single(tmp_path, random_tensors(CONFIG)))
    fill(module, reader, RELEASED, device="cpu", dtype=torch.float32, progress=False)
    frozen = [name for name, p in module.named_parameters() if not p.requires_grad]
    assert frozen == ["blocks.1.moe.router.correction_bias_E"]


def test_stored_half_precision_gates_become_float32(tmp_path: Path) -> None:
    tensors = {key: t.bfloat16() for key, t in random_tensors(CONFIG).items()}
    module, _ = load(tmp_path, tensors, dtype=torch.bfloat16)
    router = module.get_parameter("blocks.2.moe.router.weight_ED")
    assert router.dtype == torch.float32
    assert torch.equal(router, tensors["model.layers.2.mlp.gate.weight"].float())


def test_unused_parts_are_reported(tmp_path: Path) -> None:
    extra = {"model.mtp_emb_norm.0.weight": torch.ones(3)}
    _, report = load(tmp_path, random_tensors(CONFIG) | extra)
    assert report.unused == tuple(extra)


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    reader = Reader.open(write_single(tmp_path, random_tensors(CONFIG)))
    report = fill(
        bare_module(CONFIG),
        reader,
        RELEASED,
        device="cpu",
        dtype=torch.float32,
        progress=lambda done, total: told.append((done, total)),
    )
    assert len(told) == report.n_tensors
    assert told[-1] == (report.n_bytes, report.n_bytes)
    assert told == sorted(told)


def test_the_bar_is_silent_without_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader.open(write_single(tmp_path, random_tensors(CONFIG)))
    fill(bare_module(CONFIG), reader, RELEASED, device="cpu", dtype=torch.float32)
    assert capsys.readouterr() == ("", "")


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[GATE]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["model.layers.9.input_layernorm.weight"] = torch.ones(3)


def transpose(tensors: dict[str, Tensor]) -> None:
    key = "model.layers.1.mlp.gate.weight"
    tensors[key] = tensors[key].T.contiguous()


def quantise(tensors: dict[str, Tensor]) -> None:
    tensors[GATE] = tensors[GATE].to(torch.int8)


def break_tie(tensors: dict[str, Tensor]) -> None:
    tensors[HEAD] = tensors[EMBED] + 1


def poison(value: float) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[GATE].view(-1)[5] = value

    return apply


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (drop, rf"1 tensors missing from the checkpoint: {GATE}"),
        (add, r"1 tensors in the checkpoint and not in the model: model.layers.9"),
        (
            transpose,
            r"1 tensors of another shape: model.layers.1.mlp.gate.weight is \[32, 8\], "
            r"expected \[8, 32\] for blocks.1.moe.router.weight_ED",
        ),
        (quantise, rf"{GATE} is I8"),
        (break_tie, r"'lm_head.weight' differs from 'model.embed_tokens.weight'"),
        (poison(float("nan")), rf"{GATE}.* has 1 NaN or infinite values of 512 in model.safet"),
        (poison(float("inf")), rf"{GATE}.* has 1 NaN or infinite"),
        (poison(float("-inf")), rf"{GATE}.* has 1 NaN or infinite"),
    ],
)
def test_refusals_name_the_tensor(
    tmp_path: Path, harm: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors = random_tensors(CONFIG)
    harm(tensors)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, tensors)


def test_names_are_settled_before_anything_is_allocated(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    drop(tensors)
    module = bare_module(CONFIG)
    reader = Reader.open(write_single(tmp_path, tensors))
    with pytest.raises(CheckpointError):
        fill(module, reader, RELEASED, device="cpu", dtype=torch.float32)
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_value_beyond_the_dtype_is_no_damage(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    poison(1e6)(tensors)
    with pytest.raises(
        CheckpointError, match=r"overflow torch.float16; load with dtype='bfloat16'"
    ):
        load(tmp_path, tensors, dtype=torch.float16)


def test_an_equal_copy_of_a_tied_head_is_accepted(tmp_path: Path) -> None:
    tensors = random_tensors(CONFIG)
    _, report = load(tmp_path, {**tensors, HEAD: tensors[EMBED].clone()})
    assert report.n_tensors == len(tensors)


def test_buffers_left_on_meta_are_noticed(tmp_path: Path) -> None:
    module = bare_module(CONFIG)
    module.register_buffer("frequencies", torch.empty(3, device="meta"))
    reader = Reader.open(write_single(tmp_path, random_tensors(CONFIG)))
    with pytest.raises(CheckpointError, match="buffer 'frequencies' is on the meta device"):
        fill(module, reader, RELEASED, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_is_finite(dtype: torch.dtype) -> None:
    for size in (0, 1, 7, 1000, 4099):
        x = torch.randn(size).to(dtype)
        assert is_finite(x)
        for place in {0, size // 2, size - 1} if size else set():
            for value in (float("nan"), float("inf"), float("-inf")):
                bad = x.clone()
                bad[place] = value
                assert not is_finite(bad)
