"""Bits between expert and label, layer by layer, with intervals over documents."""

from __future__ import annotations

from typing import Any

import pandas as pd

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.information import Codes, Rows
from ernie_lab.analysis.token_groups import By, documents_of, groups_of, layers_of, routing_of
from ernie_lab.interventions.bootstrap import draws_of


def expert_information(
    routing: Any,
    labels: By,
    *,
    given: By | None = None,
    weighted: bool = False,
    documents: By | None = None,
    n_experts: int | None = None,
    n_draws: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per layer: `mutual_information` of expert and label, with a 95 % interval.

    `label_bits` and `expert_bits` are the entropies that `bits` cannot exceed. The interval is
    the spread of `n_draws` bootstrap draws of whole documents around their own mean, laid around
    `bits`: drawn samples repeat documents and so tell more than new ones would, and that shift is
    no uncertainty. In simulations with 12 to 72 documents it held the bits of endless text in 82 to
    85 % of cases where documents of one label differed from each other: these differences pass for
    differences of labels, so that `bits` are too high, the more the fewer documents there are.
    It says nothing of what a router that learned nothing would tell on the same documents: that
    is `specialisation`.

    With `given`, `share_comparable` is the share of tokens whose given value occurs under two
    labels or more: only these can tell anything.

    Args:
        routing: a trace of a text model, or `trace.routing("text" | "vision")`.
        labels, given: the name of a token coordinate (`"modality"`, `"id"`), or one value for
            each token; None and NaN leave a token out.
        weighted: rows count by the weight of their expert instead of equally.
        documents: what is drawn as a whole; the sequences unless given.
    """
    routing = routing_of(routing)
    ids = routing.expert_ids
    label_N = groups_of(ids, labels).code_N
    given_N = None if given is None else groups_of(ids, given).code_N
    document_N, n_documents = documents_of(ids, documents)
    n_experts = n_experts or n_experts_of(routing)
    weights_LNK = routing.expert_weights.values if weighted else None
    drawn = draws_of(n_documents, n_draws, seed)
    table = []
    for row, layer in enumerate(layers_of(ids)):
        weights_NK = None if weights_LNK is None else weights_LNK[row]
        rows = Rows.of(label_N, ids.values[row], document_N, n_experts, given_N, weights_NK)
        bits, low, high = rows.interval(drawn)
        told: dict[str, float] = {"layer": layer, "bits": bits, "low": low, "high": high}
        told |= {"label_bits": rows.label_bits(), "expert_bits": rows.expert_bits()}
        told |= {"n_tokens": rows.n_tokens, "n_documents": rows.n_documents}
        told |= {"n_labels": rows.n_labels}
        if given_N is not None:
            told["share_comparable"] = share_comparable(label_N, given_N)
        table.append(told)
    return pd.DataFrame(table).set_index("layer")


def share_comparable(label_N: Codes, given_N: Codes) -> float:
    """Share of the labelled tokens whose given value occurs under at least two labels."""
    there = (label_N >= 0) & (given_N >= 0)
    pairs = pd.DataFrame({"label": label_N[there], "given": given_N[there]})
    return float((pairs.groupby("given")["label"].transform("nunique") >= 2).mean())
