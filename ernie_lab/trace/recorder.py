"""The tap that records: one per run or generation, bound to each forward in turn."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ernie_lab.inputs.media import Media
from ernie_lab.sites import Site, SiteError, Step, Tap
from ernie_lab.trace import described
from ernie_lab.trace.budget import refuse_unknown_end
from ernie_lab.trace.flow import Flow
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.pending import Aside, Pending, fired_twice
from ernie_lab.trace.pictures import with_media
from ernie_lab.trace.pieces import Piece, future_fill, take
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorded import Recorded, join
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.rows import StepRows, Subset, bank_members, step_rows
from ernie_lab.trace.tokens import Tokens
from ernie_lab.trace.trace import Trace


class Recorder:
    """Stores what flows through the kept sites, without padding rows, and changes nothing.

    `bind(step)` before every forward, prefill first; `trace(...)` once, at the end, hands the
    values over. What passes is copied, or was handed over as a copy, so nothing that is held can
    change afterwards. Rows of decode steps are sorted out later, many steps at a time. With
    `grad=True` the tensors themselves are held too, with their graph, so that `Trace.gradient`
    can differentiate with respect to them.
    """

    def __init__(self, keep: Keep, *, grad: bool = False) -> None:
        self.keep = keep
        self.grad = grad
        self.paths = keep.paths
        self.rules = {rule.site.path: rule for rule in keep.kept}
        banks = (rule.site.bank_path for rule in keep.kept)
        self.bank_paths = frozenset(path for path in banks if path is not None)
        self.listens = self.bank_paths.union(self.rules)
        self._filters = {rule.positions for rule in keep.kept}
        self._ragged = any(rule.site.ragged for rule in keep.kept)
        self.heard: dict[frozenset[str], frozenset[str]] = {}
        self._n_bound = 0
        self._pending = Pending()
        self._steps: list[StepRows] = []
        self._columns_BT: Tensor | None = None
        self._pieces: list[dict[str, Piece]] = []
        self._flowed: list[dict[str, Tensor]] = []

    def bind(self, step: Step, /) -> Tap:
        if step.index != self._n_bound:
            raise ValueError(
                f"forward {step.index} cannot follow {self._n_bound} recorded ones; bind a "
                "recorder once per forward, from the first on"
            )
        if step.index == 1:
            for rule in self.keep.kept:
                refuse_unknown_end(rule, grows=True)
        if step.index > 0 and step.grids:
            raise ValueError(f"forward {step.index} has pictures; only a prefill can have them")
        can_wait = self._can_wait(step)
        if not can_wait or not self._pending.takes(step):
            self.settle()
        into = self._pending.begin(step) if can_wait else self._begin(step)
        self._n_bound += 1
        return _Bound(self, into)

    def _can_wait(self, step: Step) -> bool:
        """Is it a step whose rows and values may be sorted out later? See `pending`."""
        if step.index == 0 or self.grad or self._ragged:
            return False
        assert self._columns_BT is not None
        given = (step.mask, step.modality, step.bank)
        wanted = len(self._columns_BT), 1
        return all(x is None or x.shape == wanted for x in given)

    def _begin(self, step: Step) -> _Sorter:
        sorter, self._columns_BT = self._sorter(step)
        self._keep(sorter)
        return sorter

    def _sorter(self, step: Step) -> tuple[_Sorter, Tensor]:
        """For this forward, and the columns of the cache after it."""
        rows, columns_BT = step_rows(step, self._columns_BT, self._filters, self._ragged)
        return _Sorter(self, rows), columns_BT

    def _keep(self, sorter: _Sorter) -> None:
        self._steps.append(sorter.rows)
        self._pieces.append(sorter.pieces)
        self._flowed.append(sorter.flowed)

    def settle(self) -> None:
        """Sort out the decode steps that were put aside; `bind` and `trace` do so by themselves."""
        pending = self._pending
        if not pending:
            return
        for step, values in zip(pending.steps, pending.values, strict=True):
            self._require_fired(step.index, values, has_pictures=False)
        sorter, columns_BT = self._sorter(pending.as_one())
        sorter.put_all(pending)
        # Not before all of it has come out well: what fails now fails again at the next call.
        self._columns_BT, self._pending = columns_BT, Pending()
        self._keep(sorter)

    def wants(self, site: Site, /) -> bool:
        return site.path in self.paths

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:  # noqa: ARG002
        raise RuntimeError(
            f"{site.path} reached a recorder that is bound to no forward; pass "
            "tap=recorder.bind(step)"
        )

    def trace(
        self,
        ids: Sequence[Sequence[int]],
        *,
        sites: Sequence[Site],
        provenance: Provenance,
        texts: Sequence[Sequence[str]] | None = None,
        columns: Mapping[str, Sequence[Sequence[Any]]] | None = None,
        routers: Routers | Mapping[str, Routers] | None = None,
        edited: Collection[str] = (),
        media: Sequence[Media] = (),
    ) -> Trace:
        """Everything recorded, as a `Trace`; the recorder is empty afterwards.

        A site whose positions were not reached, because the text ended early, has no rows, and
        neither has a bank of experts without tokens. Sites of the vision tower are left out of a
        run without pictures.

        Args:
            ids: token ids of every sequence, without padding. The last one of a generated
                sequence may be there although no forward read it; it is left out.
            sites: all sites of the model, so that the trace can tell "not kept" from "unknown".
            texts: how each token is shown; its id where absent.
            columns: columns of the tokens table, by name, in place of what the steps tell
                (`modality`, `bank`, `content`, `image`, …).
            routers: the model's routers, by bank where it has two; None for a dense model.
            edited: paths of the sites that an edit changed: what comes after them does not
                follow from what was recorded before them, so it is not derived from it.
            media: what the model saw of each picture, in reading order over the batch.
        """
        if unknown := sorted(set(edited) - {site.path for site in sites}):
            raise SiteError(f"edited={unknown} are no sites of this model")
        self.settle()
        self._require_all_fired()
        self._require_banks(sites, routers)
        assert self._columns_BT is not None
        lengths = self._columns_BT.sum(1).tolist()
        pictures = described.pictures_of(self._steps)
        told = described.columns(self._steps, lengths, pictures)
        phases = described.phases(self._steps, lengths)
        tokens = Tokens.of(ids, phases, texts, told | dict(columns or {}))
        media_of_trace = with_media(pictures, media)
        values, flows = self._joined(lengths)
        self._steps, self._columns_BT, self._pieces, self._flowed = [], None, [], []
        self._n_bound = 0
        by_bank = {"text": routers} if isinstance(routers, Routers) else dict(routers or {})
        return Trace(
            context=tokens,
            rows_N=torch.arange(len(tokens)),
            values=values,
            known_sites=tuple(sites),
            routers={bank: one.copied() for bank, one in by_bank.items()},
            provenance=provenance,
            keep=self.keep.description,
            edited=tuple(site.path for site in sites if site.path in set(edited)),
            media=media_of_trace,
            flows=flows,
        )

    def _joined(self, lengths: Sequence[int]) -> tuple[dict[str, Recorded], dict[str, Flow]]:
        """Every site's pieces as one; only then are the pieces let go."""
        starts = tuple(accumulate(lengths, initial=0))[:-1]
        values: dict[str, Recorded] = {}
        flows: dict[str, Flow] = {}
        for path, rule in self.rules.items():
            fired = [i for i, stored in enumerate(self._pieces) if path in stored]
            if not fired:
                continue
            pieces = [self._pieces[i].pop(path) for i in fired]
            values[path] = join(rule, pieces, starts, lengths, future_fill(rule.site))
            if self.grad:
                flows[path] = Flow(
                    rule,
                    tuple(self._steps[i] for i in fired),
                    tuple(piece.rows for piece in pieces),
                    starts,
                    tuple(lengths),
                    tuple(self._flowed[i].pop(path) for i in fired),
                )
        return values, flows

    def _require_all_fired(self) -> None:
        if not self._steps:
            raise RuntimeError("nothing was recorded: bind the recorder to a forward first")
        for step, stored in zip(self._steps, self._pieces, strict=True):
            self._require_fired(step.index, stored, has_pictures=bool(step.grids))

    def _require_fired(self, index: int, stored: Container[str], has_pictures: bool) -> None:
        silent = [
            path
            for path, rule in self.rules.items()
            if path not in stored and (has_pictures or not rule.site.of_pictures)
        ]
        if silent:
            raise RuntimeError(
                f"{len(silent)} kept sites did not fire in forward {index}, first: "
                f"{min(silent)}; an interrupted forward cannot be made into a trace"
            )

    def _require_banks(
        self, sites: Sequence[Site], routers: Routers | Mapping[str, Routers] | None
    ) -> None:
        if not any(site.bank for site in sites):
            return
        if isinstance(routers, Routers):
            raise TypeError('two banks have two routers; pass routers={"text": …, "vision": …}')
        if self._steps[0].bank_BS is None:
            raise ValueError(
                "the model has two banks of experts, and the prefill was bound to a Step without "
                "bank=: which bank each token is expected to take cannot be told"
            )


class _Bound:
    """The recorder during one forward."""

    __slots__ = ("_heard", "_into", "_listens", "_paths")

    def __init__(self, recorder: Recorder, into: Aside | _Sorter) -> None:
        self._paths, self._listens, self._into = recorder.paths, recorder.listens, into
        self._heard = recorder.heard

    def wants(self, site: Site, /) -> bool:
        return site.path in self._paths

    def changes(self, paths: frozenset[str], /) -> bool:  # noqa: ARG002
        return False

    def reads(self, paths: frozenset[str], /) -> frozenset[str]:
        # Asked at each block of each step. A frozenset knows its hash.
        found = self._heard.get(paths)
        if found is None:
            found = self._heard[paths] = paths & self._listens
        return found

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self._listens:
            self._into.put(site.path, x)
        return x

    def accept(self, values: Mapping[str, Tensor], /) -> None:
        self._into.put_own({path: x for path, x in values.items() if path in self._listens})


class _Sorter:
    """Takes the rows of one forward's values as they come."""

    __slots__ = ("_banks", "_recorder", "flowed", "pieces", "rows")

    def __init__(self, recorder: Recorder, rows: StepRows) -> None:
        self._recorder, self.rows = recorder, rows
        self.pieces: dict[str, Piece] = {}
        self.flowed: dict[str, Tensor] = {}
        self._banks: dict[str, tuple[Tensor, dict[str, Subset]]] = {}

    def put(self, path: str, x: Tensor) -> None:
        if path in self._recorder.bank_paths:
            self._note_banks(path, x)
        if path not in self._recorder.paths:
            return
        if path in self.pieces:
            raise fired_twice(path)
        rule = self._recorder.rules[path]
        if self._recorder.grad:
            self.flowed[path] = x
        else:
            x = x.detach()
        self.pieces[path] = take(rule, self.rows, x, self.member(rule.site))

    def put_own(self, values: Mapping[str, Tensor]) -> None:
        for path, x in values.items():
            self.put(path, x)

    def put_all(self, pending: Pending) -> None:
        for path in self._recorder.bank_paths:
            if all(path in values for values in pending.values):
                self._note_banks(path, pending.value(path))
        for path, rule in self._recorder.rules.items():
            if path in pending.values[0]:
                self.put(path, pending.value(path, self.member(rule.site)))

    def member(self, site: Site) -> Subset | None:
        """The rows of a bank, for its sites."""
        if site.bank is None or site.bank_path is None:
            return None
        if site.bank_path not in self._banks:
            raise RuntimeError(
                f"{site.bank_path}, which tells whose rows {site.path} has, did not fire before it"
            )
        _, members = self._banks[site.bank_path]
        return members[site.bank]

    def _note_banks(self, path: str, bank_BS: Tensor) -> None:
        """Which rows each bank of this layer gets; unless it is edited, all layers share them."""
        for known in self._banks.values():
            if known[0] is bank_BS:
                self._banks[path] = known
                return
        self._banks[path] = bank_BS, bank_members(bank_BS)
