"""Quantised weights: bounds of the rounding, the forward, the bytes, and what is refused."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.files import random_tensors, write_sharded
from support.models import small_config
from torch import Tensor

import ernie_lab as el
from ernie_lab.checkpoint import CheckpointError, save_model, weight_bytes, write_config
from ernie_lab.checkpoint.names import LAYOUTS, stays_float32
from ernie_lab.checkpoint.packing import packed_parameters, packed_places
from ernie_lab.checkpoint.quantise import Quantisation, Scheme
from ernie_lab.interventions.fingerprint import fingerprint
from ernie_lab.lab import Lab
from ernie_lab.model.experts import ExpertBank
from ernie_lab.model.kinds import build
from ernie_lab.model.linear import Linear
from ernie_lab.model.packed import PackedMatrices
from ernie_lab.model.quantised import QuantisedExpertBank, named_weights, quantise

SCHEMES: tuple[Scheme, ...] = ("nf4", "int8")
IDS = [[5, 17, 23, 8, 40, 3, 9, 11, 30, 2]]
TEXT = "And God said unto him, Behold, I will give thee the land."
# The largest gap between two levels of nf4 is that from -1 to -0.6962 (QLoRA, appendix E).
NF4_GAP = 1 - 0.6961928


@cache
def opened(quantize: Scheme | None = None, source: str = "tiny-text") -> Lab:
    """Not to be changed: tests share it."""
    return el.load(source, quantize=quantize)


def packed(weights: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32) -> PackedMatrices:
    matrices = PackedMatrices("weight", tuple(weights.shape), scheme)
    matrices.allocate(torch.device("cpu"), dtype)
    matrices.take((), weights)
    return matrices


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint as the released ones are stored: bf16, several shards, fp32 gates."""
    where = tmp_path_factory.mktemp("released")
    config = small_config(tied=False)
    tensors = random_tensors(config)
    for key, x in tensors.items():
        gate = ".mlp.gate." in key or "moe_statics" in key
        tensors[key] = (0.3 * x) if gate else (0.3 * x).bfloat16()
    write_sharded(where, tensors, 3)
    (where / "config.json").write_text(json.dumps(write_config(config, "bfloat16")))
    return where


def plain_twin(lab: Lab) -> Lab:
    """A plain model that holds the dequantised weights."""
    model = build(lab.config)
    weights = dict(named_weights(lab.model))
    assert weights.keys() == dict(model.named_parameters()).keys()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kept = torch.float32 if stays_float32(name) else lab.dtype
            parameter.data = weights[name].to(kept).clone()
    return Lab(model=model.eval(), tokenizer=lab.tokenizer, preprocessor=lab.preprocessor)


@pytest.mark.parametrize("shape", [(24, 40), (7, 9), (2, 3, 16, 33)])
def test_round_trips_stay_within_half_a_step(shape: tuple[int, ...]) -> None:
    weights = torch.randn(shape) * torch.logspace(-3, 2, shape[-2])[:, None]
    int8 = packed(weights, "int8").dequantised()
    step = weights.abs().amax(-1, keepdim=True) / 127
    assert ((int8 - weights).abs() <= step / 2 * 1.001).all()

    nf4 = packed(weights, "nf4").dequantised()
    matrices = weights.reshape(-1, shape[-2] * shape[-1])
    for matrix, found in zip(matrices, nf4.reshape(matrices.shape), strict=True):
        for block, other in zip(matrix.split(64), found.split(64), strict=True):
            assert ((block - other).abs() <= block.abs().max() * NF4_GAP / 2 * 1.001).all()
            # A block's largest magnitude is a level itself: exact, with its sign.
            largest = block.abs().argmax()
            top = block[largest] if block[largest] < 0 else block.abs().max()
            assert torch.isclose(other[largest], top, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_stay_zeros_and_a_second_packing_changes_nothing(scheme: Scheme) -> None:
    weights = torch.randn(4, 64)
    weights[1] = 0
    once = packed(weights, scheme).dequantised()
    assert not once[1].any()
    torch.testing.assert_close(packed(once, scheme).dequantised(), once, rtol=1e-6, atol=0)


def test_the_rules_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weights = torch.randn(24, 64)
    codes, scales, _ = functional.int8_vectorwise_quant(weights)
    int8 = packed(weights, "int8")
    assert torch.equal(int8.codes, codes) and torch.equal(int8.scales, scales)
    theirs = functional.dequantize_4bit(
        *functional.quantize_4bit(weights, blocksize=64, quant_type="nf4")
    )
    assert torch.equal(packed(weights, "nf4").dequantised(), theirs)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_casting_leaves_the_bits_and_changes_what_multiplies(scheme: Scheme) -> None:
    weights = torch.randn(3, 8, 64)
    one = packed(weights, scheme, torch.bfloat16)
    assert one.dequantised().dtype == torch.bfloat16
    exact = packed(weights, scheme).dequantised()
    assert torch.equal(one.dequantised(1), exact[1].bfloat16())
    one.to(torch.float64)
    assert one.scales.dtype == torch.float32
    assert torch.equal(one.dequantised(), exact.double())
    assert one.to("meta").scales.is_meta


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["tiny-text", "tiny-vl", "released"])
def test_runs_as_a_plain_model_of_the_dequantised_weights(
    source: str, dtype: str, scheme: Scheme, folder: Path
) -> None:
    lab = el.load(folder if source == "released" else source, quantize=scheme, dtype=dtype)
    twin = plain_twin(lab)
    prompt: Any = IDS if source == "released" else TEXT
    media = {}
    if source == "tiny-vl":
        board = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        media = {"images": [board]}
    keep = ["routing", "blocks.*.expert_out", "blocks.*.routed_out"]
    a, b = (one.run(prompt, keep=keep, **media) for one in (lab, twin))
    assert a.logits is not None and b.logits is not None
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-5)
    for path, kept in a.trace.values.items():
        other = b.trace.values[path]
        for phase, part in kept.parts.items():
            if path.endswith("expert_ids"):
                assert torch.equal(part.values, other.parts[phase].values), path
            else:
                torch.testing.assert_close(
                    part.values, other.parts[phase].values, rtol=0, atol=1e-5
                )
            if path.endswith(("router_logits", "router_probs", "selection_scores")):
                assert part.values.dtype == torch.float32, path


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("also", [(), ("vision_tower", "resampler")])
def test_bytes_are_those_of_the_tensors_and_of_the_estimate(
    scheme: Scheme, also: tuple[str, ...]
) -> None:
    lab = el.load("tiny-vl", quantize=scheme, quantize_also=also, dtype="bfloat16")
    assert lab.report is not None and lab.report.held is not None
    held = lab.report.held
    buffers = dict(lab.model.named_buffers())
    in_few_bits = sum(
        x.nbytes for name, x in buffers.items() if name.endswith((".codes", ".scales"))
    )
    assert sum(held.packed.values()) == in_few_bits
    assert sum(held.kept.values()) == sum(p.nbytes for p in lab.model.parameters())
    assert held.total == weight_bytes(lab.config, torch.bfloat16, Quantisation(scheme, also))
    assert held.scheme == scheme
    always = {"attention", "dense_mlp", "shared_experts", "text_experts", "vision_experts"}
    assert held.packed.keys() == always | set(also)
    assert {"embed", "router", "vision_router", "norms"} <= held.kept.keys()
    kinds = {type(part) for part in lab.model.modules()}
    assert ExpertBank not in kinds and QuantisedExpertBank in kinds
    assert (Linear in {type(p) for p in lab.model.vision.blocks.modules()}) == (not also)  # type: ignore[union-attr]
    assert f"in {scheme} (" in repr(lab) and "kept (" in repr(lab)


def test_a_plain_model_holds_what_is_estimated() -> None:
    lab = el.load("tiny-text", dtype="bfloat16")
    assert lab.report is not None and lab.report.held is not None
    assert lab.report.held.total == weight_bytes(lab.config, torch.bfloat16)
    assert lab.report.held.scheme is None and "quantised" not in repr(lab)
    assert str(lab.report.held).startswith("5.6 MB kept (")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shards_layouts_and_dtypes_give_the_same_bits(
    folder: Path, tmp_path: Path, scheme: Scheme
) -> None:
    """Released experts come one by one, transformers' stacked."""
    first = el.load(folder, quantize=scheme)
    save_model(el.load(folder).model, first.config, tmp_path / "stacked", layout="transformers")
    for other in (
        el.load(tmp_path / "stacked", quantize=scheme),
        el.load(folder, quantize=scheme, dtype="float32"),
    ):
        theirs = dict(packed_parameters(other.model))
        for name, ours in packed_parameters(first.model):
            assert torch.equal(ours.codes, theirs[name].codes), name  # type: ignore[attr-defined]
            assert torch.equal(ours.scales, theirs[name].scales), name  # type: ignore[attr-defined]


def test_a_damaged_tensor_is_found_though_bits_hide_it(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config)
    key = "model.layers.1.mlp.experts.3.gate_proj.weight"
    tensors[key][2, 5] = torch.nan
    write_sharded(tmp_path, tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    with pytest.raises(CheckpointError, match=rf"'{key}' \(blocks.1.*gate_up_E2FD\) has 1 NaN"):
        el.load(tmp_path, quantize="int8")
    tensors[key][2, 5] = 1e30
    write_sharded(tmp_path, tensors, 2)
    with pytest.raises(CheckpointError, match=r"overflow torch\.float16"):
        el.load(tmp_path, quantize="int8", dtype="float16")


def test_missing_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    config = small_config()
    tensors = random_tensors(config)
    del tensors["model.layers.2.mlp.experts.0.down_proj.weight"]
    write_sharded(tmp_path, tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config)))
    with pytest.raises(CheckpointError, match=r"1 tensors missing.*layers\.2.*experts\.0\.down"):
        el.load(tmp_path, quantize="int8")
    tensors = random_tensors(config) | {"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}
    write_sharded(tmp_path, tensors, 2)
    with pytest.raises(CheckpointError, match=r"is \[3, 3\], expected \[32, 32\]"):
        el.load(tmp_path, quantize="int8")


def test_every_packed_tensor_is_stored_as_we_have_it() -> None:
    """What lets a stored tensor be packed as it is read, in every layout."""
    for layout in LAYOUTS.values():
        with torch.device("meta"):
            model = build(small_config())
        quantise(model, Quantisation("nf4"))
        places = dict(packed_places(model, layout, torch.float32))
        stacked = layout.name == "transformers"
        assert len(places) == 12 + 3 + 6 + 2 * (2 if stacked else 3 * 8)


def test_experts_that_are_not_chosen_are_not_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = opened("int8")
    run = lab.run([[5, 9]], keep="routing")
    used: list[tuple[int, ...]] = []
    real = PackedMatrices.dequantised

    def watched(self: PackedMatrices, *index: int) -> Tensor:
        if len(self.shape) > 2:
            used.append(index)
        return real(self, *index)

    monkeypatch.setattr(PackedMatrices, "dequantised", watched)
    lab.run([[5, 9]])
    ids = run.trace.routing().expert_ids
    chosen = sum(len(set(ids.sel(layer=n).values.flatten().tolist())) for n in ids.layer.values)
    assert len(used) == 2 * chosen and () not in used


def test_gradients_and_training_are_refused() -> None:
    lab = el.load("tiny-text", quantize="int8")
    with pytest.raises(ValueError, match=r"quantised \(int8\).*without quantize="):
        lab.run([[5, 9]], grad=True)
    with pytest.raises(ValueError, match=r"gradients through it are refused"):
        lab.run_with_cache([[5, 9]], incl_bwd=True)
    assert not any(p.requires_grad for p in lab.model.parameters())
    lab.model(torch.tensor([[5, 9]]))  # without a graph it runs as it is
    lab.model.requires_grad_(True)
    with pytest.raises(ValueError, match=r"gradients through it are refused"):
        lab.model(torch.tensor([[5, 9]]))


def test_saving_is_refused(tmp_path: Path) -> None:
    lab = opened("int8")
    with pytest.raises(CheckpointError, match=r"quantised \(int8\) and is not saved"):
        save_model(lab.model, lab.config, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_results_and_fingerprints_tell_quantised_models_apart(tmp_path: Path) -> None:
    labs = {how: opened(how) for how in (None, *SCHEMES)}
    again = el.load("tiny-text", quantize="nf4")
    assert len({fingerprint(lab) for lab in labs.values()}) == 3
    assert fingerprint(again) == fingerprint(labs["nf4"])
    run = labs["nf4"].run(TEXT, keep="routing")
    run.trace.save(tmp_path / "trace")
    provenance = el.Trace.load(tmp_path / "trace").provenance
    assert provenance.details["quantize"] == "nf4"
    assert "routed_experts" in provenance.details["quantised_parts"]
    assert provenance.line() == "tiny-text, float32 (nf4 weights) on cpu"
    assert "quantize" not in labs[None].run(TEXT, keep="routing").trace.provenance.details


def test_edits_work_on_a_quantised_model() -> None:
    lab = opened("int8")
    twin = plain_twin(lab)
    reference = lab.run(TEXT, keep=["routing", "moe.in", "moe.shared_out"]).trace
    for edit in (
        el.shared.zero(2),
        el.shared.swap(2, 4),
        el.shared.swap(1, 3, norm_matched=True),
        el.shared.mean(reference, 3),
        el.shared.permute_neurons(1, layers=2),
        el.experts.off(3, [1, 5]),
        el.routing.top_k(2),
        el.routing.random(0, layers=2, keep_bias=True),
    ):
        a, b = (one.run(TEXT, edits=edit) for one in (lab, twin))
        assert a.logits is not None and b.logits is not None
        torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=1e-4, msg=repr(edit))
        assert a.edits[0].n_changed > 0, edit
    assert lab.generate(TEXT, max_new_tokens=3, temperature=0, edits=el.shared.swap(2, 4)).texts


def test_what_reads_weights_reads_the_dequantised_ones() -> None:
    lab = opened("nf4")
    twin = plain_twin(lab)
    site = "blocks.2.attn.result"
    results = [np.asarray(one.run(TEXT, keep=site).trace[site]) for one in (lab, twin)]
    np.testing.assert_allclose(*results, atol=1e-5)
    alike = [el.analysis.matched_neurons(one, 3, experts=[0, 1, 2]) for one in (lab, twin)]
    np.testing.assert_allclose(*alike, atol=1e-6)


def test_a_transplant_between_quantised_and_plain_models() -> None:
    plain, int8, nf4 = opened(), opened("int8"), opened("nf4")
    base = int8.run(TEXT).logits
    # The plain shared experts in the quantised model, and the other way round.
    for receiver, donor in ((int8, plain), (plain, nf4), (int8, nf4)):
        run = receiver.run(TEXT, edits=el.shared.transplant(donor))
        assert run.edits[0].n_changed > 0
        assert not torch.equal(run.logits, receiver.run(TEXT).logits)  # type: ignore[arg-type]
    with pytest.warns(el.EditChangedNothingWarning):
        same = int8.run(TEXT, edits=el.shared.transplant(el.load("tiny-text", quantize="int8")))
    assert torch.equal(same.logits, base)  # type: ignore[arg-type]
    assert el.shared.transplant(int8) != el.shared.transplant(nf4)
    other = el.load("tiny-text", quantize="int8", dtype="bfloat16")
    with pytest.raises(el.EditError, match=r"has dtype torch\.bfloat16"):
        int8.run(TEXT, edits=el.shared.transplant(other))


def test_two_labs_that_differ_in_quantisation_are_named_and_compared() -> None:
    texts = [TEXT, "The king sent a letter to his brother."]
    plain, nf4 = opened(), opened("nf4")
    found = el.compare_labs(plain, nf4, texts, noise=0, n_draws=20, progress=False)
    assert found.names == ("tiny-text, unquantised", "tiny-text, nf4")
    assert found.b.details["quantize"] == "nf4" and "quantize" not in found.a.details
    assert found.summary.loc["kl", "value"] > 1e-3
    assert len(found.routing) == 5


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"quantize='int4' must be \"nf4\" or \"int8\""):
        el.load("tiny-text", quantize="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"quantize_also=\('resampler',\), but quantize= is not"):
        el.load("tiny-vl", quantize_also=["resampler"])
    with pytest.raises(ValueError, match=r"quantize_also=\['unembed'\].*the unembedding stay"):
        el.load("tiny-vl", quantize="int8", quantize_also=["unembed"])


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else real(name, *rest),
    )
    with pytest.raises(ImportError, match=r"ernie-lab\[quant\].*int8' needs nothing"):
        el.load("tiny-text", quantize="nf4")
    el.load("tiny-text", quantize="int8")


def test_nf4_writes_nothing_and_int8_needs_no_bitsandbytes() -> None:
    code = (
        "import sys, ernie_lab as el\n"
        "el.load('tiny-text', quantize='int8').run([[5, 9]])\n"
        "assert 'bitsandbytes' not in sys.modules\n"
        "el.load('tiny-text', quantize='nf4').run([[5, 9]])\n"
        "assert 'bitsandbytes' in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (ran.stdout, ran.stderr) == ("", "")
