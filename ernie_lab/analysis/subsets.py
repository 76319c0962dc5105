"""k distinct experts a token, with given loads and nothing else: the chance of co-activation.

A token that chose expert i has only k - 1 choices left, so that two experts meet less often than
the product of their loads says: with k of E at even load by (k - 1) E / ((E - 1) k). The law
here is the one of largest entropy among all laws of k-subsets in which expert e is chosen with
its own probability (conditional Poisson sampling): P(S) is proportional to the product of
odds_e over the experts e of S. Source: Chen, Dempster and Liu 1994, "Weighted finite population
sampling to maximize entropy", Biometrika 81.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_CLOSE = 1e-9
_MOST_ROUNDS = 2000


def pair_chance(inclusion: ArrayLike) -> Floats:
    """P(i and j are chosen together) `[e e]`, from P(i is chosen) `[e]`, which sums to k.

    The diagonal is P(i). Experts never or always chosen are exact.
    """
    wanted_E = np.asarray(inclusion, dtype=np.float64)
    if wanted_E.ndim != 1 or not np.isfinite(wanted_E).all():
        raise ValueError(f"inclusion of shape {wanted_E.shape}: one finite probability per expert")
    k = round(float(wanted_E.sum()))
    if (wanted_E < 0).any() or (wanted_E > 1).any() or abs(wanted_E.sum() - k) > 1e-6 or k < 1:
        raise ValueError(
            f"inclusion runs from {wanted_E.min():.4g} to {wanted_E.max():.4g} and sums to "
            f"{wanted_E.sum():.6g}; it must lie in 0..1 and sum to k, the experts chosen per token"
        )
    pairs = np.outer(wanted_E, wanted_E)  # exact where one of the two is certain or impossible
    open_E = np.flatnonzero((wanted_E > 0) & (wanted_E < 1))
    left = k - int((wanted_E >= 1).sum())
    if len(open_E) > 1:
        odds_O = fitted_odds(wanted_E[open_E], left)
        pairs[np.ix_(open_E, open_E)] = _pairs(odds_O, left)
    np.fill_diagonal(pairs, wanted_E)
    return pairs


def fitted_odds(wanted_E: Floats, k: int) -> Floats:
    """The odds under which k of these experts have the wanted probabilities, all in (0, 1)."""
    odds_E = wanted_E.copy()
    for _ in range(_MOST_ROUNDS):
        odds_E /= np.exp(np.log(odds_E).mean())
        others_EM = _without(odds_E, np.eye(len(odds_E), dtype=bool), k)
        # P(i in S) = odds_i e_(k-1)(others) / e_k(all), e_k(all) = that product + e_k(others)
        chosen_E = odds_E * others_EM[:, k - 1]
        ratio_E = chosen_E / (chosen_E + others_EM[:, k]) / wanted_E
        if np.abs(ratio_E - 1).max() < _CLOSE:
            return odds_E
        odds_E = wanted_E / others_EM[:, k - 1]
    worst = float(np.abs(ratio_E - 1).max())
    if worst > 1e-4:
        raise ValueError(
            f"no law of {k} of {len(wanted_E)} experts with these loads was found (the odds are "
            f"off by {worst:.1e}): loads down to {wanted_E.min():.2g} are too uneven"
        )
    return odds_E


def _pairs(odds_E: Floats, k: int) -> Floats:
    """odds_i odds_j e_(k-2)(others) / e_k(all); 0 where k is 1."""
    n_experts = len(odds_E)
    pairs = np.zeros((n_experts, n_experts))
    if k < 2:
        return pairs
    total = float(_without(odds_E, np.zeros((1, n_experts), bool), k)[0, k])
    i, j = np.triu_indices(n_experts, 1)
    left_out = np.zeros((len(i), n_experts), bool)
    left_out[np.arange(len(i)), i] = left_out[np.arange(len(i)), j] = True
    pairs[i, j] = odds_E[i] * odds_E[j] * _without(odds_E, left_out, k)[:, k - 2] / total
    return pairs + pairs.T


def _without(odds_E: Floats, left_out_XE: NDArray[np.bool_], k: int) -> Floats:
    """e_0 .. e_k of the odds that are not left out, `[x k+1]`: sums over m-subsets of products.

    All terms are positive, so nothing cancels; dividing a factor out of the full polynomial
    would.
    """
    sums_XM = np.zeros((len(left_out_XE), k + 1))
    sums_XM[:, 0] = 1
    for expert, odds in enumerate(odds_E):
        factor_X = np.where(left_out_XE[:, expert], 0.0, odds)
        sums_XM[:, 1:] += factor_X[:, None] * sums_XM[:, :-1]
    return sums_XM
