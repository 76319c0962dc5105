"""The training terms of a router, measured on a trace: how balanced, how apart, how large.

They are computed by the same functions as in training (`model/losses.py`), layer by layer, and
never pooled: a layer that sends all to one expert can hide behind one that does the opposite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ernie_lab.analysis.token_groups import (
    By,
    Floats,
    documents_of,
    layers_of,
    routing_of,
    strata_of,
    stratified_draws,
)
from ernie_lab.interventions.bootstrap import basic_interval, estimate
from ernie_lab.model.losses import orthogonal_loss, switch_loss, unbiased_choice, z_loss


def router_losses(
    routing: Any,
    gates: Mapping[int, Tensor] | None = None,
    *,
    documents: By | None = None,
    strata: By | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per layer: Switch loss, z-loss and, with the gates, orthogonal loss.

    - `switch`: E sum_e f_e mean_n p_ne with the experts really chosen; 1 when load or
      probabilities are even (Fedus et al. 2021), E / k when k experts get everything.
    - `switch_bias_blind`: the same with the k most probable experts in the place of the chosen.
      transformers' `aux_loss` counts these, which the model did not use where the correction bias
      decided; it is k times as large, and pools layers.
    - `z`: mean_n logsumexp_e(logits)^2 (ST-MoE, Zoph et al. 2022), which only the size of logits
      moves.
    - `orthogonal`: ||W W^T - I||_F^2 / E^2 with rows of length 1; a property of the weights, so
      without interval.

    `_low` and `_high` are 95 % intervals over documents: percentiles for the mean z, the basic
    bootstrap for the products; `documents` and `strata` as in `balance_by`. `gates` are the
    routers' weights `[e d]` by layer: `{n: r.weight_ED for n, r in lab.model.routers().items()}`;
    in a vision-language model `.routers()["text"]`, with `trace.routing("text")`.
    """
    routing = routing_of(routing)
    ids, logits, probs = routing.expert_ids, routing.router_logits, routing.router_probs
    document_N, n_documents = documents_of(ids, documents)
    strata_D = strata_of(ids, strata, document_N, n_documents)
    draws = stratified_draws(strata_D, n_draws, seed)
    layers = layers_of(ids)
    if absent := [layer for layer in layers if gates is not None and layer not in gates]:
        raise ValueError(f"gates= has layers {sorted(gates or ())}, but not {absent}")
    rows = []
    for i, layer in enumerate(layers):
        logits_NE, probs_NE, ids_NK = (_tensor(x[i]) for x in (logits, probs, ids))
        k = ids_NK.shape[1]
        row: dict[str, Any] = {"n_tokens": len(ids_NK), "n_documents": n_documents, "k": k}
        for name, chosen_NK in (
            ("switch", ids_NK.long()),
            ("switch_bias_blind", unbiased_choice(probs_NE, k)),
        ):
            value = float(switch_loss(probs_NE, chosen_NK))
            low, high = _switch_interval(value, probs_NE, chosen_NK, document_N, draws)
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        z = estimate(logits_NE.logsumexp(-1).square(), document_N, draws)
        row |= {"z": float(z_loss(logits_NE)), "z_low": z.low, "z_high": z.high}
        if gates is not None:
            row["orthogonal"] = float(orthogonal_loss(gates[layer].detach().double()))
        rows.append(row)
    return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))


def _switch_interval(
    value: float, probs_NE: Tensor, ids_NK: Tensor, document_N: Any, draws: Any
) -> tuple[float, float]:
    """Load and mean probability are both sums over documents, so their product is drawn too."""
    n_documents, n_experts = draws.shape[1], probs_NE.shape[1]
    if n_documents < 2:
        return np.nan, np.nan
    of_D = torch.as_tensor(document_N)
    probs_DE = torch.zeros(n_documents, n_experts, dtype=torch.float64).index_add(0, of_D, probs_NE)
    once_NE = torch.zeros_like(probs_NE).scatter(1, ids_NK, 1.0)
    slots_DE = torch.zeros(n_documents, n_experts, dtype=torch.float64).index_add(0, of_D, once_NE)
    load_BE, mean_BE = (_rows_to_one(draws @ x.numpy()) for x in (slots_DE, probs_DE))
    return basic_interval(value, n_experts * (load_BE * mean_BE).sum(1), (0.0, np.inf))


def _rows_to_one(sums_BE: Floats) -> Floats:
    return np.asarray(sums_BE / sums_BE.sum(1, keepdims=True))


def _tensor(values: Any) -> Tensor:
    array = np.array(values)
    return torch.from_numpy(array if array.dtype.kind == "i" else array.astype(np.float64))
