"""How many bits a token's experts tell about a label: of its domain, its content, its id.

Everything here counts (token, slot) rows: a token that went to K experts is K rows with the same
label. Rows of one document are no independent draws, and neither are the K slots of a token, so
the correction for small samples corrects too little and no figure should be read without its
nulls: see `specialisation`. And a number of bits says what separates tokens, not what an expert
does with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_matrix
from scipy.special import xlogy

from ernie_lab.interventions.bootstrap import centred_interval

Floats: TypeAlias = NDArray[np.float64]
Codes: TypeAlias = NDArray[np.int64]
# Counts of resampled cells in memory at one time: 64 MB.
_AT_ONCE = 8_000_000


def mutual_information(
    labels: ArrayLike,
    expert_ids: ArrayLike,
    n_experts: int,
    *,
    given: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> float:
    """I(label; expert) in bits over the (token, slot) rows, Miller-Madow corrected.

    I = H(label) + H(expert) - H(label, expert), each plug-in entropy with (cells seen - 1) / 2n
    nats added (Miller 1955), n rows. With `given` (usually the token id) it is
    I(label; expert | given) = H(label, given) + H(expert, given) - H(label, expert, given)
    - H(given). It can come out below zero, where there is nothing to tell.

    Conditional information is fragile: an id that occurs once, or under one label alone, adds
    exactly 0 and no evidence, and with few occurrences the correction leaves a bias of the
    order of what is looked for (tested). Read it beside the same figure after labels were permuted
    among tokens of equal id, as `specialisation(given="id")` does.

    Args:
        labels: `[n]`, anything that can be compared; tokens with None or NaN are left out.
        expert_ids: `[n k]`; ids below zero are left out.
        weights: `[n k]`, for rows that count by the weight of their slot. The correction then
            takes Kish's effective number of rows, (sum w)^2 / sum w^2.
    """
    code_N = codes_of(labels)
    given_N = None if given is None else codes_of(given)
    document_N = np.zeros(len(code_N), dtype=np.int64)
    rows = Rows.of(code_N, np.asarray(expert_ids), document_N, n_experts, given_N, weights)
    return float(rows.bits(np.ones((1, 1), dtype=np.int64))[0])


def information_of_counts(counts: ArrayLike) -> float:
    """`mutual_information` from counts `[label expert]` of (token, slot) rows, such as a run over a
    corpus adds up.

    Raises:
        ValueError: not a table of counts >= 0 with at least one row counted.
    """
    counts_CE = np.asarray(counts, dtype=np.float64)
    if counts_CE.ndim != 2 or not np.isfinite(counts_CE).all() or (counts_CE < 0).any():
        raise ValueError(
            f"counts of shape {counts_CE.shape} must be a table [label expert] of numbers >= 0"
        )
    n = counts_CE.sum()
    if n == 0:
        raise ValueError("nothing was counted: nothing can be told")

    def entropy(cells: Floats) -> float:
        plug_in = np.log(n) - xlogy(cells, cells).sum() / n
        return float(plug_in + ((cells > 0).sum() - 1) / (2 * n))

    nats = entropy(counts_CE.sum(1)) + entropy(counts_CE.sum(0)) - entropy(counts_CE.ravel())
    return float(nats / np.log(2))


def codes_of(labels: ArrayLike) -> Codes:
    """Labels as numbers from 0, in the order of first appearance; -1 for None and NaN."""
    codes, _ = pd.factorize(np.asarray(labels, dtype=object), use_na_sentinel=True)
    return codes.astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The (token, slot) rows that are counted, M of them, and their information under draws of
    documents; `codes` number the cells of every distribution that enters."""

    codes: dict[str, Codes]
    document_M: Codes
    weight_M: Floats
    n_tokens: int

    @classmethod
    def of(
        cls,
        label_N: Codes,
        ids_NK: NDArray[Any],
        document_N: Codes,
        n_experts: int,
        given_N: Codes | None = None,
        weights_NK: ArrayLike | None = None,
    ) -> Rows:
        if ids_NK.ndim != 2 or len(ids_NK) != len(label_N):
            raise ValueError(
                f"expert_ids has shape {ids_NK.shape}, expected ({len(label_N)}, k): one row of "
                "experts for each label"
            )
        k = ids_NK.shape[1]
        expert_M, label_M = ids_NK.reshape(-1), np.repeat(label_N, k)
        given_M = np.zeros_like(label_M) if given_N is None else np.repeat(given_N, k)
        weight_M = np.ones(len(label_M))
        if weights_NK is not None:
            weight_M = np.asarray(weights_NK, dtype=np.float64).reshape(-1)
        kept = (label_M >= 0) & (given_M >= 0) & np.isfinite(expert_M) & (expert_M >= 0)
        if not kept.any():
            raise ValueError("no row has both a label and an expert: nothing can be told")
        expert_M = expert_M[kept].astype(np.int64)
        if expert_M.max() >= n_experts:
            raise ValueError(f"expert id {expert_M.max()} with n_experts={n_experts}")
        label_M, given_M = label_M[kept], given_M[kept]
        n_labels = int(label_M.max()) + 1
        codes = {
            "label": label_M,
            "expert": expert_M,
            "given": given_M,
            "label, given": given_M * n_labels + label_M,
            "expert, given": given_M * n_experts + expert_M,
            "all": (given_M * n_labels + label_M) * n_experts + expert_M,
        }
        n_tokens = int(kept.reshape(-1, k).any(1).sum())
        return cls(codes, np.repeat(document_N, k)[kept], weight_M[kept], n_tokens)

    @property
    def n_documents(self) -> int:
        return len(np.unique(self.document_M))

    @property
    def n_labels(self) -> int:
        return len(np.unique(self.codes["label"]))

    def bits(self, draws_RD: NDArray[np.int64]) -> Floats:
        """Of every draw of documents."""
        signs = {"label, given": 1, "expert, given": 1, "all": -1, "given": -1}
        nats_R = sum(sign * self._entropy(name, draws_RD) for name, sign in signs.items())
        return np.asarray(nats_R / np.log(2))

    def interval(self, draws_RD: NDArray[np.int64]) -> tuple[float, float, float]:
        """The bits, and what their draws spread over; NaN for a single document."""
        found = float(self.bits(np.ones((1, draws_RD.shape[1]), dtype=np.int64))[0])
        drawn_R = self.bits(draws_RD) if self.n_documents > 1 else None
        return found, *centred_interval(found, drawn_R)

    def label_bits(self) -> float:
        return self._bits_of("label")

    def expert_bits(self) -> float:
        return self._bits_of("expert")

    def _bits_of(self, name: str) -> float:
        once = np.ones((1, int(self.document_M.max()) + 1), dtype=np.int64)
        return float(self._entropy(name, once)[0] / np.log(2))

    def _entropy(self, name: str, draws_RD: NDArray[np.int64]) -> Floats:
        """Nats, Miller-Madow corrected, of every draw that has any row."""
        cells, cell_M = np.unique(self.codes[name], return_inverse=True)
        shape = (draws_RD.shape[1], len(cells))
        per_document = csr_matrix((self.weight_M, (self.document_M, cell_M)), shape=shape)
        rows_R = draws_RD @ np.bincount(self.document_M, minlength=draws_RD.shape[1])
        total = self.weight_M.sum()
        kish = total**2 / (np.square(self.weight_M).sum() * len(self.weight_M))
        found = []
        for part in _parts(draws_RD, len(cells)):
            counts_RC = part @ per_document
            sum_R, seen_R = counts_RC.sum(1), (counts_RC > 0).sum(1)
            with np.errstate(invalid="ignore", divide="ignore"):
                plug_in_R = np.log(sum_R) - xlogy(counts_RC, counts_RC).sum(1) / sum_R
            found.append((plug_in_R, seen_R))
        plug_in_R, seen_R = (np.concatenate(both) for both in zip(*found, strict=True))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(plug_in_R + (seen_R - 1) / (2 * kish * rows_R))


def null_p95(drawn: ArrayLike) -> float:
    """What one more draw of a null exceeds in 5 % of cases at most, by rank.

    The ceil(0.95 (n + 1))-th smallest of n draws, so that what is above it has p <= 0.05 with
    p = (1 + draws at least as large) / (n + 1) (Davison and Hinkley 1997, section 4.2). The
    interpolated percentile of 20 draws would be exceeded in 9 % of cases. Of fewer than 19 draws
    it is the largest, and p is 1 / (n + 1).
    """
    return float(null_p95s(np.ravel(drawn)))


def null_p95s(draws_RX: ArrayLike) -> Floats:
    """`null_p95` of each column."""
    ordered_RX = np.sort(np.asarray(draws_RX, dtype=np.float64), axis=0)
    # In whole numbers: 0.95 * 20 is not exactly 19.
    rank = min(-(-95 * (len(ordered_RX) + 1) // 100), len(ordered_RX))
    # NaN sorts last. With one among the draws no rank is known.
    return np.where(np.isnan(ordered_RX[-1]), np.nan, ordered_RX[rank - 1])


def _parts(draws_RD: NDArray[np.int64], n_cells: int) -> Iterator[NDArray[np.int64]]:
    step = max(1, _AT_ONCE // n_cells)
    for start in range(0, len(draws_RD), step):
        yield draws_RD[start : start + step]
