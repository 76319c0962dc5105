"""Other routers in the place of the learned: another k, no bias, redrawn, the other bank's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.parts import part_at, router_with
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.redraw import fitted_bias, states_of
from ernie_lab.interventions.saying import AS, as_call
from ernie_lab.interventions.targets import Layers, as_layers, in_bank, sibling, siblings
from ernie_lab.interventions.values import Values
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.model.kinds import Model
from ernie_lab.model.redraw import gaussian_gate
from ernie_lab.model.router import Router
from ernie_lab.sites import Site, SiteError, all_sites, select
from ernie_lab.trace.integers import integer
from ernie_lab.trace.trace import Trace


def _router(model: nn.Module, site: Site) -> tuple[str, Router]:
    path = sibling(site, "router")
    router = part_at(model, path)
    assert isinstance(router, Router)
    return path, router


@dataclass(frozen=True, slots=True, repr=False)
class TopK:
    """Another number of chosen experts. See `top_k`."""

    kind: ClassVar[str] = "routing.top_k"
    k: int
    layers: tuple[int, ...] | None = None
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("expert_ids", self.layers, self.bank, sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        parts = {}
        for site in self.select(all_sites(model)):
            path, router = _router(model, site)
            if self.k > router.config.n_experts:
                raise EditError(f"k={self.k}, but {path} has {router.config.n_experts} experts")
            config = dataclasses.replace(router.config, n_chosen=self.k)
            parts[path] = router_with(router, config=config)
        return parts

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def beside(self, site: Site, here: Here, /) -> Tensor:  # noqa: ARG002
        raise EditError("top_k cannot be narrowed to some tokens: all rows have the same slots")


@dataclass(frozen=True, slots=True, repr=False)
class WithoutCorrectionBias:
    """Choice by probabilities alone. See `without_correction_bias`."""

    kind: ClassVar[str] = "routing.without_correction_bias"
    layers: tuple[int, ...] | None = None
    bank: str | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return in_bank("selection_scores", self.layers, self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return siblings(self.select(sites), "router_probs", sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        routers = [_router(model, site) for site in self.select(all_sites(model))]
        return {
            path: router_with(router, bias_E=torch.zeros_like(router.correction_bias_E))
            for path, router in routers
        }

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def beside(self, site: Site, here: Here, /) -> Tensor:
        return here.value(sibling(site, "router_probs"))


@dataclass(frozen=True, slots=True, repr=False)
class RandomRouter:
    """Gates redrawn at random. See `random`."""

    kind: ClassVar[str] = "routing.random"
    seed: int
    layers: tuple[int, ...] | None = None
    bank: str | None = None
    keep_bias: bool = False
    states: Values | None = field(default=None, metadata={AS: "trace"})
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _logits_and_scores(self.layers, self.bank, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _read(self.select(sites), sites)

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        parts = {}
        for site in in_bank("router_logits", self.layers, self.bank, all_sites(model)):
            path, router = _router(model, site)
            assert site.layer is not None
            weight_ED = gaussian_gate(router.weight_ED.detach(), self.seed * 1009 + site.layer)
            bias_E = None if self.keep_bias else self._bias(site, router, weight_ED)
            parts[path] = router_with(router, weight_ED=weight_ED, bias_E=bias_E)
        return parts

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def _bias(self, site: Site, router: Router, weight_ED: Tensor) -> Tensor:
        if self.states is None:
            return torch.zeros_like(router.correction_bias_E)
        if site.path not in self.states:
            raise EditError(f"{self.states!r} has nothing for {site.path}; keep moe.in there too")
        parameters = (router.weight_ED, router.correction_bias_E)
        learned = [float(parameter.detach().double().sum()) for parameter in parameters]
        key = f"{site.path} {self.seed} {learned}"
        if key not in self.states.derived:
            fitted_E = fitted_bias(weight_ED, router, self.states[site.path])
            self.states.derived[key] = fitted_E
        return self.states.derived[key].to(router.correction_bias_E)

    def beside(self, site: Site, here: Here, /) -> Tensor:
        return _beside(site, here)


@dataclass(frozen=True, slots=True, repr=False)
class ShareRouter:
    """Both banks choose by one router. See `share_router`."""

    kind: ClassVar[str] = "routing.share_router"
    source: Literal["text", "vision"] = "text"
    layers: tuple[int, ...] | None = None
    __repr__ = as_call

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        if not any(site.bank for site in sites):
            raise SiteError("share_router needs two banks of experts; this model has one")
        return _logits_and_scores(self.layers, self._receiver, sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return _read(self.select(sites), sites)

    @property
    def _receiver(self) -> str:
        return "vision" if self.source == "text" else "text"

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        parts = {}
        for site in self.select(all_sites(model)):
            path, _ = _router(model, site)
            parts[path] = part_at(model, path.replace(f".{self._receiver}.", f".{self.source}."))
        return parts

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:  # noqa: ARG002
        return x

    def beside(self, site: Site, here: Here, /) -> Tensor:
        return _beside(site, here)


def _logits_and_scores(
    layers: tuple[int, ...] | None, bank: str | None, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """Where gate and correction bias of a router show."""
    logits = in_bank("router_logits", layers, bank, sites)
    return select([*logits, *siblings(logits, "selection_scores", sites)], sites)


def _read(found: Sequence[Site], sites: Sequence[Site]) -> tuple[Site, ...]:
    inputs = [f"blocks.{site.layer}.moe.in" for site in found]
    return select([*inputs, *siblings(found, "router_probs", sites)], sites)


def _beside(site: Site, here: Here) -> Tensor:
    """This edit's router on what the layer's really read, or its bias on the probabilities."""
    router = here.parts[sibling(site, "router")]
    assert isinstance(router, Router)
    if site.path.endswith(".selection_scores"):
        return here.value(sibling(site, "router_probs")) + router.correction_bias_E.float()
    x_BSD = here.value(f"blocks.{site.layer}.moe.in")
    x_ND = x_BSD if site.row == "b" else x_BSD.flatten(0, 1)[here.rows(site, x_BSD)]
    return linear(x_ND.float(), router.weight_ED.float())


@called("routing.top_k")
def top_k(k: int, layers: Layers = None, *, bank: str | None = None) -> Edit:
    """Each token gets `k` experts; their weights are renormalised as ever.

    In a trace, layers of another k do not stack; give the same k to all, or read them apart.
    """
    k = integer(k, "k")
    if k < 1:
        raise EditError(f"k={k} must be at least 1")
    return TopK(k, as_layers(layers), bank)


@called("routing.without_correction_bias")
def without_correction_bias(
    layers: Layers = None, *, bank: str | None = None, **tokens: Unpack[Tokens]
) -> Edit:
    """Experts are chosen by their probability alone. (Their weights never knew the bias.)"""
    return narrowed_to(WithoutCorrectionBias(as_layers(layers), bank), tokens)


@called("routing.random")
def random(
    seed: int = 0,
    layers: Layers = None,
    *,
    bank: str | None = None,
    keep_bias: bool = False,
    trace: Trace | None = None,
    **tokens: Unpack[Tokens],
) -> Edit:
    """A redrawn router: Gaussian gate rows with the norms of the learned ones; states move freely.

    Args:
        trace: of other prompts, kept with `keep=["routing", "moe.in"]`: the correction bias is
            fitted there until the gate's MaxVio is that of the learned one, + 0.05 at most.
            Without it the bias is 0, so compare the loads too: an unbalanced router is another
            change.
        keep_bias: the learned bias, which balances another gate.
    """
    if keep_bias and trace is not None:
        raise EditError("keep_bias=True keeps the learned bias; trace= fits another: give one")
    numbers = as_layers(layers)
    states = None if trace is None else states_of(trace, numbers, bank)
    edit = RandomRouter(integer(seed, "seed"), numbers, bank, keep_bias, states)
    return narrowed_to(edit, tokens)


@called("routing.share_router")
def share_router(
    source: Literal["text", "vision"] = "text", layers: Layers = None, **tokens: Unpack[Tokens]
) -> Edit:
    """In a vision-language model: both banks choose by the router of `source`."""
    if source not in ("text", "vision"):
        raise EditError(f'source={source!r} must be "text" or "vision"')
    return narrowed_to(ShareRouter(source, as_layers(layers)), tokens)
