"""What users pass to the verbs of a `Lab`, made definite: a slip gets an error, not a guess."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

from ernie_lab.inference.defaults import GenerationDefaults, merged
from ernie_lab.inference.generate import LogitsProcessor, Settings
from ernie_lab.interventions.edits import Edit, EditError


def as_settings(
    defaults: GenerationDefaults,
    *,
    max_new_tokens: int,
    min_new_tokens: int,
    stop: int | str | Sequence[int | str] | None,
    seed: int | Sequence[int],
    **rules: float | int | None,
) -> Settings:
    """How to generate. What is None, of `stop` and the sampling `rules`, is the checkpoint's."""
    stop_ids, stop_strings = (defaults.stop_ids, ()) if stop is None else split_stops(stop)
    return Settings(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        sampling=merged(defaults.sampling, rules),
        stop_ids=stop_ids,
        stop_strings=stop_strings,
        seeds=as_seeds(seed),
    )


def split_stops(
    stop: int | str | Sequence[int | str],
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Stop ids and stop strings. One of either may be given without a list around it."""
    given: list[Any] = [stop] if isinstance(stop, str | Integral) else list(cast(Any, stop))
    ids, strings = [], []
    for one in given:
        if isinstance(one, str):
            strings.append(one)
        elif type(one) is not bool and isinstance(one, Integral):
            ids.append(int(one))
        else:
            raise TypeError(f"stop holds {one!r}, expected token ids (integers) and strings")
    return tuple(ids), tuple(strings)


def as_seeds(seed: int | Sequence[int]) -> tuple[int, ...]:
    given = [seed] if isinstance(seed, Integral) else seed
    if not isinstance(given, list | tuple) or not all(isinstance(s, Integral) for s in given):
        raise TypeError(f"seed={seed!r} must be an integer, or one for each sequence")
    return tuple(int(s) for s in given)


def as_edits(edits: Edit | Iterable[Edit]) -> tuple[Edit, ...]:
    if isinstance(edits, Edit):
        return (edits,)
    if isinstance(edits, str | Mapping) or not isinstance(edits, Iterable):
        raise EditError(
            f"{edits!r} must be an edit or a list of edits, such as el.shared.zero(3); see el.edit"
        )
    return tuple(edits)


def as_processors(
    processors: LogitsProcessor | Sequence[LogitsProcessor],
) -> tuple[LogitsProcessor, ...]:
    given = (processors,) if callable(processors) else tuple(processors)
    for one in given:
        if not callable(one):
            raise TypeError(f"a logits processor is a function fn(ids, logits), not {one!r}")
    return given
