"""Any function as an edit. It cannot be saved: only the ready-made edits can."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.protocol import Edit
from ernie_lab.sites import Site, filtered, select


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

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        mine = x.clone()
        out = self.fn(mine, hook=site)
        return mine if out is None else out


@dataclass(frozen=True, slots=True, eq=False)
class BackwardHook:
    """`fn(gradient, hook=site) -> Tensor | None`, called when a gradient flows back to a site.

    None leaves the gradient as it is. Made for one run: `through` are the values of that run at
    its sites. The value itself is never changed.
    """

    where: str | Site | Callable[[str], bool]
    fn: Callable[..., Tensor | None]
    through: list[Tensor] = field(default_factory=list, repr=False)

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return Hook(self.where, self.fn).select(sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        if not x.requires_grad:
            raise EditError(
                f"no gradient flows to {site.path}: it holds integers, or nothing before it has one"
            )
        held = x.view_as(x)  # what flows on from here, not what else `x` is used for
        held.register_hook(lambda gradient: self.fn(gradient, hook=site))
        self.through.append(held)
        return held


def edit(where: str | Site | Iterable[str | Site], fn: Callable[[Tensor], Tensor]) -> Edit:
    """`fn(x) -> Tensor` at every site matching `where` (path, glob, name without layer, Site)."""
    if not callable(fn):
        raise EditError(f"el.edit takes a function of the tensor, not {fn!r}")
    return Function(tuple([where] if isinstance(where, str | Site) else where), fn)


@dataclass(frozen=True, slots=True, repr=False)
class Function:
    """What `edit` makes."""

    where: tuple[str | Site, ...]
    fn: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        places = ", ".join(w.path if isinstance(w, Site) else w for w in self.where)
        return f"edit({places!r}, {getattr(self.fn, '__name__', repr(self.fn))})"

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return select(self.where, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return self.fn(x.clone())
