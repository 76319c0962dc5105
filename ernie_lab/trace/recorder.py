"""The tap that records: one per run or generation, bound to each forward in turn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ernie_lab.inputs.media import Media
from ernie_lab.sites import Site, SiteError, Step, Tap
from ernie_lab.trace import described
from ernie_lab.trace.budget import refuse_unknown_end
from ernie_lab.trace.flow import Flow
from ernie_lab.trace.keep import Keep, KeptSite
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
    values over. Rows are copied as they pass, so no tensor of the model is held and none can
    change afterwards. With `grad=True` the tensors themselves are held too, with their graph,
    so that `Trace.gradient` can differentiate with respect to them.
    """

    def __init__(self, keep: Keep, *, grad: bool = False) -> None:
        self.keep = keep
        self.grad = grad
        self.paths = keep.paths
        self.rules = {rule.site.path: rule for rule in keep.kept}
        self.bank_paths = frozenset(rule.site.bank_path for rule in keep.kept if rule.site.bank)
        self.listens = self.bank_paths.union(self.rules)
        self._filters = {rule.positions for rule in keep.kept}
        self._ragged = any(rule.site.ragged for rule in keep.kept)
        self._steps: list[StepRows] = []
        self._columns_BT: Tensor | None = None
        self._pieces: list[dict[str, Piece]] = []
        self._flowed: list[dict[str, Tensor]] = []

    def bind(self, step: Step, /) -> Tap:
        if step.index != len(self._steps):
            raise ValueError(
                f"forward {step.index} cannot follow {len(self._steps)} recorded ones; bind a "
                "recorder once per forward, from the first on"
            )
        if step.index > 0:
            for rule in self.keep.kept:
                refuse_unknown_end(rule, grows=True)
        if step.index > 0 and step.grids:
            raise ValueError(f"forward {step.index} has pictures; only a prefill can have them")
        rows, self._columns_BT = step_rows(step, self._columns_BT, self._filters, self._ragged)
        self._steps.append(rows)
        self._pieces.append({})
        self._flowed.append({})
        return _StepRecorder(self, rows, self._pieces[-1], self._flowed[-1])

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
        for index, (step, stored) in enumerate(zip(self._steps, self._pieces, strict=True)):
            silent = [
                path
                for path, rule in self.rules.items()
                if path not in stored and (step.grids or not rule.site.of_pictures)
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


class _StepRecorder:
    """The recorder during one forward."""

    __slots__ = ("_banks", "_flowed", "_pieces", "_recorder", "_rows")

    def __init__(
        self,
        recorder: Recorder,
        rows: StepRows,
        pieces: dict[str, Piece],
        flowed: dict[str, Tensor],
    ) -> None:
        self._recorder, self._rows, self._pieces, self._flowed = recorder, rows, pieces, flowed
        self._banks: dict[str, tuple[Tensor, dict[str, Subset]]] = {}

    def wants(self, site: Site, /) -> bool:
        return site.path in self._recorder.paths

    def changes(self, paths: Set[str], /) -> bool:  # noqa: ARG002
        return False

    def reads(self, paths: Set[str], /) -> Set[str]:
        return paths & self._recorder.listens

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self._recorder.bank_paths:
            self._note_banks(site.path, x)
        if site.path not in self._recorder.paths:
            return x
        if site.path in self._pieces:
            raise RuntimeError(
                f"{site.path} fired twice in one forward; bind the recorder anew for each forward"
            )
        rule = self._recorder.rules[site.path]
        if self._recorder.grad:
            self._flowed[site.path] = x
            self._pieces[site.path] = self._take(rule, x)
        else:
            self._pieces[site.path] = self._take(rule, x.detach())
        return x

    def _note_banks(self, path: str, bank_BS: Tensor) -> None:
        """Which rows each bank of this layer gets; unless it is edited, all layers share them."""
        for known in self._banks.values():
            if known[0] is bank_BS:
                self._banks[path] = known
                return
        self._banks[path] = bank_BS, bank_members(bank_BS)

    def _take(self, rule: KeptSite, x: Tensor) -> Piece:
        if rule.site.bank is None or rule.site.bank_path is None:
            return take(rule, self._rows, x)
        _, members = self._banks[rule.site.bank_path]
        return take(rule, self._rows, x, members[rule.site.bank])
