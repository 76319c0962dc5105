"""Do router rows point at what their experts read?

A router sends tokens where its rows point, so tokens sent to an expert lie nearer to its row than
others in *any* router, also a random one. Only what exceeds a redrawn router on the same states
was learned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_lab.analysis.choices import Choices, choices, place_of
from ernie_lab.analysis.components import HasModel
from ernie_lab.analysis.geometry import mixture
from ernie_lab.analysis.information import null_p95
from ernie_lab.analysis.token_groups import Floats, Integers
from ernie_lab.interventions.bootstrap import draws_of, ends
from ernie_lab.model.kinds import Model
from ernie_lab.model.redraw import NotBalanced, OtherRouter, choose, redraw, seed_of

_WORK = 64_000_000  # numbers of resampled sums at one time


def input_alignment(
    trace: Any,
    model: Model | HasModel,
    layer: int,
    bank: str | None = None,
    *,
    n_redrawn: int = 5,
    n_draws: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """cos(w_e, mean input) of the tokens sent to expert e and of those not sent; a row per expert.

    - `sent`, `not_sent`: w_e against the mean of what these tokens bring to the router, as it is.
      What all tokens have in common is in both.
    - `apart`: w_e against the difference of the two means: the direction along which its tokens
      lie apart. `low` and `high` are its 95 % interval over documents.
    - `redrawn`: `apart`, averaged over the experts of routers with Gaussian rows of the same
      lengths, on the same states, their bias fitted to the learned balance (`redraw`);
      `redrawn_p95` over these experts. NaN where no draw could be balanced on so few tokens.
    - `random_sd` = 1/sqrt(d): any of the three against a direction that has nothing to do with it.

    Needs `keep=["routing", "blocks.{layer}.moe.in"]`. An expert that got no token, or all, has NaN.
    """
    routing = trace.routing(bank)
    chosen = choices(routing)
    place = place_of(layer, chosen.layers)
    router, _ = mixture(model, layer, bank)
    weight_ED = router.weight_ED.detach().float().cpu()
    states_ND = _states(trace, routing, layer)[chosen.rows_N]
    ids_NK = chosen.ids_LNK[place]
    sums = _sums(states_ND, ids_NK, chosen)
    once = np.ones((1, chosen.n_documents), np.int64)
    sent_E, not_sent_E, apart_E = (one[0] for one in _cosines(weight_ED, sums, once))
    drawn_DE = _drawn(weight_ED, sums, draws_of(chosen.n_documents, n_draws, seed))
    low_E, high_E = np.full((2, chosen.n_experts), np.nan)
    known_E = np.isfinite(drawn_DE).any(0) & (chosen.n_documents > 1)
    low_E[known_E], high_E[known_E] = ends(drawn_DE[:, known_E])
    random = _redrawn(
        router.correction_bias_E, weight_ED, states_ND, chosen, n_redrawn, (seed, layer)
    )
    return pd.DataFrame(
        {
            "layer": layer, "expert": range(chosen.n_experts),
            "n_sent": np.bincount(ids_NK.ravel(), minlength=chosen.n_experts),
            "sent": sent_E, "not_sent": not_sent_E, "apart": apart_E, "low": low_E, "high": high_E,
            "redrawn": random.mean() if random.size else np.nan,
            "redrawn_p95": null_p95(random) if random.size else np.nan,
            "random_sd": weight_ED.shape[1] ** -0.5,
        }
    )  # fmt: skip


def _states(trace: Any, routing: Any, layer: int) -> Floats:
    """What the router read, in the order of the routing's tokens."""
    states = trace[f"blocks.{layer}.moe.in"]
    place = {
        spot: row
        for row, spot in enumerate(
            zip(states.coords["sequence"].values, states.coords["pos"].values, strict=True)
        )
    }
    ids = routing.expert_ids
    spots = zip(ids.coords["sequence"].values, ids.coords["pos"].values, strict=True)
    try:
        rows = [place[spot] for spot in spots]
    except KeyError as missing:
        raise ValueError(
            f"blocks.{layer}.moe.in was not kept at sequence, position {missing.args[0]}: keep it "
            "without positions=, or with those of the routing"
        ) from None
    return np.asarray(states.values, dtype=np.float64)[rows]


Sums = tuple[Floats, Integers, Floats, Integers]


def _sums(states_ND: Floats, ids_NK: Integers, chosen: Choices) -> Sums:
    """By document: inputs added up per expert `[x e d]` and their number; of all tokens."""
    n_documents, n_experts, width = chosen.n_documents, chosen.n_experts, states_ND.shape[1]
    sent_XED = np.zeros((n_documents, n_experts, width))
    count_XE = np.zeros((n_documents, n_experts), np.int64)
    for slot in ids_NK.T:
        np.add.at(sent_XED, (chosen.document_N, slot), states_ND)
        np.add.at(count_XE, (chosen.document_N, slot), 1)
    all_XD = np.zeros((n_documents, width))
    np.add.at(all_XD, chosen.document_N, states_ND)
    return sent_XED, count_XE, all_XD, np.bincount(chosen.document_N, minlength=n_documents)


def _cosines(weight_ED: Tensor, sums: Sums, draws_RX: Integers) -> tuple[Floats, Floats, Floats]:
    """With the means of tokens sent, not sent, and their difference, `[r e]` each."""
    sent_XED, count_XE, all_XD, n_X = sums
    rows_ED = weight_ED.double().numpy()
    unit_ED = rows_ED / np.linalg.norm(rows_ED, axis=1, keepdims=True)
    sent_RED = np.tensordot(draws_RX, sent_XED, axes=1)
    count_RE1 = (draws_RX @ count_XE)[..., None]
    all_R1D, n_R11 = (draws_RX @ all_XD)[:, None], (draws_RX @ n_X)[:, None, None]

    def cosine(x_RED: Floats) -> Floats:
        sizes = np.linalg.norm(x_RED, axis=-1)
        return np.asarray((x_RED * unit_ED).sum(-1) / sizes)

    with np.errstate(invalid="ignore", divide="ignore"):
        mean_RED = sent_RED / count_RE1
        rest_RED = (all_R1D - sent_RED) / (n_R11 - count_RE1)
        return cosine(mean_RED), cosine(rest_RED), cosine(mean_RED - rest_RED)


def _drawn(weight_ED: Tensor, sums: Sums, draws_RX: Integers) -> Floats:
    step = max(1, _WORK // (3 * weight_ED.numel()))
    parts = [draws_RX[at : at + step] for at in range(0, len(draws_RX), step)]
    return np.concatenate([_cosines(weight_ED, sums, part)[2] for part in parts])


def _redrawn(
    bias_E: Tensor,
    weight_ED: Tensor,
    states_ND: Floats,
    chosen: Choices,
    n_redrawn: int,
    seed: tuple[int, int],
) -> NDArray[Any]:
    """`apart` of all experts of some redrawn routers."""
    learned = OtherRouter(weight_ED, bias_E.detach().float().cpu())
    x_ND = torch.from_numpy(states_ND).float()
    once = np.ones((1, chosen.n_documents), np.int64)
    found = []
    for number in range(n_redrawn):
        try:
            other = redraw(learned, x_ND, chosen.k, seed_of(*seed, number), "norm")
        except NotBalanced:
            continue
        ids_NK = choose(x_ND, other, chosen.k).numpy()
        sums = _sums(states_ND, ids_NK, chosen)
        found.append(_cosines(other.weight_ED, sums, once)[2][0])
    every = np.concatenate(found) if found else np.empty(0)
    return every[np.isfinite(every)]
