"""The measures of specialisation of OLMoE, under their published names.

Source: Muennighoff et al. 2024 (arXiv:2409.02060), section 5. They say which experts a domain or
a token goes to. Neither has a null of its own: a domain made of few tokens, or a token that is
always routed alike, gives high figures in a router that learned nothing. `specialisation` and
`token_id_null` stand beside them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.nulls import halves_of
from ernie_lab.analysis.token_groups import (
    By,
    documents_of,
    groups_of,
    layers_of,
    routing_of,
    token_coordinate,
)
from ernie_lab.interventions.bootstrap import draws_of, ends


def first_slots(ids: Any, k: int | None) -> NDArray[Any]:
    """The first `k` choices of every token, `[l n k]`, by falling selection score; all if None."""
    ids_LNK = np.asarray(ids)
    if not np.isfinite(ids_LNK).all() or (ids_LNK < 0).any():
        raise ValueError("some tokens were not routed in every layer: take a layer at a time")
    if k is not None and not 1 <= k <= ids_LNK.shape[2]:
        raise ValueError(f"k={k} of {ids_LNK.shape[2]} chosen experts; 1 to {ids_LNK.shape[2]}")
    return ids_LNK[:, :, :k].astype(np.int64)


def domain_specialisation(
    routing: Any,
    labels: By,
    *,
    k: int | None = None,
    documents: By | None = None,
    n_experts: int | None = None,
    n_draws: int = 500,
    seed: int = 0,
) -> xr.Dataset:
    """N(k)_{e,D} / N_D: the share of a domain's tokens that have expert e among their first k.

    Variables `share`, `low` and `high` (95 %, bootstrap over documents) with dims (layer, expert,
    label), and `n_tokens` (label). Sums to k over experts; uniform routing gives k / E, which is
    `attrs["fair_share"]`. OLMoE shows k = 1 and all chosen; any label does for a domain.

    Args:
        routing: a trace of a text model, or `trace.routing("text" | "vision")`.
        labels: the name of a token coordinate, or one value for each token; None and NaN leave
            a token out.
        k: of the chosen experts, by falling selection score; all unless given.
        documents: what the bootstrap draws as a whole; the sequences unless given.
    """
    routing = routing_of(routing)
    ids = routing.expert_ids
    groups = groups_of(ids, labels)
    document_N, n_documents = documents_of(ids, documents)
    n_experts = n_experts or n_experts_of(routing)
    drawn = draws_of(n_documents, n_draws, seed)
    ids_LNK, n_labels = first_slots(ids, k), len(groups.names)
    kept = groups.code_N >= 0
    cell_N = (document_N * n_labels + groups.code_N)[kept]
    size = n_documents * n_labels
    tokens_DC = np.bincount(cell_N, minlength=size).reshape(n_documents, n_labels)
    found = {name: [] for name in ("share", "low", "high")}  # type: ignore[var-annotated]
    for ids_NK in ids_LNK[:, kept]:
        cell_M = (cell_N[:, None] * n_experts + ids_NK).ravel()
        hits = np.bincount(cell_M, minlength=size * n_experts).reshape(n_documents, -1)
        shape = (-1, n_labels, n_experts)
        # A draw without any token of a label says nothing about it.
        n_RC = (drawn @ tokens_DC).astype(float)
        n_RC[n_RC == 0] = np.nan
        draws_RCE = (drawn @ hits).reshape(shape) / n_RC[:, :, None]
        share_CE = hits.sum(0).reshape(n_labels, n_experts) / tokens_DC.sum(0)[:, None]
        low_CE, high_CE = ends(draws_RCE)
        alone_C = (tokens_DC > 0).sum(0) < 2
        low_CE[alone_C] = high_CE[alone_C] = np.nan
        for name, values in zip(found, (share_CE, low_CE, high_CE), strict=True):
            found[name].append(values.T)
    coords = {"layer": layers_of(ids), "expert": range(n_experts), "label": list(groups.names)}
    dims = ("layer", "expert", "label")
    variables = {name: (dims, np.array(values)) for name, values in found.items()}
    variables["n_tokens"] = (("label",), tokens_DC.sum(0))  # type: ignore[assignment]
    n_chosen = ids_LNK.shape[2]
    attrs = {"k": n_chosen, "fair_share": n_chosen / n_experts, "n_documents": n_documents}
    return xr.Dataset(variables, coords=coords, attrs=attrs)


def vocabulary_specialisation(
    routing: Any,
    labels: By | None = None,
    *,
    k: int | None = None,
    min_count: int = 10,
    min_share: float = 0.5,
    documents: By | None = None,
    n_experts: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """N(k)_{x,e} / N_x: of the times that token id x was read, how often expert e was chosen.

    One row per (layer, expert, id) with `share` or `share_picked` of at least `min_share`, the
    largest share first in each layer: `id`, `text`, `n` (times read), `share`. Ids read fewer than
    `min_count` times are left out. With many ids some shares are high by luck, so `share_picked`
    is that of half of the documents and `share_other` that of the rest: pick by the one, report
    the other (NaN where it has no such token; `n_other` says of how many). With `labels`, such as
    the domain of each token, every label's documents are halved; else they are by lot (`seed`).
    No row that is picked at `min_share` or more is missing for a low share in the rest.

    These are *input* ids: the token that the router reads. OLMoE also shows predicted ids.
    """
    routing = routing_of(routing)
    ids = routing.expert_ids
    token_N, text_N = token_coordinate(ids, "id"), token_coordinate(ids, "text")
    document_N, _ = documents_of(ids, documents)
    n_experts = n_experts or n_experts_of(routing)
    vocabulary, first_V, code_N = np.unique(token_N, return_index=True, return_inverse=True)
    n_V = np.bincount(code_N)
    if not (n_V >= min_count).any():
        raise ValueError(
            f"no token id occurs {min_count} times (the commonest {n_V.max()}): run more text or "
            "lower min_count="
        )
    groups = groups_of(ids, labels)
    label_N = None if labels is None else groups.code_N
    picked_N = halves_of(label_N, groups.names, document_N, seed)
    sides = {"share": np.ones_like(picked_N), "share_picked": picked_N, "share_other": ~picked_N}
    tables = []
    for layer, ids_NK in zip(layers_of(ids), first_slots(ids, k), strict=True):
        shares = {}
        for name, rows_N in sides.items():
            cell_M = (code_N[rows_N, None] * n_experts + ids_NK[rows_N]).ravel()
            hits = np.bincount(cell_M, minlength=len(vocabulary) * n_experts)
            n_side = np.bincount(code_N[rows_N], minlength=len(vocabulary)).astype(float)
            n_side[n_side == 0] = np.nan
            shares[name] = hits.reshape(-1, n_experts) / n_side[:, None]
        high = (shares["share"] >= min_share) | (shares["share_picked"] >= min_share)
        row, expert = np.nonzero(high & (n_V >= min_count)[:, None])
        told = {"layer": layer, "expert": expert, "id": vocabulary[row]}
        told |= {"text": text_N[first_V[row]], "n": n_V[row]}
        told |= {name: values[row, expert] for name, values in shares.items()}
        told["n_other"] = np.bincount(code_N[~picked_N], minlength=len(vocabulary))[row]
        by = ["share", "n", "id", "expert"]
        table = pd.DataFrame(told).sort_values(by, ascending=[False, False, True, True])
        tables.append(table)
    return pd.concat(tables, ignore_index=True)
