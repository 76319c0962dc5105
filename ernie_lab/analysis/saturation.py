"""When in training a router settles: agreement of a checkpoint's choices with the final ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.olmoe import first_slots
from ernie_lab.analysis.token_groups import (
    By,
    documents_of,
    layers_of,
    require_same_tokens,
    routing_of,
)
from ernie_lab.interventions.bootstrap import draws_of, estimate


def set_agreement(one_NK: ArrayLike, other_NK: ArrayLike) -> NDArray[np.float64]:
    """|S and S'| / k of every token, for sets of k distinct experts."""
    first, second = np.asarray(one_NK), np.asarray(other_NK)
    both = (first[..., :, None] == second[..., None, :]).any(-1).sum(-1)
    return np.asarray(both / first.shape[-1])


def router_saturation(
    earlier: Any,
    final: Any,
    *,
    k: int | None = None,
    documents: By | None = None,
    n_experts: int | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """mean over tokens of |E_t and E_T| / k: how far checkpoint t chooses as the final one does.

    E_t are the k experts that a token's router chose at checkpoint t, on the same tokens. Source:
    OLMoE, Muennighoff et al. 2024 (arXiv:2409.02060), section 5.1. Experts are compared by their
    number, so this is for checkpoints of one training. Hidden states differ too: it measures
    the network up to the router, not the gate alone.

    One row per layer: `saturation` with a 95 % interval over documents; `uniform`, k / E, what
    two routers that know nothing of each other and load all experts alike give;
    `independent`, sum_e p_e q_e / k with the loads p, q (shares of tokens) that the two really
    have: the agreement if only the loads were common.

    Args:
        earlier, final: routings of the same tokens: traces of text models, or of one bank.
        k: of the chosen experts, by falling selection score; all unless given.
    """
    earlier, final = routing_of(earlier), routing_of(final)
    mine, theirs = earlier.expert_ids, final.expert_ids
    require_same_tokens(mine, theirs)
    n_experts = n_experts or n_experts_of(final)
    document_N, n_documents = documents_of(theirs, documents)
    drawn = draws_of(n_documents, n_draws, seed)
    rows = []
    both = zip(layers_of(theirs), first_slots(mine, k), first_slots(theirs, k), strict=True)
    for layer, mine_NK, theirs_NK in both:
        found = estimate(set_agreement(mine_NK, theirs_NK), document_N, drawn)
        chosen = mine_NK.shape[1]
        p_E, q_E = (
            np.bincount(ids_NK.ravel(), minlength=n_experts) / len(ids_NK)
            for ids_NK in (mine_NK, theirs_NK)
        )
        told = {"layer": layer, "saturation": found.value, "low": found.low, "high": found.high}
        told |= {"uniform": chosen / n_experts, "independent": float(p_E @ q_E) / chosen}
        rows.append(told | {"n_tokens": found.n, "n_documents": n_documents})
    return pd.DataFrame(rows).set_index("layer")
