"""Which sites an edit means: a quantity, in some layers, in one of two banks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.here import EditError
from ernie_lab.sites import Site, SiteError, select
from ernie_lab.trace.integers import integers

Layers: TypeAlias = "int | Iterable[int] | None"


def number(given: object, name: str) -> float:
    """One number of Python, numpy or torch; True is a flag and no number."""
    plain: Any = given
    if getattr(plain, "ndim", None) == 0:
        plain = plain.item()
    if isinstance(plain, bool) or not isinstance(plain, Real):
        raise TypeError(f"{name}={given!r}: expected a number")
    return float(plain)


def as_layers(layers: Layers, name: str = "layers") -> tuple[int, ...] | None:
    if layers is None:
        return None
    found = integers(layers, name)
    if not found:
        raise EditError(f"an empty list of {name} selects nothing; leave it out for all")
    return found


def true_layer(layer: int, sites: Sequence[Site]) -> int:
    """The layer's number from the front; negative ones count from the end."""
    n_layers = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    if not -n_layers <= layer < n_layers:
        raise SiteError(f"layer {layer} does not exist; the model has layers 0..{n_layers - 1}")
    return layer % n_layers


def in_layers(
    quantity: str, layers: tuple[int, ...] | None, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """One quantity's sites in these layers (all that have it, if None); a layer without raises."""
    if layers is None:
        return select(quantity, sites)
    return select([f"blocks.{true_layer(layer, sites)}.{quantity}" for layer in layers], sites)


def require_bank(bank: str | None, sites: Sequence[Site]) -> str:
    """`moe`, or `moe.text` and `moe.vision` in a model with two banks."""
    has_banks = any(site.bank for site in sites)
    if bank is not None and bank not in BANKS:
        raise EditError(f'bank={bank!r} must be "text" or "vision"')
    if has_banks and bank is None:
        raise EditError(
            "this model has two banks of experts, and expert 5 of the one is not expert 5 of the "
            'other; say bank="text" or bank="vision"'
        )
    if not has_banks and bank is not None:
        raise EditError(f"bank={bank!r}: a text model has one bank of experts; leave it out")
    return "moe" if bank is None else f"moe.{bank}"


def in_bank(
    quantity: str, layers: tuple[int, ...] | None, bank: str | None, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """A routing quantity (`router_logits`) of one bank, in these layers."""
    if not any(".moe." in site.path for site in sites):
        raise SiteError(f"{quantity} does not exist: this model is dense, without experts")
    return in_layers(f"{require_bank(bank, sites)}.{quantity}", layers, sites)


def sibling(site: Site, name: str) -> str:
    """The path of another quantity of the same layer and bank."""
    return f"{site.path.rpartition('.')[0]}.{name}"


def siblings(found: Sequence[Site], name: str, sites: Sequence[Site]) -> tuple[Site, ...]:
    return select([sibling(site, name) for site in found], sites)


@dataclass(frozen=True, slots=True)
class Target:
    """Sites by pattern, narrowed to layers and heads."""

    what: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None

    @classmethod
    def of(cls, what: str | Site | Iterable[str | Site], layers: Layers, heads: Layers) -> Target:
        several = [what] if isinstance(what, str | Site) else list(what)
        return cls(
            tuple(one.path if isinstance(one, Site) else one for one in several),
            as_layers(layers),
            as_layers(heads, "heads"),
        )

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        found = select(self.what, sites)
        if self.layers is not None:
            wanted = {true_layer(layer, sites) for layer in self.layers}
            missing = wanted - {site.layer for site in found}
            if missing:
                raise SiteError(
                    f"{', '.join(self.what)} has no site in layer {min(missing)}; it has in "
                    f"layers {sorted({s.layer for s in found if s.layer is not None})}"
                )
            found = tuple(site for site in found if site.layer in wanted)
        if self.heads is not None:
            headless = [site.path for site in found if _head_axis(site) is None]
            if headless:
                raise SiteError(f"heads={list(self.heads)}: {headless[0]} has no heads")
        return found

    def put(self, site: Site, x: Tensor, new: Tensor) -> Tensor:
        """`new` where it is meant: in these heads, and not at keys that a query cannot see."""
        if self.heads is not None:
            axis = _head_axis(site)
            assert axis is not None
            n = x.shape[axis]
            if beyond := [head for head in self.heads if not -n <= head < n]:
                raise EditError(f"heads={list(beyond)}: {site.path} has heads 0..{n - 1}")
            mine = torch.zeros(n, dtype=torch.bool, device=x.device)
            mine[list(self.heads)] = True
            new = torch.where(mine.view([-1 if i == axis else 1 for i in range(x.ndim)]), new, x)
        # `attn.scores` are -inf at keys that a query cannot see: these stay unseen.
        return torch.where(x.isneginf(), x, new) if site.path.endswith(".scores") else new


def _head_axis(site: Site) -> int | None:
    letters = site.dims.split()
    return next((i for i, letter in enumerate(letters) if letter in "hg"), None)


def require_floats(site: Site, x: Tensor, what: str) -> None:
    if not x.is_floating_point():
        raise EditError(
            f"{site.path} holds integers, which {what} would make meaningless; see el.routing and "
            "el.experts, or give the new integers with el.edit"
        )
