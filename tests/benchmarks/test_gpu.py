"""The GPU benchmark at toy size, without a GPU: it runs, and says that it measured nothing."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import pytest
import torch

from benchmarks import gpu_shapes


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's compiler, imported only now, warns of torch
        return importlib.import_module("benchmarks.gpu")


def test_it_runs_at_toy_size_and_stores_nothing(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "store", lambda *_: pytest.fail("toy figures were stored"))
    found = gpu.main(["--toy"])
    assert found["figures_of"].startswith("NO GPU FIGURES")
    shown = capsys.readouterr().out
    assert shown.startswith("NO GPU FIGURES") and shown.strip().endswith(gpu.NO_GPU)
    measured = {"limits", "text_decode_recorded", "text_generate", "text_prefill"}
    measured |= {"text_prefill_recorded", "attention_sums", "attention_map"}
    measured |= {"text_decode_recorded_to_cpu", "vl_decode_recorded", "vl_prefill_recorded"}
    assert measured <= set(found)
    assert not any("failed" in found[name] for name in measured)


def test_transformers_runs_over_the_same_tensors() -> None:
    lab = gpu_shapes.random_lab(gpu_shapes.TEXT_TOY, "ernie4_5_moe", torch.device("cpu"))
    lab.model.float()
    theirs = gpu_shapes.in_transformers(lab, gpu_shapes.TEXT_TOY)
    assert theirs.lm_head.weight.data_ptr() == lab.model.embed_VD.data_ptr()
    ids_BS = torch.randint(3, 400, (2, 9))
    with torch.no_grad():
        expected = theirs(input_ids=ids_BS).logits
        found = lab.model(ids_BS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    # Changed where it lies, both see it.
    lab.model.final_norm.gain_D.mul_(-1)
    with torch.no_grad():
        changed = theirs(input_ids=ids_BS).logits
    torch.testing.assert_close(changed, -expected, rtol=0, atol=1e-5)


def test_active_weights_of_the_released_shape() -> None:
    from ernie_lab.checkpoint.config_json import read_config
    from ernie_lab.lab import Lab
    from ernie_lab.model.kinds import build

    for kind, shape in (
        ("ernie4_5_moe", gpu_shapes.TEXT_21B),
        ("ernie4_5_moe_vl", gpu_shapes.VL_28B),
    ):
        with torch.device("meta"):
            lab = Lab(build(read_config({"model_type": kind, **shape})).to(torch.bfloat16))
        active = gpu_shapes.active(lab)
        total = sum(parameter.nbytes for parameter in lab.model.parameters())
        tower = sum(
            parameter.nbytes
            for name, parameter in lab.model.named_parameters()
            if name.startswith(("vision.", "resampler."))
        )
        assert 2.9e9 < active.parameters - active.table < 3.3e9  # "A3B"
        # Never too low: it counts the dense layer as one with experts.
        assert total - tower < gpu_shapes.model_bytes(shape, 28) < 1.06 * (total - tower)


def test_without_a_gpu_it_says_so(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU that torch finds"):
        gpu.main([])
