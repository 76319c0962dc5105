"""The batches of a comparison, run one after the other; what is finished is kept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ernie_lab.experiments.conditions import BatchRun, Named
from ernie_lab.experiments.measuring import (
    PER_SEQUENCE,
    Array,
    Metric,
    Outcome,
    measure,
    observe,
    routed_layers,
)
from ernie_lab.experiments.noise import Variant, equivalent
from ernie_lab.experiments.parts import Arrays, Parts
from ernie_lab.experiments.passages import Passage, Passages
from ernie_lab.interventions import Edit, EditCount
from ernie_lab.interventions.summary import EditFacts, Measured
from ernie_lab.lab import Lab

# The name of the edits' facts among the arrays of a part.
_EDITS = "edits"


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """The batches of a comparison and their finished parts."""

    lab: Lab
    passages: Passages
    batches: list[list[int]]
    own: dict[str, Metric]
    keep: tuple[Any, ...]
    parts: Parts

    def members(self, batch: int) -> list[Passage]:
        return [self.passages.all[i] for i in self.batches[batch]]

    def key(self, batch: int, name: str, identity: Any) -> str:
        """Functions may depend on which sequences these are."""
        numbered = tuple(self.batches[batch]) if callable(identity) else None
        depends = None if self.parts.folder is None else (self.members(batch), numbered, identity)
        return self.parts.key(name, batch, depends=depends)

    def run(
        self,
        named: Mapping[str, Named],
        equivalents: Sequence[Variant],
        on_noise: Sequence[int],
        progress: bool,
    ) -> None:
        from tqdm.auto import tqdm

        n_steps = len(self.batches) * len(named) + len(on_noise) * len(equivalents)
        with tqdm(total=n_steps, desc="compare", disable=not progress, leave=False) as bar:
            for batch in range(len(self.batches)):
                done = self._batch(batch, named, equivalents if batch in on_noise else ())
                for _ in done:
                    bar.update()

    def _batch(
        self, batch: int, named: Mapping[str, Named], equivalents: Sequence[Variant]
    ) -> Iterable[str]:
        members, started = self.members(batch), None
        for name, condition in named.items():
            key = self.key(batch, name, condition.identity)
            if self.parts.get(key) is None:
                started = started or self._start(batch)
                self.parts.put(key, self._condition(members, started, condition))
            yield name
        for number, variant in enumerate(equivalents):
            key = self.key(batch, f"noise {number}", variant)
            if self.parts.get(key) is None:
                started = started or self._start(batch)
                other = equivalent(self.lab, members, started.base, variant)
                found = measure(started.base, other, members, self.own, without_trace=True)
                self.parts.put(key, found)
            yield f"noise {number}"

    def _start(self, batch: int) -> BatchRun:
        def run(edits: tuple[Edit, ...]) -> Outcome:
            return observe(self.lab, self.members(batch), edits, keep=self.keep)

        return BatchRun(tuple(self.batches[batch]), run(()), run)

    def _condition(self, members: Sequence[Passage], batch: BatchRun, condition: Named) -> Arrays:
        if condition.other is not None:
            edited = condition.other(batch)
        else:
            edited = batch.run(condition.of(batch))
        return measure(batch.base, edited, members, self.own) | _of_edits(edited.run.edits)

    def measured(self, name: str, condition: Named) -> Measured:
        keys = {b: self.key(b, name, condition.identity) for b in range(len(self.batches))}
        found = self._joined(name, keys)
        parts = [part for key in keys.values() if (part := self.parts.get(key)) is not None]
        # A function's edits may have other names in each batch.
        edits = _joined_edits(parts, None if condition.fixed is not None else "of each batch")
        return dataclasses.replace(found, edits=edits, control=condition.control)

    def noise(self, number: int, variant: Variant, on_noise: Iterable[int]) -> Measured:
        name = f"noise {number}"
        return self._joined(name, {b: self.key(b, name, variant) for b in on_noise})

    def _joined(self, name: str, keys: Mapping[int, str]) -> Measured:
        """The parts of some batches at their places among all tokens and sequences."""
        n, starts = self.passages.n_tokens, self.passages.starts()
        tokens: dict[str, Array] = {}
        sequences: dict[str, Array] = {}
        flips_LN = np.full((len(routed_layers(self.lab)), n), np.nan, dtype=np.float32)
        for batch, key in keys.items():
            part, rows = self.parts.get(key), self.batches[batch]
            assert part is not None
            where = np.concatenate(
                [starts[i] + np.arange(len(self.passages.all[i].ids)) for i in rows]
            )
            for column, values in part.items():
                if column == "flips":
                    flips_LN[:, where] = values
                elif column.startswith(PER_SEQUENCE):
                    short = column.removeprefix(PER_SEQUENCE)
                    all_M = sequences.setdefault(short, np.full(len(self.passages), np.nan))
                    all_M[rows] = values
                elif column != _EDITS:
                    tokens.setdefault(column, np.full(n, np.nan))[where] = values
        return Measured(name, tokens, sequences, flips_LN)


def _of_edits(counts: Sequence[EditCount]) -> Arrays:
    """What the edits of one run did, as text: the edits themselves may not live on."""
    facts = [
        {
            "edit": repr(count.edit),
            "n_fired": count.n_fired,
            "n_changed": count.n_changed,
            "after": list(count.after),
            "told": count.told,
        }
        for count in counts
    ]
    return {_EDITS: np.array(json.dumps(facts))}


def _joined_edits(parts: Sequence[Arrays], name: str | None) -> tuple[EditFacts, ...]:
    """Their sums over batches; figures that edits report are means over tokens."""
    joined: dict[tuple[int, str], dict[str, Any]] = {}
    for part in parts:
        for place, facts in enumerate(json.loads(str(part[_EDITS]))):
            key = place, name or facts["edit"]
            known = joined.setdefault(key, {"n_fired": 0, "n_changed": 0, "told": {}})
            known["after"] = facts["after"]
            known["n_fired"] += facts["n_fired"]
            known["n_changed"] += facts["n_changed"]
            for figure, (total, n) in facts["told"].items():
                mine = known["told"].setdefault(figure, [0.0, 0])
                mine[0] += total
                mine[1] += n
    return tuple(
        EditFacts(
            what,
            known["n_fired"],
            known["n_changed"],
            tuple(known["after"]),
            {figure: total / n for figure, (total, n) in known["told"].items() if n},
        )
        for (_, what), known in joined.items()
    )
