"""Is routing balanced? Statistics of expert load, each beside what uniform routing would give.

Balance is a finite-sample quantity: thirty tokens routed uniformly at random already look
unbalanced. So no statistic here should be read without `multinomial_reference` at its own
number of tokens, and `balance_table` prints both. By phase, domain or position, and with
intervals: `balance_by`.

Letters: E routed experts, K experts chosen per token, N tokens, L layers. Expert ids below zero
(and NaN) mean "this token was not routed here" and are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]
Statistic: TypeAlias = Literal["max_violation", "cv", "entropy", "gini", "least_loaded"]

# Below this many expected slots per expert, an expert at 1 % of its fair share cannot be told
# from bad luck (at 500 it would have 5 slots where 500 were due).
DEAD_NEEDS_SLOTS = 500
DEAD_SHARE = 0.01
# Above this many simulated tokens the sum over tokens is drawn from its normal limit.
_EXACT_ROWS = 5_000_000
_CHUNK_ROWS = 250_000


def counts(expert_ids: ArrayLike, n_experts: int) -> NDArray[np.int64]:
    """Slots that went to each expert `[e]`, from ids of any shape, usually `[n k]`."""
    raw = np.asarray(expert_ids)
    kept = raw[np.isfinite(raw) & (raw >= 0)].astype(np.int64)
    if kept.size and kept.max() >= n_experts:
        raise ValueError(f"expert id {kept.max()} with n_experts={n_experts}: ids start at 0")
    return np.bincount(kept, minlength=n_experts)


def load(expert_ids: ArrayLike, n_experts: int) -> Floats:
    """f_e = (slots of expert e) / (K N): the share of all slots, so it sums to 1.

    Uniform routing gives 1/E. Source: the fraction of tokens dispatched to an expert of Switch
    Transformers (Fedus et al. 2021, eq. 5), per slot instead of per token, for K > 1.
    """
    counts_E = counts(expert_ids, n_experts)
    if counts_E.sum() == 0:
        raise ValueError("no token was routed: expert_ids is empty, load is undefined")
    return np.asarray(counts_E / counts_E.sum())


def _shares(load_E: ArrayLike) -> Floats:
    """Shares along the last axis; counts are accepted too, all statistics ignore the scale."""
    values = np.asarray(load_E, dtype=np.float64)
    total = values.sum(axis=-1, keepdims=True)
    if not np.isfinite(values).all() or (values < 0).any() or (total <= 0).any():
        raise ValueError("loads must be finite, >= 0 and not all zero")
    return np.asarray(values / total)


def cv(load_E: ArrayLike) -> Floats:
    """Coefficient of variation std(f) / mean(f), population std; 0 is perfect balance.

    The worst is sqrt(E - 1), one expert for everything; with K distinct experts a token
    sqrt(E/K - 1).
    Source: the importance loss of Shazeer et al. 2017 (arXiv:1701.06538) is its square.
    """
    shares = _shares(load_E)
    return np.asarray(shares.std(axis=-1) / shares.mean(axis=-1))


def max_violation(load_E: ArrayLike) -> Floats:
    """MaxVio = max_e(f_e) E - 1: how far the busiest expert is above its fair share.

    0 is balance, 1 means that some expert has twice its share. The worst is E - 1, one expert for
    everything; where each token picks K distinct experts it is E/K - 1, the same K for all. Over
    the whole sample given here; the mean over batches is larger and is not this number.
    Source: Wang et al. 2024, auxiliary-loss-free load balancing (arXiv:2408.15664).
    """
    shares = _shares(load_E)
    return np.asarray(shares.max(axis=-1) * shares.shape[-1] - 1)


def entropy(load_E: ArrayLike) -> Floats:
    """-sum(f log f) / log E: 1 is balance; 0 log 0 counts as 0.

    The worst is 0, one expert for everything; with K distinct experts a token log K / log E.
    """
    shares = _shares(load_E)
    if shares.shape[-1] == 1:
        return np.ones(shares.shape[:-1])
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return np.asarray(-(shares * logs).sum(axis=-1) / np.log(shares.shape[-1]))


def gini(load_E: ArrayLike) -> Floats:
    """sum_i (2i - E - 1) f_(i) / E with f sorted upwards, i from 1: 0 is balance.

    The worst is 1 - 1/E, one expert for everything; with K distinct experts a token 1 - K/E. The
    mean absolute difference between two experts, over twice the mean load.
    """
    ordered = np.sort(_shares(load_E), axis=-1)
    n = ordered.shape[-1]
    return np.asarray((ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(axis=-1) / n)


def least_loaded(load_E: ArrayLike) -> Floats:
    """min_e(f_e) E: the share of the idlest expert in units of a fair share; 1 is balance,
    0 an expert without a slot."""
    shares = _shares(load_E)
    return np.asarray(shares.min(axis=-1) * shares.shape[-1])


@dataclass(frozen=True, slots=True)
class Dead:
    """Experts below 1 % of their fair share, or None with the reason why nobody can tell."""

    experts: tuple[int, ...] | None
    reason: str = ""

    @property
    def n(self) -> float:
        return float("nan") if self.experts is None else float(len(self.experts))


def dead(counts_E: ArrayLike) -> Dead:
    """Experts with f_e < 0.01 / E; undefined below K N / E = 500 expected slots per expert.

    Takes counts, not shares: whether the answer means anything depends on the sample's size.
    """
    values = np.asarray(counts_E, dtype=np.float64)
    due = values.sum() / len(values)
    if due < DEAD_NEEDS_SLOTS:
        return Dead(
            None, f"{due:.3g} slots per expert were due, {DEAD_NEEDS_SLOTS} are needed: more tokens"
        )
    return Dead(tuple(int(e) for e in np.flatnonzero(values < DEAD_SHARE * due)))


STATISTICS: dict[Statistic, Callable[[ArrayLike], Floats]] = {
    "max_violation": max_violation,
    "cv": cv,
    "entropy": entropy,
    "gini": gini,
    "least_loaded": least_loaded,
}


@dataclass(frozen=True, slots=True)
class Reference:
    """A statistic under uniform routing of the same number of tokens."""

    statistic: Statistic
    mean: float
    p05: float
    p95: float


def multinomial_reference(
    n_tokens: int,
    n_experts: int,
    k: int,
    statistic: Statistic = "max_violation",
    n_random: int = 1000,
    seed: int = 0,
) -> Reference:
    """What `statistic` gives when each of N tokens picks k distinct experts of E uniformly.

    By simulation: exact up to 5 million simulated tokens (N x draws); beyond, the counts come
    from their normal limit, variance N p (1 - p) with p = k/E and covariance
    -N p (1 - p) / (E - 1) (within 2 % there; tested). Real tokens of one text are not
    independent, so this is a lower bound on what a balanced router shows.
    """
    if not 0 < k <= n_experts or n_tokens < 1 or n_random < 1:
        raise ValueError(
            f"n_tokens={n_tokens}, n_experts={n_experts}, k={k}, n_random={n_random}: "
            "need 1 <= k <= n_experts and at least one token and one draw"
        )
    if statistic not in STATISTICS:
        raise ValueError(f"statistic={statistic!r}; known: {', '.join(STATISTICS)}")
    values = STATISTICS[statistic](_uniform_counts(n_tokens, n_experts, k, n_random, seed))
    p05, p95 = np.percentile(values, [5, 95])
    return Reference(statistic, float(values.mean()), float(p05), float(p95))


@lru_cache(maxsize=32)
def _uniform_counts(n_tokens: int, n_experts: int, k: int, n_random: int, seed: int) -> Floats:
    """Slots per expert `[draw e]` under uniform routing."""
    rng = np.random.default_rng(seed)
    if n_tokens * n_random > _EXACT_ROWS:
        p = k / n_experts
        z = rng.standard_normal((n_random, n_experts))
        spread = np.sqrt(n_tokens * p * (1 - p) * n_experts / max(n_experts - 1, 1))
        out = n_tokens * p + spread * (z - z.mean(axis=1, keepdims=True))
        return np.asarray(np.clip(out, 0, None))
    # Choosing k of E is leaving out E - k: take the smaller side.
    size = min(k, n_experts - k)
    out = np.zeros((n_random, n_experts))
    per_chunk = max(1, _CHUNK_ROWS // n_tokens)
    for start in range(0, n_random, per_chunk):
        n = min(per_chunk, n_random - start)
        ids = _subsets(n * n_tokens, n_experts, size, rng)
        cell = np.repeat(np.arange(n), n_tokens)[:, None] * n_experts + ids
        out[start : start + n] = np.bincount(cell.ravel(), minlength=n * n_experts).reshape(n, -1)
    return out if size == k else n_tokens - out


def _subsets(rows: int, n_experts: int, size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform subsets `[row size]` by Floyd's algorithm (Bentley and Floyd 1987), row-wise."""
    ids = np.empty((rows, size), dtype=np.int64)
    for slot, last in enumerate(range(n_experts - size, n_experts)):
        drawn = rng.integers(0, last + 1, rows)
        taken = (ids[:, :slot] == drawn[:, None]).any(axis=1)
        ids[:, slot] = np.where(taken, last, drawn)
    return ids


def balance_table(
    trace: Any,
    *,
    n_experts: int | None = None,
    layers: Sequence[int] | None = None,
    n_random: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per layer: every balance statistic beside its value under uniform routing.

    `trace` has `.expert_ids` with dims (layer, token, slot), or is such an array `[l n k]`; then
    `n_experts` is needed and `layers` gives the true layer numbers. `uniform_p95` (`p05` for
    entropy) is the value that uniform routing of the same tokens exceeds in 5 % of draws:
    what lies within it is no evidence of imbalance. `dead` is NaN when undefined (see `dead`).
    """
    ids = getattr(trace, "expert_ids", trace)
    if layers is None:
        coords = getattr(ids, "coords", {})
        layers = [int(x) for x in coords["layer"]] if "layer" in coords else None
    ids_LNK = np.asarray(ids)
    if ids_LNK.ndim != 3:
        raise ValueError(f"expert_ids has shape {ids_LNK.shape}, expected (layer, token, slot)")
    layers = list(range(len(ids_LNK))) if layers is None else list(layers)
    if len(layers) != len(ids_LNK):
        raise ValueError(f"{len(layers)} layer numbers for {len(ids_LNK)} layers of expert_ids")
    n_experts = n_experts or n_experts_of(trace)
    rows = [_balance_row(ids_NK, n_experts, n_random, seed) for ids_NK in ids_LNK]
    return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))


def _balance_row(
    ids_NK: NDArray[Any], n_experts: int, n_random: int, seed: int
) -> dict[str, int | float]:
    routed = np.isfinite(ids_NK).all(axis=1) & (ids_NK >= 0).all(axis=1)
    n_tokens, k = int(routed.sum()), ids_NK.shape[1]
    counts_E = counts(ids_NK[routed], n_experts)
    load_E = load(ids_NK[routed], n_experts)

    def uniform(statistic: Statistic) -> Reference:
        return multinomial_reference(n_tokens, n_experts, k, statistic, n_random, seed)

    return {
        "n_tokens": n_tokens,
        "k": k,
        "n_experts": n_experts,
        "busiest": int(load_E.argmax()),
        "busiest_load": float(load_E.max()),
        "max_violation": float(max_violation(load_E)),
        "max_violation_uniform_p95": uniform("max_violation").p95,
        "cv": float(cv(load_E)),
        "cv_uniform_p95": uniform("cv").p95,
        "entropy": float(entropy(load_E)),
        "entropy_uniform_p05": uniform("entropy").p05,
        "gini": float(gini(load_E)),
        "gini_uniform_p95": uniform("gini").p95,
        "unused": int((counts_E == 0).sum()),
        "dead": dead(counts_E).n,
    }


def n_experts_of(trace: Any) -> int:
    """From whatever the trace kept that has an expert axis."""
    if (known := getattr(trace, "n_experts", None)) is not None:
        return int(known)
    for name in ("router_logits", "router_probs", "selection_scores"):
        try:
            return int(getattr(trace, name).sizes["expert"])
        except (AttributeError, KeyError):
            continue
    raise ValueError("the number of experts cannot be read off expert_ids alone: pass n_experts=")
