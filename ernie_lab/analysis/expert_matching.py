"""Which expert of one model is which of another, by the tokens that they share.

Two trainings number their experts as they like. The numbering under which two routings agree
most is found by the Hungarian method; but the best of E! numberings agrees in something whatever
the routings are, so it is found on some documents and tried on others, beside the same done with
shuffled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.information import null_p95
from ernie_lab.analysis.saturation import set_agreement
from ernie_lab.analysis.token_groups import (
    By,
    Integers,
    documents_of,
    layers_of,
    require_same_tokens,
    routing_of,
)
from ernie_lab.interventions.bootstrap import draws_of, estimate

if TYPE_CHECKING:
    import xarray as xr

LEAST_SHUFFLES = 20


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ExpertMatching:
    """What `match_experts` found.

    `to_a` (layer, expert of b) is the number of a's expert that b's is matched with. `table` has
    one row per layer, all on documents that the matching was not found on: `as_numbered` and
    `matched`, the mean share of a token's experts that both choose, |S and S'| / k, before and
    after renumbering, and their difference `gain`, each with `_low` and `_high` (95 %, bootstrap
    over documents); `chance_mean` and `chance_p95` of `matched` where b's tokens are shuffled;
    `by_lot` k / E; `moved`, how many experts got another number.
    """

    table: pd.DataFrame
    to_a: xr.DataArray

    def in_numbers_of_a(self, ids_LNK: Integers, layers: Sequence[int]) -> Integers:
        """b's ids, renumbered; for the layers that were matched."""
        known = [int(layer) for layer in self.to_a["layer"]]
        if absent := [layer for layer in layers if layer not in known]:
            raise ValueError(f"the matching is of layers {known}; layer {absent[0]} is not in it")
        to_a_LE = self.to_a.values[[known.index(layer) for layer in layers]]
        renumbered = np.take_along_axis(to_a_LE, ids_LNK.reshape(len(layers), -1), axis=1).reshape(
            ids_LNK.shape
        )
        return np.asarray(renumbered, dtype=np.int64)

    def __repr__(self) -> str:
        columns = ["as_numbered", "matched", "gain", "chance_p95", "by_lot", "moved"]
        shown = self.table[columns].to_string(float_format="{:.3g}".format)
        return f"ExpertMatching, on documents that it was not found on\n{shown}"


def match_experts(
    a: Any,
    b: Any,
    *,
    documents: By | None = None,
    n_experts: int | None = None,
    n_permuted: int = LEAST_SHUFFLES,
    n_draws: int = 1000,
    seed: int = 0,
) -> ExpertMatching:
    """The numbering of b's experts under which it agrees most with a, layer by layer.

    For each pair of experts, the tokens that both were chosen for; the one-to-one assignment of
    the largest sum (Hungarian method: Kuhn 1955, as scipy's `linear_sum_assignment`). It is found
    on a random half of the documents and reported on the other half.

    Shuffled tokens know of the loads alone. Two routers that never met also agree wherever both
    tell tokens apart by what they are, so `matched` above `chance_p95` is an agreement, and not
    yet a common origin: put an untrained twin beside it.

    Args:
        a, b: routings of the same tokens, as for `routing_diff`.
        n_permuted: how often b's tokens are shuffled, at least 20.

    Raises:
        ValueError: other tokens, layers or numbers of experts, or a single document.
    """
    a, b = routing_of(a), routing_of(b)
    require_same_tokens(a.expert_ids, b.expert_ids)
    sizes = [n_experts or n_experts_of(one) for one in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"a chooses among {sizes[0]} experts, b among {sizes[1]}: no matching")
    if n_permuted < LEAST_SHUFFLES:
        raise ValueError(
            f"n_permuted={n_permuted}: a 95th percentile needs at least {LEAST_SHUFFLES}"
        )
    document_N, n_documents = documents_of(a.expert_ids, documents)
    if n_documents < 2:
        raise ValueError(
            "what fits best must be found on some documents and reported on others, and here is "
            "one: run several texts"
        )
    rng = np.random.default_rng(seed)
    find_N = np.isin(document_N, rng.permutation(n_documents)[: n_documents // 2])
    draws = draws_of(n_documents, n_draws, seed)
    layers = layers_of(a.expert_ids)
    tables, to_a = [], []
    for layer, ids_NK, its_NK in zip(
        layers,
        np.asarray(a.expert_ids, dtype=np.int64),
        np.asarray(b.expert_ids, dtype=np.int64),
        strict=True,
    ):
        found_E = _assigned(ids_NK[find_N], its_NK[find_N], sizes[0])
        shares = {
            "as_numbered": set_agreement(ids_NK, its_NK),
            "matched": set_agreement(ids_NK, found_E[its_NK]),
        }
        shares["gain"] = shares["matched"] - shares["as_numbered"]
        row: dict[str, float] = {"layer": layer, "n_tokens": int((~find_N).sum())}
        for name, share_N in shares.items():
            got = estimate(share_N[~find_N], document_N[~find_N], draws)
            row |= {name: got.value, f"{name}_low": got.low, f"{name}_high": got.high}
        chance = [_by_chance(ids_NK, its_NK, find_N, sizes[0], rng) for _ in range(n_permuted)]
        row |= {"chance_mean": float(np.mean(chance))}
        row |= {"chance_p95": null_p95(chance)}
        row |= {"by_lot": ids_NK.shape[1] / sizes[0]}
        tables.append(row | {"moved": int((found_E != np.arange(sizes[0])).sum())})
        to_a.append(found_E)
    return ExpertMatching(pd.DataFrame(tables).set_index("layer"), _labelled(to_a, layers))


def _assigned(ids_NK: Integers, its_NK: Integers, n_experts: int) -> Integers:
    """`[e]`: the expert of the first that each expert of the second is matched with.

    Where several assignments are equally good, an expert keeps its number.
    """
    from scipy.optimize import linear_sum_assignment

    pair_NKK = its_NK[:, :, None] * n_experts + ids_NK[:, None, :]
    both_EE = np.bincount(pair_NKK.ravel(), minlength=n_experts**2).reshape(n_experts, n_experts)
    # Less than any count: it decides only among equals.
    tie_EE = np.eye(n_experts) / (2 * n_experts)
    _, to_a_E = linear_sum_assignment(both_EE + tie_EE, maximize=True)
    return np.asarray(to_a_E, dtype=np.int64)


def _by_chance(
    ids_NK: Integers, its_NK: Integers, find_N: Any, n_experts: int, rng: np.random.Generator
) -> float:
    """`matched` with b's tokens shuffled, within the documents to find on and those to try on."""
    shuffled_NK = its_NK.copy()
    for part_N in (find_N, ~find_N):
        shuffled_NK[part_N] = rng.permutation(its_NK[part_N])
    found_E = _assigned(ids_NK[find_N], shuffled_NK[find_N], n_experts)
    return float(set_agreement(ids_NK[~find_N], found_E[shuffled_NK[~find_N]]).mean())


def _labelled(to_a: list[Integers], layers: Sequence[int]) -> xr.DataArray:
    import xarray as xr

    coords = {"layer": list(layers), "expert": np.arange(len(to_a[0]))}
    return xr.DataArray(np.stack(to_a), dims=("layer", "expert"), coords=coords, name="to_a")
