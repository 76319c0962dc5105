"""What each attention head looks at, in numbers: sinks, neighbours, repeats, spread, distance.

Every statistic stands beside `even`, its value for a head that looks evenly at all that the same
queries can see. A second reference is the user's to make: the same texts through an untrained
twin of the model. And a pattern is no function: what a head *does* is seen by cutting it
(`el.edits.zero("attn.result", heads=[...])`, `el.edits.knockout`), not here.

These read maps. Where maps do not fit, `attention_summary` has the same entropy, sink and distance
of single queries without one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from ernie_lab.analysis.attention_blocks import distance_edges
from ernie_lab.analysis.attention_measures import (
    TOWER_UNITS,
    UNITS,
    Measured,
    Places,
    measure,
    measure_distances,
    measure_patches,
)
from ernie_lab.analysis.attention_tally import Counted, Piece, Tally, counted, tallied

Labels: TypeAlias = "str | ArrayLike"
Measure: TypeAlias = Callable[[ArrayLike, Places], Measured]


def attention_statistics(
    trace: Any,
    *,
    layers: Sequence[int] | None = None,
    queries: Labels = "all",
    skip: int = 1,
    first: int = 1,
    by: Labels | None = None,
    documents: Sequence[Hashable] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """Mean over queries of what each head looks at, (statistic, layer, head).

    `value` with its 95 % interval `low` .. `high`, `even` for looking evenly, and `n`, the
    queries that have the statistic. The statistics and their formulas are those of
    `attention_measures.measure`: entropy, effective_keys, sink, self, previous, distance,
    duplicate, induction; the coordinate `unit` says in what. Prefill and decode are joined; the
    maps of all sequences count by their number of queries. The interval is of a bootstrap over
    documents, NaN for a single one.

    For duplicate and induction take text in which tokens come again and what follows them
    cannot be guessed otherwise: `repeated_tokens`. Tokens of pictures share one id, so they are
    no repeats of each other.

    Args:
        trace: with attention patterns, `keep="attention"`, whole or of some layers and heads.
        layers: those to look at, by default all whose patterns were kept.
        queries: "all", "prefill", "decode", or True and False for each row of `trace.tokens`.
        skip: so many first tokens of each sequence are no queries. The first one can see only
            itself, so that 1 is the least with which sinks mean anything.
        first: so many first tokens of each sequence are the sink.
        by: also apart for groups of queries: a column of `trace.tokens` ("content", "modality",
            "phase"), or one label for each of its rows; a row without one does not count. Adds the
            dimension `group`.
        documents: the document of each sequence; by default each is one.

    Raises:
        ValueError: no pattern was kept, no query counts, or the rows of a pattern do not sum to 1.
    """
    if first < 1 or skip < 0:
        raise ValueError(f"first={first} must be at least 1 and skip={skip} at least 0")
    those = counted(trace, queries, skip, by, documents)
    numbers = _layers(trace, layers)
    found = tallied(
        _pieces(trace, numbers, those, lambda pattern, at: measure(pattern, at, first)),
        those.groups,
        those.n_documents,
        n_draws,
        seed,
    )
    return _as_dataset(found, by is not None, "statistic", UNITS)


def attention_distances(
    trace: Any,
    *,
    edges: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    queries: Labels = "all",
    skip: int = 1,
    by: Labels | None = None,
    documents: Sequence[Hashable] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> xr.Dataset:
    """How far back each head looks: share of its weight by distance, (distance, layer, head).

    The bins 0, 1, 2-3, 4-7, 8-15, … tokens add up to 1; `edges` gives others, each bin from
    one edge to below the next, and then they add up to what lies inside. Everything else is as in
    `attention_statistics`.
    """
    those = counted(trace, queries, skip, by, documents)
    numbers = _layers(trace, layers)
    if edges is None:
        n_keys = int(trace.tokens["pos"].max()) + 1
        starts = distance_edges(n_keys)
        edges = [*starts, max(2 * starts[-1], 1)]
    if len(edges) < 2 or edges[0] < 0 or (np.diff(edges) <= 0).any():
        raise ValueError(f"edges={list(edges)} must rise from 0 or more, at least two of them")
    bins = tuple(int(edge) for edge in edges)
    found = tallied(
        _pieces(trace, numbers, those, lambda pattern, at: measure_distances(pattern, at, bins)),
        those.groups,
        those.n_documents,
        n_draws,
        seed,
    )
    out = _as_dataset(found, by is not None, "distance", None)
    return out.assign_coords(from_tokens=("distance", list(bins[:-1])))


def vision_attention_statistics(
    trace: Any, *, layers: Sequence[int] | None = None, n_draws: int = 1000, seed: int = 0
) -> xr.Dataset:
    """The same for the vision tower, whose patches see all patches of their frame.

    (statistic, layer, head) of entropy, effective_keys, self and distance, the last in patches
    on the grid (`attention_measures.measure_patches`). All frames of all pictures; a picture, with
    all its frames, is a document. Keep `"vision.blocks.*.attn.pattern"`.
    """
    kept = [int(path.split(".")[2]) for path in trace.sites if _is_tower(path)]
    numbers = _known(layers, kept, 'keep="vision.blocks.*.attn.pattern"')

    def pieces() -> Iterator[Piece]:
        mine = [n for n, one in enumerate(trace.media) if one.sequence in trace.sequences]
        for layer in numbers:
            for document, image in enumerate(mine):
                for frame in range(trace.media[image].grid[0]):
                    pattern = trace.vision_pattern(layer, image, frame)
                    row, col = (pattern.coords[f"query_{name}"].values for name in ("row", "col"))
                    found = measure_patches(pattern.values, row, col)
                    yield Piece(layer, document, _heads(pattern), found, np.zeros(len(row), int))

    n_pictures = sum(one.sequence in trace.sequences for one in trace.media)
    found = tallied(pieces(), ("",), n_pictures, n_draws, seed)
    return _as_dataset(found, False, "statistic", TOWER_UNITS)


def repeated_tokens(
    vocabulary: Sequence[int], length: int, n: int, *, repeats: int = 2, seed: int = 0
) -> list[list[int]]:
    """`n` prompts of `length` random distinct ids of `vocabulary`, `repeats` times over.

    Within one block no token comes twice, so that what follows an earlier occurrence is known
    exactly, and only by looking back. Source: the repeated random tokens of Olsson et al. 2022
    (arXiv:2209.11895).
    """
    if not 1 < length <= len(vocabulary) or repeats < 2 or n < 1:
        raise ValueError(
            f"length={length} of {len(vocabulary)} ids, repeats={repeats}, n={n}: need 2 to "
            f"{len(vocabulary)} distinct ids, at least 2 repeats and 1 prompt"
        )
    rng = np.random.default_rng(seed)
    ids = np.asarray(vocabulary)
    return [rng.choice(ids, length, replace=False).tolist() * repeats for _ in range(n)]


def _as_dataset(
    found: Tally, grouped: bool, dim: str, units: Mapping[str, str] | None
) -> xr.Dataset:
    by_head, by_layer = (dim, "layer", "head", "group"), (dim, "layer", "group")
    out = xr.Dataset(
        {name: (by_head, getattr(found, name)) for name in ("value", "low", "high")}
        | {name: (by_layer, getattr(found, name)) for name in ("even", "n")},
        coords={
            dim: list(found.names),
            "layer": list(found.layers),
            "head": list(found.heads),
            "group": list(found.groups),
        },
        attrs={"n_documents": found.n_documents},
    )
    if units is not None:
        out = out.assign_coords(unit=(dim, [units[name] for name in found.names]))
    return out if grouped else out.isel(group=0, drop=True)


def _pieces(trace: Any, layers: Sequence[int], those: Counted, how: Measure) -> Iterator[Piece]:
    """One map after the other; only one is in memory beside the trace."""
    for document, sequence in zip(those.document, those.sequences, strict=True):
        places: Places | None = None
        for layer in layers:
            pattern = trace.pattern(layer, sequence)
            query_S = np.asarray(pattern.coords["query_pos"].values, dtype=int)
            if places is None or not np.array_equal(places.query_S, query_S):
                places = _places(pattern, query_S)
            found = how(pattern.values, places)
            yield Piece(layer, document, _heads(pattern), found, those.group(sequence, query_S))


def _places(pattern: Any, query_S: Any) -> Places:
    key = {name: pattern.coords[f"key_{name}"].values for name in ("pos", "id", "modality")}
    return Places.of(query_S, key["pos"], key["id"], key["modality"] == "text")


def _heads(pattern: Any) -> list[int]:
    return [int(head) for head in pattern.coords["head"].values]


def _is_tower(path: str) -> bool:
    return path.startswith("vision.") and path.endswith(".attn.pattern")


def _layers(trace: Any, layers: Sequence[int] | None) -> list[int]:
    kept = [layer for layer in trace.layers if ("pattern", layer, "attn") in trace]
    return _known(layers, kept, 'keep="attention"')


def _known(layers: Sequence[int] | None, kept: list[int], keep: str) -> list[int]:
    if not kept:
        raise ValueError(f"this trace has no attention pattern: run with {keep}")
    wanted = kept if layers is None else [int(layer) for layer in layers]
    if not wanted or not set(wanted) <= set(kept):
        raise ValueError(f"layers={wanted}: the patterns of layers {kept} were kept")
    return wanted
