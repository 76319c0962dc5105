"""How sure an average is: a paired bootstrap over documents.

Tokens of one text are not independent, so whole documents are drawn, with all windows of each.
Both sides of a difference come from the same draw (that is the pairing), and every condition of
a comparison sees the same draws, so that differences between conditions are paired too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """An average and its 95 % percentile interval; the bounds are NaN for a single document."""

    value: float
    low: float
    high: float
    n: int


def draws_of(n_documents: int, n_draws: int, seed: int) -> NDArray[np.int64]:
    """How often each document is drawn, `[draw document]`: n of n, with replacement."""
    if n_documents < 1 or n_draws < 1:
        raise ValueError(f"{n_documents} documents and {n_draws} draws; both must be at least 1")
    rng = np.random.default_rng(seed)
    shares = np.full(n_documents, 1 / n_documents)
    return np.asarray(rng.multinomial(n_documents, shares, size=n_draws), dtype=np.int64)


def per_document(
    values: ArrayLike, document: ArrayLike, n_documents: int
) -> tuple[Floats, NDArray[np.int64]]:
    """Sum and number of the values of each document; NaN is no value."""
    values_N = np.asarray(values, dtype=np.float64)
    document_N: NDArray[Any] = np.asarray(document)
    there_N = ~np.isnan(values_N)
    sums = np.bincount(document_N[there_N], values_N[there_N], minlength=n_documents)
    counts = np.bincount(document_N[there_N], minlength=n_documents)
    return np.asarray(sums, dtype=np.float64), counts


def estimate(values: ArrayLike, document: ArrayLike, draws: NDArray[np.int64]) -> Estimate:
    """mean = sum of all values / their number, over draws of whole documents.

    A document counts by its number of values, as in a mean over tokens. Source: the cluster
    bootstrap for ratio estimators (Davison and Hinkley 1997, section 3.8), percentile interval.
    `document` numbers the document of each value from 0; `draws` is of `draws_of`.
    """
    sums, counts = per_document(values, document, draws.shape[1])
    n = int(counts.sum())
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan, 0)
    value = float(sums.sum() / n)
    if np.count_nonzero(counts) < 2:
        return Estimate(value, np.nan, np.nan, n)
    drawn = draws @ counts
    # A draw of documents without any value says nothing about the mean.
    means = (draws @ sums)[drawn > 0] / drawn[drawn > 0]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)
