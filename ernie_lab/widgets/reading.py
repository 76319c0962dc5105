"""What the routing view shows of a trace: the choices of a layer, and one token in words."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.plots.pictures import TraceLike
from ernie_lab.plots.router_token import Choice
from ernie_lab.plots.token_names import names, rows_of
from ernie_lab.plots.tokens import coordinate, prompt_length, shortened, shown_text
from ernie_lab.trace.keys import NotKept

RUNNERS_UP = 3
_LONGEST = 60  # characters of one token


class Reading:
    """One bank of a trace, sequence by sequence; arrays are read once, when they are asked for."""

    def __init__(self, trace: TraceLike, bank: str) -> None:
        self.ledger = trace.routing(bank if len(trace.banks) > 1 else None)
        self.ids, self.weights = self.ledger.expert_ids, self.ledger.expert_weights
        self.layers = [int(layer) for layer in coordinate(self.ids, "layer") or []]
        sequence = coordinate(self.ids, "sequence") or [0] * self.ids.shape[1]
        self._sequence_N = np.asarray(sequence, dtype=np.int64)
        self._tokens = trace.tokens

    @property
    def sequences(self) -> list[int]:
        return sorted(set(self._sequence_N.tolist()))

    def rows(self, sequence: int) -> NDArray[np.int64]:
        """Places on the token axis."""
        return np.flatnonzero(self._sequence_N == sequence)

    def tokens(self, sequence: int) -> Said:
        """The tokens of a sequence that this bank read."""
        part = self.ids.isel(token=self.rows(sequence))
        rows_of(part, self._tokens)  # raises where the table is another trace's
        called = names(part, self._tokens) or []
        positions = [int(p) for p in coordinate(part, "pos") or range(len(called))]
        texts = [shortened(shown_text(text), _LONGEST) for text in called]
        border = prompt_length(part)
        return Said(texts, positions, -1 if border is None else border)

    def choices(self, sequence: int, layer: int) -> dict[str, Any]:
        """Ids and weights, `[token slot]` as bytes of int16 and float32, little-endian."""
        rows, place = self.rows(sequence), self.layers.index(layer)
        ids_NK, weights_NK = self.ids.values[place, rows], self.weights.values[place, rows]
        return {
            "sequence": sequence,
            "layer": layer,
            "ids": np.ascontiguousarray(ids_NK, dtype="<i2").tobytes(),
            "weights": np.ascontiguousarray(weights_NK, dtype="<f4").tobytes(),
        }

    def token(self, sequence: int, layer: int, token: int) -> dict[str, Any]:
        """One token's router at a layer: who was chosen, who came next, what the bias did."""
        row, place = self.rows(sequence)[token], self.layers.index(layer)
        ids_K, weights_K = self.ids.values[place, row], self.weights.values[place, row]
        weight_of = {int(e): float(w) for e, w in zip(ids_K, weights_K, strict=True)}
        choice, reason = self._choice(place, row)
        if choice is None:
            lines = [{"expert": e, "weight": w, "prob": None, "score": None, "note": ""}
                     for e, w in weight_of.items()]  # fmt: skip
            return {"lines": lines, "words": [f"Only choices and weights are known: {reason}"]}
        others = [e for e in choice.order if e not in weight_of][:RUNNERS_UP]
        lines = [
            {
                "expert": e,
                "weight": weight_of.get(e),
                "prob": float(choice.probs[e]),
                "score": float(choice.scores[e]),
                "note": _note(choice, e),
            }
            for e in [*weight_of, *others]
        ]
        return {"lines": lines, "words": [*_words(choice)]}

    @cached_property
    def _router(self) -> tuple[Any, Any] | str:
        """Probabilities and correction bias, or why they are not known."""
        try:
            return self.ledger.router_probs.values, self.ledger.correction_bias
        except (NotKept, ValueError) as error:
            return str(error)

    def _choice(self, place: int, row: int) -> tuple[Choice | None, str]:
        if isinstance(self._router, str):
            return None, self._router
        probs_LNE, bias = self._router
        biased = coordinate(bias, "layer") or []
        bias_E = bias.values[biased.index(self.layers[place])]
        try:
            return Choice.of(probs_LNE[place, row], bias_E, self.ids.values[place, row]), ""
        except ValueError as error:  # an edit may choose an expert twice
            return None, str(error)


@dataclass(frozen=True, slots=True)
class Said:
    """Texts and positions of tokens; `border` is the first generated one's place, or -1."""

    texts: list[str]
    positions: list[int]
    border: int


def _note(choice: Choice, expert: int) -> str:
    if expert in choice.chosen and expert in choice.added:
        return "by the bias"
    if expert in choice.displaced:
        return "lost to the bias"
    return ""


def _words(choice: Choice) -> Iterable[str]:
    pair = choice.last_and_runner_up
    if choice.edited:
        yield "The choice does not follow from these scores: the routing was edited."
    elif pair is None:
        yield "Every expert is chosen: there is no runner-up and no margin."
    else:
        yield (
            f"Margin {choice.margin:.3g}: by so much the score of expert {pair[0]}, chosen last, "
            f"beats that of the runner-up, expert {pair[1]}."
        )
    if not choice.bias.any():
        yield "This router has no correction bias: score and probability are the same."
    elif choice.added:
        yield (
            f"The correction bias put {_listed(choice.added)} in the place of "
            f"{_listed(choice.displaced)}. It moves who is chosen, never a weight."
        )
    else:
        yield "The correction bias changed nothing here: the most probable experts were chosen."


def _listed(experts: Collection[int]) -> str:
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, sorted(experts)))}"
