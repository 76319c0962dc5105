"""Taps on the vision experts: silence one, put its mean in its place, keep what the slots add."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_lab.organisms.ablations import SilenceExpert
from ernie_lab.organisms.boards.draw import N_CELLS
from ernie_lab.organisms.boards.recipe import N_EXPERTS
from ernie_lab.sites import Site, Tap

LAYERS = (1, 2, 3)  # nothing reads what the last layer writes at a picture's tokens
EXPERTS = [(layer, expert) for layer in LAYERS for expert in range(N_EXPERTS)]
BANK_ROWS = N_CELLS + 2  # of a picture: start delimiter, cells in reading order, end delimiter


def silenced(layer: int, expert: int) -> Tap:
    return SilenceExpert(layer, expert, "vision.")


@dataclass(slots=True)
class AtMean:
    """One expert's outputs, before their weights, replaced by their mean."""

    layer: int
    expert: int
    mean_D: Tensor
    ids_NK: Tensor | None = None

    def wants(self, site: Site, /) -> bool:
        return site.path == f"blocks.{self.layer}.moe.vision.expert_out"

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path == f"blocks.{self.layer}.moe.vision.expert_ids":
            self.ids_NK = x
        if self.wants(site):
            assert self.ids_NK is not None, "ids come before outputs"
            return torch.where((self.ids_NK == self.expert)[..., None], self.mean_D, x)
        return x


@dataclass(slots=True)
class Slots:
    """Keeps the vision banks' ids, weights and slots; the slots can be differentiated by.

    With `scaled`, (layer, alpha), the slots of that layer are multiplied by alpha.
    """

    scaled: tuple[int, float] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:
        return site.path.endswith("vision.slot_out")

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        quantity = site.quantity.removeprefix("moe.vision.")
        if quantity == "slot_out" and site.layer in LAYERS:
            if self.scaled is not None and self.scaled[0] == site.layer:
                x = x * self.scaled[1]
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()
        if quantity in ("slot_out", "expert_ids", "expert_weights"):
            self.kept[site.path] = x
        return x

    def of(self, layer: int, quantity: str) -> Tensor:
        return self.kept[f"blocks.{layer}.moe.vision.{quantity}"]


@dataclass(slots=True)
class KeepOutputs:
    """Keeps the named sites, on-demand ones too, one row for each slot of outputs."""

    paths: frozenset[str]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:
        return site.path in self.paths

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self.paths:
            rows = x.flatten(0, 1) if site.path.endswith("expert_out") else x
            self.kept.setdefault(site.path, []).append(rows)
        return x


def by_expert(values_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """`[n e]`: each slot's value in the column of its expert, 0 where it was not chosen."""
    return values_NK.new_zeros(len(values_NK), N_EXPERTS).scatter(1, ids_NK, values_NK)


def of_pictures(values_NE: Tensor) -> Tensor:
    """`[b m e]`: a bank's rows, picture by picture."""
    return values_NE.unflatten(0, (-1, BANK_ROWS))
