"""Decode steps that are sorted out many at a time leave what each by itself would have left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from trace_driver import PREFILL, SITES, drive, one_step, provenance, routers, values

from ernie_lab.sites import Site, Step
from ernie_lab.trace import pending, recorder
from ernie_lab.trace.keep import Keep, keep
from ernie_lab.trace.pending import Aside, Pending
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.trace import Trace

BANKED = (
    Site("blocks.1.moe.bank", "b s", "", "int64"),
    Site("blocks.1.moe.text.router_logits", "n e", "", "float32"),
    Site("blocks.1.moe.vision.router_logits", "n e", "", "float32"),
)


def decoding(masks_BT: Tensor) -> list[Step]:
    """After the prefill of two sequences, one step for each column."""
    steps = [Step("prefill", 0, torch.zeros(2, 4, dtype=torch.int64), PREFILL)]
    for index in range(masks_BT.shape[1]):
        mask_B1 = masks_BT[:, index : index + 1].bool()
        steps.append(Step("decode", index + 1, torch.zeros(2, 1, dtype=torch.int64), mask_B1))
    return steps


def recorded(wish: Any, steps: list[Step]) -> Trace:
    taped = Recorder(Keep.of(wish, SITES))
    drive(taped, steps)
    lengths = torch.cat([step.mask for step in steps], 1).sum(1).tolist()
    ids = [[100 * i + pos for pos in range(length)] for i, length in enumerate(lengths)]
    return taped.trace(ids, sites=SITES, provenance=provenance(), routers=routers())


def equal(found: Trace, expected: Trace) -> None:
    assert found.tokens.equals(expected.tokens)
    assert found.sites == expected.sites
    for path in expected.sites:
        one, other = found.values[path].parts[None], expected.values[path].parts[None]
        assert one.values.dtype is other.values.dtype, path
        assert torch.equal(one.values, other.values), path
        assert torch.equal(one.rows_N, other.rows_N), path


@pytest.fixture
def one_by_one(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Calls without anything put aside."""

    def call(function: Callable[..., Any], *given: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Recorder, "_can_wait", lambda self, step: False)
            return function(*given)

    return call


WISHES = [
    "all",
    [keep("attn.z", heads=[2, 0], dtype="float16"), "routing"],
    keep("resid_post", "logits", positions=slice(3, 9, 2)),
]


@pytest.mark.parametrize("wish", WISHES)
@pytest.mark.parametrize("n_steps", [1, pending.MOST_STEPS, 2 * pending.MOST_STEPS + 3])
def test_equal_to_one_by_one(
    one_by_one: Callable[..., Any], wish: Any, n_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = Pending.begin
    monkeypatch.setattr(
        Pending, "begin", lambda self, step: begun.append(step.index) or begin(self, step)
    )
    masks_BT = torch.rand(2, n_steps, generator=torch.Generator().manual_seed(n_steps)) < 0.7
    masks_BT[0] = True
    steps = decoding(masks_BT)
    found = recorded(wish, steps)
    assert begun == list(range(1, n_steps + 1))
    equal(found, one_by_one(recorded, wish, steps))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=8), st.integers(1, 3000))
def test_any_masks_and_any_room(masks: list[tuple[bool, bool]], n_bytes: int) -> None:
    steps = decoding(torch.tensor(masks, dtype=torch.bool).reshape(-1, 2).T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pending, "MOST_BYTES", n_bytes)
        found = recorded("routing", steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "_can_wait", lambda self, step: False)
        equal(found, recorded("routing", steps))


def in_banks(bank_BT: Tensor, masks_BT: Tensor) -> Trace:
    """Rows of each bank, in a decoding whose bank is chosen anew for each token."""
    taped, steps = Recorder(Keep.of("*router_logits", BANKED)), decoding(masks_BT)
    n_before = PREFILL.shape[1]
    x_BTE = torch.arange(2 * (n_before + bank_BT.shape[1]) * 3).float().view(2, -1, 3)
    for step in steps:
        first = step.index and n_before - 1 + step.index
        here_BSE = x_BTE[:, first : first + step.mask.shape[1]]
        bank_BS = bank_BT[:, step.index - 1 :][:, :1] if step.index else torch.zeros_like(PREFILL)
        step = Step(step.phase, step.index, step.positions, step.mask, bank=bank_BS.long())
        tap = taped.bind(step)
        tap(BANKED[0], bank_BS.long())
        for number, site in enumerate(BANKED[1:]):
            tap(site, here_BSE[bank_BS.long() == number])
    lengths = torch.cat([step.mask for step in steps], 1).sum(1).tolist()
    ids = [list(range(length)) for length in lengths]
    return taped.trace(ids, sites=BANKED, provenance=provenance(), routers={})


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_banks(one_by_one: Callable[..., Any], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    bank_BT, masks_BT = (torch.rand(2, 9, generator=random) < 0.6 for _ in range(2))
    found, expected = (
        in_banks(bank_BT, masks_BT),
        one_by_one(in_banks, bank_BT, masks_BT),
    )
    equal(found, expected)
    n_text = int((~bank_BT & masks_BT).sum())
    assert len(found.tensor("blocks.1.moe.text.router_logits")) == n_text + int(PREFILL.sum())
    assert len(found.tensor("blocks.1.moe.vision.router_logits")) == int((bank_BT & masks_BT).sum())


def site_of(path: str) -> Site:
    return next(site for site in SITES if site.path == path)


def test_holds_copies_alone() -> None:
    taped, site = Recorder(Keep.of("embed", SITES)), site_of("embed")
    taped.bind(one_step((2,)))(site, torch.zeros(1, 2, 4))
    mask_B1, x_BSD = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, 4000)
    taped.bind(Step("decode", 1, torch.zeros(1, 1), mask_B1))(site, x_BSD[..., :4])
    x_BSD.fill_(9.0)
    mask_B1.fill_(False)
    trace = taped.trace([[1, 2, 3]], sites=SITES, provenance=provenance())
    assert torch.equal(trace.tensor("embed"), torch.zeros(3, 4))


def test_copies_of_somebody_else_are_kept_as_they_are() -> None:
    taped, sites = Recorder(Keep.of(["embed", "logits"], SITES)), ("embed", "logits")
    before = taped.bind(one_step((2,)))
    before.accept({path: values(site_of(path), (1, 2), 2, 0) for path in sites})
    here = taped.bind(Step("decode", 1, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool)))
    given = {path: values(site_of(path), (1, 1), 3, 1) for path in (*sites, "blocks.0.resid_pre")}
    here.accept(given)
    assert {
        path: x is given[path] for path, x in taped._pending.values[0].items()
    } == dict.fromkeys(sites, True)
    with pytest.raises(RuntimeError, match="embed fired twice"):
        here.accept({"embed": given["embed"]})
    trace = taped.trace([[1, 2, 3]], sites=SITES, provenance=provenance())
    assert torch.equal(trace.tensor("logits")[2], given["logits"][0, 0])


def test_what_is_wrong_is_told_of_when_it_is_sorted_out() -> None:
    steps = decoding(torch.ones(2, 3))

    def until(last: int) -> Recorder:
        taped = Recorder(Keep.of(["embed", "logits"], SITES))
        drive(taped, steps[:last])
        return taped

    ids = [[1] * 5, [1] * 7]
    taped = until(3)
    taped.bind(steps[3])(site_of("embed"), torch.zeros(2, 1, 4))
    for _ in range(2):  # and again: nothing is forgotten
        with pytest.raises(
            RuntimeError, match="1 kept sites did not fire in forward 3, first: log"
        ):
            taped.trace(ids, sites=SITES, provenance=provenance())
    taped = until(3)
    here = taped.bind(steps[3])
    here(site_of("embed"), torch.zeros(2, 1, 4))
    with pytest.raises(RuntimeError, match="embed fired twice"):
        here(site_of("embed"), torch.zeros(2, 1, 4))
    here(site_of("logits"), torch.zeros(2, 2, 6))
    told = r"logits has shape \[2, 2, 6\] and torch.float32 in forward 3; expected \[2, 1, 6\]"
    with pytest.raises(ValueError, match=told):
        taped.trace(ids, sites=SITES, provenance=provenance())
    with pytest.raises(ValueError, match="forward 2 cannot follow 4"):
        until(4).bind(steps[2])


@pytest.mark.parametrize("wrong", [torch.zeros(1, 0, 4), torch.zeros(1, 1, 4).double()])
def test_what_would_cancel_or_be_converted_is_told_of(wrong: Tensor) -> None:
    """Two rows in one step and none in the next are as many as two steps have."""
    taped, site = Recorder(Keep.of("embed", SITES)), site_of("embed")
    taped.bind(one_step((2,)))(site, torch.zeros(1, 2, 4))
    two = torch.zeros(1, 2 if wrong.numel() == 0 else 1, 4)
    for index, x in enumerate((two, wrong), start=1):
        step = Step("decode", index, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        taped.bind(step)(site, x)
    with pytest.raises(ValueError, match=r"embed has shape .* in forward"):
        taped.trace([[1] * 4], sites=SITES, provenance=provenance())


def test_an_interrupted_sorting_out_forgets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = decoding(torch.ones(2, 3))
    taped = Recorder(Keep.of("all", SITES))
    drive(taped, steps)
    ids = [[1] * 5, [1] * 7]
    with monkeypatch.context() as patch:
        patch.setattr(recorder, "step_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            taped.trace(ids, sites=SITES, provenance=provenance())
    found = taped.trace(ids, sites=SITES, provenance=provenance(), routers=routers())
    assert found.tensor("embed").shape == (12, 4)


def interrupted(*given: Any) -> Any:
    raise KeyboardInterrupt


def test_room_is_counted_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank may have few rows in the first step, and many later."""
    monkeypatch.setattr(pending, "MOST_BYTES", 1000)
    aside = Pending()
    for index, n_rows in enumerate((1, 100, 100)):
        step = Step("decode", index, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
        assert aside.takes(step) == (index < 2)
        aside.begin(step).put("a", torch.zeros(n_rows, 2))


@pytest.mark.parametrize(
    ("wish", "grad", "n_new"),
    [("embed", True, 1), ("attention", False, 1), ("embed", False, 2)],
)
def test_what_cannot_wait(wish: str, grad: bool, n_new: int) -> None:
    """Graphs are held as they are; maps grow; a longer forward has time for its rows."""
    taped = Recorder(Keep.of(wish, SITES), grad=grad)
    drive(taped, decoding(torch.ones(2, 0)))
    mask_BS = torch.ones(2, n_new, dtype=torch.bool)
    taped.bind(Step("decode", 1, torch.zeros(2, n_new), mask_BS))
    assert not taped._pending


def test_positions_of_three_axes_and_modalities_lie_side_by_side() -> None:
    aside = Pending()
    for index in (4, 5):
        text_B1 = torch.full((2, 1), index)
        mask_B1 = torch.tensor([[True], [index == 4]])
        step = Step("decode", index, torch.full((2, 1, 3), index), mask_B1, text_B1, text_B1 + 1)
        assert aside.takes(step)
        assert isinstance(aside.begin(step), Aside)
    one = aside.as_one()
    assert (one.phase, one.index) == ("decode", 4)
    assert one.positions.tolist() == [[[4] * 3, [5] * 3]] * 2
    assert one.mask.tolist() == [[True, True], [True, False]]
    assert one.modality is not None and one.modality.tolist() == [[4, 5]] * 2
    assert one.bank is not None and one.bank.tolist() == [[5, 6]] * 2
    assert not aside.takes(Step("decode", 6, one.positions, mask_B1))
    assert not aside.takes(Step("prefill", 6, one.positions, mask_B1, text_B1, text_B1))
