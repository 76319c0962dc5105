"""The tap that applies edits, and counts what they did.

An edit is a value that picks sites and maps their tensor to another; it keeps no state. The
tap counts, per edit, how often it fired and how often it changed anything, because an edit
that silently did nothing is the commonest wrong result in this field.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.functions import Hook, edit
from ernie_lab.interventions.here import EditError, Here, Past
from ernie_lab.interventions.parts import differ, part_at, with_parts
from ernie_lab.interventions.protocol import Edit, Exchange, Explains, Narrowed, Reads
from ernie_lab.interventions.saying import times
from ernie_lab.model.kinds import Model
from ernie_lab.model.quantised import named_weights
from ernie_lab.sites import BindableTap, CandidTap, Idle, Site, Step, Tap, idle, may_change

__all__ = [
    "Edit",
    "EditChangedNothingWarning",
    "EditCount",
    "EditError",
    "EditTap",
    "Hook",
    "checked",
    "edit",
    "same",
]


class EditChangedNothingWarning(UserWarning):
    """Every application of an edit returned what it was given."""


@dataclass(slots=True)
class EditCount:
    """How often an edit was applied, and how often that changed at least one number.

    Counted are forwards times sites, and only changes on real tokens. `after` says which
    earlier edits act on the same sites: they are applied in the given order, this one to
    what those left (parts of the model are exchanged before any value is edited). `measured`
    are figures that some edits report: their mean over the tokens of the run.
    """

    edit: Edit
    n_fired: int = 0
    n_changed: int = 0
    after: tuple[str, ...] = ()
    told: dict[str, list[float]] = field(default_factory=dict, repr=False)

    @property
    def measured(self) -> dict[str, float]:
        return {name: total / n for name, (total, n) in self.told.items() if n}


@dataclass(slots=True, eq=False)
class _Bound:
    """An edit against one model: its count, and the parts it exchanges or computes beside."""

    count: EditCount
    parts: Mapping[str, nn.Module] = field(default_factory=dict)
    before: Mapping[str, nn.Module] = field(default_factory=dict)
    # Sites whose part in the running model is another than it was before this edit.
    exchanged: frozenset[str] = frozenset()


@dataclass(slots=True)
class EditTap:
    """Applies edits in the given order, then hands the value on: `EditTap(edits, then=recorder)`.

    Built per run by `EditTap.of`, which resolves the sites once and so fails before the model
    runs. What `then` records is what really flowed. `model` is the one to run: the given one, or
    one that shares all its tensors but the exchanged parts.
    """

    by_path: dict[str, tuple[_Bound, ...]]
    counts: tuple[EditCount, ...]
    then: Tap = field(default_factory=Idle)
    model: Any = None
    step: Step | None = None
    # Sites whose value is kept during a forward: which bank each token takes, where an edit is
    # in a bank, and what edits read.
    noted: frozenset[str] = frozenset()
    _values: dict[str, Tensor] = field(default_factory=dict)
    _kept: dict[tuple[int, torch.device], dict[str, Tensor]] = field(default_factory=dict)
    _past: Past = field(default_factory=Past)

    @classmethod
    def of(
        cls,
        edits: Iterable[Edit],
        sites: Sequence[Site],
        then: Tap = idle,
        model: Model | None = None,
    ) -> EditTap:
        """`model` is needed by edits that exchange parts; then run `tap.model`."""
        if isinstance(edits, Edit):
            edits = (edits,)
        counts: list[EditCount] = []
        noted: set[str] = set()
        by_path: dict[str, list[_Bound]] = {}
        for one in edits:
            if not isinstance(one, Edit):
                raise EditError(
                    f"{one!r} is not an edit; wrap a function as el.edit(site, fn), or use one "
                    "of the ready-made edits"
                )
            chosen = one.select(sites)
            count = EditCount(one, after=_collisions(chosen, by_path))
            bound = _Bound(count)
            if isinstance(one, Exchange | Narrowed):
                bound, model = _with_parts_of(one, count, chosen, model)
            counts.append(count)
            for site in chosen:
                by_path.setdefault(site.path, []).append(bound)
            noted |= {site.path for site in one.reads(sites)} if isinstance(one, Reads) else set()
            noted |= {site.bank_path for site in chosen if site.bank_path is not None}
        return cls(
            {path: tuple(bounds) for path, bounds in by_path.items()},
            tuple(counts),
            then,
            model,
            noted=frozenset(noted),
        )

    def bind(self, step: Step) -> Tap:
        then = self.then.bind(step) if isinstance(self.then, BindableTap) else self.then
        self._past.extend(step)
        return EditTap(
            self.by_path, self.counts, then, self.model, step, self.noted, _past=self._past
        )

    def wants(self, site: Site, /) -> bool:
        return site.path in self.by_path or site.path in self.noted or self.then.wants(site)

    def changes(self, paths: frozenset[str], /) -> bool:
        return not paths.isdisjoint(self.by_path) or may_change(self.then, paths)

    def reads(self, paths: frozenset[str], /) -> frozenset[str]:
        return (paths & self.noted) | cast("CandidTap", self.then).reads(paths)

    def accept(self, values: Mapping[str, Tensor], /) -> None:
        # Copies: an edit may write into what it reads, and `then` keeps these.
        self._values.update({path: x.clone() for path, x in values.items() if path in self.noted})
        cast("CandidTap", self.then).accept(values)  # or it would have been called

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        told_by = x  # of `embed`, which tells the tokens: before any edit
        for bound in self.by_path.get(site.path, ()):
            count = bound.count
            edited = checked(site, x, count.edit.apply(site, x, self._here(bound, x.device)))
            count.n_fired += 1
            differs = not same(edited, x)
            if differs:
                count.n_changed += self._changes_a_token(site, edited, x)
            elif site.path in bound.exchanged:
                count.n_changed += x.numel() > 0
            if differs or torch.is_grad_enabled():
                # Equal values may differ in their graph: a detached tensor, say.
                x = edited
        if site.path in self.noted:
            self._values[site.path] = told_by if site.path == "embed" else x
        # `then` records only what it wants of the on-demand sites that an edit computed.
        return self.then(site, x) if not site.on_demand or self.then.wants(site) else x

    def _here(self, bound: _Bound, device: torch.device) -> Here:
        return Here(
            self.step,
            self._past,
            self._values,
            self.model,
            bound.parts,
            bound.before,
            kept=self._kept.setdefault((id(bound), device), {}),
            told=bound.count.told,
        ).on(device)

    def _changes_a_token(self, site: Site, after: Tensor, before: Tensor) -> bool:
        """Is any difference on a real token? One on padding alone moves nothing."""
        letters = site.dims.split()
        if self.step is None:
            return True
        differs = ~((after == before) | ((after != after) & (before != before)))
        mask_BS = self.step.mask.to(after.device)
        if site.bank is not None and site.bank_path is not None:
            if site.bank_path not in self._values:
                return True
            mine_N = self._values[site.bank_path].flatten() == BANKS.index(site.bank)
            real_N = mask_BS.flatten()[mine_N]
            return bool((differs.flatten(1).any(-1) & real_N).any())
        if site.row == "i":
            return bool((differs & _present(self.step, differs)).any())
        if "s" not in letters:
            return True
        axis = letters.index("s")
        if after.shape[axis] != mask_BS.shape[1]:  # logits of the last position alone
            return True
        per_token_BS = differs.movedim(axis, 1).reshape(*mask_BS.shape, -1).any(-1)
        return bool((per_token_BS & mask_BS).any())

    def touches(self, path: str) -> bool:
        """Is this site edited, or kept by a recorder behind?"""
        return path in self.by_path or path in getattr(self.then, "paths", ())

    def warn_if_idle(self) -> None:
        """Say so when an edit never changed anything."""
        for count in self.counts:
            if count.n_changed == 0:
                why = ""
                if count.n_fired and isinstance(count.edit, Explains):
                    why = count.edit.why_idle("no token")
                warnings.warn(
                    f"{count.edit!r} was applied {times(count.n_fired)} and changed nothing"
                    + (f": {why}" if why else ""),
                    EditChangedNothingWarning,
                    stacklevel=3,
                )


def _collisions(chosen: Sequence[Site], by_path: Mapping[str, Sequence[_Bound]]) -> tuple[str, ...]:
    """The earlier edits at these sites, with how many sites they share."""
    shared: dict[int, tuple[Edit, int]] = {}
    for site in chosen:
        for bound in by_path.get(site.path, ()):
            _, n = shared.get(id(bound), (bound.count.edit, 0))
            shared[id(bound)] = bound.count.edit, n + 1
    return tuple(
        f"{edit!r} ({n} site{'' if n == 1 else 's'} in common)" for edit, n in shared.values()
    )


def _with_parts_of(
    edit: Any, count: EditCount, chosen: Sequence[Site], model: Model | None
) -> tuple[_Bound, Model]:
    """The edit with its parts, and the model that runs after it."""
    if model is None:
        raise EditError(
            f"{edit!r} exchanges parts of the model; use lab.run or lab.generate, or give "
            "EditTap.of(..., model=) and run tap.model"
        )
    in_place = isinstance(edit, Exchange)
    parts = (edit if in_place else edit.exchange).parts(model)
    before = {path: part_at(model, path) for path in parts}
    for path, part in parts.items():
        _require_place(edit, path, before[path], part)
    if not in_place:
        return _Bound(count, parts, before), model
    # The part `blocks.3.moe.shared` shows at sites of its owner, `blocks.3.moe.shared_out`.
    owners = tuple(
        path.rpartition(".")[0] + "." for path in parts if differ(before[path], parts[path])
    )
    exchanged = {site.path for site in chosen if site.path.startswith(owners)}
    return _Bound(count, parts, before, frozenset(exchanged)), with_parts(model, parts)


def _require_place(edit: Edit, path: str, own: nn.Module, part: nn.Module) -> None:
    """A donor's part must be on the same device, of the same dtype and width."""
    mine, theirs = dict(named_weights(own)), dict(named_weights(part))
    for name in mine.keys() & theirs.keys():
        for what in ("device", "dtype"):
            was, now = getattr(mine[name], what), getattr(theirs[name], what)
            if was != now:
                raise EditError(
                    f"{edit!r}: the donor's {path}.{name} has {what} {now}, the model {was}; load "
                    "both alike"
                )
        axis = 0 if name.startswith("down.") else -1
        if mine[name].ndim == 2 and mine[name].shape[axis] != theirs[name].shape[axis]:
            raise EditError(
                f"{edit!r}: the donor's {path}.{name} has shape {tuple(theirs[name].shape)}, "
                f"which does not fit {tuple(mine[name].shape)}: other widths"
            )


def _present(step: Step, maps_IHPU: Tensor) -> Tensor:
    """`[i 1 p u]`, True where a frame has both patches: maps are padded to the largest frame."""
    lengths = torch.tensor([h * w for t, h, w in step.grids for _ in range(t)])
    present_IP = (torch.arange(maps_IHPU.shape[-1]) < lengths[:, None]).to(maps_IHPU.device)
    return present_IP[:, None, :, None] & present_IP[:, None, None, :]


def checked(site: Site, before: Tensor, after: Any) -> Tensor:
    """`after`, if it can stand in for `before`."""
    if not isinstance(after, Tensor):
        raise EditError(
            f"the edit at {site.path} returned {type(after).__name__}, expected a tensor of shape "
            f"{tuple(before.shape)} ({site.dims})"
        )
    for name in ("shape", "dtype", "device"):
        was, now = getattr(before, name), getattr(after, name)
        if was != now:
            raise EditError(
                f"the edit at {site.path} returned {name} {now}, expected {was} ({site.dims})"
            )
    return after


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in every bit that matters: NaN equals NaN."""
    return torch.equal(a, b) or bool(torch.all((a == b) | ((a != a) & (b != b))))
