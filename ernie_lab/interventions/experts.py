"""What single routed experts do: switch some off, in one of six senses, or let two change places.

In a vision-language model every function needs `bank=`: expert 5 of the text bank is not expert 5
of the vision bank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias, Unpack, get_args

import torch
from torch import Tensor, nn

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.draws import key_sites, token_keys, uniforms
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.parts import part_at
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.reference import expert_means, expert_rows
from ernie_lab.interventions.routing import Forbid, among, as_experts, require_existing
from ernie_lab.interventions.saying import AS, as_call
from ernie_lab.interventions.targets import Layers, as_layers, in_bank, sibling, siblings
from ernie_lab.interventions.values import Values
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.model.experts import ExpertSites
from ernie_lab.model.kinds import Model
from ernie_lab.model.router import Router
from ernie_lab.sites import Site, all_sites, select
from ernie_lab.trace.integers import integer
from ernie_lab.trace.trace import Trace

__all__ = ["off", "off_each_way", "swap"]

_BESIDE = ExpertSites.under("beside")

How: TypeAlias = Literal["zero", "renormalise", "next_best", "mean", "resample"]
_REFERRING = ("mean", "resample")


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__


@dataclass(frozen=True, slots=True, repr=False)
class WithoutWeight:
    """The experts' weight is 0; with `renormalise` the others are divided by what remains."""

    kind: ClassVar[str] = "experts.off"
    layers: tuple[int, ...] | None
    ids: tuple[int, ...] | None
    how: Literal["zero", "renormalise"] = "zero"
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("expert_weights", self.layers, self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        found = self.select(sites)
        names = ("expert_ids", "router_probs")
        return tuple(site for name in names for site in siblings(found, name, sites))

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        if self.ids is None:
            return torch.zeros_like(x)
        require_existing(site, self.ids, here.value(sibling(site, "router_probs")).shape[-1])
        off = among(here.value(sibling(site, "expert_ids")), self.ids)
        kept = x.masked_fill(off, 0.0)
        if self.how == "zero":
            return kept
        wide = kept.float()
        removed = (x.float() - wide).sum(-1, keepdim=True)
        # Where nobody is left, or nobody was off, there is nothing to divide by.
        divide = (removed < 1) & off.any(-1, keepdim=True) & ~off.all(-1, keepdim=True)
        return torch.where(divide, wide / (1 - removed), wide).to(x.dtype)

    def why_idle(self, nobody: str) -> str:
        if self.ids is None:
            return ""
        layers = "any layer" if self.layers is None else f"layer {_or(self.layers)}"
        return f"{nobody} chose expert {_or(self.ids)} in {layers} with a weight above 0"


def _or(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} or {last}" if first else last


@dataclass(frozen=True, slots=True, repr=False)
class OtherOutput:
    """The experts put out a constant, or what they put out for other tokens."""

    kind: ClassVar[str] = "experts.other_output"
    said: ClassVar[str] = "experts.off"
    layers: tuple[int, ...]
    ids: tuple[int, ...]
    how: Literal["mean", "resample"]
    values: Values = field(metadata={AS: "trace"})
    bank: str | None = None
    seed: int = 0
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("expert_out", self.layers, self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        ids = siblings(self.select(sites), "expert_ids", sites)
        return (*ids, *key_sites(sites)) if self.how == "resample" else ids

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        ids_NK = here.value(sibling(site, "expert_ids"))
        out = x
        for expert in self.ids:
            mine = (ids_NK == expert).unsqueeze(-1)
            given = self.values[f"{site.path}#{expert}"]
            if self.how == "mean":
                other = given.to(x)
            else:
                drawn_N = uniforms(token_keys(here, site, x, self.seed + 7919 * expert), 1)[:, 0]
                rows_ND = given[(drawn_N * len(given)).long().to(given.device)].to(x)
                other = rows_ND.view(*x.shape[:-2], 1, x.shape[-1])
            out = torch.where(mine, other, out)
        return out


class Relabelled(nn.Module):
    """A bank of experts in which `a` and `b` have changed places; it holds the same tensors."""

    def __init__(self, experts: nn.Module, a: int, b: int) -> None:
        super().__init__()
        self.experts = experts
        self.a, self.b = a, b

    def forward(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor, *more: Any) -> Tensor:
        changed_NK = torch.where(ids_NK == self.a, self.b, ids_NK)
        changed_NK = torch.where(ids_NK == self.b, self.a, changed_NK)
        out_ND: Tensor = self.experts(x_ND, changed_NK, weights_NK, *more)
        return out_ND


@dataclass(frozen=True, slots=True, repr=False)
class ExpertSwap:
    """Experts `a` and `b` change places. See `swap`."""

    kind: ClassVar[str] = "experts.swap"
    layer: int
    a: int
    b: int
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("routed_out", (self.layer,), self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        (site,) = self.select(sites)
        names = [sibling(site, name) for name in ("expert_ids", "expert_weights")]
        return select([f"blocks.{site.layer}.moe.in", *names], sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        (site,) = self.select(all_sites(model))
        path = sibling(site, "experts")
        router = part_at(model, sibling(site, "router"))
        assert isinstance(router, Router)
        require_existing(site, (self.a, self.b), router.config.n_experts)
        own = part_at(model, path)
        return {path: own if self.a == self.b else Relabelled(own, self.a, self.b)}

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def beside(self, site: Site, here: Here, /) -> Tensor:
        read = here.value(f"blocks.{site.layer}.moe.in")
        ids, weights = (here.value(sibling(site, f"expert_{name}")) for name in ("ids", "weights"))
        x_ND = read if site.row == "b" else read.flatten(0, 1)[here.rows(site, read)]
        out_ND: Tensor = here.parts[sibling(site, "experts")](x_ND, ids, weights, _BESIDE)
        return out_ND


@called("experts.off")
def off(
    layer: Layers,
    ids: int | Iterable[int] | None = None,
    how: How = "zero",
    *,
    bank: str | None = None,
    trace: Trace | None = None,
    seed: int = 0,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Switch experts off. `layer` is one, several, or None for all; `ids` None is the whole bank.

    Args:
        how: what takes the place of such an expert.
            `"zero"`: nothing; the weights of the others stay.
            `"renormalise"`: the others, whose weights are divided by 1 - its weight.
            `"next_best"`: the next candidate of the router, as in `routing.forbid`.
            `"mean"`: its own mean output over the tokens of `trace` that chose it.
            `"resample"`: its own output for a random such token.
        trace: for the last two, kept with `keep=["moe.expert_out", "moe.expert_ids"]` (in a
            vision-language model `moe.vision.expert_out`, …), of other prompts.
    """
    if how not in get_args(How):
        raise EditError(f"how={how!r} must be one of {', '.join(get_args(How))}")
    layers = as_layers(layer, "layer")
    experts = None if ids is None else as_experts(ids)
    seed = integer(seed, "seed")
    if how == "mean" or how == "resample":
        if trace is None or experts is None or layers is None:
            raise EditError(f"how={how!r} needs layer, ids and trace= with expert_out and ids")
        make = expert_means if how == "mean" else expert_rows
        values = make(trace, layers, experts, bank)
        return narrowed_to(OtherOutput(layers, experts, how, values, bank, seed), tokens)
    if trace is not None:
        raise EditError(f"trace= would not be used: how={how!r} needs no reference")
    if how == "next_best":
        if experts is None:
            raise EditError('how="next_best" needs ids: of no expert at all there is no next one')
        return narrowed_to(Forbid(layers, experts, bank), tokens)
    divided: Literal["zero", "renormalise"] = "zero" if how == "zero" else "renormalise"
    return narrowed_to(WithoutWeight(layers, experts, divided, bank), tokens)


@called("experts.off_each_way")
def off_each_way(
    layer: Layers,
    ids: int | Iterable[int],
    *,
    bank: str | None = None,
    trace: Trace | None = None,
    seed: int = 0,
    **tokens: Unpack[Tokens],
) -> dict[str, list[Edit]]:
    """`off` in every sense, side by side: conditions for `el.compare`, by their name.

    Without `trace` the two senses that need a reference are left out.
    """
    ways = [how for how in get_args(How) if trace is not None or how not in _REFERRING]
    return {
        how: [
            off(
                layer,
                ids,
                how,
                bank=bank,
                trace=trace if how in _REFERRING else None,
                seed=seed,
                **tokens,
            )
        ]
        for how in ways
    }


@called("experts.swap")
def swap(layer: int, a: int, b: int, *, bank: str | None = None, **tokens: Unpack[Tokens]) -> Edit:
    """Experts `a` and `b` of one layer change places; the router stays. No weight is copied.

    `expert_ids` still name places: where it says `a`, the weights of `b` have run.
    """
    a, b, layer = integer(a, "a"), integer(b, "b"), integer(layer, "layer")
    return narrowed_to(ExpertSwap(layer, a, b, bank), tokens)
