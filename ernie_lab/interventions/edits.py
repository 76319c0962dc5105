"""Edits: values that change what flows through a site, and the tap that applies them.

An edit is a rule that picks sites and maps their tensor to another; it keeps no state. The
tap counts, per edit, how often it fired and how often it changed anything, because an edit
that silently did nothing is the commonest wrong result in this field.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.sites import BindableTap, Idle, Site, Step, Tap, filtered, idle, select


class EditError(ValueError):
    """An edit that cannot be applied: wrong shape, dtype or device, or an impossible target."""


class EditChangedNothingWarning(UserWarning):
    """Every application of an edit returned what it was given."""


@runtime_checkable
class Edit(Protocol):
    """What `edits=` takes."""

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites it applies to; raises `SiteError` when there are none."""
        ...

    def apply(self, site: Site, x: Tensor, step: Step | None) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Hook:
    """Any function of a site's tensor, as an edit: `fn(x, hook=site) -> Tensor | None`.

    TransformerLens' convention; None leaves the value as it is. An in-place change of `x` is
    seen (the function gets a copy), so both styles work.
    """

    where: str | Site | Callable[[str], bool]
    fn: Callable[..., Tensor | None]

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        if isinstance(self.where, str | Site):
            return select(self.where, sites)
        return filtered(self.where, sites)

    def apply(self, site: Site, x: Tensor, step: Step | None) -> Tensor:  # noqa: ARG002
        mine = x.clone()
        out = self.fn(mine, hook=site)
        return mine if out is None else out


def edit(where: str | Site | Iterable[str | Site], fn: Callable[[Tensor], Tensor]) -> Edit:
    """`fn(x) -> Tensor` at every site matching `where` (path, glob, name without layer, Site)."""
    if not callable(fn):
        raise EditError(f"el.edit takes a function of the tensor, not {fn!r}")
    return _Function(tuple([where] if isinstance(where, str | Site) else where), fn)


@dataclass(frozen=True, slots=True, repr=False)
class _Function:
    where: tuple[str | Site, ...]
    fn: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        places = ", ".join(w.path if isinstance(w, Site) else w for w in self.where)
        return f"edit({places!r}, {getattr(self.fn, '__name__', repr(self.fn))})"

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return select(self.where, sites)

    def apply(self, site: Site, x: Tensor, step: Step | None) -> Tensor:  # noqa: ARG002
        return self.fn(x.clone())


@dataclass(slots=True)
class EditCount:
    """How often an edit was applied, and how often that changed at least one number."""

    edit: Edit
    n_fired: int = 0
    n_changed: int = 0


@dataclass(slots=True)
class EditTap:
    """Applies edits in the given order, then hands the value on: `EditTap(edits, then=recorder)`.

    Built per run by `EditTap.of`, which resolves the sites once and so fails before the model
    runs. What `then` records is what really flowed.
    """

    by_path: dict[str, tuple[EditCount, ...]]
    counts: tuple[EditCount, ...]
    then: Tap = field(default_factory=Idle)
    step: Step | None = None
    # The sites that say which bank each token takes, where an edit is in a bank; and what they
    # said in this forward.
    bank_paths: frozenset[str] = frozenset()
    _banks: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, edits: Iterable[Edit], sites: Sequence[Site], then: Tap = idle) -> EditTap:
        if isinstance(edits, Edit):
            edits = (edits,)
        counts: list[EditCount] = []
        bank_paths = set()
        by_path: dict[str, list[EditCount]] = {}
        for one in edits:
            if not isinstance(one, Edit):
                raise EditError(
                    f"{one!r} is not an edit; wrap a function as el.edit(site, fn), or use one "
                    "of the ready-made edits"
                )
            count = EditCount(one)
            counts.append(count)
            for site in one.select(sites):
                by_path.setdefault(site.path, []).append(count)
                if site.bank_path is not None:
                    bank_paths.add(site.bank_path)
        return cls(
            {path: tuple(c) for path, c in by_path.items()},
            tuple(counts),
            then,
            bank_paths=frozenset(bank_paths),
        )

    def bind(self, step: Step) -> Tap:
        then = self.then.bind(step) if isinstance(self.then, BindableTap) else self.then
        return EditTap(self.by_path, self.counts, then, step, self.bank_paths)

    def wants(self, site: Site, /) -> bool:
        return site.path in self.by_path or self.then.wants(site)

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        for count in self.by_path.get(site.path, ()):
            edited = checked(site, x, count.edit.apply(site, x, self.step))
            count.n_fired += 1
            if not same(edited, x):
                count.n_changed += self._changes_a_token(site, edited, x)
                x = edited
            elif torch.is_grad_enabled():
                # Equal values may differ in their graph: a detached tensor, say.
                x = edited
        if site.path in self.bank_paths:
            self._banks[site.path] = x
        # `then` records only what it wants of the on-demand sites that an edit computed.
        return self.then(site, x) if not site.on_demand or self.then.wants(site) else x

    def _changes_a_token(self, site: Site, after: Tensor, before: Tensor) -> bool:
        """Is any difference on a real token? One on padding alone moves nothing."""
        letters = site.dims.split()
        if self.step is None:
            return True
        differs = ~((after == before) | ((after != after) & (before != before)))
        mask_BS = self.step.mask
        if site.bank is not None and site.bank_path is not None:
            if site.bank_path not in self._banks:
                return True
            mine_N = self._banks[site.bank_path].flatten() == BANKS.index(site.bank)
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
                warnings.warn(
                    f"{count.edit!r} was applied {count.n_fired} times and changed nothing",
                    EditChangedNothingWarning,
                    stacklevel=3,
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
