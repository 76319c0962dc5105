"""What a comparison compares: conditions by name, controls among them, metrics of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from ernie_lab.arguments import as_edits
from ernie_lab.experiments.measuring import Metric, Outcome
from ernie_lab.interventions import Edit, EditError, EditTap
from ernie_lab.lab import Lab
from ernie_lab.sites import all_sites, idle

Edits: TypeAlias = "Edit | Iterable[Edit]"
# Edits, or a function from the numbers of a batch's sequences to them.
Condition: TypeAlias = "Edits | Callable[[tuple[int, ...]], Edits]"
Metrics: TypeAlias = "Mapping[str, Metric] | Iterable[Metric]"


@dataclass(frozen=True, slots=True, eq=False)
class BatchRun:
    """One batch: which sequences it holds, its base run, and a way to run it with edits."""

    sequences: tuple[int, ...]
    base: Outcome
    run: Callable[[tuple[Edit, ...]], Outcome]


@dataclass(frozen=True, slots=True)
class Named:
    """One condition. `of` gives its edits for a batch, `fixed` says them where they are the same
    for every batch; `identity` is all that they follow from. `other` makes the outcome by other
    means than edits, from another model, say."""

    of: Callable[[BatchRun], tuple[Edit, ...]]
    fixed: tuple[Edit, ...] | None
    identity: Any
    control: bool = False
    other: Callable[[BatchRun], Outcome] | None = None

    @classmethod
    def always(cls, edits: tuple[Edit, ...], control: bool = False) -> Named:
        return cls(lambda _: edits, edits, edits, control)


def named_conditions(
    conditions: Mapping[str, Condition], controls: Mapping[str, Condition]
) -> dict[str, Named]:
    if not isinstance(conditions, Mapping) or not conditions:
        raise TypeError(
            'conditions must name edits, such as {"no shared": [el.shared.zero(layers=[3])]}; '
            f"got {conditions!r}"
        )
    if both := sorted(conditions.keys() & controls.keys()):
        raise ValueError(f"{both} are both conditions and controls; give them other names")
    named = {}
    for name, given in [*conditions.items(), *controls.items()]:
        control = name in controls
        if callable(given) and not isinstance(given, Edit):
            named[name] = Named(_per_batch(given), None, given, control)
            continue
        try:
            edits = as_edits(given)
        except EditError as error:
            raise EditError(f"condition {name!r}: {error}") from None
        named[name] = Named.always(edits, control)
    return named


def _per_batch(
    given: Callable[[tuple[int, ...]], Edits],
) -> Callable[[BatchRun], tuple[Edit, ...]]:
    return lambda batch: as_edits(given(batch.sequences))


def own_metrics(metrics: Metrics) -> dict[str, Metric]:
    if isinstance(metrics, Mapping):
        return dict(metrics)
    listed = [metrics] if callable(metrics) else list(metrics)
    own = {getattr(metric, "__name__", repr(metric)): metric for metric in listed}
    if len(own) < len(listed) or "<lambda>" in own:
        raise ValueError('metrics need names of their own: pass metrics={"name": fn, …}')
    return own


def check_sites(lab: Lab, named: Mapping[str, Named]) -> None:
    """Find edits that match no site before anything runs."""
    for name, condition in named.items():
        try:
            EditTap.of(condition.fixed or (), all_sites(lab.model), idle, lab.model)
        except Exception as error:
            error.add_note(f"in condition {name!r}")
            raise


def refuse_sequences(named: Mapping[str, Named]) -> None:
    for name, condition in named.items():
        for edit in condition.fixed or ():
            if _names_sequences(edit):
                raise ValueError(
                    f"condition {name!r}: {edit!r} names sequences, but the prompts make several "
                    "batches, and each counts its own from 0. Pass a function of the numbers of "
                    "a batch's sequences that returns edits, or a larger batch_tokens="
                )


def _names_sequences(value: Any) -> bool:
    if getattr(value, "sequences", None) is not None and not callable(value.sequences):
        return type(value).__name__ == "Where"
    if isinstance(value, list | tuple):
        return any(map(_names_sequences, value))
    if dataclasses.is_dataclass(value) and hasattr(value, "apply"):
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return any(map(_names_sequences, fields))
    return False
