"""Edits of any site: zero, mean, resample, patch, scale, add. Public as `el.edits`.

All take a site as `keep` does (path, glob, name without layer, Site), `layers=` and `heads=`, and
what `el.at` takes: `phase=`, `steps=`, `positions=`, `where=`, `sequence=`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, Unpack

import torch
from torch import Tensor

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.draws import key_sites, token_keys, uniforms
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.lookup import looked_up
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.saying import as_call
from ernie_lab.interventions.targets import Layers, Target, number, require_floats
from ernie_lab.interventions.values import (
    Values,
    kept_paths,
    recorded_means,
    recorded_rows,
    refuse_maps,
    require_in,
)
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.sites import Site
from ernie_lab.trace.integers import integer
from ernie_lab.trace.trace import Trace

What: TypeAlias = "str | Site | Iterable[str | Site]"
SHARED_OUT = "moe.shared_out"


@dataclass(frozen=True, slots=True, repr=False)
class Scale:
    """`by` times the value; 0 is zero ablation."""

    kind: ClassVar[str] = "scale"
    target: Target
    by: float

    @property
    def said(self) -> str:
        return _said("zero" if self.by == 0 else "scale", self.target)

    def __repr__(self) -> str:
        return as_call(self, unsaid="by" if self.by == 0 else "")

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return self.target.select(sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        require_floats(site, x, "scaling")
        # Not 0 * x, which is NaN where x is not finite.
        return self.target.put(site, x, torch.zeros_like(x) if self.by == 0 else x * self.by)


@dataclass(frozen=True, slots=True, repr=False)
class Mean:
    """A constant for each site: its mean over the tokens of a reference trace."""

    kind: ClassVar[str] = "mean"
    target: Target
    values: Values
    __repr__ = as_call

    @property
    def said(self) -> str:
        return _said("mean", self.target)

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _with_values(self.target, self.values, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        require_floats(site, x, "a mean")
        mean = self.values.like(site.path, x)
        return self.target.put(site, x, mean.expand_as(x))


@dataclass(frozen=True, slots=True, repr=False)
class Resample:
    """For each token, the value at a token of a reference trace, drawn at random."""

    kind: ClassVar[str] = "resample"
    target: Target
    values: Values
    seed: int = 0
    __repr__ = as_call

    @property
    def said(self) -> str:
        return _said("resample", self.target)

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _with_values(self.target, self.values, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return key_sites(sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        require_floats(site, x, "resampling")
        drawn_N = uniforms(token_keys(here, site, x, self.seed), 1)[:, 0]
        pool = self.values[site.path]
        rows = pool[(drawn_N * len(pool)).long().to(pool.device)].to(x)
        return self.target.put(site, x, rows.view_as(x))


@dataclass(frozen=True, slots=True, repr=False)
class Patch:
    """Each token's value from the same (sequence, position) of a reference trace."""

    kind: ClassVar[str] = "patch"
    said: ClassVar[str] = "edits.patch"
    target: Target
    values: Values
    missing: str = "error"
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _with_values(self.target, self.values, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        return self.target.put(site, x, looked_up(self.values, site, x, here, self.missing))


@dataclass(frozen=True, slots=True, repr=False)
class Add:
    """`by` times a direction is added: steering."""

    kind: ClassVar[str] = "add"
    said: ClassVar[str] = "edits.add"
    target: Target
    direction: Values
    by: float = 1.0
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return self.target.select(sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        require_floats(site, x, "adding a direction")
        direction = self.direction.like("direction", x)
        if direction.shape != x.shape[x.ndim - direction.ndim :]:
            raise EditError(
                f"the direction has shape {tuple(direction.shape)}, expected the last axes of "
                f"{site.path}: {tuple(x.shape)} ({site.dims})"
            )
        return self.target.put(site, x, x + self.by * direction)


def _said(kind: str, target: Target) -> str:
    """As the shared experts' own function where there is one, which makes an equal edit."""
    of_shared = target.what == (SHARED_OUT,) and target.heads is None
    return f"shared.{kind}" if of_shared else f"edits.{kind}"


def _with_values(target: Target, values: Values, sites: Sequence[Site]) -> tuple[Site, ...]:
    found = target.select(sites)
    if target.layers is None:
        found = tuple(site for site in found if site.path in values) or found
    require_in(values, found)
    return found


def _kept(trace: Trace, target: Target) -> list[str]:
    patterns = target.what
    kept = kept_paths(trace, patterns, every=False)
    if target.layers is None:
        return kept
    chosen = [site.path for site in target.select(trace.known_sites)]
    if missing := [path for path in chosen if path not in kept]:
        raise EditError(f"the trace has no {missing[0]}; record it: keep={missing[0]!r}")
    return chosen


@called("edits.zero")
def zero(
    site: What, *, layers: Layers = None, heads: Layers = None, **tokens: Unpack[Tokens]
) -> Edit:
    """Zero ablation."""
    return narrowed_to(Scale(Target.of(site, layers, heads), 0.0), tokens)


@called("edits.scale")
def scale(
    site: What, by: float, *, layers: Layers = None, heads: Layers = None, **tokens: Unpack[Tokens]
) -> Edit:
    """`by` times the value."""
    return narrowed_to(Scale(Target.of(site, layers, heads), number(by, "by")), tokens)


@called("edits.mean")
def mean(
    site: What,
    trace: Trace,
    *,
    layers: Layers = None,
    heads: Layers = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Mean ablation: the mean over all tokens of `trace` (slice it with `trace.sel` for others).

    Without `layers`, in every layer of which the trace kept the site.
    """
    target = Target.of(site, layers, heads)
    refuse_maps(trace, _kept(trace, target), "mean over tokens")
    values = recorded_means(trace, _kept(trace, target), f"means of {len(trace)} tokens")
    return narrowed_to(Mean(target, values), tokens)


@called("edits.resample")
def resample(
    site: What,
    trace: Trace,
    *,
    seed: int = 0,
    layers: Layers = None,
    heads: Layers = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Resample ablation: each token gets the value at a random token of `trace`.

    The draw depends on seed, site, position and token, so it is the same in any batch and in
    generation.
    """
    target = Target.of(site, layers, heads)
    refuse_maps(trace, _kept(trace, target), "row of another token that would fit")
    values = recorded_rows(trace, _kept(trace, target), f"rows of {len(trace)} tokens")
    return narrowed_to(Resample(target, values, integer(seed, "seed")), tokens)


@called("edits.patch")
def patch(
    site: What,
    trace: Trace,
    *,
    missing: str = "error",
    layers: Layers = None,
    heads: Layers = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Activation patching: each token's value at the same sequence and position of `trace`.

    A token that the trace has not is an error, or under `missing="keep"` left alone. In one of
    two banks of experts the rows are those of its tokens; a token that was in the other bank is
    missing. Of attention (`attn.pattern`, `attn.scores`) a query gets the recorded weights of the
    keys at the same positions.
    """
    if missing not in ("error", "keep"):
        raise EditError(f'missing={missing!r} must be "error" or "keep"')
    target = Target.of(site, layers, heads)
    values = recorded_rows(trace, _kept(trace, target), f"rows of {len(trace)} tokens")
    return narrowed_to(Patch(target, values, missing), tokens)


@called("edits.add")
def add(
    site: What,
    direction: Tensor,
    by: float = 1.0,
    *,
    layers: Layers = None,
    heads: Layers = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Steering: `by` times `direction` (the last axis, or the last axes, of the site) is added."""
    held = Values({"direction": direction.detach().clone().cpu()}, "a direction")
    return narrowed_to(Add(Target.of(site, layers, heads), held, number(by, "by")), tokens)
