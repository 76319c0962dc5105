"""How close were the choices? Margins, the noise that could flip them, and what does flip.

The margin of a token is the selection score of its k-th expert minus that of the (k+1)-th: by so
much the first of the two that were left out would have to gain to be chosen. Scores are
probabilities plus correction bias, so margins are in units of probability.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ernie_lab.analysis.saturation import set_agreement
from ernie_lab.analysis.token_groups import (
    By,
    Floats,
    documents_of,
    layers_of,
    require_same_tokens,
    routing_of,
)
from ernie_lab.interventions.bootstrap import draws_of, estimate

LEAST_RUNS = 8
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def score_noise(base: Any, equivalent: Sequence[Any]) -> pd.DataFrame:
    """The noise level of selection scores in each layer, from runs that should be the same.

    `equivalent` are at least 8 traces (or routings) of the tokens of `base`, run in other
    company, with other padding or under another attention kernel, in the same dtype; another
    dtype is an effect, not noise. One row per layer:

    - `score`: 95th percentile of |change of a selection score|, all experts, tokens and runs;
    - `margin`: the same of the difference between the k-th and (k+1)-th expert of `base`, the two
      held: the very number that a margin is compared with;
    - `flips`: share of slots filled otherwise, 1 - |S and S'| / k, mean over tokens and runs.
    """
    base = routing_of(base)
    others = [routing_of(other) for other in equivalent]
    if len(others) < LEAST_RUNS:
        raise ValueError(
            f"{len(others)} equivalent runs: a 95th percentile needs at least {LEAST_RUNS}"
        )
    ids_LNK = np.array(base.expert_ids)
    scores_LNE = np.array(base.selection_scores, dtype=np.float64)
    pair_LN2 = _border(scores_LNE, ids_LNK.shape[-1])
    gap_LN = _gap(scores_LNE, pair_LN2)
    changes, margins, flips = [], [], []
    for other in others:
        require_same_tokens(base.expert_ids, other.expert_ids)
        its_LNE = np.array(other.selection_scores, dtype=np.float64)
        changes.append(np.abs(its_LNE - scores_LNE).reshape(len(scores_LNE), -1))
        margins.append(np.abs(_gap(its_LNE, pair_LN2) - gap_LN))
        flips.append(set_flips(ids_LNK, other.expert_ids).mean(1))
    return pd.DataFrame(
        {
            "score": np.percentile(np.concatenate(changes, axis=1), 95, axis=1),
            "margin": np.percentile(np.concatenate(margins, axis=1), 95, axis=1),
            "flips": np.mean(flips, axis=0),
            "n_runs": len(others),
        },
        index=pd.Index(layers_of(base.expert_ids), name="layer"),
    )


def margin_table(
    routing: Any,
    *,
    noise: pd.DataFrame | float | None = None,
    documents: By | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The distribution of margins, one row per layer: `p05`, `p25`, `p50`, `p75`, `p95`, `mean`.

    With `noise`, a `score_noise` table or one number for all layers: `noise`, the level, and
    `within_noise`, the share of tokens whose margin is no larger, with its 95 % interval over
    documents. The choice of such a token may be another in a run that should be the same.
    """
    routing = routing_of(routing)
    margin = routing.margin
    document_N, n_documents = documents_of(margin, documents)
    margin_LN = _margins(margin)
    layers = layers_of(margin)
    levels = _levels(noise, layers)
    draws = draws_of(n_documents, n_draws, seed)
    rows = []
    for margin_N, level in zip(margin_LN, levels, strict=True):
        row: dict[str, Any] = {"n_tokens": int(np.isfinite(margin_N).sum())}
        points = np.nanquantile(margin_N, QUANTILES)
        row |= {f"p{100 * q:02.0f}": float(x) for q, x in zip(QUANTILES, points, strict=True)}
        row["mean"] = float(np.nanmean(margin_N))
        if noise is not None:
            inside_N = np.where(np.isnan(margin_N), np.nan, margin_N <= level)
            found = estimate(inside_N, document_N, draws)
            row |= {"noise": level, "within_noise": found.value}
            row |= {"within_noise_low": found.low, "within_noise_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))


def flips_by_margin(
    base: Any,
    other: Any,
    *,
    edges: Sequence[float] | None = None,
    documents: By | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Set flips of `other` against `base`, by how large the margin was in `base`.

    One row per layer and bin of margins: `flips`, the mean share of slots filled otherwise, with
    its 95 % interval over documents; `margin_low` <= margin < `margin_high` (the last bin holds
    its end); `n_tokens`. `edges` rise; by default the bins are tenths of all layers' margins
    together. Upstream states differ between two whole runs, so flips are cumulative; replay or
    freeze the layers before one to see it alone.
    """
    base, other = routing_of(base), routing_of(other)
    require_same_tokens(base.expert_ids, other.expert_ids)
    document_N, n_documents = documents_of(base.expert_ids, documents)
    margin_LN = _margins(base.margin)
    flips_LN = set_flips(base.expert_ids, other.expert_ids)
    points = np.quantile(margin_LN, np.linspace(0, 1, 11)) if edges is None else np.array(edges)
    points = np.unique(points) if edges is None else points
    if len(points) < 2 or (np.diff(points) <= 0).any():
        raise ValueError(f"edges={points.tolist()} must rise, and be at least two")
    draws = draws_of(n_documents, n_draws, seed)
    bin_LN = np.searchsorted(points, margin_LN, side="right") - 1
    bin_LN[margin_LN == points[-1]] = len(points) - 2
    rows = []
    for i, layer in enumerate(layers_of(base.expert_ids)):
        for number in range(len(points) - 1):
            mine_N = bin_LN[i] == number
            found = estimate(flips_LN[i][mine_N], document_N[mine_N], draws)
            rows.append(
                {
                    "layer": layer,
                    "bin": number,
                    "margin_low": points[number],
                    "margin_high": points[number + 1],
                    "flips": found.value,
                    "low": found.low,
                    "high": found.high,
                    "n_tokens": found.n,
                }
            )
    return pd.DataFrame(rows).set_index(["layer", "bin"])


def set_flips(ids: ArrayLike, other: ArrayLike) -> Floats:
    """1 - |S and S'| / k for sets of expert ids along the last axis; their order does not count."""
    mine, its = np.asarray(ids), np.asarray(other)
    if mine.shape != its.shape:
        raise ValueError(f"ids of shapes {mine.shape} and {its.shape}")
    return np.asarray(1 - set_agreement(mine, its))


def _margins(margin: Any) -> Floats:
    margin_LN = np.array(margin, dtype=np.float64)
    if np.isnan(margin_LN).all():
        raise ValueError("every expert is chosen for every token: there is no margin")
    return margin_LN


def _border(scores_LNE: Floats, k: int) -> NDArray[np.int64]:
    """The k-th and the (k+1)-th expert of each token `[l n 2]`."""
    if k >= scores_LNE.shape[-1]:
        raise ValueError("every expert is chosen for every token: there is no margin")
    order = np.argsort(-scores_LNE, axis=-1, kind="stable")
    return np.asarray(order[..., k - 1 : k + 1])


def _gap(scores_LNE: Floats, pair_LN2: NDArray[np.int64]) -> Floats:
    two = np.take_along_axis(scores_LNE, pair_LN2, -1)
    return np.asarray(two[..., 0] - two[..., 1])


def _levels(noise: pd.DataFrame | float | None, layers: Sequence[int]) -> list[float]:
    if noise is None or not isinstance(noise, pd.DataFrame):
        return [np.nan if noise is None else float(noise)] * len(layers)
    if absent := [layer for layer in layers if layer not in noise.index]:
        raise ValueError(f"noise= has layers {list(noise.index)}, but not {absent}")
    return [float(level) for level in noise.loc[list(layers), "margin"].to_numpy(dtype=float)]
