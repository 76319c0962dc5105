"""Statistics as integers: their sums are the same in whatever order and pieces they are added.

Floating-point sums are not, so probabilities and weights are added in fixed point, 2^-30 each
(an int64 holds 8e9 tokens of probability 1), and entropies and margins are counted in bins.

Letters: L mixture layers, G domains, P position buckets, C kinds of content, E experts, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

Statistic: TypeAlias = Literal[
    "counts", "probabilities", "entropy", "margin", "coactivation", "transitions", "vocabulary"
]
STATISTICS: tuple[Statistic, ...] = get_args(Statistic)
DEFAULT: tuple[Statistic, ...] = STATISTICS[:-1]
CONTENT = ("text", "delimiter", "image", "video")
# First positions of the buckets.
BUCKETS = (0, 1, 16, 64, 256, 1024, 4096, 16384)
FIXED = 2**30
ENTROPY_BINS = 1024
# 32 bins for every halving of the margin, down to 2^-32.
MARGIN_BINS, PER_OCTAVE = 1024, 32
# Above this many rows a sum of ones in fp32 would no longer be exact.
_EXACT_ROWS = 2**24


@dataclass(frozen=True, slots=True)
class Shape:
    """What the axes of one bank's statistics are."""

    layers: tuple[int, ...]
    n_experts: int
    n_chosen: int
    vocab_size: int
    domains: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The tokens of one forward that one bank read, padding left out, `[n]` each."""

    domain_N: Int[Tensor, " n"]
    bucket_N: Int[Tensor, " n"]
    content_N: Int[Tensor, " n"]
    token_N: Int[Tensor, " n"]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """The counts of one bank. Every tensor is int64; `sums` holds them by name."""

    shape: Shape
    sums: Mapping[str, Tensor]

    @classmethod
    def empty(
        cls, shape: Shape, wanted: Sequence[str] = DEFAULT, device: torch.device | str = "cpu"
    ) -> Statistics:
        n_layers, n_domains, n_experts = len(shape.layers), len(shape.domains), shape.n_experts
        sizes: dict[str, tuple[int, ...]] = {
            "tokens": (n_layers, n_domains, len(BUCKETS)),
            "counts": (n_layers, n_domains, len(BUCKETS), n_experts),
            "content_counts": (n_layers, len(CONTENT), n_experts),
        }
        if "probabilities" in wanted:
            sizes["probabilities"] = sizes["weights"] = (n_layers, n_domains, n_experts)
        if "entropy" in wanted:
            sizes["entropy"] = (n_layers, n_domains, ENTROPY_BINS)
        if "margin" in wanted:
            sizes["margin"] = (n_layers, n_domains, MARGIN_BINS)
        if "coactivation" in wanted:
            sizes["coactivation"] = (n_layers, n_experts, n_experts)
        if "transitions" in wanted:
            sizes["transitions"] = (max(n_layers - 1, 0), n_experts, n_experts)
        if "vocabulary" in wanted:
            sizes["vocabulary"] = (n_layers, shape.vocab_size, n_experts)
        zeros = {
            name: torch.zeros(size, dtype=torch.int64, device=device)
            for name, size in sizes.items()
        }
        return cls(shape, zeros)

    @property
    def n_tokens(self) -> int:
        """Tokens this bank read, in its first layer (an edit may send others to others)."""
        return int(self.sums["tokens"][0].sum()) if len(self.sums["tokens"]) else 0

    def add(
        self,
        layer: int,
        rows: Rows,
        probs_NE: Float[Tensor, "n e"],
        scores_NE: Float[Tensor, "n e"],
        ids_NK: Int[Tensor, "n k"],
        weights_NK: Float[Tensor, "n k"],
    ) -> None:
        """Count one forward's tokens of one layer, in place."""
        if not torch.isfinite(probs_NE).all():
            raise ValueError(f"layer {layer}: the router's probabilities are not all finite")
        self.add_choices(layer, rows, ids_NK)
        sums, n_experts, k = self._of(layer), self.shape.n_experts, ids_NK.shape[1]
        if "probabilities" in sums:
            fixed_NE = (probs_NE.double() * FIXED).round().long()
            sums["probabilities"].index_add_(0, rows.domain_N, fixed_NE)
            fixed_NK = (weights_NK.double() * FIXED).round().long()
            cell_NK = rows.domain_N[:, None] * n_experts + ids_NK
            sums["weights"].view(-1).index_add_(0, cell_NK.flatten(), fixed_NK.flatten())
        if "entropy" in sums:
            bin_N = (normalised_entropy(probs_NE) * ENTROPY_BINS).long().clamp(max=ENTROPY_BINS - 1)
            _count(sums["entropy"], rows.domain_N * ENTROPY_BINS + bin_N)
        if "margin" in sums and k < n_experts:
            best_NK = scores_NE.topk(k + 1, dim=-1).values
            margin_N = best_NK[:, k - 1] - best_NK[:, k]
            _count(sums["margin"], rows.domain_N * MARGIN_BINS + margin_bin(margin_N))

    def add_choices(self, layer: int, rows: Rows, ids_NK: Int[Tensor, "n k"]) -> None:
        """What follows from the ids alone: also known of other engines' routing."""
        sums, n_experts = self._of(layer), self.shape.n_experts
        group_N = rows.domain_N * len(BUCKETS) + rows.bucket_N
        _count(sums["tokens"], group_N)
        _count(sums["counts"], group_N[:, None] * n_experts + ids_NK)
        _count(sums["content_counts"], rows.content_N[:, None] * n_experts + ids_NK)
        if "coactivation" in sums:
            for piece_NK in ids_NK.split(_EXACT_ROWS):
                chosen_NE = one_hot(piece_NK, n_experts).sum(1).float()
                together_EE = einsum(chosen_NE, chosen_NE, "n e, n f -> e f")
                sums["coactivation"] += together_EE.long()
        if "vocabulary" in sums:
            _count(sums["vocabulary"], rows.token_N[:, None] * n_experts + ids_NK)

    def _of(self, layer: int) -> dict[str, Tensor]:
        at = self.shape.layers.index(layer)
        return {name: x[at] for name, x in self.sums.items() if name != "transitions"}

    def add_transitions(self, layer: int, before_N: Tensor, first_N: Tensor) -> None:
        """From the first choices in the mixture layer before this one, of the same tokens."""
        if "transitions" in self.sums:
            at, n_experts = self.shape.layers.index(layer) - 1, self.shape.n_experts
            _count(self.sums["transitions"][at], before_N * n_experts + first_N)

    def merged(self, other: Statistics, in_place: bool = False) -> Statistics:
        """The statistics of both; domains are joined by name, in alphabetical order.

        `in_place` adds to these where all domains are known already: of thousands of units that
        are merged one by one, no more than two are in memory.
        """
        mine, theirs = self.shape, other.shape
        alike = dataclasses.replace(theirs, domains=mine.domains)
        if alike != mine or set(self.sums) != set(other.sums):
            raise ValueError(
                f"statistics of {mine} ({sorted(self.sums)}) cannot be added to those of {theirs} "
                f"({sorted(other.sums)})"
            )
        domains = tuple(sorted({*mine.domains, *theirs.domains}))
        if in_place and domains == mine.domains:
            for name, x in self.sums.items():
                x += other.spread(name, domains)
            return self
        joined = dataclasses.replace(mine, domains=domains)
        sums = {
            name: self.spread(name, domains) + other.spread(name, domains) for name in self.sums
        }
        return Statistics(joined, sums)

    def spread(self, name: str, domains: tuple[str, ...]) -> Tensor:
        """One sum with its domain axis laid out as `domains`."""
        x = self.sums[name]
        if name not in _BY_DOMAIN or domains == self.shape.domains:
            return x
        place = torch.tensor([domains.index(domain) for domain in self.shape.domains])
        wide = x.new_zeros(x.shape[0], len(domains), *x.shape[2:])
        wide[:, place] = x
        return wide


_BY_DOMAIN = frozenset({"tokens", "counts", "probabilities", "weights", "entropy", "margin"})


def bucket_of(position_N: Int[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Number of the position bucket: the last of `BUCKETS` that is not beyond it."""
    edges = torch.tensor(BUCKETS[1:], device=position_N.device)
    return torch.bucketize(position_N, edges, right=True)


def normalised_entropy(probs_NE: Float[Tensor, "n e"]) -> Float[Tensor, " n"]:
    """-sum p log p / log E, in 0..1; 0 log 0 counts as 0."""
    n_experts = probs_NE.shape[-1]
    if n_experts == 1:
        return torch.zeros_like(probs_NE[:, 0])
    entropy_N: Tensor = torch.special.entr(probs_NE.double()).sum(-1)
    return (entropy_N / math.log(n_experts)).clamp(0, 1)


def margin_bin(margin_N: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Bin i holds margins in (2^(-(i+1)/32), 2^(-i/32)]; the last one all smaller ones, and ties.

    An edited choice can have a negative margin; it counts as a tie.
    """
    octaves_N = -margin_N.double().clamp(min=2.0**-40).log2() * PER_OCTAVE
    return octaves_N.floor().long().clamp(0, MARGIN_BINS - 1)


def _count(sums: Tensor, cell: Tensor) -> None:
    """Add 1 to `sums.flatten()[i]` for every i in `cell`."""
    flat = sums.view(-1)
    flat += torch.bincount(cell.flatten(), minlength=len(flat))
