"""What to record: groups, globs and sites, narrowed by layer, head, position and dtype.

A `KeepRequest` is what a user writes, `el.keep("attention", layers=[3], heads=[0, 1])`, and
knows no model. `Keep` is the same against the sites of one model: nothing is left open.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch

from ernie_lab.sites import Site, SiteError, select
from ernie_lab.trace.integers import integers
from ernie_lab.trace.keys import AmbiguousName, lookup
from ernie_lab.trace.positions import Positions, PositionsLike, as_positions

# `routing` is the least from which probabilities, selection scores, margins and the bias's
# part can be derived; the correction bias itself stands once in the trace.
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "routing": (
            "blocks.*.moe.*router_logits",
            "blocks.*.moe.*expert_ids",
            "blocks.*.moe.*expert_weights",
        ),
        "attention": ("blocks.*.attn.pattern",),
        "residual": ("blocks.*.resid_pre", "blocks.*.resid_mid", "blocks.*.resid_post"),
    }
)
_GROUP_NAMES = ", ".join((*GROUPS, "all"))
# What an edit between the logits and the choice would change, so that it no longer follows.
_EDITED_ROUTING = ("blocks.*.moe.*router_probs", "blocks.*.moe.*selection_scores")

Heads: TypeAlias = tuple[int, ...] | None
Names: TypeAlias = "str | Site | KeepRequest | Iterable[str | Site | KeepRequest]"


@dataclass(frozen=True, slots=True)
class KeepRequest:
    """A wish, still without a model; built by `keep`. None leaves a filter open."""

    what: tuple[str | Site, ...]
    layers: tuple[int, ...] | None = None
    heads: Heads = None
    positions: Positions | None = None
    dtype: torch.dtype | None = None
    device: str | None = None

    def within(self, outer: KeepRequest) -> KeepRequest:
        """This request, with what it leaves open taken from `outer`."""
        filters = ("layers", "heads", "positions", "dtype", "device")
        mine = {name: getattr(self, name) for name in filters}
        theirs = {name: getattr(outer, name) for name in filters if mine[name] is None}
        return dataclasses.replace(self, **theirs)

    def __str__(self) -> str:
        names = [what.path if isinstance(what, Site) else what for what in self.what]
        filters = {
            "layers": self.layers,
            "heads": self.heads,
            "positions": self.positions,
            "dtype": self.dtype,
        }
        given = [f"{name}={value}" for name, value in filters.items() if value is not None]
        return ", ".join(names) + (f" ({', '.join(given)})" if given else "")


def keep(
    *what: str | Site,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    positions: PositionsLike | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | None = None,
) -> KeepRequest:
    """What to record, for `keep=` of `run` and `generate`; several may stand in one list.

    Args:
        what: a group (`routing`, `attention`, `residual`, `all`: every site that is not on
            demand), a path, a glob, a Site, or a name without its layer, as for `trace[name]`.
        layers: true layer numbers, negative from the end. Sites outside the decoder's blocks
            stay; those of the vision tower are narrowed by their path, `vision.blocks.3.*`.
        heads: query heads, counted from 0, for sites that have them, in the decoder and in the
            vision tower; key/value heads (`k`, `v`) of the decoder stay whole.
        positions: a slice or indices, counted in each sequence without its padding; a bank of
            experts and `resampler.out` give the rows of these tokens, patches stay whole. Those
            that a sequence has not, or does not reach in generation, give no row; those that
            none can reach are refused before the run. So are negative ones in generation,
            where the end is not known.
        dtype: of the stored values. Per-expert values (`router_logits` and the like) keep
            theirs: rounding them makes ties that the model never had.
        device: where values are kept; `cpu` unless said otherwise.
    """
    if not what:
        raise ValueError(f"keep() needs a group, path or Site; groups: {_GROUP_NAMES}")
    for name in what:
        if not isinstance(name, str | Site):
            raise TypeError(f"keep takes names and Sites, not {type(name).__name__}: {name!r}")
    return KeepRequest(
        what,
        layers=_numbers(layers, "layers"),
        heads=_heads(heads),
        positions=None if positions is None else as_positions(positions),
        dtype=_floating(dtype),
        device=device,
    )


@dataclass(frozen=True, slots=True)
class KeptSite:
    """One site to record and what of it."""

    site: Site
    heads: Heads = None
    positions: Positions | None = None
    dtype: torch.dtype | None = None
    device: str = "cpu"


@dataclass(frozen=True, slots=True)
class Keep:
    """Exactly what a recorder stores of one model. `description` is the wish in words."""

    kept: tuple[KeptSite, ...]
    description: str

    @classmethod
    def of(
        cls,
        keep: Names,
        sites: Sequence[Site],
        *,
        layers: int | Iterable[int] | None = None,
        heads: int | Iterable[int] | None = None,
        positions: PositionsLike | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | None = None,
        edited: bool = False,
    ) -> Keep:
        """Resolve a wish against all `sites` of a model; the filters fill what it leaves open.

        With `edited`, the group `routing` also takes `router_probs` and `selection_scores`:
        under edits they need not follow from the logits.
        """
        wishes = _wishes(keep)
        outer = KeepRequest(
            (),
            layers=_numbers(layers, "layers"),
            heads=_heads(heads),
            positions=None if positions is None else as_positions(positions),
            dtype=_floating(dtype),
            device=device,
        )
        requests = [
            wish if isinstance(wish, KeepRequest) else KeepRequest((wish,)) for wish in wishes
        ]
        rules: dict[str, KeptSite] = {}
        for request in requests:
            found = _resolved(request.within(outer), sites, edited)
            _require_heads(request.heads, found)
            _require_positions(request.positions, found)
            for rule in found:
                if rules.setdefault(rule.site.path, rule) != rule:
                    raise ValueError(
                        f"{rule.site.path} is asked for twice with different filters; "
                        "name it in one request only"
                    )
        kept = tuple(rules[site.path] for site in sites if site.path in rules)
        _require_heads(outer.heads, kept)
        _require_positions(outer.positions, kept)
        return cls(kept, "; ".join(dict.fromkeys(str(r.within(outer)) for r in requests)))

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(rule.site.path for rule in self.kept)

    @property
    def devices(self) -> dict[str, str]:
        """Where each site's values are stored, by path."""
        return {rule.site.path: rule.device for rule in self.kept}


def _wishes(keep: Names) -> list[str | Site | KeepRequest]:
    several = [keep] if isinstance(keep, str | Site | KeepRequest) else keep
    wishes = list(several) if isinstance(several, Iterable) else [several]
    if not wishes:
        raise ValueError("nothing to keep: give a group, path, glob or Site")
    for wish in wishes:
        if not isinstance(wish, str | Site | KeepRequest):
            raise TypeError(
                f"keep={wish!r}: expected a group ({_GROUP_NAMES}), a path, a glob, a Site, "
                "el.keep(...), or a list of these"
            )
    return wishes


def _resolved(request: KeepRequest, sites: Sequence[Site], edited: bool) -> list[KeptSite]:
    chosen: set[str] = set()
    for what in request.what:
        chosen |= {site.path for site in _named(what, sites, edited)}
    found = [site for site in sites if site.path in chosen]
    if request.layers is not None:
        found = _in_layers(found, request, sites)
    return [_rule(site, request) for site in found]


def _require_heads(heads: Heads, rules: Sequence[KeptSite]) -> None:
    if heads is not None and all(rule.heads is None for rule in rules):
        names = ", ".join(dict.fromkeys(rule.site.quantity for rule in rules))
        raise SiteError(f"heads={list(heads)} narrows nothing: {names} have no query heads")


def _require_positions(positions: Positions | None, rules: Sequence[KeptSite]) -> None:
    if positions is not None and all(rule.positions is None for rule in rules):
        names = ", ".join(dict.fromkeys(rule.site.quantity for rule in rules))
        raise SiteError(f"positions={positions} narrows nothing: {names} have patches, not tokens")


def _rule(site: Site, request: KeepRequest) -> KeptSite:
    letters = site.dims.split()
    return KeptSite(
        site,
        heads=request.heads if "h" in letters else None,
        positions=None if site.of_patches else request.positions,
        dtype=None if "e" in letters else request.dtype,
        device=request.device or "cpu",
    )


def _named(what: str | Site, sites: Sequence[Site], edited: bool) -> Sequence[Site]:
    if what == "all":
        return [site for site in sites if not site.on_demand]
    if isinstance(what, str) and what in GROUPS:
        if what == "routing" and not any(".moe." in site.path for site in sites):
            raise SiteError("keep='routing' matches nothing: this model is dense, without experts")
        return select(
            GROUPS[what] + (_EDITED_ROUTING if edited and what == "routing" else ()), sites
        )
    try:
        return select(what, sites)
    except SiteError as error:
        if isinstance(what, Site):
            raise
        try:
            found = lookup(what, sites)
        except AmbiguousName:
            raise
        except SiteError:
            raise SiteError(f"{error} Groups of sites: {_GROUP_NAMES}.") from None
        return (found,) if isinstance(found, Site) else found


def _in_layers(found: list[Site], request: KeepRequest, sites: Sequence[Site]) -> list[Site]:
    assert request.layers is not None
    n_layers = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    wanted: set[int] = set()
    for layer in request.layers:
        if not -n_layers <= layer < n_layers:
            raise SiteError(f"layer {layer} does not exist; the model has layers 0..{n_layers - 1}")
        wanted.add(layer % n_layers)
    narrowed = [site for site in found if site.layer is None or site.layer in wanted]
    there = sorted({site.layer for site in found if site.layer is not None})
    if there and not any(site.layer is not None for site in narrowed):
        raise SiteError(
            f"{', '.join(map(str, request.what))} has no site in layers {sorted(wanted)}; "
            f"it has in layers {there}"
        )
    return narrowed


def _numbers(numbers: int | Iterable[int] | None, name: str) -> tuple[int, ...] | None:
    if numbers is None:
        return None
    listed = integers(numbers, name)
    if not listed:
        raise ValueError(f"an empty list of {name} selects nothing; leave it out for all")
    return listed


def _heads(heads: int | Iterable[int] | None) -> Heads:
    listed = _numbers(heads, "heads")
    if listed and (min(listed) < 0 or len(set(listed)) < len(listed)):
        raise ValueError(f"heads={list(listed)} must be distinct and counted from 0")
    return listed


def _floating(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None:
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    allowed = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    if found not in allowed:
        raise ValueError(f"dtype={dtype!r} must be float16, bfloat16, float32 or float64")
    assert isinstance(found, torch.dtype)
    return found
