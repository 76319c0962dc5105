"""What the correction bias does: who is chosen because of it, who is not, and what follows.

The bias is added to the probabilities when experts are chosen, and to nothing else. For a token
let S_b be the experts chosen, S_0 the k most probable ones: *added* are S_b \\ S_0, *displaced*
S_0 \\ S_b. As sets: which of the added took whose place is not defined.

Two questions have two answers, and stand in columns of their own. *Local*: on the same hidden
states, how else would this router have chosen? One trace tells. *Global*: the bias is taken away
in every layer, so that later states change too. That takes a second run of the same tokens, with
`el.routing.without_correction_bias()`.

A trained bias is a record of the load that it had to fight: ERNIE's is moved by a fixed step
against the load of each batch (`model/losses.py`, `updated_correction_bias`). So that it opposes
the unbiased router's load is the training rule, not a finding; how far it succeeds on *this* text
is one. Only differences of the bias within a layer matter, so it is shown centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ernie_lab.analysis.balance import load, max_violation, multinomial_reference
from ernie_lab.analysis.balance_groups import counts_by_document
from ernie_lab.analysis.information import null_p95
from ernie_lab.analysis.token_groups import (
    By,
    Floats,
    Integers,
    documents_of,
    layers_of,
    require_same_tokens,
    routing_of,
    strata_of,
    stratified_draws,
)
from ernie_lab.interventions.bootstrap import basic_interval, estimate, interval
from ernie_lab.model.losses import unbiased_choice
from ernie_lab.trace.routing import require_choice, selection_scores

Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, repr=False)
class BiasLedger:
    """What the correction bias did in every layer, and to every expert.

    `layers`, one row for each:

    - `bias_std`, `bias_range`: standard deviation and largest minus smallest bias.
    - `local_slots`: share of the slots that the bias fills otherwise, |S_b \\ S_0| / k averaged;
      `local_tokens`: share of tokens with any; `local_weight`: weight moved, half of
      sum_e |w_e - w'_e| between the weights used and those over S_0.
    - `max_violation`, `local_max_violation`: MaxVio with the bias, and as S_0 would give; `local_
      max_violation_change`, its interval paired; `uniform_p95` as in `balance_by`.
    - `correlation`: Pearson's r over experts between the bias and the load under S_0, with an
      interval over documents; `correlation_chance`: |r| that 5 % of random orders of the experts
      exceed.
    - the same with `global_` for the run without bias, if there is one; else they are absent.

    `experts`, one row for each (layer, expert): `bias`, centred; `load` and `local_load`,
    `global_load` without, 1 = fair share; `added` and `displaced`, the share of tokens which the
    bias brought the expert, and took from it.
    """

    layers: pd.DataFrame
    experts: pd.DataFrame
    n_tokens: int
    n_documents: int
    k: int

    @property
    def has_global(self) -> bool:
        return "global_slots" in self.layers

    def __repr__(self) -> str:
        parts = [
            f"Correction bias in layers {', '.join(map(str, self.layers.index))}; "
            f"{self.n_tokens} tokens of {self.n_documents} documents.",
            f"On the same states it fills {_span(self.layers['local_slots'], '%')} of the slots "
            f"otherwise; MaxVio {_span(self.layers['local_max_violation'])} -> "
            f"{_span(self.layers['max_violation'])}.",
        ]
        if self.has_global:
            parts.append(
                f"Taken away in all layers: {_span(self.layers['global_slots'], '%')} of the slots "
                f"differ, MaxVio {_span(self.layers['global_max_violation'])}."
            )
        return " ".join([*parts, ".layers, .experts"])


def bias_ledger(
    routing: Any,
    without: Any = None,
    *,
    documents: By | None = None,
    strata: By | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> BiasLedger:
    """The bias ledger of one bank's routing.

    Args:
        routing: a trace, or one bank's routing, with logits and choices kept, as
            `keep="routing"` does. Its choices must follow from probabilities and bias.
        without: the same tokens run with `edits=el.routing.without_correction_bias()`.
        documents: the document of each token, if it is not its sequence.
        strata: documents are drawn within these, as in `balance_by`.

    Intervals are 95 %, documents drawn with replacement, percentiles for means and the basic
    bootstrap for MaxVio (see `balance_by`). Raises where the choices follow from something else:
    an edited run says nothing about its bias.
    """
    with_bias = _Choices.of(routing_of(routing), "routing")
    runs = {"local": with_bias.unbiased()}
    if without is not None:
        other = _Choices.of(routing_of(without), "without")
        require_same_tokens(with_bias.ids, other.ids)
        if np.ptp(other.bias_LE, axis=1).any():
            raise ValueError(
                "without= is a run with its correction bias; run the same prompts with "
                "edits=el.routing.without_correction_bias()"
            )
        runs["global"] = other
    document_N, n_documents = documents_of(with_bias.ids, documents)
    strata_D = strata_of(with_bias.ids, strata, document_N, n_documents)
    draws = stratified_draws(strata_D, n_draws, seed)
    layer_rows, expert_rows = [], []
    for i, layer in enumerate(layers_of(with_bias.ids)):
        row, experts = _of_layer(i, with_bias, runs, document_N, draws, seed)
        layer_rows.append({"layer": layer} | row)
        expert_rows.append(experts.assign(layer=layer))
    n_tokens, k = with_bias.ids_LNK.shape[1:]
    return BiasLedger(
        pd.DataFrame(layer_rows).set_index("layer"),
        pd.concat(expert_rows).set_index(["layer", "expert"]),
        n_tokens,
        n_documents,
        k,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Choices:
    """Who is chosen with which weight; `ids` is the labelled array."""

    ids: Any
    ids_LNK: Integers
    weights_LNK: Floats
    probs_LNE: Floats
    bias_LE: Floats

    @classmethod
    def of(cls, routing: Any, name: str) -> _Choices:
        ids, layers = routing.expert_ids, layers_of(routing.expert_ids)
        probs, bias = routing.router_probs, routing.correction_bias.sel(layer=layers)
        if probs.shape[:2] != ids.shape[:2]:
            raise ValueError(
                f"{name}: probabilities of {probs.shape[:2]} and choices of {ids.shape[:2]} "
                "(layers, tokens) were kept; keep='routing' keeps both everywhere"
            )
        scores = selection_scores(
            torch.from_numpy(np.array(probs)), torch.from_numpy(np.array(bias))
        )
        require_choice(scores, torch.from_numpy(np.array(ids)), layers)
        return cls(
            ids,
            np.array(ids, dtype=np.int64),
            np.array(routing.expert_weights, dtype=np.float64),
            np.array(probs, dtype=np.float64),
            np.array(bias, dtype=np.float64),
        )

    def unbiased(self) -> _Choices:
        """As the same probabilities would choose by themselves."""
        k = self.ids_LNK.shape[-1]
        ids_LNK = np.stack(
            [unbiased_choice(torch.from_numpy(p_NE), k).numpy() for p_NE in self.probs_LNE]
        )
        chosen_LNK = np.take_along_axis(self.probs_LNE, ids_LNK, -1)
        weights_LNK = chosen_LNK / chosen_LNK.sum(-1, keepdims=True)
        return _Choices(self.ids, ids_LNK, weights_LNK, self.probs_LNE, 0 * self.bias_LE)

    def spread(self, layer: int) -> tuple[Bools, Floats]:
        """Of one layer, over all experts `[n e]`: is it chosen, and with which weight?"""
        ids_NK, weights_NK = self.ids_LNK[layer], self.weights_LNK[layer]
        weights_NE = np.zeros(self.probs_LNE.shape[1:])
        np.put_along_axis(weights_NE, ids_NK, weights_NK, -1)
        chosen_NE = np.zeros(weights_NE.shape, dtype=bool)
        np.put_along_axis(chosen_NE, ids_NK, True, -1)
        return chosen_NE, weights_NE


def _of_layer(
    i: int,
    with_bias: _Choices,
    runs: dict[str, _Choices],
    document_N: Integers,
    draws: NDArray[np.int64],
    seed: int,
) -> tuple[dict[str, Any], pd.DataFrame]:
    n_tokens, k = with_bias.ids_LNK.shape[1:]
    bias_E = with_bias.bias_LE[i] - with_bias.bias_LE[i].mean()
    n_documents, n_experts = draws.shape[1], len(bias_E)
    chosen_NE, weights_NE = with_bias.spread(i)
    counts_DE = counts_by_document(with_bias.ids_LNK[i], document_N, n_documents, n_experts)
    violation = float(max_violation(counts_DE.sum(0)))
    row: dict[str, Any] = {
        "n_tokens": n_tokens,
        "bias_std": float(bias_E.std()),
        "bias_range": float(np.ptp(bias_E)),
        "max_violation": violation,
        "uniform_p95": multinomial_reference(n_tokens, n_experts, k, seed=seed).p95,
    }
    experts = pd.DataFrame({"expert": range(n_experts), "bias": bias_E})
    experts["load"] = load(with_bias.ids_LNK[i], n_experts) * n_experts
    for name, other in runs.items():
        other_NE, other_weights_NE = other.spread(i)
        other_DE = counts_by_document(other.ids_LNK[i], document_N, n_documents, n_experts)
        moved_N = np.abs(weights_NE - other_weights_NE).sum(1) / 2
        added_NE, displaced_NE = chosen_NE & ~other_NE, other_NE & ~chosen_NE
        means = {
            "slots": added_NE.sum(1) / k,
            "tokens": added_NE.any(1).astype(np.float64),
            "weight": moved_N,
        }
        for what, values_N in means.items():
            found = estimate(values_N, document_N, draws)
            row[f"{name}_{what}"] = found.value
            row |= {f"{name}_{what}_low": found.low, f"{name}_{what}_high": found.high}
        row |= _violations(name, counts_DE, other_DE, draws)
        experts[f"{name}_load"] = load(other.ids_LNK[i], n_experts) * n_experts
        if name == "local":
            row |= _correlation(bias_E, other_DE, draws, seed)
            experts["added"], experts["displaced"] = added_NE.mean(0), displaced_NE.mean(0)
    return row, experts


def _violations(
    name: str, counts_DE: Integers, other_DE: Integers, draws: NDArray[np.int64]
) -> dict[str, float]:
    """MaxVio without the bias, and with minus without, from the same draws of documents."""
    without = float(max_violation(other_DE.sum(0)))
    change = float(max_violation(counts_DE.sum(0))) - without
    low, high = np.nan, np.nan
    if draws.shape[1] > 1:
        drawn_B = max_violation(draws @ counts_DE) - max_violation(draws @ other_DE)
        low, high = basic_interval(change, drawn_B)
    column = f"{name}_max_violation"
    ends = {f"{column}_change_low": low, f"{column}_change_high": high}
    return {column: without, f"{column}_change": change} | ends


def _correlation(
    bias_E: Floats, other_DE: Integers, draws: NDArray[np.int64], seed: int
) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    load_E = other_DE.sum(0).astype(np.float64)
    low, high = interval(_pearson(bias_E, draws @ other_DE), draws.shape[1])
    orders = np.stack([rng.permutation(load_E) for _ in range(1000)])
    chance = np.abs(_pearson(bias_E, orders))
    return {
        "correlation": float(_pearson(bias_E, load_E[None])[0]),
        "correlation_low": low,
        "correlation_high": high,
        "correlation_chance": null_p95(chance),
    }


def _pearson(x_E: Floats, y_BE: Any) -> Floats:
    """r between `x` and each row; NaN where either is constant."""
    x = x_E - x_E.mean()
    y = y_BE - y_BE.mean(axis=1, keepdims=True)
    size = np.linalg.norm(x) * np.linalg.norm(y, axis=1)
    r_B = np.divide(y @ x, size, where=size > 0, out=np.full(len(size), np.nan))
    return np.asarray(r_B, dtype=np.float64)


def _span(values: pd.Series[float], unit: str = "") -> str:
    low, high = float(values.min()), float(values.max())
    if unit == "%":
        return f"{100 * low:.1f} to {100 * high:.1f} %"
    return f"{low:.2f} to {high:.2f}"
