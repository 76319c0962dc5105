"""How well scores of (fact, expert) pairs agree with what ablation shows."""

from __future__ import annotations

import numpy as np
from scipy.stats import rankdata

from ernie_lab.interventions.bootstrap import estimate

METRICS = ("spearman", "precision@1", "precision@2", "auroc")
# Points of exact match that a holder of a fact must cost; the gates' bar for an expert's own facts.
HOLDS = 15.0


def spearman(scores_FE: np.ndarray, truth_FE: np.ndarray) -> np.ndarray:
    """Over the experts of each fact; 0 where either puts them all level."""
    ranks = [rankdata(x, axis=1) for x in (scores_FE, truth_FE)]
    a, b = (x - x.mean(1, keepdims=True) for x in ranks)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def precision(scores_FE: np.ndarray, truth_FE: np.ndarray, k: int) -> np.ndarray:
    """Which share of a method's first k experts are among the true first k; ties at random."""
    lots_FE = np.random.default_rng(0).random(scores_FE.shape)
    first, true = (np.lexsort((lots_FE, -x), axis=1)[:, :k] for x in (scores_FE, truth_FE))
    share: np.ndarray = (first[:, :, None] == true[:, None, :]).any(2).mean(1)
    return share


def auroc(scores_FE: np.ndarray, holds_FE: np.ndarray) -> np.ndarray:
    """Of each fact: P(a holder's score > another expert's), ties by half; NaN without both."""
    ranks = rankdata(scores_FE, axis=1)
    n_holders = holds_FE.sum(1)
    n_others = holds_FE.shape[1] - n_holders
    above = (ranks * holds_FE).sum(1) - n_holders * (n_holders + 1) / 2
    pairs = n_holders * n_others
    return np.divide(above, pairs, out=np.full(len(above), np.nan), where=pairs > 0)


def measured(
    scores_FE: np.ndarray, nats_FE: np.ndarray, holds_FE: np.ndarray, draws: np.ndarray
) -> dict[str, dict[str, float]]:
    """Means over facts with 95 % intervals of a bootstrap over facts."""
    values = {
        "spearman": spearman(scores_FE, nats_FE),
        "precision@1": precision(scores_FE, nats_FE, 1),
        "precision@2": precision(scores_FE, nats_FE, 2),
        "auroc": auroc(scores_FE, holds_FE),
    }
    facts = np.arange(len(scores_FE))
    found = {name: estimate(x, facts, draws) for name, x in values.items()}
    return {
        name: {"mean": rounded(x.value), "low": rounded(x.low), "high": rounded(x.high)}
        for name, x in found.items()
    }


def among_chosen(
    scores_FE: np.ndarray,
    nats_FE: np.ndarray,
    points_FE: np.ndarray,
    often_FE: np.ndarray,
    n_draws: int,
) -> dict[str, dict[str, float]]:
    """The (fact, expert) pairs of `often_FE` together: which of them does the fact need?

    A stricter question than the rest: experts that never see the fact are left out, and the facts
    without a holder come in. Intervals are of a bootstrap over facts.
    """
    rng, facts = np.random.default_rng(0), np.arange(len(scores_FE))
    found: dict[str, list[float]] = {"spearman": [], "auroc": []}
    for draw in range(n_draws + 1):
        these = facts if draw == 0 else rng.choice(facts, len(facts))
        often = often_FE[these]
        score, nats, points = (x[these][often][None] for x in (scores_FE, nats_FE, points_FE))
        found["spearman"].append(float(spearman(score, nats)[0]))
        found["auroc"].append(float(auroc(score, points >= HOLDS)[0]))
    return {
        name: {
            "mean": rounded(x[0]),
            "low": rounded(np.quantile(x[1:], 0.025)),
            "high": rounded(np.quantile(x[1:], 0.975)),
        }
        for name, x in found.items()
    }


def rounded(value: float) -> float:
    return round(float(value), 4)
