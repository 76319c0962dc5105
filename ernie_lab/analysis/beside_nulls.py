"""One layer's bits beside its nulls, on plain arrays. What `specialisation` asks of every layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_lab.analysis.information import Codes, Floats, Rows, null_p95
from ernie_lab.analysis.nulls import (
    Choice,
    Permuted,
    balanced,
    constant_within,
    halves,
    permuted,
    redrawn,
)
from ernie_lab.interventions.bootstrap import centred_interval, draws_of
from ernie_lab.model.redraw import VARIANTS, max_violation, seed_of, thinned

PERMUTED, UNTRAINED = "permuted labels", "untrained twin"
REDRAWN = {variant: f"redrawn router, equal {variant}" for variant in VARIANTS}


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """Labels of tokens, `-1` for none, and how they are measured; the same for every layer.

    `fitted_N` are the tokens that biases are fitted on, `measured_N` those that bits are of: the
    labelled ones of the other documents.
    """

    label_N: Codes
    document_N: Codes
    given_N: Codes | None
    fitted_N: NDArray[np.bool_]
    measured_N: NDArray[np.bool_]
    by: Permuted
    drawn_RD: NDArray[np.int64]
    n_redrawn: int
    n_permuted: int
    weighted: bool
    seed: int

    @classmethod
    def of(
        cls,
        label_N: Codes,
        document_N: Codes,
        given_N: Codes | None = None,
        *,
        n_redrawn: int = 40,
        n_permuted: int = 100,
        n_draws: int = 300,
        weighted: bool = False,
        seed: int = 0,
    ) -> Question:
        fitted_N = halves(label_N, document_N)
        measured_N = ~fitted_N & (label_N >= 0)
        if given_N is not None:
            measured_N &= given_N >= 0
        if len(np.unique(label_N[measured_N])) < 2:
            raise ValueError(
                "the measured half of the documents has fewer than two labels, so there is nothing "
                "to tell apart: take two documents or more of every label"
            )
        by: Permuted = "tokens of equal given"
        if given_N is None:
            constant = constant_within(label_N[measured_N], document_N[measured_N])
            by = "documents" if constant else "tokens of a document"
        drawn_RD = draws_of(int(document_N.max()) + 1, n_draws, seed)
        return cls(
            label_N, document_N, given_N, fitted_N, measured_N, by, drawn_RD, n_redrawn,
            n_permuted, weighted, seed,
        )  # fmt: skip

    def rows(self, choice: Choice, n_experts: int, label_N: Codes | None = None) -> Rows:
        """The rows that are measured, of one router's choice."""
        mine = self.measured_N
        return Rows.of(
            (self.label_N if label_N is None else label_N)[mine],
            choice.ids_NK[mine],
            self.document_N[mine],
            n_experts,
            None if self.given_N is None else self.given_N[mine],
            choice.weights_NK[mine] if self.weighted else None,
        )

    def permuted_labels(self, draw: int) -> Codes:
        within_N = self.document_N if self.given_N is None else self.given_N
        mine, new_N = self.measured_N, self.label_N.copy()
        rng = np.random.default_rng((self.seed, draw))
        new_N[mine] = permuted(self.label_N[mine], within_N[mine], self.by, rng)
        return new_N


def layer_specialisation(
    question: Question,
    learned: Choice,
    states_ND: Tensor,
    gate_ED: Tensor,
    twins_NE: Sequence[Tensor] = (),
    layer: int = 0,
) -> tuple[dict[str, float | bool], pd.DataFrame]:
    """A row of `Specialisation.table`, and every draw of every null.

    `learned` is what the router really chose; `states_ND` what it read, `gate_ED` its weights,
    `twins_NE` the router probabilities of untrained twins. `layer` has gates of its own drawn.
    """
    k, n_experts, fitted_N = learned.ids_NK.shape[1], len(gate_ED), question.fitted_N
    target = max_violation(thinned(torch.from_numpy(learned.ids_NK[fitted_N])), n_experts)
    rows = question.rows(learned, n_experts)
    bits, low, high = rows.interval(question.drawn_RD)
    once = np.ones((1, question.drawn_RD.shape[1]), dtype=np.int64)

    def of(choice: Choice) -> float:
        return float(question.rows(choice, n_experts).bits(once)[0])

    draws: list[tuple[str, int, float]] = []
    for draw in range(question.n_permuted):
        again = question.rows(learned, n_experts, question.permuted_labels(draw))
        draws.append((PERMUTED, draw, float(again.bits(once)[0])))
    for draw, probs_NE in enumerate(twins_NE):
        draws.append((UNTRAINED, draw, of(balanced(probs_NE, fitted_N, k, target))))
    worst, resampled = [], []
    for way, variant in enumerate(VARIANTS):
        for draw in range(question.n_redrawn):
            seed = seed_of(question.seed, way, layer, draw)
            choice = redrawn(gate_ED, states_ND, fitted_N, k, target, seed, variant)
            draws.append((REDRAWN[variant], draw, of(choice)))
            worst.append(choice.max_violation - target)
            resampled.append(question.rows(choice, n_experts).bits(question.drawn_RD))
    nulls = pd.DataFrame(draws, columns=["null", "draw", "bits"])
    of_null = {name: group.to_numpy() for name, group in nulls.groupby("null")["bits"]}
    told: dict[str, float | bool] = {"bits": bits, "low": low, "high": high}
    told["permuted"] = float(of_null[PERMUTED].mean())
    told["permuted_p95"] = null_p95(of_null[PERMUTED])
    told["untrained"] = float(of_null[UNTRAINED].mean()) if len(twins_NE) else np.nan
    told["untrained_max"] = float(of_null[UNTRAINED].max()) if len(twins_NE) else np.nan
    for variant in VARIANTS:
        drawn = of_null[REDRAWN[variant]]
        told[f"{variant}_median"] = float(np.median(drawn))
        told[f"{variant}_p95"] = null_p95(drawn)
        told[f"{variant}_percentile"] = float(100 * (drawn < bits).mean())
    told["above"] = all(bits > float(told[f"{variant}_p95"]) for variant in VARIANTS)
    # A comparison with NaN is False: above none where there is none.
    told["above_twins"] = bits > float(told["untrained_max"])
    every = np.concatenate([of_null[name] for name in REDRAWN.values()])
    told["excess"] = bits - float(every.mean())
    told["excess_low"], told["excess_high"] = centred_interval(
        float(told["excess"]), _difference(rows, question, resampled)
    )
    told |= {"label_bits": rows.label_bits(), "expert_bits": rows.expert_bits()}
    told |= {"max_violation": target, "redrawn_max_violation": target + max(worst, key=abs)}
    return told, nulls


def _difference(rows: Rows, question: Question, resampled: list[Floats]) -> Floats | None:
    """Learned minus the mean of the redrawn routers, for every draw of documents."""
    if rows.n_documents < 2:
        return None
    return np.asarray(rows.bits(question.drawn_RD) - np.mean(resampled, axis=0))
