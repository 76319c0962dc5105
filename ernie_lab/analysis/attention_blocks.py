"""Causal attention weights a block of queries at a time, and sums over their keys.

With p = softmax(s) over the scores of a query, log p_t = s_t - log Z, so that

    -sum_t p_t log p_t = log Z - sum_t p_t s_t = sum_t p_t (max s - s_t) - log max p,

which takes no logarithm of each weight and no difference of large scores, and no map of queries x
keys ever exists.

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

# The score of a later key: 0 after the softmax. Other than with -inf, 0 times it is 0, and so is
# 0 times its distance from a score.
_LATER = torch.finfo(torch.float32).min / 2
# Keys of a block are a multiple of it: rows of whole chunks can be looked at chunk by chunk.
_CHUNK = 64


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """A few queries, at positions `pos_S`, over the keys up to the last of them; all fp32.

    Some later keys follow, and keys that do not exist: `_CHUNK` divides their number.
    """

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
        below_GXT = self.scores_GXT.sub_(self.scores_GXT.amax(-1, keepdim=True))
        mean_below_GX1 = below_GXT.mul_(self.weights_GXT).sum(-1, keepdim=True)
        reduced = {
            # Differences of like numbers: a certain head would come out at -1e-7.
            "entropy": self.by_head(-largest_GX1.log() - mean_below_GX1)[..., 0].clamp(min=0),
            "distance": (self.pos_S - means_HSC[..., 0]).clamp(min=0),
            "largest": self.by_head(largest_GX1)[..., 0],
            "first": weights_HST[..., 0].clone(),
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
    return _in_chunks(torch.cat([position_T[None], columns_TC.T]))


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
    k_GAT = _in_chunks(rearrange(k_TGA.float(), "t g a -> g a t"))
    k_GTA = rearrange(k_GAT, "g a t -> g t a").contiguous()
    room_2N = k_GTA.new_empty(2, n_heads * min(size, len(pos_S)) * k_GTA.shape[1])
    for here_S, q_of_block in zip(pos_S.split(size), q_SHA.split(size), strict=True):
        q_GXA = rearrange(
            q_of_block.float() / math.sqrt(width), "s (g m) a -> g (m s) a", g=n_groups
        )
        first, end = int(here_S[0]), _whole(int(here_S[-1]) + 1)
        shape = (n_groups, q_GXA.shape[1], end)
        scores_GXT, weights_GXT = (room_N[: math.prod(shape)].view(shape) for room_N in room_2N)
        torch.bmm(q_GXA, k_GTA[:, :end].mT, out=scores_GXT)
        # Only keys after the block's first query can be later than any of its queries.
        key_T = torch.arange(first + 1, end, device=here_S.device)
        later_XT = repeat(key_T > here_S[:, None], "s t -> (m s) t", m=n_heads // n_groups)
        scores_GXT[..., first + 1 :].masked_fill_(later_XT, _LATER)
        torch.softmax(scores_GXT, -1, out=weights_GXT)
        yield Block(scores_GXT, weights_GXT, here_S)


def _whole(n_keys: int) -> int:
    return -(-n_keys // _CHUNK) * _CHUNK


def _in_chunks(x_CT: Tensor) -> Tensor:
    """Zeros after the last key."""
    return pad(x_CT, (0, _whole(x_CT.shape[-1]) - x_CT.shape[-1]))


def distance_edges(n_keys: int) -> list[int]:
    """Distances at which bins begin: 0, 1, 2, 4, 8, …, below `n_keys`."""
    return [0, *(2**i for i in range((n_keys - 1).bit_length()))]


def _largest(weights_HST: Tensor, top: int) -> dict[str, Tensor]:
    """The largest weights and their keys; -1 and 0 where a query has fewer keys."""
    n_keys = weights_HST.shape[-1]
    if n_keys < 2 * top * _CHUNK:
        weight_HSN, key_HSN = weights_HST.topk(min(top, n_keys))
    else:
        weight_HSN, key_HSN = _largest_of_chunks(weights_HST, top)
    short = top - weight_HSN.shape[-1]
    weight_HSN, key_HSN = pad(weight_HSN, (0, short)), pad(key_HSN, (0, short))
    return {"top_key": key_HSN.masked_fill(weight_HSN == 0, -1), "top_weight": weight_HSN}


def _largest_of_chunks(weights_HST: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """`weights_HST.topk(top)`, from the `top` chunks with the largest maxima: it is in these."""
    chunks_HSCW = weights_HST.unflatten(-1, (-1, _CHUNK))
    rows, n_chunks = chunks_HSCW.shape[:2], chunks_HSCW.shape[2]
    chosen_HSN = chunks_HSCW.amax(-1).topk(top, sorted=False).indices
    row_HS1 = torch.arange(rows.numel(), device=chosen_HSN.device).view(*rows, 1)
    flat_N = (row_HS1 * n_chunks + chosen_HSN).flatten()
    among_HSX = chunks_HSCW.flatten(0, 2).index_select(0, flat_N).view(*rows, -1)
    weight_HSN, place_HSN = among_HSX.topk(top)
    return weight_HSN, chosen_HSN.gather(-1, place_HSN // _CHUNK) * _CHUNK + place_HSN % _CHUNK


def _by_distance(weights_HST: Tensor, pos_S: Tensor, edges: Sequence[int]) -> Tensor:
    """`[h s bin]`: the weight of keys at distances from each edge up to the next."""
    first, last = int(pos_S[0]), int(pos_S[-1])
    neighbours = last - first == len(pos_S) - 1
    if neighbours and not any(first < edge <= last for edge in edges):
        return _by_distance_skewed(weights_HST, first, edges)
    # Running sums over keys, read where each bin begins.
    running_HST = pad(weights_HST.cumsum(-1), (1, 0))
    beyond = weights_HST.shape[-1]
    edge_N = torch.tensor([*edges, beyond], device=pos_S.device)
    # The keys at least this far back are the first `pos + 1 - edge` ones.
    upto_SN = (pos_S[:, None] + 1 - edge_N).clamp(min=0)
    read_HSN = running_HST.gather(-1, repeat(upto_SN, "s n -> h s n", h=len(running_HST)))
    return (read_HSN[..., :-1] - read_HSN[..., 1:]).clamp(min=0)


def _by_distance_skewed(weights_HST: Tensor, first: int, edges: Sequence[int]) -> Tensor:
    """The same for neighbouring queries, of which all or none reach each edge: five times faster.

    Each row read one key later than the one above, a column is one distance, the last one 0, and a
    bin is a few columns. What that leaves out, keys 0 to i - 1 of row i, is farther than all of it.
    """
    n_heads, n_queries, n_keys = weights_HST.shape
    skewed_HSD = weights_HST.as_strided(
        (n_heads, n_queries, first + 1), (n_queries * n_keys, n_keys + 1, 1)
    )
    reached = [edge for edge in edges if edge <= first]
    masses = [
        skewed_HSD[..., first + 1 - far : first + 1 - near].sum(-1)
        for near, far in zip(reached, [*reached[1:], first + 1], strict=True)
    ]
    masses[-1] += weights_HST[..., :n_queries].tril(-1).sum(-1)
    masses += [torch.zeros_like(masses[0])] * (len(edges) - len(reached))
    return torch.stack(masses, dim=-1)
