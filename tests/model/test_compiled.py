"""Compiled decoding against the reference: the same sites, choices and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor

import ernie_lab as el
from ernie_lab.model import compiled, graphed
from ernie_lab.model.banks import BankRows
from ernie_lab.model.cache import KVCache
from ernie_lab.model.stack import block_list
from ernie_lab.sites import Site, all_sites, idle

PROMPT = "The gate opens and"


def _compiler() -> str:
    try:
        compiled.require_compiler(torch.device("cpu"))
    except compiled.CompilerMissing as error:
        return str(error)
    return ""


@pytest.fixture(scope="module", autouse=True)
def unchecked() -> Iterator[None]:
    """The checks of shapes that the tests weave in cannot be compiled."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()


@pytest.fixture(scope="module")
def text() -> el.Lab:
    if missing := _compiler():
        pytest.skip(missing)
    return el.load("tiny-text", compile=True)


@pytest.fixture(scope="module")
def plain() -> el.Lab:
    return el.load("tiny-text")


def generated(lab: el.Lab, **more: Any) -> el.Generation:
    return lab.generate(PROMPT, **{"max_new_tokens": 6, "temperature": 0, "stop": []} | more)


def agree(found: el.Trace, expected: el.Trace) -> None:
    """Every kept site: choices equal, values to 1e-5 of the largest."""
    for path in expected.values:
        ours, theirs = _array(found, path), _array(expected, path)
        assert len(ours) == len(theirs), path
        for one, other in zip(ours, theirs, strict=True):
            if other.dtype.kind in "iub":
                assert np.array_equal(one, other), path
            elif other.size:
                finite = np.isfinite(other)
                assert np.array_equal(finite, np.isfinite(one)), path
                scale = max(1.0, float(np.abs(other[finite]).max(initial=0)))
                np.testing.assert_allclose(
                    one[finite], other[finite], rtol=0, atol=1e-5 * scale, err_msg=path
                )


def _array(trace: el.Trace, path: str) -> list[np.ndarray]:
    if path.endswith((".scores", ".pattern")):
        layer = int(path.split(".")[1])
        return [trace.pattern(layer, 0).values] if path.endswith("pattern") else []
    return [trace[path].values]


def test_every_site_has_the_value_of_the_reference(text: el.Lab, plain: el.Lab) -> None:
    keep = [site.path for site in all_sites(plain.model)]
    ours, theirs = generated(text, keep=keep), generated(plain, keep=keep)
    assert ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)
    # The decode steps came from the compiled way, or their last bits would be the reference's.
    different = (
        ours.trace["blocks.3.resid_post"].values != theirs.trace["blocks.3.resid_post"].values
    )
    assert different[-5:].any() and not different[:-5].any()


def test_as_part_of_a_step_in_fixed_memory(text: el.Lab, plain: el.Lab) -> None:
    """What a GPU captures (tests/model/test_graphed.py), with the blocks really compiled."""
    replays = 0

    def counted(run: graphed.Run) -> graphed.Run:
        def again() -> compiled.Values:
            nonlocal replays
            replays += 1
            return run()

        return again

    graphed.graph_decode(text.model, counted)
    try:
        ours = generated(text, keep=["routing", "logits", "*.resid_post"])
    finally:
        graphed._WAYS.pop(text.model)
    theirs = generated(plain, keep=["routing", "logits", "*.resid_post"])
    assert replays == 1 + 5 and ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)


def test_recording_changes_no_bit(text: el.Lab) -> None:
    every = [site.path for site in all_sites(text.model)]
    all_kept = generated(text, keep=every).trace["logits"].values
    one_kept = generated(text, keep="logits").trace["logits"].values
    assert np.array_equal(all_kept, one_kept)


def test_edited_layers_go_the_ordinary_way(
    text: el.Lab, plain: el.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[int] = []
    real = compiled.CompiledDecode.__call__

    def watched(self: compiled.CompiledDecode, block: Any, *args: Any) -> Any:
        served.append(block.layer)
        return real(self, block, *args)

    monkeypatch.setattr(compiled.CompiledDecode, "__call__", watched)
    edits = [el.routing.forbid(layer=3, experts=[0, 1, 2]), el.shared.swap(2, 4)]
    ours = generated(text, keep="routing", edits=edits)
    layers = set(range(text.config.n_layers))
    assert layers - set(served) == {2, 3, 4}
    theirs = generated(plain, keep="routing", edits=edits)
    assert ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)
    assert not np.isin(ours.trace.expert_ids.sel(layer=3).values, [0, 1, 2]).any()
    served.clear()
    generated(text)
    assert set(served) == layers


@pytest.mark.slow
def test_a_batch_with_padding(text: el.Lab, plain: el.Lab) -> None:
    prompts = ["The gate", "Numbers: 1 2 3 4", "a"]
    ours, theirs = (
        lab.generate(prompts, max_new_tokens=4, temperature=0, stop=[], keep="routing")
        for lab in (text, plain)
    )
    assert ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)


@pytest.mark.slow
def test_a_model_of_two_banks(plain: el.Lab) -> None:
    if missing := _compiler():
        pytest.skip(missing)
    images = [np.full((56, 56, 3), 90, dtype=np.uint8)]
    found = []
    for compile in (True, False):
        lab = el.load("tiny-vl", compile=compile)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
        found.append(
            lab.generate(chat, images=images, max_new_tokens=4, temperature=0, stop=[], keep="all")
        )
    assert found[0].tokens == found[1].tokens
    agree(found[0].trace, found[1].trace)


def test_prefills_gradients_and_unknown_taps_are_not_served(text: el.Lab) -> None:
    class Silent:
        def wants(self, site: Site, /) -> bool:
            return False

        def __call__(self, site: Site, x: Tensor, /) -> Tensor:
            return x

    block = block_list(text.model.blocks)[1]
    assert block.compiled is not None
    one, cache = torch.zeros(1, 1, text.config.width), KVCache(text.config.n_layers)
    serves = block.compiled.serves
    with torch.no_grad():
        assert serves(block, one, cache, idle)
        assert not serves(block, one, None, idle)
        assert not serves(block, one.expand(1, 2, -1), cache, idle)
        assert not serves(block, one.expand(9, 1, -1), cache, idle)
        assert not serves(block, one, cache, Silent())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not serves(block, one, cache, idle)
    assert not serves(block, one, cache, idle)


class Scribbler:
    """An edit that uses what it reads as scratch paper."""

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.path == "blocks.4.resid_pre")

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return tuple(site for site in sites if site.path == "blocks.2.moe.router_logits")

    def apply(self, site: Site, x: Tensor, here: Any) -> Tensor:
        here.value("blocks.2.moe.router_logits").mul_(100)
        return x * 1.01


def test_an_edit_that_writes_into_what_it_reads_leaves_the_recording_alone(
    text: el.Lab, plain: el.Lab
) -> None:
    agree(*(generated(lab, keep="routing", edits=[Scribbler()]).trace for lab in (text, plain)))


def test_banks_and_growing_maps_together() -> None:
    lab, plain = el.load("tiny-vl", compile=True), el.load("tiny-vl")
    keep = ["routing", "attn.pattern"]
    agree(*(generated(one, keep=keep, max_new_tokens=4).trace for one in (lab, plain)))


def test_a_tap_that_cannot_accept_goes_the_ordinary_way(text: el.Lab) -> None:
    seen: list[str] = []

    class Old:
        def wants(self, site: Site, /) -> bool:
            return False

        def changes(self, paths: frozenset[str], /) -> bool:
            return False

        def __call__(self, site: Site, x: Tensor, /) -> Tensor:
            seen.append(site.path)
            return x

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        out = text.model(ids, use_cache=True)
        text.model(ids[:, :1], past_key_values=out.past_key_values, tap=Old())
    assert "blocks.2.moe.router_logits" in seen


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@pytest.mark.parametrize("name", ["tiny-text", "tiny-vl"])
@pytest.mark.parametrize("n_sequences", [1, 2])
def test_a_tap_owns_what_it_accepts(
    name: str, n_sequences: int, text: el.Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that goes in or on lies in the memory of what a tap keeps."""
    lab = text if name == "tiny-text" else el.load(name, compile=True)
    accepted: dict[str, Tensor] = {}
    elsewhere: set[int] = set()

    class Owner:
        def wants(self, site: Site, /) -> bool:
            return False

        def changes(self, paths: frozenset[str], /) -> bool:
            return False

        def reads(self, paths: frozenset[str], /) -> frozenset[str]:
            return paths

        def accept(self, values: Mapping[str, Tensor], /) -> None:
            assert not accepted.keys() & values.keys()
            accepted.update(values)

        def __call__(self, site: Site, x: Tensor, /) -> Tensor:
            elsewhere.add(storage(x))
            return x

    inner = compiled.Piece.__call__

    def call(self: Any, block: Any, *given: Any) -> Any:
        out, values = inner(self, block, *given)
        passed = (*given, *out) if isinstance(out[1], Tensor) else (*given, out[0])
        for x in passed:
            elsewhere.update(storage(one) for one in tensors_in(x))
        kept.append(passed)
        return out, values

    kept: list[Any] = []  # so that no memory is used twice
    monkeypatch.setattr(compiled.Piece, "__call__", call)
    ids = torch.tensor([[65, 66, 67]] * n_sequences)
    with torch.no_grad():
        out = lab.model(ids, use_cache=True)
        lab.model(ids[:, :1], past_key_values=out.past_key_values, tap=Owner())
    elsewhere.update(storage(x) for x in lab.model.parameters())
    inside = [path for path in accepted if path.startswith("blocks.")]
    assert len(inside) > 15 * lab.config.decoder.n_layers
    assert [path for path in inside if storage(accepted[path]) in elsewhere] == []


def tensors_in(x: Any) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x] if x.numel() else []
    if isinstance(x, BankRows):
        x = x.bank_BS, *x.rows
    return [] if x is None else [one for part in x for one in tensors_in(part)]


def test_without_a_compiler_it_warns_and_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no g++ here\n\nfor that\nand a long story")

    monkeypatch.setattr(compiled, "signature", lambda _: _Signature())
    monkeypatch.setattr(torch, "compile", broken)
    told = r"no g\+\+ here for that\. On a CPU it needs a C\+\+ compiler"
    with pytest.warns(UserWarning, match=told):
        lab = el.load("tiny-text", compile=True)
    assert len(generated(lab).tokens[0]) == 6


class _Signature:
    parameters = frozenset({"isolate_recompiles"})


@pytest.mark.parametrize("other", [{"placement": "stream"}, {"quantize": "int8"}])
def test_what_it_does_not_go_with_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compile=True does not go with"):
        el.load("tiny-text", compile=True, **other)
