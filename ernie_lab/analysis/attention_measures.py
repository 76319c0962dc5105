"""What one attention map is like: a number for each head and query, beside that of looking evenly.

A query that looks evenly gives each of the n keys that it can see the weight 1/n. That is the
reference of every measure: a head that has learned nothing about where to look is near it.

Letters: M measures, H heads, S queries, T keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

# Unit of each measure, in the order of every table.
UNITS: Mapping[str, str] = MappingProxyType(
    {
        "entropy": "nats",
        "effective_keys": "keys",
        "sink": "share",
        "self": "share",
        "previous": "share",
        "distance": "tokens",
        "duplicate": "share",
        "induction": "share",
    }
)
TOWER_UNITS: Mapping[str, str] = MappingProxyType(
    {"entropy": "nats", "effective_keys": "keys", "self": "share", "distance": "patches"}
)
# Weights of bf16 are right to 0.4 %; a row that is further off was edited, or is no pattern.
_ROW_SUM = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """`values` `[m h s]` and, of looking evenly, `even` `[m s]`; NaN where a query has none."""

    names: tuple[str, ...]
    values: Floats
    even: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Which keys of a sequence each query can see, and which of them a measure asks for."""

    query_S: NDArray[np.int64]
    key_T: NDArray[np.int64]
    visible_ST: Bools
    duplicate_ST: Bools
    induction_ST: Bools

    @classmethod
    def of(
        cls,
        query_pos: ArrayLike,
        key_pos: ArrayLike,
        ids: ArrayLike | None = None,
        comparable: ArrayLike | None = None,
    ) -> Places:
        """From positions `[s]` and `[t]`, and the keys' token ids `[t]`.

        `comparable` `[t]` is False for tokens whose id says nothing about what they are, such as
        the placeholders of pictures; without ids no token equals another.
        """
        query_S, key_T = (np.asarray(pos, dtype=np.int64) for pos in (query_pos, key_pos))
        if (np.diff(key_T) <= 0).any() or not np.isin(query_S, key_T).all():
            raise ValueError(
                "key positions must rise and hold those of all queries: pass a pattern of one "
                "sequence, as trace.pattern(layer, sequence) gives it"
            )
        visible_ST = key_T[None, :] <= query_S[:, None]
        earlier_ST = key_T[None, :] < query_S[:, None]
        if ids is None:
            equal_ST = np.zeros_like(visible_ST)
        else:
            id_T = np.asarray(ids)
            alike_T = np.ones(len(id_T), bool) if comparable is None else np.asarray(comparable)
            own_S = np.searchsorted(key_T, query_S)
            equal_ST = id_T[own_S][:, None] == id_T[None, :]
            equal_ST &= alike_T[own_S][:, None] & alike_T[None, :]
        duplicate_ST = equal_ST & earlier_ST
        return cls(query_S, key_T, visible_ST, duplicate_ST, followers(duplicate_ST, earlier_ST))


def followers(duplicate_ST: Bools, earlier_ST: Bools) -> Bools:
    """The keys right after an earlier occurrence of the query's token, up to the one before it."""
    after_ST = np.zeros_like(duplicate_ST)
    after_ST[:, 1:] = duplicate_ST[:, :-1]
    return np.asarray(after_ST & earlier_ST)


def measure(pattern_HST: ArrayLike, places: Places, first: int = 1) -> Measured:
    """Every measure of `UNITS` for each head and query of a causal pattern `[h s t]`.

    For a query at position i with weights a_j on the keys j <= i of which n are visible:

    - entropy: -sum_j a_j ln a_j; evenly ln n
    - effective_keys: exp(entropy), the number of keys among which looking evenly is as spread
    - sink: sum of a_j over the `first` first tokens (Xiao et al. 2023, arXiv:2309.17453)
    - self: a_i; previous: a_(i-1), none at the first token
    - distance: sum_j a_j (i - j), in tokens
    - duplicate: sum of a_j over j < i with the same token (duplicate-token heads, Wang et al.
      2022, arXiv:2211.00593)
    - induction: sum of a_(j+1) over j < i - 1 with the same token, what came next last time: the
      prefix-matching score of Olsson et al. 2022 (arXiv:2209.11895), who average it over repeated
      random tokens. Here all earlier occurrences count together.

    A query without an earlier occurrence has neither of the last two.
    """
    weights_HST = checked(pattern_HST, places.visible_ST.shape)
    n_S = places.visible_ST.sum(1)
    away_ST = (places.query_S[:, None] - places.key_T[None, :]).astype(np.float64)
    masks = {
        "sink": places.visible_ST & (places.key_T < first)[None, :],
        "self": away_ST == 0,
        "previous": away_ST == 1,
        "duplicate": places.duplicate_ST,
        "induction": places.induction_ST,
    }
    entropy_HS = entropies(weights_HST)
    values = {"entropy": entropy_HS, "effective_keys": np.exp(entropy_HS)}
    even = {"entropy": np.log(n_S), "effective_keys": n_S.astype(np.float64)}
    values["distance"] = weighted(weights_HST, away_ST)
    even["distance"] = (away_ST * places.visible_ST).sum(1) / n_S
    for name, mask_ST in masks.items():
        there_S = mask_ST.any(1)
        values[name] = np.where(there_S, weighted(weights_HST, mask_ST), np.nan)
        even[name] = np.where(there_S, mask_ST.sum(1) / n_S, np.nan)
    return collected(UNITS, values, even)


def measure_distances(pattern_HST: ArrayLike, places: Places, edges: Sequence[int]) -> Measured:
    """Share of the weight by distance: bin b holds distances edges[b] <= i - j < edges[b+1].

    A query that has no key so far away has 0 there, of its own and evenly.
    """
    weights_HST = checked(pattern_HST, places.visible_ST.shape)
    away_ST = places.query_S[:, None] - places.key_T[None, :]
    n_S = places.visible_ST.sum(1)
    values, even = {}, {}
    for low, high in pairwise(edges):
        mask_ST = (away_ST >= low) & (away_ST < high)
        name = f"{low}" if high == low + 1 else f"{low}-{high - 1}"
        values[name], even[name] = weighted(weights_HST, mask_ST), mask_ST.sum(1) / n_S
    return collected(values, values, even)


def measure_patches(pattern_HST: ArrayLike, row_S: ArrayLike, col_S: ArrayLike) -> Measured:
    """Every measure of `TOWER_UNITS`, for the patches of one frame, which all see each other.

    distance: sum_j a_j sqrt((row_i - row_j)^2 + (col_i - col_j)^2), in patches.
    """
    rows, cols = (np.asarray(at, dtype=np.float64) for at in (row_S, col_S))
    away_SS = np.hypot(rows[:, None] - rows[None, :], cols[:, None] - cols[None, :])
    weights_HSS = checked(pattern_HST, away_SS.shape)
    n = len(rows)
    entropy_HS = entropies(weights_HSS)
    own_HS = np.diagonal(weights_HSS, axis1=1, axis2=2).astype(np.float64)
    values = {
        "entropy": entropy_HS,
        "effective_keys": np.exp(entropy_HS),
        "self": own_HS,
        "distance": weighted(weights_HSS, away_SS),
    }
    even = {
        "entropy": np.full(n, np.log(n)),
        "effective_keys": np.full(n, float(n)),
        "self": np.full(n, 1 / n),
        "distance": away_SS.mean(1),
    }
    return collected(TOWER_UNITS, values, even)


def collected(
    names: Mapping[str, Any], values: Mapping[str, Floats], even: Mapping[str, Floats]
) -> Measured:
    order = tuple(names)
    return Measured(order, np.stack([values[n] for n in order]), np.stack([even[n] for n in order]))


def checked(pattern_HST: ArrayLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """A pattern `[h s t]` whose rows sum to 1, as it was recorded."""
    weights_HST = np.asarray(pattern_HST)
    if weights_HST.ndim != 3 or weights_HST.shape[1:] != shape:
        raise ValueError(
            f"a pattern of shape {weights_HST.shape} for {shape[0]} queries and {shape[1]} keys: "
            "expected [head, query, key]"
        )
    sums_HS = weights_HST.sum(-1, dtype=np.float64)
    off_HS = ~(np.abs(sums_HS - 1) <= _ROW_SUM)
    if off_HS.any():
        head, query = np.argwhere(off_HS)[0].tolist()
        raise ValueError(
            f"the weights of query row {query} in head row {head} sum to "
            f"{sums_HS[head, query]:.3g}, expected 1: pass patterns, not scores; a head that an "
            "edit cut has no statistics"
        )
    return weights_HST


def entropies(weights_HST: NDArray[Any]) -> Floats:
    """`[h s]` in nats; 0 ln 0 counts as 0. One head at a time, for the memory's sake."""
    from scipy.special import entr

    return np.stack([np.asarray(entr(map_ST), np.float64).sum(-1) for map_ST in weights_HST])


def weighted(weights_HST: NDArray[Any], by_ST: NDArray[Any]) -> Floats:
    """sum_t a_t by_t for each head and query `[h s]`."""
    by = by_ST.astype(np.float64)
    return np.stack([np.einsum("st,st->s", map_ST, by) for map_ST in weights_HST])
