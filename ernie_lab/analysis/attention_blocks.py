"""Causal attention weights a block of queries at a time, and sums over their keys.

With weights w_t = exp(q.k_t - m), m the largest score, one product of the weights with the matrix
[k, 1, columns] gives the normaliser, every weighted sum of the columns, and the entropy

    -sum_t p_t log p_t = log Z + m - q . sum_t p_t k_t,    p = w / Z,

so that scores need not be kept beside the weights and no map of queries x keys ever exists.

Letters: S queries, T keys, H query heads in G groups of M, A per-head width, C columns; X = M S.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A few queries: `weights_GXT` are exp(score - largest), 0 for later keys; all fp32."""

    q_GXA: Float[Tensor, "g x a"]
    k_GTA: Float[Tensor, "g t a"]
    weights_GXT: Float[Tensor, "g x t"]
    largest_GX1: Float[Tensor, "g x 1"]
    pos_S: Int[Tensor, " s"]

    def by_head(self, x_GXC: Tensor) -> Tensor:
        """`[h s c]`; head i reads key/value head i // m."""
        return rearrange(x_GXC, "g (m s) c -> (g m) s c", s=len(self.pos_S))

    def pattern(self) -> Float[Tensor, "h s t"]:
        """The weights, normalised."""
        return self.by_head(self.weights_GXT / self.weights_GXT.sum(-1, keepdim=True))

    def reduced(
        self, summed_GTC: Float[Tensor, "g t c"], top: int, edges: Sequence[int]
    ) -> dict[str, Tensor]:
        """Every reduction, `[h s]` or `[h s …]`; see `attention_summary` for what each is.

        `summed_GTC` are the `summands` of all keys.
        """
        n_keys, width = self.k_GTA.shape[1:]
        sums_GXC = self.weights_GXT @ summed_GTC[:, :n_keys]
        normaliser_GX1 = sums_GXC[..., width : width + 1]
        means_GXC = sums_GXC / normaliser_GX1
        mean_score_GX1 = (self.q_GXA * means_GXC[..., :width]).sum(-1, keepdim=True)
        entropy_GX1 = normaliser_GX1.log() + self.largest_GX1 - mean_score_GX1
        weights_HST, normaliser_HS1 = self.by_head(self.weights_GXT), self.by_head(normaliser_GX1)
        own_HS1 = repeat(self.pos_S, "s -> h s 1", h=len(weights_HST))
        mean_pos_HS = self.by_head(means_GXC[..., width + 1 : width + 2])[..., 0]
        reduced = {
            # Differences of like numbers: a certain head would come out at -1e-7.
            "entropy": self.by_head(entropy_GX1)[..., 0].clamp(min=0),
            "distance": (self.pos_S - mean_pos_HS).clamp(min=0),
            "largest": 1 / normaliser_HS1[..., 0],
            "first": weights_HST[..., 0] / normaliser_HS1[..., 0],
            "own": (weights_HST.gather(-1, own_HS1) / normaliser_HS1)[..., 0],
            "mass": self.by_head(means_GXC[..., width + 2 :]),
        }
        if top:
            reduced |= _largest(weights_HST, normaliser_HS1, top)
        if edges:
            reduced["distance_mass"] = _by_distance(weights_HST / normaliser_HS1, self.pos_S, edges)
        return reduced


def summands(k_TGA: Float[Tensor, "t g a"], columns_TC: Float[Tensor, "t c"]) -> Tensor:
    """What weights are summed over, for every block alike: keys, 1, position, then the columns."""
    n_keys, n_groups = k_TGA.shape[:2]
    position_T1 = torch.arange(n_keys, device=k_TGA.device, dtype=torch.float32)[:, None]
    beside_TC = torch.cat([torch.ones_like(position_T1), position_T1, columns_TC], dim=-1)
    k_GTA = rearrange(k_TGA.float(), "t g a -> g t a")
    return torch.cat([k_GTA, repeat(beside_TC, "t c -> g t c", g=n_groups)], dim=-1)


def blocks(
    q_SHA: Float[Tensor, "s h a"],
    k_TGA: Float[Tensor, "t g a"],
    pos_S: Int[Tensor, " s"],
    block_bytes: int,
) -> Iterator[Block]:
    """The queries at rising positions `pos_S`, over all keys of a sequence, in bounded memory.

    `block_bytes` bounds the scores of a block. All blocks have theirs in the same memory (a fresh,
    larger one for each would cost its page faults, a third of the time): what is read of a block
    is read before the next one is asked for.
    """
    n_heads, width = q_SHA.shape[1:]
    n_keys, n_groups = k_TGA.shape[:2]
    size = max(1, block_bytes // (4 * n_heads * n_keys))
    k_GTA = rearrange(k_TGA.float(), "t g a -> g t a").contiguous()
    room = k_GTA.new_empty(n_heads * min(size, len(pos_S)) * n_keys)
    for here_S, q_of_block in zip(pos_S.split(size), q_SHA.split(size), strict=True):
        q_GXA = rearrange(
            q_of_block.float() / math.sqrt(width), "s (g m) a -> g (m s) a", g=n_groups
        )
        first, end = int(here_S[0]), int(here_S[-1]) + 1
        shape = (n_groups, q_GXA.shape[1], end)
        scores_GXT = room[: math.prod(shape)].view(shape)
        torch.bmm(q_GXA, k_GTA[:, :end].mT, out=scores_GXT)
        # Only keys after the block's first query can be later than any of its queries.
        key_T = torch.arange(first + 1, end, device=here_S.device)
        later_XT = repeat(key_T > here_S[:, None], "s t -> (m s) t", m=n_heads // n_groups)
        scores_GXT[..., first + 1 :].masked_fill_(later_XT, -math.inf)
        largest_GX1 = scores_GXT.amax(-1, keepdim=True)
        weights_GXT = scores_GXT.sub_(largest_GX1).exp_()
        yield Block(q_GXA, k_GTA[:, :end], weights_GXT, largest_GX1, here_S)


def distance_edges(n_keys: int) -> list[int]:
    """Distances at which bins begin: 0, 1, 2, 4, 8, …, below `n_keys`."""
    return [0, *(2**i for i in range((n_keys - 1).bit_length()))]


def _largest(weights_HST: Tensor, normaliser_HS1: Tensor, top: int) -> dict[str, Tensor]:
    """The largest weights and their keys; -1 and 0 where a query has fewer keys."""
    found = weights_HST.topk(min(top, weights_HST.shape[-1]), dim=-1)
    short = top - found.values.shape[-1]
    weight_HSN = pad(found.values / normaliser_HS1, (0, short))
    key_HSN = pad(found.indices, (0, short)).masked_fill(weight_HSN == 0, -1)
    return {"top_key": key_HSN, "top_weight": weight_HSN}


def _by_distance(pattern_HST: Tensor, pos_S: Tensor, edges: Sequence[int]) -> Tensor:
    """`[h s bin]`: running sums over keys, read where each bin begins."""
    running_HST = pad(pattern_HST.cumsum(-1), (1, 0))
    beyond = pattern_HST.shape[-1]
    edge_N = torch.tensor([*edges, beyond], device=pos_S.device)
    # The keys at least this far back are the first `pos + 1 - edge` ones.
    upto_SN = (pos_S[:, None] + 1 - edge_N).clamp(min=0)
    read_HSN = running_HST.gather(-1, repeat(upto_SN, "s n -> h s n", h=len(running_HST)))
    return (read_HSN[..., :-1] - read_HSN[..., 1:]).clamp(min=0)
