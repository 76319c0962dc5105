"""Where two routings of the same tokens differ: two runs, dtypes, models, with and without an edit.

Sets of experts are compared by number. In models that were trained apart the numbers mean
nothing: `match_experts` looks for the numbering first.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.expert_matching import ExpertMatching
from ernie_lab.analysis.margins import LEAST_RUNS, set_flips
from ernie_lab.analysis.token_groups import (
    By,
    Floats,
    Integers,
    documents_of,
    layers_of,
    require_same_tokens,
    routing_of,
)
from ernie_lab.interventions.bootstrap import draws_of, estimate
from ernie_lab.trace.keys import NotKept

if TYPE_CHECKING:
    import xarray as xr

N_BINS = 10
FLOOR_PERCENTILE = 95
# Of `by_layer`; each has an interval, and a floor where equivalent runs were given.
MEASURES = ("changed", "flips", "jaccard", "weight_change")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RoutingDiff:
    """Routing b against routing a; S, S' are a token's sets of k experts, w, w' their weights.

    - `flips` (layer, token): 1 - |S and S'| / k.
    - `weight_change` (layer, token): sum over experts |w - w'| / 2, an expert that was not chosen
      having weight 0: the share of the weight that lies on other experts, or otherwise on these.
    - `first_layer` (token): the first layer in which any expert differs; NaN where none does.
    - `by_layer`: means over tokens: `changed` (share of tokens with any other expert), `flips`,
      `jaccard` |S and S'| / |S or S'|, `weight_change`, each with `_low` and `_high` (95 %,
      bootstrap over documents) and `_floor`, the 95th percentile of the same mean over equivalent
      runs of a (NaN without these). `first`: share of all tokens that diverge first here; `still`:
      the share of those equal in every earlier layer that diverge here.
    - `by_margin`: mean flips of all layers' tokens by their margin in a, with intervals; empty
      where a has no margins. `flips_by_margin` has it by layer.
    """

    flips: xr.DataArray
    weight_change: xr.DataArray
    first_layer: xr.DataArray
    by_layer: pd.DataFrame
    by_margin: pd.DataFrame
    k: int
    n_experts: int
    n_documents: int
    n_equivalent: int

    @property
    def by_lot(self) -> float:
        """Set flips of two independent uniform draws: 1 - k / E."""
        return 1 - self.k / self.n_experts

    @property
    def same(self) -> bool:
        """Does every token have the same experts in every layer?"""
        return not bool((self.flips.values > 0).any())

    def __repr__(self) -> str:
        columns = ["changed", "flips", "flips_low", "flips_high", "weight_change", "first"]
        shown = self.by_layer[columns[:4] + ["flips_floor"] * (self.n_equivalent > 0) + columns[4:]]
        return f"{self._head()}\n{shown.to_string(float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        table = self.by_layer.to_html(float_format="{:.4g}".format)
        return f"<div>{html.escape(self._head())}{table}</div>"

    def _head(self) -> str:
        n, documents = self.flips.sizes["token"], self.n_documents
        diverge = 100 * float(np.isfinite(self.first_layer.values).mean())
        return (
            f"RoutingDiff of {n} tokens of {documents} document{'s' * (documents > 1)}, "
            f"{len(self.by_layer)} layers, {self.k} of {self.n_experts} experts: {diverge:.3g} % "
            f"of tokens diverge in some layer; mean set flips {float(self.flips.mean()):.4g} "
            f"(two lots: {self.by_lot:.3g})"
        )


def routing_diff(
    a: Any,
    b: Any,
    *,
    matching: ExpertMatching | None = None,
    equivalent: Sequence[Any] = (),
    edges: Sequence[float] | None = None,
    documents: By | None = None,
    n_experts: int | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> RoutingDiff:
    """Routing b against routing a, token by token and layer by layer.

    Upstream states differ as well, so flips are cumulative: to see a layer's own, replay or freeze
    the layers before it in b.

    Args:
        a, b: routings of the same tokens (`Trace` of a text model, `trace.routing("text")`).
        matching: of `match_experts(a, b)`: b's experts are renumbered by it. Its own table, of
            documents that it was not found on, says how much of the agreement is real.
        equivalent: at least 8 routings that should equal a (other batches, padding or attention
            kernel; same dtype): the noise floor.
        edges: of the bins of margins, rising; tenths of all margins if absent.
        documents: labels of tokens, or a coordinate; the sequence of each token if absent.

    Raises:
        ValueError: other tokens, layers or numbers of experts.
    """
    a, b = routing_of(a), routing_of(b)
    ids, its = a.expert_ids, b.expert_ids
    require_same_tokens(ids, its)
    if ids.shape != its.shape:
        raise ValueError(f"{ids.shape[2]} experts per token in a, {its.shape[2]} in b: no diff")
    sizes = [n_experts or n_experts_of(one) for one in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a chooses among {sizes[0]} experts, b among {sizes[1]}: no diff")
    layers = layers_of(ids)
    ids_LNK, its_LNK = np.asarray(ids, dtype=np.int64), np.asarray(its, dtype=np.int64)
    if matching is not None:
        its_LNK = matching.in_numbers_of_a(its_LNK, layers)
    document_N, n_documents = documents_of(ids, documents)
    draws = draws_of(n_documents, n_draws, seed)
    weights = [np.asarray(one.expert_weights, dtype=np.float64) for one in (a, b)]
    values = _values(ids_LNK, its_LNK, weights[0], weights[1], sizes[0])
    flips_LN = values["flips"]
    differs_LN = flips_LN > 0
    first_N = np.where(differs_LN.any(0), np.array(layers)[differs_LN.argmax(0)], np.nan)
    floors = _floors(ids, ids_LNK, weights[0], sizes[0], equivalent)
    coords = {name: one for name, one in ids.coords.items() if "slot" not in one.dims}
    return RoutingDiff(
        _labelled(flips_LN, coords, "set flips"),
        _labelled(values["weight_change"], coords, "weight change"),
        _labelled(first_N, {n: c for n, c in coords.items() if n != "layer"}, "first layer"),
        _by_layer(values, layers, document_N, draws, floors).join(_first(differs_LN, layers)),
        _by_margin(a, flips_LN, document_N, draws, edges),
        ids_LNK.shape[2],
        sizes[0],
        n_documents,
        len(equivalent),
    )


def _values(
    ids_LNK: Integers, its_LNK: Integers, weights_LNK: Floats, its_weights_LNK: Floats, n: int
) -> dict[str, Floats]:
    """By measure, `[l n]`."""
    flips_LN = set_flips(ids_LNK, its_LNK)
    common_LN = 1 - flips_LN
    full_LNE, its_full_LNE = (
        _by_expert(ids, weights, n)
        for ids, weights in ((ids_LNK, weights_LNK), (its_LNK, its_weights_LNK))
    )
    return {
        "changed": (flips_LN > 0).astype(np.float64),
        "flips": flips_LN,
        "jaccard": common_LN / (2 - common_LN),
        "weight_change": np.abs(full_LNE - its_full_LNE).sum(-1) / 2,
    }


def _by_expert(ids_LNK: Integers, weights_LNK: Floats, n_experts: int) -> Floats:
    full_LNE = np.zeros((*ids_LNK.shape[:2], n_experts))
    np.put_along_axis(full_LNE, ids_LNK, weights_LNK, axis=-1)
    return full_LNE


def _floors(
    ids: Any,
    ids_LNK: Integers,
    weights_LNK: Floats,
    n_experts: int,
    equivalent: Sequence[Any],
) -> dict[str, Floats]:
    """By measure, `[l]`: the percentile of its mean over tokens, over runs equal to a."""
    if not equivalent:
        return {}
    if len(equivalent) < LEAST_RUNS:
        raise ValueError(
            f"{len(equivalent)} equivalent runs: a 95th percentile needs at least {LEAST_RUNS}"
        )
    found: dict[str, list[Floats]] = {name: [] for name in MEASURES}
    for other in map(routing_of, equivalent):
        require_same_tokens(ids, other.expert_ids)
        its_LNK = np.asarray(other.expert_ids, dtype=np.int64)
        its_weights_LNK = np.asarray(other.expert_weights, dtype=np.float64)
        values = _values(ids_LNK, its_LNK, weights_LNK, its_weights_LNK, n_experts)
        for name in MEASURES:
            found[name].append(values[name].mean(1))
    # No effect is a Jaccard of 1: its floor is what lies below 1 in 5 % of the runs.
    return {
        name: np.percentile(runs, 100 - FLOOR_PERCENTILE if name == "jaccard" else 95, axis=0)
        for name, runs in found.items()
    }


def _by_layer(
    values: dict[str, Floats],
    layers: Sequence[int],
    document_N: Integers,
    draws: Integers,
    floors: dict[str, Floats],
) -> pd.DataFrame:
    rows = []
    for place, layer in enumerate(layers):
        row: dict[str, float] = {"layer": layer, "n_tokens": len(document_N)}
        for name in MEASURES:
            found = estimate(values[name][place], document_N, draws)
            row |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            row[f"{name}_floor"] = float(floors[name][place]) if floors else np.nan
        rows.append(row)
    return pd.DataFrame(rows).set_index("layer")


def _first(differs_LN: Any, layers: Sequence[int]) -> pd.DataFrame:
    """How many tokens diverge first in each layer: of all, and of those that had not before."""
    equal_N = np.ones(differs_LN.shape[1], dtype=bool)
    rows = []
    for layer, differs_N in zip(layers, differs_LN, strict=True):
        here = int((differs_N & equal_N).sum())
        left = int(equal_N.sum())
        rows.append((layer, here / len(equal_N), here / left if left else np.nan))
        equal_N &= ~differs_N
    return pd.DataFrame(rows, columns=pd.Index(["layer", "first", "still"])).set_index("layer")


def _by_margin(
    a: Any, flips_LN: Floats, document_N: Integers, draws: Integers, edges: Sequence[float] | None
) -> pd.DataFrame:
    try:
        margin_LN = np.asarray(a.margin, dtype=np.float64)
    except (NotKept, AttributeError):
        margin_LN = np.full(flips_LN.shape, np.nan)
    if not np.isfinite(margin_LN).any():
        return pd.DataFrame(columns=pd.Index(["margin_low", "margin_high", "flips"]))
    points = np.quantile(margin_LN, np.linspace(0, 1, N_BINS + 1)) if edges is None else edges
    points = np.unique(points) if edges is None else np.asarray(points, dtype=np.float64)
    if len(points) < 2 or (np.diff(points) <= 0).any():
        raise ValueError(f"edges={points.tolist()} must rise, and be at least two")
    bin_LN = np.searchsorted(points, margin_LN, side="right") - 1
    bin_LN[margin_LN == points[-1]] = len(points) - 2
    document_LN = np.broadcast_to(document_N, flips_LN.shape)
    rows = []
    for number in range(len(points) - 1):
        mine_LN = bin_LN == number
        found = estimate(flips_LN[mine_LN], document_LN[mine_LN], draws)
        row = {"margin_low": points[number], "margin_high": points[number + 1]}
        row |= {"flips": found.value, "low": found.low, "high": found.high, "n": found.n}
        rows.append(row)
    return pd.DataFrame(rows).rename_axis("bin")


def _labelled(values: Floats, coords: Any, name: str) -> xr.DataArray:
    import xarray as xr

    dims = ("layer", "token") if values.ndim == 2 else ("token",)
    return xr.DataArray(values, dims=dims, coords=coords, name=name)
