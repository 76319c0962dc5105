"""The taps by which the gates switch parts of the model off or choose experts differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_lab.model.redraw import OtherRouter
from ernie_lab.model.text import TextModel
from ernie_lab.organisms.mixtures import mixtures
from ernie_lab.sites import Site, Tap


def paths(model: TextModel, quantity: str) -> dict[int, str]:
    """The path of one quantity in every mixture layer."""
    return {layer: f"blocks.{layer}.moe.{quantity}" for layer in mixtures(model)}


@dataclass(frozen=True, slots=True)
class Replace:
    """Each named site's value, replaced by a function of it."""

    by_path: dict[str, Callable[[Tensor], Tensor]]

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        change = self.by_path.get(site.path)
        return x if change is None else change(x)


@dataclass(slots=True)
class Keep:
    """Keeps every value of the named sites, batch after batch, flattened to one row per token."""

    paths: frozenset[str]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self.paths:
            self.kept.setdefault(site.path, []).append(x.flatten(0, -2))
        return x

    def all(self, path: str) -> Tensor:
        return torch.cat(self.kept[path])


@dataclass(slots=True)
class SilenceExpert:
    """One expert of one layer contributes nothing; the weights of the others stay as they were.

    `bank` is `"text."` or `"vision."` in a model with two banks.
    """

    layer: int
    expert: int
    bank: str = ""
    ids_NK: Tensor | None = None

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path == f"blocks.{self.layer}.moe.{self.bank}expert_ids":
            self.ids_NK = x
        if site.path == f"blocks.{self.layer}.moe.{self.bank}expert_weights":
            assert self.ids_NK is not None, "ids come before weights"
            return x.masked_fill(self.ids_NK == self.expert, 0.0)
        return x


@dataclass(slots=True)
class Reroute:
    """Layers choose by another router; the experts and everything else stay.

    `weights` are gates by layer; `bias_shifts` the other correction bias minus the learned one.
    """

    weights: dict[int, Tensor]
    bias_shifts: dict[int, Tensor]
    input_BSD: Tensor | None = None

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.layer is None or site.layer not in self.weights:
            return x
        if site.path.endswith("moe.in"):
            self.input_BSD = x
        if site.path.endswith("moe.router_logits"):
            assert self.input_BSD is not None
            return self.input_BSD @ self.weights[site.layer].T
        if site.path.endswith("moe.selection_scores"):
            return x + self.bias_shifts[site.layer]
        return x


def learned_routers(model: TextModel) -> dict[int, OtherRouter]:
    return {
        layer: OtherRouter(moe.router.weight_ED.detach(), moe.router.correction_bias_E.detach())
        for layer, moe in mixtures(model).items()
    }


def reroute(model: TextModel, routers: dict[int, OtherRouter]) -> Tap:
    learned = learned_routers(model)
    return Reroute(
        {layer: router.weight_ED for layer, router in routers.items()},
        {layer: router.bias_E - learned[layer].bias_E for layer, router in routers.items()},
    )


def off(model: TextModel, quantity: str) -> Tap:
    """`routed_out` or `shared_out` of every layer zeroed."""
    return Replace(dict.fromkeys(paths(model, quantity).values(), torch.zeros_like))


def at_mean(model: TextModel, means_D: dict[int, Tensor], quantity: str) -> Tap:
    """The same, replaced by a constant of its own in each layer."""

    def constant(mean_D: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x_BSD: mean_D.expand_as(x_BSD)

    where = paths(model, quantity)
    return Replace({where[layer]: constant(mean_D) for layer, mean_D in means_D.items()})


def random_choice(model: TextModel, seed: int) -> Tap:
    """Every token gets k experts uniformly at random, weighed as if the router had chosen them."""
    generator = torch.Generator().manual_seed(seed)
    n_experts = len(next(iter(mixtures(model).values())).router.correction_bias_E)

    def choose(ids_BSK: Tensor) -> Tensor:
        drawn = torch.rand((*ids_BSK.shape[:-1], n_experts), generator=generator)
        return drawn.topk(ids_BSK.shape[-1], dim=-1).indices

    return Replace(dict.fromkeys(paths(model, "expert_ids").values(), choose))
