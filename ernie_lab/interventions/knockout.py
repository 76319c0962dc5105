"""Attention knockout: some queries may not read some keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.saying import as_call
from ernie_lab.interventions.targets import Layers, Target
from ernie_lab.interventions.where import Where
from ernie_lab.sites import Phase, Site
from ernie_lab.trace.positions import PositionsLike

SITE = "attn.scores"
Group: TypeAlias = "Where | str | Iterable[str]"


@dataclass(frozen=True, slots=True, repr=False)
class Knockout:
    """`attn.scores` from these queries to these keys are -inf. See `knockout`."""

    kind: ClassVar[str] = "knockout"
    said: ClassVar[str] = "edits.knockout"
    queries: Where
    keys: Where
    target: Target
    keep_self: bool = True
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        # Not the vision tower, whose attention is among patches.
        return tuple(s for s in self.target.select(sites) if s.layer is not None)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        n_new, n_keys = x.shape[-2:]
        query_BS = self.queries.among(here.past)[:, -n_new:].to(x.device)
        if here.chosen_BS is not None:
            query_BS = query_BS & here.chosen_BS.to(x.device)
        key_BT = self.keys.among(here.past).to(x.device)
        if key_BT.shape[1] != n_keys:
            raise EditError(
                f"{site.path} has {n_keys} keys, the forwards bound so far {key_BT.shape[1]}; bind "
                "the tap from the first forward of a cache on"
            )
        cut_BST = query_BS[:, :, None] & key_BT[:, None, :]
        if self.keep_self:
            own_S = torch.arange(n_keys - n_new, n_keys, device=x.device)
            cut_BST &= own_S[:, None] != torch.arange(n_keys, device=x.device)
        out = self.target.put(site, x, x.masked_fill(cut_BST[:, None], -torch.inf))
        if bool(out.isneginf().all(-1).any()):
            raise EditError(
                f"{self!r} leaves a query at {site.path} without any key; keep_self=True leaves it "
                "itself"
            )
        return out


@called("edits.tokens")
def tokens(
    where: str | Iterable[str] | None = None,
    *,
    positions: PositionsLike | None = None,
    phase: Phase | None = None,
    steps: int | Iterable[int] | None = None,
    sequence: int | Iterable[int] | None = None,
) -> Where:
    """A group of tokens for `knockout`: all that is given must hold, as in `el.at`."""
    return Where.of(positions, where, phase, steps, sequence)


@called("edits.knockout")
def knockout(
    queries: Group,
    keys: Group,
    *,
    layers: Layers = None,
    heads: Layers = None,
    keep_self: bool = True,
) -> Edit:
    """The queries may not read the keys: what flows from `keys` to `queries` is cut.

    Groups are contents (`"image"`, `["image", "delimiter"]`) or `el.edits.tokens(...)`, for
    example `knockout(tokens(phase="decode"), "image")`. The other keys of a query share its
    attention anew, since the scores are cut before the softmax. With `keep_self` a token of both
    groups still reads itself.
    """
    target = Target.of(SITE, layers, heads)
    return Knockout(_group(queries), _group(keys), target, keep_self)


def _group(given: Group) -> Where:
    return given if isinstance(given, Where) else Where.of(where=given)
