"""Who is chosen, and how much each of the chosen counts: every way to change it.

In a vision-language model every function but `cross_bank` and `share_router` needs `bank=`. An edit
of `router_logits`, `selection_scores`, `expert_ids` or `expert_weights` moves all that follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.draws import key_sites, token_keys, uniforms
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.replay import freeze, replay
from ernie_lab.interventions.routers import (
    random,
    share_router,
    top_k,
    without_correction_bias,
)
from ernie_lab.interventions.saying import as_call
from ernie_lab.interventions.targets import (
    Layers,
    as_layers,
    in_bank,
    in_layers,
    number,
    sibling,
    siblings,
)
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.model.router import Router, renormalise
from ernie_lab.sites import Site, SiteError, select
from ernie_lab.trace.integers import integer, integers

__all__ = [
    "cross_bank",
    "forbid",
    "force",
    "freeze",
    "random",
    "replay",
    "share_router",
    "steer",
    "temperature",
    "top_k",
    "uniform",
    "without_correction_bias",
]


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__


def as_experts(ids: int | Iterable[int]) -> tuple[int, ...]:
    found = integers(ids, "experts")
    if not found:
        raise EditError("an empty list of experts selects nothing")
    if min(found) < 0 or len(set(found)) < len(found):
        raise EditError(f"experts={list(found)} must be distinct and counted from 0")
    return found


def among(ids_NK: Tensor, experts: Sequence[int]) -> Tensor:
    return torch.isin(ids_NK, torch.tensor(experts, device=ids_NK.device))


def router_of(site: Site, here: Here) -> Router:
    """The router that runs at a routing site."""
    if here.model is None:
        raise EditError("this edit needs the model: EditTap.of(..., model=), or lab.run")
    router = here.model.get_submodule(sibling(site, "router"))
    assert isinstance(router, Router)
    return router


def chosen_weights(site: Site, ids_NK: Tensor, here: Here) -> Tensor:
    """The weights, fp32, that the router gives these experts: their probabilities, renormalised."""
    probs_NE = here.value(sibling(site, "router_probs"))
    return renormalise(probs_NE.gather(-1, ids_NK), router_of(site, here).config.min_weight_sum)


def require_existing(site: Site, experts: Sequence[int], n_experts: int) -> None:
    if beyond := [expert for expert in experts if not 0 <= expert < n_experts]:
        raise EditError(f"expert {beyond[0]} does not exist: {site.path} has 0..{n_experts - 1}")


@dataclass(frozen=True, slots=True, repr=False)
class Forbid:
    """Experts that the router may not choose. See `forbid`."""

    kind: ClassVar[str] = "routing.forbid"
    layers: tuple[int, ...] | None
    experts: tuple[int, ...]
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("selection_scores", self.layers, self.bank, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        require_existing(site, self.experts, x.shape[-1])
        out = x.clone()
        out[..., list(self.experts)] = -torch.inf
        k = router_of(site, here).config.n_chosen if here.model is not None else 1
        left = int((~out.isneginf()).sum(-1).min()) if out.numel() else k
        if left < k:
            raise EditError(
                f"{self!r} leaves {left} experts at {site.path}, but {k} are chosen for each token"
            )
        return out


@dataclass(frozen=True, slots=True, repr=False)
class Steer:
    """`by` is added to some experts' logits or selection scores. See `steer`."""

    kind: ClassVar[str] = "routing.steer"
    layers: tuple[int, ...] | None
    experts: tuple[int, ...]
    by: float
    on: Literal["logits", "selection"] = "logits"
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        name = "router_logits" if self.on == "logits" else "selection_scores"
        return in_bank(name, self.layers, self.bank, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        require_existing(site, self.experts, x.shape[-1])
        out = x.clone()
        out[..., list(self.experts)] += self.by
        return out


@dataclass(frozen=True, slots=True, repr=False)
class Temperature:
    """Router logits divided by a temperature. See `temperature`."""

    kind: ClassVar[str] = "routing.temperature"
    temperature: float
    layers: tuple[int, ...] | None = None
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("router_logits", self.layers, self.bank, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x / self.temperature


@dataclass(frozen=True, slots=True, repr=False)
class Force:
    """Experts that every token gets. See `force`."""

    kind: ClassVar[str] = "routing.force"
    layers: tuple[int, ...] | None
    experts: tuple[int, ...]
    weight: float | Literal["own", "displaced"] = "own"
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        ids = in_bank("expert_ids", self.layers, self.bank, sites)
        return select([*ids, *siblings(ids, "expert_weights", sites)], sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        ids = in_bank("expert_ids", self.layers, self.bank, sites)
        return select([*ids, *siblings(ids, "router_probs", sites)], sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        if site.path.endswith(".expert_ids"):
            here.kept[site.path] = x
            return self._forced(site, x, here)
        ids_NK = here.value(sibling(site, "expert_ids"))
        is_forced = among(ids_NK, self.experts)
        if self.weight == "displaced":
            out = chosen_weights(site, here.kept[sibling(site, "expert_ids")], here).to(x.dtype)
        elif self.weight == "own":
            out = x
        else:
            out = self._with_number(x.float(), is_forced).to(x.dtype)
        here.tell("weight of the forced", site, (out.float() * is_forced).sum(-1))
        return out

    def _forced(self, site: Site, ids_NK: Tensor, here: Here) -> Tensor:
        require_existing(site, self.experts, here.value(sibling(site, "router_probs")).shape[-1])
        if len(self.experts) > ids_NK.shape[-1]:
            raise EditError(
                f"{self!r} forces {len(self.experts)} experts, but {ids_NK.shape[-1]} are chosen"
            )
        out = ids_NK.clone()
        for expert in self.experts:
            has_it = (out == expert).any(-1)
            # The last slot of an expert that is not forced itself: the least of the choice.
            free = ~among(out, self.experts)
            slot_K = torch.arange(out.shape[-1], device=out.device)
            last = (free * (slot_K + 1)).argmax(-1, keepdim=True)
            placed = out.scatter(-1, last, expert)
            out = torch.where(has_it.unsqueeze(-1), out, placed)
        return out

    def _with_number(self, weights_NK: Tensor, is_forced: Tensor) -> Tensor:
        """Each forced expert counts `weight`; the others share what remains, in proportion."""
        assert isinstance(self.weight, float)
        rest = weights_NK.masked_fill(is_forced, 0.0)
        remains = 1 - self.weight * is_forced.sum(-1, keepdim=True)
        scaled = rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(rest.dtype).tiny) * remains
        return torch.where(is_forced, self.weight, scaled)


@dataclass(frozen=True, slots=True, repr=False)
class Uniform:
    """Experts drawn uniformly at random. See `uniform`."""

    kind: ClassVar[str] = "routing.uniform"
    seed: int
    layers: tuple[int, ...] | None = None
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("expert_ids", self.layers, self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        probs = siblings(self.select(sites), "router_probs", sites)
        return (*probs, *key_sites(sites))

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        n_experts = here.value(sibling(site, "router_probs")).shape[-1]
        drawn_NE = uniforms(token_keys(here, site, x, self.seed), n_experts)
        return drawn_NE.topk(x.shape[-1], -1).indices.view_as(x)


@dataclass(frozen=True, slots=True, repr=False)
class CrossBank:
    """Tokens of one kind go to the other bank. See `cross_bank`."""

    kind: ClassVar[str] = "routing.cross_bank"
    tokens: Literal["text", "vision"]
    layers: tuple[int, ...] | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        if not any(site.bank for site in sites):
            raise SiteError("cross_bank needs two banks of experts; this model has one")
        return in_layers("moe.bank", self.layers, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        source = 0 if self.tokens == "text" else 1
        return torch.where(x == source, 1 - source, x)


@called("routing.forbid")
def forbid(
    layer: Layers,
    experts: int | Iterable[int],
    *,
    bank: str | None = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """The router may not choose these experts; the next best of each token takes the place.

    Masks `selection_scores`. (Masking `router_logits` would also rescale the probabilities against
    the correction bias, and so choose other sets.)
    """
    return narrowed_to(Forbid(as_layers(layer, "layer"), as_experts(experts), bank), tokens)


@called("routing.force")
def force(
    layer: Layers,
    expert: int | Iterable[int],
    weight: float | Literal["own", "displaced"] = "own",
    *,
    bank: str | None = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """Every token gets this expert, in the place of the last of its choice (unless it has it).

    Args:
        weight: `"own"`: by its own probability, renormalised with the others': a fraction of a
            fair share, since the router did not want it. `"displaced"`: what the displaced one
            would have had; the others keep theirs. A number: this, and the others share the
            rest in proportion. The count of the edit reports the mean weight that it got.
    """
    experts = as_experts(expert)
    if isinstance(weight, str):
        if weight not in ("own", "displaced"):
            raise EditError(f'weight={weight!r} must be "own", "displaced" or a number')
    else:
        weight = number(weight, "weight")
        if not 0 <= weight * len(experts) <= 1:
            raise EditError(f"weight={weight} for {len(experts)} experts must sum to 0..1")
    return narrowed_to(Force(as_layers(layer, "layer"), experts, weight, bank), tokens)


@called("routing.steer")
def steer(
    layer: Layers,
    experts: int | Iterable[int],
    by: float,
    *,
    on: Literal["logits", "selection"] = "logits",
    bank: str | None = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """`by` is added for these experts: on `"logits"` it moves who is chosen and how much they
    count, on `"selection"` (a correction bias) who is chosen alone."""
    if on not in ("logits", "selection"):
        raise EditError(f'on={on!r} must be "logits" or "selection"')
    edit = Steer(as_layers(layer, "layer"), as_experts(experts), number(by, "by"), on, bank)
    return narrowed_to(edit, tokens)


@called("routing.temperature")
def temperature(
    t: float, layers: Layers = None, *, bank: str | None = None, **tokens: Unpack[Tokens]
) -> Edit:
    """Router logits divided by `t`: below 1 sharper, above 1 flatter."""
    t = number(t, "t")
    if not t > 0:
        raise EditError(f"temperature={t} must be above 0")
    return narrowed_to(Temperature(t, as_layers(layers), bank), tokens)


@called("routing.uniform")
def uniform(
    seed: int = 0, layers: Layers = None, *, bank: str | None = None, **tokens: Unpack[Tokens]
) -> Edit:
    """Each token gets k experts uniformly at random, weighed as if the router had chosen them."""
    return narrowed_to(Uniform(integer(seed, "seed"), as_layers(layers), bank), tokens)


@called("routing.cross_bank")
def cross_bank(
    tokens: Literal["text", "vision"], layers: Layers = None, **which: Unpack[Tokens]
) -> Edit:
    """Tokens that would go to this bank go to the other. `"vision"` includes delimiters."""
    if tokens not in ("text", "vision"):
        raise EditError(f'tokens={tokens!r} must be "text" or "vision"')
    return narrowed_to(CrossBank(tokens, as_layers(layers)), which)
