"""Which experts go together: pairs that the same token chose, against what loads alone give.

Two busy experts meet often by chance, so a count of meetings says little. Chance here is k
distinct experts per token with the loads that were seen and nothing else (`subsets.pair_chance`).
Tokens of one text are not independent, so that "beyond chance" is a lower bar than it looks; the
intervals of `coactivated_pairs` are over documents.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.choices import Choices, choices, place_of
from ernie_lab.analysis.subsets import pair_chance
from ernie_lab.interventions.bootstrap import draws_of, interval

if TYPE_CHECKING:
    import xarray as xr

Floats = NDArray[np.float64]
Measure: TypeAlias = Literal["share", "jaccard", "lift"]

MEANING: dict[Measure, str] = {
    "share": "of the tokens of `expert`, the share that also went to `other`",
    "jaccard": "tokens of both, over tokens of either",
    "lift": "tokens of both, over those that the loads alone would give",
}
# Below this many meetings by chance a lift is a ratio of accidents.
_LEAST_EXPECTED = 5


def coactivation_counts(routing: Any, *, n_experts: int | None = None) -> xr.DataArray:
    """Tokens that chose both, (layer, expert, other); on the diagonal, those that chose one.

    Counts of several runs may be added up: all other numbers follow from them.
    """
    chosen = choices(routing, n_experts=n_experts)
    counts = np.stack([_meetings(chosen, place) for place in range(len(chosen.layers))])
    return _labelled(counts, chosen.layers, "tokens of both experts", {})


def coactivation(
    of: Any, measure: Measure = "lift", *, n_experts: int | None = None
) -> xr.DataArray:
    """How much experts go together, (layer, expert, other); NaN on the diagonal.

    - `share` c_ij / c_i, with c_i the tokens of expert i and c_ij those of both. Not symmetric.
      Source: expert co-activation of OLMoE (Muennighoff et al. 2024, arXiv:2409.02060).
    - `jaccard` c_ij / (c_i + c_j - c_ij).
    - `lift` c_ij / (N p_ij), p_ij from k distinct experts per token with the same loads; 1 is
      chance, 0 never together.

    `of` is a routing, or counts `[e e]` or (layer, expert, other) as of `coactivation_counts`; an
    expert without tokens has NaN. Balanced experts and chance give share (k - 1) / (E - 1).
    """
    _require_measure(measure)
    counts = _counts(of, n_experts)
    many_LEE = counts.to_numpy().astype(float).reshape(-1, *counts.shape[-2:])
    sizes = [_sizes(counts_EE) for counts_EE in many_LEE]
    values = np.stack([_measured(one, measure, *sizes[i]) for i, one in enumerate(many_LEE)])
    layers = counts.coords["layer"].values if "layer" in counts.dims else None
    told = {"measure": measure, "n_tokens": max(n for n, _ in sizes), "k": sizes[0][1]}
    return _labelled(values if layers is not None else values[0], layers, MEANING[measure], told)


def coactivated_pairs(
    routing: Any,
    n: int = 10,
    *,
    measure: Measure = "lift",
    layer: int | None = None,
    n_experts: int | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """The `n` pairs of each layer that go together most, picked on half of the documents.

    All numbers are of the other half. `low` and `high` are the 95 % interval of `measure` over
    documents (chance's part in a lift held at its value); `chance_p95` is what the same measure
    exceeds in 5 % of samples in which the loads alone decide. `expected` are the tokens of both
    that chance gives. Pairs with fewer than 5 expected tokens are not candidates.
    """
    _require_measure(measure)
    chosen = choices(routing, n_experts=n_experts)
    picking, telling = chosen.halves(seed)
    draws_DX = draws_of(telling.n_documents, n_draws, seed)
    places = range(len(chosen.layers)) if layer is None else [place_of(layer, chosen.layers)]
    rows: list[dict[str, Any]] = []
    for place in places:
        chosen_NE = telling.chosen(place)
        chance_EE = pair_chance(chosen_NE.mean(0, dtype=float))
        for i, j in _picked(picking, place, n, measure):
            pair = _Pair.of(telling, chosen_NE, i, j)
            row = _row(pair, float(chance_EE[i, j]), measure, draws_DX)
            rows.append({"layer": chosen.layers[place], "expert": i, "other": j, **row})
    if not rows:
        raise ValueError(
            f"no pair has {_LEAST_EXPECTED} tokens by chance in half of the documents: more texts"
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True, slots=True, eq=False)
class _Pair:
    """By document: tokens of both, of one, of the other, and all."""

    both_X: NDArray[Any]
    one_X: NDArray[Any]
    other_X: NDArray[Any]
    tokens_X: NDArray[Any]

    @classmethod
    def of(cls, telling: Choices, chosen_NE: NDArray[Any], i: int, j: int) -> _Pair:
        one_N, other_N = chosen_NE[:, i] > 0, chosen_NE[:, j] > 0

        def by_document(values_N: NDArray[np.bool_]) -> NDArray[Any]:
            return np.bincount(telling.document_N[values_N], minlength=telling.n_documents)

        return cls(
            by_document(one_N & other_N),
            by_document(one_N),
            by_document(other_N),
            by_document(np.ones_like(one_N)),
        )

    def drawn(self, draws_DX: NDArray[np.int64]) -> _Pair:
        parts = (self.both_X, self.one_X, self.other_X, self.tokens_X)
        return _Pair(*(draws_DX @ part for part in parts))

    def measured(self, measure: Measure, apart: float) -> Floats:
        """`apart` is p_ij / (p_i p_j) under chance."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if measure == "share":
                return np.asarray(self.both_X / self.one_X)
            if measure == "jaccard":
                return np.asarray(self.both_X / (self.one_X + self.other_X - self.both_X))
            return np.asarray(self.both_X * self.tokens_X / (self.one_X * self.other_X * apart))


def _row(
    pair: _Pair, chance: float, measure: Measure, draws_DX: NDArray[np.int64]
) -> dict[str, Any]:
    from scipy.stats import binom

    every = pair.drawn(np.ones((1, draws_DX.shape[1]), np.int64))
    n_tokens = int(every.tokens_X[0])
    independent = float(every.one_X[0] * every.other_X[0]) / n_tokens**2
    apart = chance / independent if independent > 0 else np.nan
    values = {name: float(every.measured(name, apart)[0]) for name in get_args(Measure)}
    low, high = interval(pair.drawn(draws_DX).measured(measure, apart), draws_DX.shape[1])
    bound = _Pair(
        np.array([binom.ppf(0.95, n_tokens, chance)]), every.one_X, every.other_X, every.tokens_X
    )
    return {
        "n_both": int(every.both_X[0]), "expected": n_tokens * chance, **values,
        "measure": measure, "low": low, "high": high,
        "chance_p95": float(bound.measured(measure, apart)[0]), "n_tokens": n_tokens,
    }  # fmt: skip


def _picked(picking: Choices, place: int, n: int, measure: Measure) -> list[tuple[int, int]]:
    """Ordered as (expert, other); a symmetric measure has each pair once."""
    counts_EE = _meetings(picking, place).astype(float)
    n_tokens, k = _sizes(counts_EE)
    values_EE = _measured(counts_EE, measure, n_tokens, k)
    few = n_tokens * pair_chance(counts_EE.diagonal() / n_tokens) < _LEAST_EXPECTED
    values_EE[few | np.isnan(values_EE)] = -np.inf
    if measure != "share":
        values_EE[np.tril_indices(len(values_EE))] = -np.inf
    order = np.argsort(-values_EE, axis=None, kind="stable")[:n]
    found = [divmod(int(place), len(values_EE)) for place in order]
    return [(i, j) for i, j in found if np.isfinite(values_EE[i, j])]


def _meetings(chosen: Choices, place: int) -> NDArray[np.int64]:
    chosen_NE = chosen.chosen(place)  # a product of float32 is exact below 2^24 tokens
    return np.asarray(np.rint(chosen_NE.T @ chosen_NE), dtype=np.int64)


def _measured(counts_EE: Floats, measure: Measure, n_tokens: int, k: int) -> Floats:
    if k < 2:
        raise ValueError("every token has one expert: no two experts can have a token together")
    one_E = counts_EE.diagonal()
    if measure == "share":
        under = np.broadcast_to(one_E[:, None], counts_EE.shape)
    elif measure == "jaccard":
        under = one_E[:, None] + one_E[None, :] - counts_EE
    else:
        under = n_tokens * pair_chance(one_E / n_tokens)
    used = (one_E > 0)[:, None] & (one_E > 0)[None, :] & (under > 0)
    values = np.divide(counts_EE, under, where=used, out=np.full_like(counts_EE, np.nan))
    np.fill_diagonal(values, np.nan)
    return values


def _sizes(counts_EE: Floats) -> tuple[int, int]:
    """Tokens and experts per token: a token with k experts is k times on the diagonal and
    k (k - 1) times beside it."""
    once, all_of_it = counts_EE.diagonal().sum(), counts_EE.sum()
    k = all_of_it / once if once > 0 else np.nan
    n_tokens = once / k if once > 0 else np.nan
    whole = np.isfinite(k) and abs(k - round(k)) < 1e-6 and abs(n_tokens - round(n_tokens)) < 1e-6
    if not whole or (counts_EE != counts_EE.T).any() or (counts_EE < 0).any():
        raise ValueError(
            f"these are no counts of tokens with k experts each: the diagonal adds up to {once:g}, "
            f"all cells to {all_of_it:g}. Cell [i, j] counts tokens that chose both, symmetric, "
            "[i, i] those that chose i; `coactivation_counts` makes them"
        )
    return round(n_tokens), round(k)


def _counts(of: Any, n_experts: int | None) -> xr.DataArray:
    import xarray as xr

    dims = getattr(of, "dims", None)
    if hasattr(of, "expert_ids") or (dims is not None and "slot" in dims):
        return coactivation_counts(of, n_experts=n_experts)
    array = np.asarray(of)
    if array.ndim not in (2, 3) or array.shape[-1] != array.shape[-2]:
        raise ValueError(f"counts of shape {array.shape}: expected [e e] or (layer, expert, other)")
    if dims is not None and "layer" in dims:
        return _labelled(array, of.coords["layer"].values, "", {})
    if array.ndim == 3:
        raise ValueError("counts of several layers need their true numbers: pass an xarray array")
    return xr.DataArray(array, dims=("expert", "other"))


def _labelled(
    values: NDArray[Any], layers: Any, meaning: str, told: dict[str, Any]
) -> xr.DataArray:
    import xarray as xr

    numbers = np.arange(values.shape[-1])
    coords: dict[str, Any] = {"expert": numbers, "other": numbers}
    if layers is not None:
        coords["layer"] = [int(layer) for layer in layers]
    dims = ("layer", "expert", "other")[-values.ndim :]
    return xr.DataArray(
        values, dims=dims, coords=coords, name="coactivation", attrs={"meaning": meaning, **told}
    )


def _require_measure(measure: str) -> None:
    if measure not in MEANING:
        raise ValueError(f"measure={measure!r}; known: {', '.join(MEANING)}")
