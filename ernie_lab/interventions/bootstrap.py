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
# A "95 %" percentile interval of a mean over 2 documents held the true mean in 51 % of simulations
# (normal values), over 3 in 74 %, over 5 in 81 %, over 6 in 87 %, over 20 in 92 %.
FEW_DOCUMENTS = 6


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


def few_drawn(n_documents: int) -> str:
    """What a caption adds to intervals over so few documents; nothing over enough of them."""
    if not 1 < n_documents < FEW_DOCUMENTS:
        return ""
    return f" Intervals are over {n_documents} documents only: too narrow for 95 %."


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
    `document` numbers the document of each value from 0; `draws` is of `draws_of`. Of fewer than
    `FEW_DOCUMENTS` documents the interval is too narrow; `few_drawn` says so in captions.
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
    low, high = ends((draws @ sums)[drawn > 0] / drawn[drawn > 0])
    return Estimate(value, float(low), float(high), n)


def ends(drawn: ArrayLike) -> Floats:
    """The percentiles between which 95 % of the draws lie, `[2 …]` of drawn `[draw …]`.

    A draw of NaN is left out; one number at least must be known for each entry.
    """
    values = np.asarray(drawn, dtype=np.float64)
    quantile = np.nanquantile if np.isnan(values).any() else np.quantile
    tail = (1 - CONFIDENCE) / 2
    return np.asarray(quantile(values, [tail, 1 - tail], axis=0))


def interval(drawn: ArrayLike, n_documents: int) -> tuple[float, float]:
    """The percentile interval of one number over its draws; NaN for a single document."""
    values = np.asarray(drawn, dtype=np.float64)
    known = values[np.isfinite(values)]
    if n_documents < 2 or not known.size:
        return np.nan, np.nan
    low, high = ends(known)
    return float(low), float(high)


def basic_interval(
    value: float, drawn: ArrayLike, bounds: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[float, float]:
    """The basic interval [2 t - q_high, 2 t - q_low], within what is possible.

    For statistics that a draw shifts to one side, as any draw of documents is less even than the
    documents: what it adds is taken off twice. Source: Davison and Hinkley 1997, section 5.2.
    """
    below, above = ends(drawn)
    low, high = np.clip([2 * value - above, 2 * value - below], *bounds)
    return float(low), float(high)


def centred_interval(value: float, drawn: ArrayLike | None) -> tuple[float, float]:
    """How far draws spread around their own mean, laid around the value found; NaN without draws.

    For bits: draws repeat documents, which adds information that only the repetition has, and
    their mean shows how much.
    """
    values = np.asarray(np.nan if drawn is None else drawn, dtype=np.float64)
    if not np.isfinite(values).any():
        return np.nan, np.nan
    low, high = ends(values) - np.nanmean(values)
    return value + float(low), value + float(high)
