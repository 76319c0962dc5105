"""Means over queries and their intervals, from maps that come one at a time.

Letters: L layers, M measures, H heads, G groups of queries, D documents.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.attention_measures import Floats, Measured
from ernie_lab.interventions.bootstrap import draws_of, ends


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """Which queries count, in which group; and the document of each sequence."""

    groups: tuple[Hashable, ...]
    sequences: tuple[int, ...]
    document: tuple[int, ...]
    _group: dict[tuple[int, int], int]

    @property
    def n_documents(self) -> int:
        return max(self.document) + 1

    def group(self, sequence: int, query_S: NDArray[np.int64]) -> NDArray[np.int64]:
        """The group's number of each query, -1 for those that do not count."""
        return np.array([self._group.get((sequence, int(pos)), -1) for pos in query_S], dtype=int)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """One map: its measures, and the group of each query, -1 for those that do not count."""

    layer: int
    document: int
    heads: list[int]
    found: Measured
    group_S: NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Tally:
    """`value`, `low`, `high` `[m l h g]`; `even` and `n` `[m l g]`. NaN: no such head or query."""

    names: tuple[str, ...]
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    groups: tuple[Hashable, ...]
    n_documents: int
    value: Floats
    low: Floats
    high: Floats
    even: Floats
    n: NDArray[np.int64]


def counted(
    trace: Any,
    queries: Any,
    skip: int,
    by: Any,
    documents: Sequence[Hashable] | None,
) -> Counted:
    """From the arguments of `attention_statistics`; no query at all raises."""
    table = trace.tokens
    sequences = tuple(dict.fromkeys(int(one) for one in table["sequence"]))
    labels = [""] * len(table) if by is None else _labels(table, by)
    there_N = ~np.asarray(pd.isna(pd.Series(labels, dtype=object)))
    groups = tuple(dict.fromkeys(one for one, there in zip(labels, there_N, strict=True) if there))
    counts_N = (table["pos"] >= skip).to_numpy() & _chosen(table, queries) & there_N
    if not counts_N.any():
        raise ValueError(
            f"no query counts: queries={queries if isinstance(queries, str) else 'a mask'}, "
            f"skip={skip} leave none of {len(table)} tokens"
        )
    places = zip(table["sequence"], table["pos"], labels, counts_N, strict=True)
    group = {(int(s), int(p)): groups.index(label) for s, p, label, counts in places if counts}
    if documents is None:
        return Counted(groups, sequences, tuple(range(len(sequences))), group)
    if len(documents) != len(sequences):
        raise ValueError(
            f"{len(documents)} documents for {len(sequences)} sequences: one label for each"
        )
    known = list(dict.fromkeys(documents))
    return Counted(groups, sequences, tuple(known.index(one) for one in documents), group)


def _chosen(table: Any, queries: Any) -> NDArray[np.bool_]:
    if isinstance(queries, str):
        if queries == "all":
            return np.ones(len(table), bool)
        if queries not in ("prefill", "decode"):
            raise ValueError(
                f'queries={queries!r}: "all", "prefill", "decode", or True and False per token'
            )
        return np.asarray(table["phase"] == queries, dtype=bool)
    mask: NDArray[Any] = np.asarray(queries)
    if mask.dtype != bool or mask.shape != (len(table),):
        raise ValueError(
            f"queries of shape {mask.shape} and type {mask.dtype}: expected True or False for each "
            f"of the {len(table)} rows of trace.tokens"
        )
    return mask


def _labels(table: Any, by: Any) -> list[Hashable]:
    if isinstance(by, str):
        if by not in table:
            raise ValueError(f"by={by!r} is no column of trace.tokens: {', '.join(table)}")
        return list(table[by].tolist())
    labels = list(np.asarray(by).tolist())
    if len(labels) != len(table):
        raise ValueError(f"by has {len(labels)} labels for the {len(table)} rows of trace.tokens")
    return labels


def tallied(
    pieces: Iterable[Piece], groups: Sequence[Hashable], n_documents: int, n_draws: int, seed: int
) -> Tally:
    """Means and percentile intervals of a bootstrap over documents (see `interventions.bootstrap`).

    A document counts by its number of queries, as in a mean over queries.
    """
    parts = [(one, *_summed(one, len(groups))) for one in pieces]
    layers = tuple(sorted({one.layer for one, *_ in parts}))
    heads = tuple(sorted({head for one, *_ in parts for head in one.heads}))
    names = parts[0][0].found.names
    shape = (len(names), len(layers), len(groups), n_documents)
    n, even = np.zeros(shape, dtype=np.int64), np.zeros(shape)
    # NaN where a head of a layer was never kept, so that its mean is no number.
    sums = np.full((*shape[:2], len(heads), *shape[2:]), np.nan)
    for one, sums_MHG, even_MG, n_MG in parts:
        layer, rows = layers.index(one.layer), [heads.index(head) for head in one.heads]
        here = sums[:, layer, rows, :, one.document]
        sums[:, layer, rows, :, one.document] = np.nan_to_num(here) + np.moveaxis(sums_MHG, 1, 0)
        even[:, layer, :, one.document] += even_MG
        n[:, layer, :, one.document] += n_MG
    kept = ~np.isnan(sums).all(-1, keepdims=True)
    sums = np.where(kept, np.nan_to_num(sums), np.nan)
    total = n.sum(-1)
    low, high = _interval(sums, n, draws_of(n_documents, n_draws, seed))
    return Tally(
        names, layers, heads, tuple(groups), n_documents,
        _over(sums.sum(-1), total[:, :, None]), low, high, _over(even.sum(-1), total), total,
    )  # fmt: skip


def _summed(one: Piece, n_groups: int) -> tuple[Floats, Floats, NDArray[np.int64]]:
    """Over the queries of each group: sums `[m h g]`, sums of `even` `[m g]`, their number."""
    member_SG = one.group_S[:, None] == np.arange(n_groups)
    there_MS = ~np.isnan(one.found.even)
    n_MG = there_MS.astype(np.int64) @ member_SG
    even_MG = np.nan_to_num(one.found.even) @ member_SG
    return np.nan_to_num(one.found.values) @ member_SG, even_MG, n_MG


def _over(sums: Floats, n: NDArray[np.int64]) -> Floats:
    return np.where(n > 0, sums / np.maximum(n, 1), np.nan)


def _interval(
    sums: Floats, n: NDArray[np.int64], draws_RD: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    low, high = np.full(sums.shape[:-1], np.nan), np.full(sums.shape[:-1], np.nan)
    # Layer by layer: all draws of all heads at one time would be the largest array here.
    for measure, layer, group in np.ndindex(*n.shape[:-1]):
        if np.count_nonzero(n[measure, layer, group]) < 2:
            continue
        drawn_R = draws_RD @ n[measure, layer, group]
        means_RH = draws_RD @ sums[measure, layer, :, group].T
        # A draw of documents without such a query says nothing about the mean.
        means_RH = means_RH[drawn_R > 0] / drawn_R[drawn_R > 0, None]
        low[measure, layer, :, group], high[measure, layer, :, group] = ends(means_RH)
    return low, high
