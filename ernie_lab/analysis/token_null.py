"""How much of routing is the token itself? A null model that knows a token's id and no context.

It predicts, for every token, the k experts that its id was most often sent to in *other*
documents. What it gets right needs no context; what is above it does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.nulls import halves_of
from ernie_lab.analysis.olmoe import first_slots
from ernie_lab.analysis.saturation import set_agreement
from ernie_lab.analysis.token_groups import (
    By,
    documents_of,
    groups_of,
    layers_of,
    routing_of,
    token_coordinate,
)
from ernie_lab.interventions.bootstrap import draws_of, estimate

Integers = NDArray[np.int64]


def predicted_experts(
    fitted_ids_F: Integers, fitted_FK: Integers, ids_N: Integers, n_experts: int
) -> Integers:
    """`[n k]`: for every id the k experts that it was most often sent to where it was fitted.

    Of all sets of k, this has the largest expected overlap. Ties, and ids that were never seen,
    go to the experts most used overall, and then to the lower number.
    """
    k = fitted_FK.shape[1]
    vocabulary, code_F = np.unique(fitted_ids_F, return_inverse=True)
    cells = (code_F[:, None] * n_experts + fitted_FK).ravel()
    counts_VE = np.bincount(cells, minlength=len(vocabulary) * n_experts).reshape(-1, n_experts)
    load_E = np.bincount(fitted_FK.ravel(), minlength=n_experts)
    place_N = np.minimum(np.searchsorted(vocabulary, ids_N), len(vocabulary) - 1)
    seen_N = vocabulary[place_N] == ids_N
    # Loads below one half break ties and nothing else.
    score_NE = np.where(seen_N[:, None], counts_VE[place_N], 0) + load_E / (2 * load_E.sum() + 1)
    return np.asarray(np.argsort(-score_NE, axis=1, kind="stable")[:, :k])


def token_id_null(
    routing: Any,
    labels: By | None = None,
    *,
    documents: By | None = None,
    n_experts: int | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per layer: the share of slots that a token's id alone predicts, on other documents.

    Fitted on half of the documents, measured on the rest. With `labels`, such as the domain of
    each token, every label's documents are halved; without, they are halved by lot (`seed`), and
    a kind of text that is mostly in one half makes `token_id` too low. `token_id`: mean over
    tokens of |predicted and chosen| / k, with a 95 % interval over documents. Beside it
    `context_free`, the same prediction for every token (the k most used experts), and `uniform`,
    k / E, what guessing gives. `gain` (with interval) is token_id minus context_free, paired.
    `seen`: share of measured tokens whose id was in the fitted half; `token_id_seen`: share right
    among those. A token id seen seldom is predicted badly for want of data, so `token_id` is a
    lower bound on what the token tells; more text raises it.
    """
    routing = routing_of(routing)
    ids = routing.expert_ids
    token_N = np.asarray(token_coordinate(ids, "id"), dtype=np.int64)
    document_N, n_documents = documents_of(ids, documents)
    if n_documents < 2:
        raise ValueError(
            "the null model is fitted on some documents and measured on others, and this is one: "
            "run several texts, or pass documents="
        )
    n_experts = n_experts or n_experts_of(routing)
    groups = groups_of(ids, labels)
    label_N = None if labels is None else groups.code_N
    fitted_N = halves_of(label_N, groups.names, document_N, seed)
    seen_N = np.isin(token_N[~fitted_N], token_N[fitted_N])
    document_M = document_N[~fitted_N]
    drawn = draws_of(n_documents, n_draws, seed)
    rows = []
    for layer, ids_NK in zip(layers_of(ids), first_slots(ids, None), strict=True):
        fitted_FK, actual_MK = ids_NK[fitted_N], ids_NK[~fitted_N]
        by_id = predicted_experts(token_N[fitted_N], fitted_FK, token_N[~fitted_N], n_experts)
        same = np.zeros_like(token_N)
        always = predicted_experts(same[fitted_N], fitted_FK, same[~fitted_N], n_experts)
        right_M, free_M = set_agreement(by_id, actual_MK), set_agreement(always, actual_MK)
        found = estimate(right_M, document_M, drawn)
        gain = estimate(right_M - free_M, document_M, drawn)
        told = {"layer": layer, "token_id": found.value, "low": found.low, "high": found.high}
        told |= {"context_free": float(free_M.mean()), "uniform": ids_NK.shape[1] / n_experts}
        told |= {"gain": gain.value, "gain_low": gain.low, "gain_high": gain.high}
        told |= {"seen": float(seen_N.mean())}
        told |= {"token_id_seen": float(right_M[seen_N].mean()) if seen_N.any() else np.nan}
        rows.append(told | {"n_tokens": len(right_M), "n_fitted": int(fitted_N.sum())})
    return pd.DataFrame(rows).set_index("layer")
