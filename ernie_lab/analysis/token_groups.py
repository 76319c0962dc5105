"""Which tokens belong together: labels of tokens, buckets of positions, documents.

Functions that compare groups of tokens take `by`: the name of a coordinate of the routing's
tokens (`phase`, `modality`, `sequence`), or one label for each of its token rows. A label of None
or NaN leaves its token out. Groups come in the order of their first token; those of a pandas
Categorical, such as `position_buckets` gives, in the order of its categories.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.interventions.bootstrap import draws_of

Integers: TypeAlias = NDArray[np.int64]
Floats: TypeAlias = NDArray[np.float64]
# A name of a coordinate, or one label for each token.
By: TypeAlias = str | Iterable[Any]

POSITION_EDGES = (0, 16, 64, 256, 1024, 4096)
_NO_GROUP = -1


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """`code_N` is the group of each token, -1 for none; `names` are their labels, in order."""

    code_N: Integers
    names: tuple[Any, ...]


def routing_of(trace: Any) -> Any:
    """The routing that a trace holds; a trace with two banks raises and names them."""
    if way := instead_of(trace):
        raise TypeError(
            f"a routing is wanted (a trace, trace.routing(bank), expert ids), not a "
            f"{type(trace).__name__}: {way}"
        )
    return trace.routing() if callable(getattr(trace, "routing", None)) else trace


def is_run(given: Any) -> bool:
    """A run, or a generation, where its trace is wanted (arrays have a method `trace`)."""
    return hasattr(given, "trace") and not callable(given.trace)


def instead_of(given: Any) -> str:
    """What to pass in the place of something that has a routing, or makes one, and is none.

    Empty for all else. Known by what it has: recordings and models are no business of this module.
    """
    if isinstance(given, str | PathLike):
        name = repr(str(given))
        return f"el.Trace.load({name}) reads a saved trace, el.RoutingStore({name}) a recording"
    if is_run(given):
        return "pass its .trace"
    if hasattr(given, "balance") and hasattr(given, "sample"):
        return "store.balance(…) counts all of it, and store.sample(n_tokens) is a routing"
    if hasattr(given, "run") and hasattr(given, "prepare"):
        return "pass lab.run(prompt, keep='routing').trace"
    return ""


def groups_of(ids: Any, by: By | None) -> Groups:
    """The group of every token of `ids`, an array with a token axis; one for all without `by`."""
    n_tokens = n_tokens_of(ids)
    if by is None:
        return Groups(np.zeros(n_tokens, dtype=np.int64), ("all",))
    labels = token_coordinate(ids, by) if isinstance(by, str) else by
    if not isinstance(labels, pd.Categorical):
        values = np.empty(n_tokens, dtype=object)
        given = list(labels)
        if len(given) != n_tokens:
            raise ValueError(
                f"by= has {len(given)} labels for {n_tokens} tokens; give one for each token row, "
                "or the name of a coordinate such as 'phase'"
            )
        values[:] = given
        code_N, names = pd.factorize(values)
        return _some(np.asarray(code_N, dtype=np.int64), tuple(names))
    if len(labels) != n_tokens:
        raise ValueError(f"by= has {len(labels)} labels for {n_tokens} tokens")
    used = labels.remove_unused_categories()
    return _some(np.asarray(used.codes, dtype=np.int64), tuple(used.categories))


def position_buckets(routing: Any, edges: Sequence[int] = POSITION_EDGES) -> pd.Categorical[str]:
    """The bucket of each token's position in its sequence: 0-15, 16-63, …, and the last, open one.

    `edges` are the first positions of the buckets, rising from 0. Positions are true ones: the
    first generated token follows its prompt.
    """
    starts = [int(edge) for edge in edges]
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        raise ValueError(f"edges={list(edges)} must rise from 0: the first position of each bucket")
    names = [f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(starts)]
    names.append(f"{starts[-1]} on" if len(starts) > 1 else "all")
    pos_N = np.asarray(token_coordinate(routing_of(routing).expert_ids, "pos"), dtype=np.int64)
    codes = np.searchsorted(starts, pos_N, side="right") - 1
    return pd.Categorical([names[code] for code in codes], categories=names, ordered=True)


def documents_of(ids: Any, documents: By | None) -> tuple[Integers, int]:
    """The number of each token's document, from 0, and how many there are.

    By default its sequence is its document; an array without that coordinate is a single one.
    """
    if documents is None:
        if "sequence" not in getattr(ids, "coords", {}):
            return np.zeros(n_tokens_of(ids), dtype=np.int64), 1
        documents = "sequence"
    groups = groups_of(ids, documents)
    if (groups.code_N == _NO_GROUP).any():
        raise ValueError("documents= leaves tokens without a document")
    return groups.code_N, len(groups.names)


def strata_of(ids: Any, strata: By | None, document_N: Integers, n_documents: int) -> Integers:
    """The stratum of each document: the label that all its tokens share; one for all without."""
    if strata is None:
        return np.zeros(n_documents, dtype=np.int64)
    code_N = groups_of(ids, strata).code_N
    found = np.full(n_documents, _NO_GROUP)
    found[document_N] = code_N
    if (found == _NO_GROUP).any() or (found[document_N] != code_N).any():
        raise ValueError("strata= must have one label for all tokens of a document, and no gaps")
    return np.asarray(found, dtype=np.int64)


def stratified_draws(strata_D: Integers, n_draws: int, seed: int) -> Integers:
    """How often each document is drawn `[draw d]`: with replacement, within each stratum."""
    draws = np.zeros((n_draws, len(strata_D)), dtype=np.int64)
    for stratum in np.unique(strata_D):
        mine = np.flatnonzero(strata_D == stratum)
        draws[:, mine] = draws_of(len(mine), n_draws, seed + int(stratum))
    return draws


def token_coordinate(ids: Any, name: str) -> NDArray[Any]:
    """A coordinate of the token axis, by name."""
    coords = getattr(ids, "coords", {})
    if name not in coords:
        there = [str(key) for key in coords if tuple(coords[key].dims) == ("token",)]
        raise ValueError(
            f"the tokens have no {name!r}; they have {', '.join(there) or 'no coordinates'}. Give "
            "one label for each token"
        )
    return np.asarray(coords[name].values)


def layers_of(array: Any, n_layers: int | None = None) -> list[int]:
    """True layer numbers where the array carries them, else counted from 0."""
    coords = getattr(array, "coords", {})
    if "layer" in coords:
        return [int(layer) for layer in np.atleast_1d(coords["layer"])]
    return list(range(np.shape(array)[0] if n_layers is None else n_layers))


def require_same_tokens(ids: Any, other: Any) -> None:
    """Two arrays of routing have the same layers, and the same tokens in the same order."""
    if np.shape(ids)[:2] != np.shape(other)[:2] or layers_of(ids) != layers_of(other):
        raise ValueError(
            f"(layers, tokens) are {np.shape(ids)[:2]} and {np.shape(other)[:2]}, layers "
            f"{layers_of(ids)} and {layers_of(other)}: run the same prompts with the same keep="
        )
    for name in ("sequence", "pos", "id"):
        mine, its = (getattr(x, "coords", {}).get(name) for x in (ids, other))
        if mine is not None and its is not None and not np.array_equal(mine, its):
            row = int(np.flatnonzero(np.asarray(mine) != np.asarray(its))[0])
            raise ValueError(
                f"token row {row} has {name} {mine.values[row]} in the one and "
                f"{its.values[row]} in the other; run the same prompts in the same order"
            )


def n_tokens_of(ids: Any) -> int:
    shape = np.shape(ids)
    if len(shape) < 2:
        raise ValueError(f"an array of shape {shape} has no (layer, token) axes")
    if not shape[1]:
        raise ValueError(
            "this routing has no token: no prompt brought any to its bank (a vision bank needs a "
            "picture), or a selection left none"
        )
    return int(shape[1])


def _some(code_N: Integers, names: tuple[Any, ...]) -> Groups:
    if not names:
        raise ValueError("by= gives no token a group: nothing is selected")
    return Groups(code_N, names)
