"""The tap that counts: routing of a whole corpus, without keeping a trace of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_lab.corpus.statistics import CONTENT, Rows, Statistics, bucket_of
from ernie_lab.corpus.units import Window
from ernie_lab.inputs.batch import Batch, visual_columns
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.sites import Site

_WATCHED = ("router_probs", "selection_scores", "expert_ids", "expert_weights")


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """What each place of a padded batch is, flattened `[b s]`; padding is not `real_N`.

    `content` has the kind of every real token, sequence by sequence.
    """

    real_N: Tensor
    rows: Rows
    content: tuple[list[str], ...]

    @classmethod
    def of(cls, batch: Batch, windows: Sequence[Window], domains: Sequence[str]) -> Places:
        mask_BS = batch.mask
        local_BS = mask_BS.cumsum(-1) - 1
        device = mask_BS.device
        start_B = torch.tensor([window.start for window in windows], device=device)
        domain_B = torch.tensor([domains.index(w.domain) for w in windows], device=device)
        content = tuple(visual_columns(batch)["content"])
        content_BS = torch.zeros_like(batch.input_ids)
        numbers = [CONTENT.index(kind) for row in content for kind in row]
        content_BS[mask_BS] = torch.tensor(numbers, device=device)
        rows = Rows(
            domain_B[:, None].expand_as(mask_BS).flatten(),
            bucket_of((local_BS + start_B[:, None]).clamp(min=0)).flatten(),
            content_BS.flatten(),
            batch.input_ids.flatten(),
        )
        return cls(mask_BS.flatten(), rows, content)

    def at(self, place_N: Tensor) -> Rows:
        rows = self.rows
        return Rows(
            rows.domain_N[place_N],
            rows.bucket_N[place_N],
            rows.content_N[place_N],
            rows.token_N[place_N],
        )


@dataclass(slots=True, eq=False)
class CountingTap:
    """Adds each layer's routing to the statistics of its bank, as it flows.

    `chosen` collects, where rows are wanted, `[b s]` x k experts and weights by layer, in the slots
    of a trace, best selection score first: -1 and 0 where a token was not routed.
    """

    statistics: Mapping[str, Statistics]
    places: Places
    shape: tuple[int, int]
    keep_rows: bool
    chosen: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _seen: dict[str, Tensor] = field(default_factory=dict)
    _bank_N: Tensor | None = None
    _first: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.layer is None or ".moe." not in site.path:
            return x
        name = site.path.rpartition(".")[2]
        # Layers may be on several devices; what is counted is on one.
        if site.path.endswith(".moe.bank"):
            self._bank_N = x.flatten().to(self.places.real_N.device)
        elif name in _WATCHED:
            self._seen[name] = x.to(self.places.real_N.device)
            if name == _WATCHED[-1]:
                self._count(site.bank, site.layer)
        return x

    def _count(self, bank: str | None, layer: int) -> None:
        places = torch.arange(len(self.places.real_N), device=self.places.real_N.device)
        if bank is not None:
            assert self._bank_N is not None
            places = places[self._bank_N == BANKS.index(bank)]
        real_N = self.places.real_N[places]
        place_N = places[real_N]
        probs_NE, scores_NE, ids_NK, weights_NK = (
            self._seen.pop(name).flatten(0, -2)[real_N] for name in _WATCHED
        )
        counted = self.statistics[bank or "text"]
        counted.add(layer, self.places.at(place_N), probs_NE, scores_NE, ids_NK, weights_NK.float())
        self._follow(bank or "text", layer, counted, place_N, ids_NK[:, 0])
        if self.keep_rows:
            self._keep(layer, place_N, ids_NK, weights_NK)

    def _follow(
        self, bank: str, layer: int, counted: Statistics, place_N: Tensor, first_N: Tensor
    ) -> None:
        """Transitions of the tokens that both layers of this bank read."""
        full_N = first_N.new_full((len(self.places.real_N),), -1)
        full_N[place_N] = first_N
        if (before := self._first.get(bank)) is not None:
            both_N = (before[1] >= 0) & (full_N >= 0)
            counted.add_transitions(layer, before[1][both_N], full_N[both_N])
        self._first[bank] = place_N, full_N

    def _keep(self, layer: int, place_N: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> None:
        if layer not in self.chosen:
            size = (len(self.places.real_N), ids_NK.shape[-1])
            self.chosen[layer] = (
                ids_NK.new_full(size, -1),
                torch.zeros(size, dtype=torch.float32, device=ids_NK.device),
            )
        ids, weights = self.chosen[layer]
        ids[place_N], weights[place_N] = ids_NK, weights_NK.float()
