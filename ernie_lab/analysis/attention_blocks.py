"""Causal attention weights a block of queries at a time, and sums over their keys.

With p = softmax(s) over the scores of a query, log p_t = s_t - log Z, so that

    -sum_t p_t log p_t = log Z - sum_t p_t s_t,    log Z = max(s) - log max(p),

which takes no logarithm of each weight, and no map of queries x keys ever exists.

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
from torch.nn.functional import linear, pad

# The score of a later key: 0 after the softmax and, other than -inf, 0 times it.
_LATER = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A few queries, at positions `pos_S`, over the keys up to the last of them; all fp32."""

    scores_GXT: Float[Tensor, "g x t"]
    weights_GXT: Float[Tensor, "g x t"]
    pos_S: Int[Tensor, " s"]

    def by_head(self, x_GXC: Tensor) -> Tensor:
        """`[h s c]`; head i reads key/value head i // m."""
        return rearrange(x_GXC, "g (m s) c -> (g m) s c", s=len(self.pos_S))

    def pattern(self) -> Float[Tensor, "h s t"]:
        return self.by_head(self.weights_GXT)

    def reduced(
        self, summed_CT: Float[Tensor, "c t"], top: int, edges: Sequence[int]
    ) -> dict[str, Tensor]:
        """Every reduction, `[h s]` or `[h s …]`; see `attention_summary` for what each is.

        `summed_CT` are the `summands` of all keys. The scores are used up.
        """
        weights_HST = self.pattern()
        own_HS1 = repeat(self.pos_S, "s -> h s 1", h=len(weights_HST))
        means_HSC = self.by_head(linear(self.weights_GXT, summed_CT[:, : weights_HST.shape[-1]]))
        largest_GX1 = self.weights_GXT.amax(-1, keepdim=True)
        log_z_GX1 = self.scores_GXT.amax(-1, keepdim=True) - largest_GX1.log()
        mean_score_GX1 = self.scores_GXT.mul_(self.weights_GXT).sum(-1, keepdim=True)
        reduced = {
            # Differences of like numbers: a certain head would come out at -1e-7.
            "entropy": self.by_head(log_z_GX1 - mean_score_GX1)[..., 0].clamp(min=0),
            "distance": (self.pos_S - means_HSC[..., 0]).clamp(min=0),
            "largest": self.by_head(largest_GX1)[..., 0],
            "first": weights_HST[..., 0],
            "own": weights_HST.gather(-1, own_HS1)[..., 0],
            "mass": means_HSC[..., 1:],
        }
        if top:
            reduced |= _largest(weights_HST, top)
        if edges:
            reduced["distance_mass"] = _by_distance(weights_HST, self.pos_S, edges)
        return reduced


def summands(columns_TC: Float[Tensor, "t c"]) -> Float[Tensor, "c t"]:
    """What weights are summed over, for every block alike: position, then the columns."""
    position_T = torch.arange(len(columns_TC), device=columns_TC.device, dtype=torch.float32)
    return torch.cat([position_T[None], columns_TC.T])


def blocks(
    q_SHA: Float[Tensor, "s h a"],
    k_TGA: Float[Tensor, "t g a"],
    pos_S: Int[Tensor, " s"],
    block_bytes: int,
) -> Iterator[Block]:
    """The queries at rising positions `pos_S`, over all keys of a sequence, in bounded memory.

    `block_bytes` bounds the scores of a block, and its weights take as much. All blocks have
    theirs in the same memory (a fresh, larger one for each would cost its page faults, a third of
    the time): what is read of a block is read before the next one is asked for.
    """
    n_heads, width = q_SHA.shape[1:]
    n_keys, n_groups = k_TGA.shape[:2]
    size = max(1, block_bytes // (4 * n_heads * n_keys))
    k_GTA = rearrange(k_TGA.float(), "t g a -> g t a").contiguous()
    room_2N = k_GTA.new_empty(2, n_heads * min(size, len(pos_S)) * n_keys)
    for here_S, q_of_block in zip(pos_S.split(size), q_SHA.split(size), strict=True):
        q_GXA = rearrange(
            q_of_block.float() / math.sqrt(width), "s (g m) a -> g (m s) a", g=n_groups
        )
        first, end = int(here_S[0]), int(here_S[-1]) + 1
        shape = (n_groups, q_GXA.shape[1], end)
        scores_GXT, weights_GXT = (room_N[: math.prod(shape)].view(shape) for room_N in room_2N)
        torch.bmm(q_GXA, k_GTA[:, :end].mT, out=scores_GXT)
        # Only keys after the block's first query can be later than any of its queries.
        key_T = torch.arange(first + 1, end, device=here_S.device)
        later_XT = repeat(key_T > here_S[:, None], "s t -> (m s) t", m=n_heads // n_groups)
        scores_GXT[..., first + 1 :].masked_fill_(later_XT, _LATER)
        torch.softmax(scores_GXT, -1, out=weights_GXT)
        yield Block(scores_GXT, weights_GXT, here_S)


def distance_edges(n_keys: int) -> list[int]:
    """Distances at which bins begin: 0, 1, 2, 4, 8, …, below `n_keys`."""
    return [0, *(2**i for i in range((n_keys - 1).bit_length()))]


def _largest(weights_HST: Tensor, top: int) -> dict[str, Tensor]:
    """The largest weights and their keys; -1 and 0 where a query has fewer keys."""
    found = weights_HST.topk(min(top, weights_HST.shape[-1]), dim=-1)
    short = top - found.values.shape[-1]
    weight_HSN = pad(found.values, (0, short))
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
