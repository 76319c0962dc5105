"""The taps by which the gates switch banks of experts off or choose experts differently."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ernie_lab.model.redraw import OtherRouter
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.ablations import Replace
from ernie_lab.sites import Site, Tap

BankName: TypeAlias = Literal["text", "vision"]


def layers(model: VLModel) -> list[int]:
    """The mixture layers."""
    return list(model.routers()["text"])


def paths(model: VLModel, quantity: str) -> dict[int, str]:
    """The path of one quantity in every mixture layer; those of a bank begin with its name."""
    return {layer: f"blocks.{layer}.moe.{quantity}" for layer in layers(model)}


def off(model: VLModel, quantity: str) -> Tap:
    """`vision.routed_out`, `text.routed_out` or `shared_out` of every layer zeroed."""
    return Replace(dict.fromkeys(paths(model, quantity).values(), torch.zeros_like))


def at_mean(model: VLModel, means_D: dict[int, Tensor], quantity: str) -> Tap:
    """The same in the layers of `means_D`, each replaced by a constant of its own."""

    def constant(mean_D: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: mean_D.expand_as(x)

    where = paths(model, quantity)
    return Replace({where[layer]: constant(mean_D) for layer, mean_D in means_D.items()})


def through_text_bank(model: VLModel) -> Tap:
    """Every token goes to the text bank."""
    return Replace(dict.fromkeys(paths(model, "bank").values(), torch.zeros_like))


def random_choice(model: VLModel, bank: BankName, seed: int) -> Tap:
    """k experts uniformly at random, weighed as if the router had chosen them."""
    generator = torch.Generator().manual_seed(seed)
    n_experts = len(next(iter(model.routers()[bank].values())).correction_bias_E)

    def choose(ids_NK: Tensor) -> Tensor:
        drawn = torch.rand((len(ids_NK), n_experts), generator=generator)
        return drawn.topk(ids_NK.shape[-1], dim=-1).indices

    return Replace(dict.fromkeys(paths(model, f"{bank}.expert_ids").values(), choose))


@dataclass(slots=True)
class RerouteVision:
    """Vision banks choose by other routers; the experts and everything else stay.

    `bias_shifts` are the other correction biases minus the learned ones.
    """

    weights: dict[int, Tensor]
    bias_shifts: dict[int, Tensor]
    input_BSD: Tensor | None = None
    input_ND: Tensor | None = None

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.layer is None or site.layer not in self.weights:
            return x
        if site.path.endswith("moe.in"):
            self.input_BSD = x
        if site.path.endswith("moe.bank"):
            assert self.input_BSD is not None
            self.input_ND = self.input_BSD[x == 1]
        if site.path.endswith("moe.vision.router_logits"):
            assert self.input_ND is not None
            return self.input_ND @ self.weights[site.layer].T
        if site.path.endswith("moe.vision.selection_scores"):
            return x + self.bias_shifts[site.layer]
        return x


def learned_routers(model: VLModel, bank: BankName) -> dict[int, OtherRouter]:
    return {
        layer: OtherRouter(router.weight_ED.detach(), router.correction_bias_E.detach())
        for layer, router in model.routers()[bank].items()
    }


def reroute_vision(model: VLModel, routers: dict[int, OtherRouter]) -> Tap:
    learned = learned_routers(model, "vision")
    return RerouteVision(
        {layer: router.weight_ED for layer, router in routers.items()},
        {layer: router.bias_E - learned[layer].bias_E for layer, router in routers.items()},
    )


@dataclass(slots=True)
class KeepVision:
    """Keeps, batch after batch, one row per vision token: what a bank's router reads, and its
    choice."""

    states: dict[int, list[Tensor]]
    choices: dict[int, list[Tensor]]
    input_BSD: Tensor | None = None

    @classmethod
    def of(cls, model: VLModel) -> KeepVision:
        return cls({layer: [] for layer in layers(model)}, {layer: [] for layer in layers(model)})

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path.endswith("moe.in"):
            self.input_BSD = x
        if site.path.endswith("moe.bank"):
            assert self.input_BSD is not None
            assert site.layer is not None
            self.states[site.layer].append(self.input_BSD[x == 1])
        if site.path.endswith("moe.vision.expert_ids"):
            assert site.layer is not None
            self.choices[site.layer].append(x)
        return x
