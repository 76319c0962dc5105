"""A decode step in fixed memory, called again in place of a CUDA graph, against the reference.

What a GPU alone can do, the capture, is not tested here. `into_fixed` does to the values what a
replay does: it overwrites them where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.models import small_model, small_vl_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ernie_lab as el
from ernie_lab.model import graphed
from ernie_lab.model.cache import KVCache, StaticCache
from ernie_lab.model.compiled import Values
from ernie_lab.model.experts import Dispatch
from ernie_lab.model.graphed import FixedStep, GraphedDecode, Run, graph_decode
from ernie_lab.sites import all_sites, idle

PROMPTS = ["The gate opens and", "Numbers: 1 2 3 4 5 6"]


def into_fixed(run: Run) -> Run:
    first = {path: x.clone() for path, x in run().items()}

    def again() -> Values:
        for path, x in run().items():
            first[path].copy_(x)
        return first

    return again


class Counted:
    """A capture that counts the replays of decode steps."""

    def __init__(self) -> None:
        self.replays = -1  # the check after the capture

    def __call__(self, run: Run) -> Run:
        inner = into_fixed(run)

        def again() -> Values:
            self.replays += 1
            return inner()

        return again


@pytest.fixture(scope="module")
def plain() -> el.Lab:
    return el.load("tiny-text")


@pytest.fixture
def replays() -> Counted:
    return Counted()


@pytest.fixture
def lab(replays: Counted) -> Iterator[el.Lab]:
    lab = el.load("tiny-text")
    graph_decode(lab.model, replays)
    yield lab
    graphed._WAYS.pop(lab.model)


def generated(lab: el.Lab, prompt: Any = PROMPTS[0], **more: Any) -> el.Generation:
    return lab.generate(prompt, **{"max_new_tokens": 6, "temperature": 0, "stop": []} | more)


def most_sites(lab: el.Lab) -> list[str]:
    ends = (".attn.scores", ".attn.pattern", ".attn.result")
    return [site.path for site in all_sites(lab.model) if not site.path.endswith(ends)]


def agree(found: el.Trace, expected: el.Trace) -> None:
    assert set(found.values) == set(expected.values)
    for path in expected.values:
        one, other = found[path].values, expected[path].values
        if other.dtype.kind in "iub":
            assert np.array_equal(one, other), path
        else:
            scale = max(1.0, float(np.abs(other[np.isfinite(other)]).max(initial=0)))
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * scale, err_msg=path)


def test_every_site_over_two_generations(lab: el.Lab, plain: el.Lab, replays: Counted) -> None:
    keep = most_sites(plain)
    for n, prompt in enumerate(PROMPTS, start=1):
        ours, theirs = generated(lab, prompt, keep=keep), generated(plain, prompt, keep=keep)
        assert ours.tokens == theirs.tokens
        agree(ours.trace, theirs.trace)
        assert replays.replays == 5 * n


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_a_padded_batch(lab: el.Lab, plain: el.Lab, replays: Counted, stop: list[str]) -> None:
    ours, theirs = (generated(one, PROMPTS, keep="routing", stop=stop) for one in (lab, plain))
    assert ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)
    assert replays.replays > 0


def test_two_banks_and_a_picture() -> None:
    lab, plain, replays = el.load("tiny-vl"), el.load("tiny-vl"), Counted()
    graph_decode(lab.model, replays)
    images = [np.full((56, 56, 3), 90, dtype=np.uint8)]
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    ours, theirs = (
        generated(one, chat, images=images, keep=["logits", "*.resid_post", "blocks.*.moe.*"])
        for one in (lab, plain)
    )
    assert ours.tokens == theirs.tokens and replays.replays == 5
    agree(ours.trace, theirs.trace)


def test_what_changes_or_needs_a_map_goes_the_other_way(
    lab: el.Lab, plain: el.Lab, replays: Counted
) -> None:
    edits = [el.routing.forbid(layer=3, experts=[0, 1, 2])]
    ours, theirs = (generated(one, keep="routing", edits=edits) for one in (lab, plain))
    assert replays.replays <= 0 and ours.tokens == theirs.tokens
    agree(ours.trace, theirs.trace)
    ours, theirs = (generated(one, keep=["attn.pattern"]) for one in (lab, plain))
    assert replays.replays <= 0
    assert np.allclose(ours.trace.pattern(2, 0), theirs.trace.pattern(2, 0), atol=1e-6)


def test_exchanged_parts_and_weights_are_not_ignored(
    lab: el.Lab, plain: el.Lab, replays: Counted
) -> None:
    assert generated(lab).tokens == generated(plain).tokens and replays.replays == 5
    swap = [el.shared.swap(2, 4)]
    assert generated(lab, edits=swap).tokens == generated(plain, edits=swap).tokens
    assert replays.replays == 5
    # Changed where they lie, weights are read as they are.
    norm = lab.model.final_norm.gain_D
    with torch.no_grad():
        norm[::2] *= -1
    changed = generated(lab, keep="logits").trace["logits"].values
    assert replays.replays == 10
    # At another place the captured step would read what was there before.
    lab.model.final_norm.gain_D = nn.Parameter(norm.detach().clone())
    moved = generated(lab, keep="logits").trace["logits"].values
    assert replays.replays == 10
    np.testing.assert_allclose(moved, changed, rtol=0, atol=1e-4)


def test_a_generation_that_is_left_gives_its_memory_back(lab: el.Lab, plain: el.Lab) -> None:
    expected = generated(plain).tokens[0]
    first = lab.stream(PROMPTS[0], max_new_tokens=6, temperature=0, stop=[])
    seen = [next(first).token for _ in range(3)]
    # The second one begins while the first has the memory, and takes its own.
    assert generated(lab, PROMPTS[1]).tokens == generated(plain, PROMPTS[1]).tokens
    assert [*seen, *(piece.token for piece in first)] == expected
    way = graphed._WAYS[lab.model]
    assert not any(room.taken.locked() for room in way._rooms.values())


def test_lengths_and_batches_beyond_it_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphed, "SMALLEST", 8)
    monkeypatch.setattr(graphed, "LARGEST", 64)
    model = small_model()
    way, mask_BS = GraphedDecode(model, into_fixed), torch.ones(2, 9, dtype=torch.bool)
    with torch.no_grad():
        with way.generation(model, mask_BS, 3) as steps:
            assert steps is not None and steps.cache.length == 0 and steps.serves(idle)
        with way.generation(model, mask_BS, 30) as steps:
            assert steps is None
        with way.generation(model, mask_BS[:1].expand(9, -1), 1) as steps:
            assert steps is None
        with way.generation(small_model(), mask_BS, 3) as steps:
            assert steps is None
    assert list(way._rooms) == [(2, 16)]


@pytest.mark.parametrize("make", [small_model, small_vl_model])
def test_a_capture_that_fails_or_lies_is_told_and_not_used(
    make: Callable[[], Any],
) -> None:
    def fails(run: Run) -> Run:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    def lies(run: Run) -> Run:
        return lambda: {path: x + 1 for path, x in run().items()}

    for capture, told in ((fails, "when stream is capturing. Decoding"), (lies, "off by 1")):
        model, mask_BS = make(), torch.ones(1, 4, dtype=torch.bool)
        way = GraphedDecode(model, capture)
        with (
            torch.no_grad(),
            pytest.warns(UserWarning, match=told),
            way.generation(model, mask_BS, 3) as steps,
        ):
            assert steps is None
        with way.generation(model, mask_BS, 3) as steps:
            assert steps is None  # and not tried, or told, again


def test_the_memory_is_seen_by_both_kinds_of_cache() -> None:
    static = StaticCache(2, 1, 8, (2, 4), torch.zeros(1))
    cache = static.begin(torch.tensor([[False, True, True]]))
    rows_BSGA = torch.randn(1, 3, 2, 4)
    cache.extend(1, rows_BSGA, -rows_BSGA)
    cache.commit(3)
    static.aim(3, 3)
    new_BSGA = torch.randn(1, 1, 2, 4)
    k_BTGA, v_BTGA = static.extend(1, new_BSGA, -new_BSGA)
    assert static.visible_BST[0, 0].tolist() == [False, True, True, True] + 4 * [False]
    expected_BTGA = torch.cat([rows_BSGA, new_BSGA], 1)
    assert torch.equal(k_BTGA[:, :4], expected_BTGA) and torch.equal(v_BTGA[:, :4], -expected_BTGA)
    assert not k_BTGA[:, 4:].any()
    cache.commit(1)
    k_BTGA, _ = cache.extend(1, new_BSGA, new_BSGA)
    assert torch.equal(k_BTGA, torch.cat([expected_BTGA, new_BSGA], 1))
    assert isinstance(cache, KVCache) and cache.get_seq_length() == 4


class Capturing(TorchDispatchMode):
    """Refuses what a capture does: to wait for a value, and to copy one from Python."""

    REFUSED = frozenset(
        {
            "_local_scalar_dense",
            "bincount",
            "equal",
            "lift_fresh",
            "masked_select",
            "nonzero",
            "unique_consecutive",
        }
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(x is not None and x.dtype is torch.bool for x in args[1])
        if name in self.REFUSED or by_mask:
            raise RuntimeError(f"{name} in a step that is to be captured")
        return func(*args, **(kwargs or {}))


def test_the_refusals_are_real() -> None:
    for wait in (
        lambda: bool(torch.ones(1)),
        lambda: torch.tensor([1]),
        lambda: torch.ones(2).nonzero(),
    ):
        with pytest.raises(RuntimeError, match="is to be captured"), Capturing():
            wait()
    rows = Dispatch.of(torch.tensor([[0, 1]]))
    with pytest.raises(RuntimeError, match="is to be captured"), Capturing():
        _ = rows.counts


@pytest.mark.parametrize("kind", ["text", "vl"])
@torch.no_grad()
def test_a_step_waits_for_no_value(kind: str) -> None:
    model = small_model() if kind == "text" else small_vl_model(vision_expert_hidden=16)
    model = model.bfloat16()  # in which a bank's experts are one product, compiled or not
    step = FixedStep(model, 2, 16)
    expected = step.run(model)
    with Capturing():
        found = step.run(model)
    assert torch.equal(found["logits"], expected["logits"])


def test_compiled_blocks_are_what_a_gpu_captures(plain: el.Lab, replays: Counted) -> None:
    """The blocks of `load(compile=True)` within the step."""
    from ernie_lab.model import compiled

    lab = el.load("tiny-text")
    ways: list[int] = []

    class Way:
        def serves(self, block: Any, resid_BSD: Any, cache: Any, tap: Any) -> bool:
            return compiled.CompiledDecode.serves(self, block, resid_BSD, cache, tap)  # type: ignore[arg-type]

        def __call__(self, block: Any, resid_BSD: Any, *args: Any) -> Any:
            ways.append(block.layer)
            before, after = compiled.Before(block), compiled.After(block)
            self.before = lambda block, *given: before(*given)
            self.after = lambda block, *given: after(*given)
            return compiled.CompiledDecode.__call__(self, block, resid_BSD, *args)  # type: ignore[arg-type]

    for block in compiled.block_list(lab.model.blocks):
        block.compiled = Way()  # its pieces, uncompiled, which takes no compiler
    graph_decode(lab.model, replays)
    keep = most_sites(plain)
    ours, theirs = generated(lab, keep=keep), generated(plain, keep=keep)
    assert ours.tokens == theirs.tokens and replays.replays == 5
    agree(ours.trace, theirs.trace)
    assert set(ways) == set(range(lab.config.n_layers))
