"""How attention flows between groups of tokens: shares of it, beside looking evenly.

Text and pictures of the vision-language models meet in attention alone (the shared experts see
both, but one token at a time). The mass from group A to group B is

    mass(A, B) = mean over queries s in A of sum over keys t in B of pattern[s, t],

so that a row sums to 1. It says little alone: a group of many tokens gets much from a head that
looks at nothing in particular. `even` is the same for queries that look evenly at every token up
to themselves, and belongs beside it. A share is information about where a head reads, not about
what the read value does; for that, `el.edits.knockout` cuts the same edges.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ernie_lab.interventions.bootstrap import draws_of, ends

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Floats: TypeAlias = NDArray[np.float64]
# By name, which queries, or which keys, are of the group.
Groups: TypeAlias = Mapping[str, NDArray[np.bool_]]

FIRST = "first token"
_WHOLE = ("text before", "picture", "delimiters", "text after", "generated")


class HasPatterns(Protocol):
    """The part of a `Trace` that is read here."""

    @property
    def tokens(self) -> pd.DataFrame: ...
    @property
    def layers(self) -> Sequence[int]: ...
    def pattern(self, layer: int, sequence: int | None = None) -> xr.DataArray: ...
    def __contains__(self, key: Any) -> bool: ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class AttentionMass:
    """Shares of attention between groups of tokens.

    `mass` (sequence, layer, head, source, target): of the queries of `source`, the mean share
    that goes to `target`; NaN where a sequence has no such query. `even` (sequence, source,
    target): the same for looking evenly, in every layer and head. `n_queries` (sequence, source).
    """

    mass: xr.DataArray
    even: xr.DataArray
    n_queries: xr.DataArray

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.mass["source"].values)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(str(name) for name in self.mass["target"].values)

    def table(self, *, per_head: bool = False, n_draws: int = 1000, seed: int = 0) -> pd.DataFrame:
        """One row for each layer (and head), source and target: share, low, high, even, n.

        A query counts the same in whatever sequence it is. The interval is of a bootstrap over
        sequences (95 %, percentiles), NaN where a single one has such queries. `n` is the
        number of queries.
        """
        import pandas as pd

        mass = self.mass if per_head else self.mass.mean("head").expand_dims(head=[-1], axis=2)
        # Before the pooling: NaN of an absent group is no share of 0.
        counts_QS = self.n_queries.values.astype(float)
        sums = np.nan_to_num(mass.values) * counts_QS[:, None, None, :, None]
        even = np.nan_to_num(self.even.values) * counts_QS[:, :, None]
        n_S = counts_QS.sum(0)
        share = _divided(sums.sum(0), n_S[:, None])
        low, high = _interval(sums, counts_QS, n_draws, seed)
        axes = ["layer", "head", "source", "target"]
        index = pd.MultiIndex.from_product([mass[axis].values for axis in axes], names=axes)
        flat_even = np.broadcast_to(_divided(even.sum(0), n_S[:, None]), share.shape)
        frame = pd.DataFrame(
            {
                "share": share.ravel(),
                "low": low.ravel(),
                "high": high.ravel(),
                "even": flat_even.ravel(),
                "n": np.broadcast_to(n_S[:, None], share.shape).ravel().astype(int),
            },
            index=index,
        )
        return frame if per_head else frame.droplevel("head")

    def __repr__(self) -> str:
        n_sequences, n_layers, n_heads = self.mass.shape[:3]
        return (
            f"Attention between {', '.join(self.sources)}: {n_sequences} sequences, {n_layers} "
            f"layers, {n_heads} heads; .table() has shares, intervals and looking evenly"
        )


def attention_mass(
    trace: HasPatterns,
    *,
    layers: Sequence[int] | None = None,
    sequences: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    labels: str | Sequence[str] | None = None,
) -> AttentionMass:
    """The attention mass matrix of every layer and head whose pattern was kept.

    Groups, unless `labels` says otherwise: text before the first picture, pictures, the
    delimiters around them, text after, generated tokens. `labels` is a column of `trace.tokens`,
    such as "content", or one label for each of its rows. The first token of a sequence is a
    group of its own as a key, since attention rests on it for want of anything better, and no
    query.

    Raises:
        ValueError: no pattern kept; a sequence without a picture (unless `labels` are given);
            heads or sequences that the trace has not.
    """
    import xarray as xr

    numbers = kept_layers(trace) if layers is None else [int(layer) for layer in layers]
    if not numbers:
        raise ValueError('no attention pattern in this trace: run with keep="attention"')
    table = trace.tokens
    if labels is not None:
        table = _labelled(table, labels)
    there = sorted(int(one) for one in set(table["sequence"]))
    chosen = there if sequences is None else [int(one) for one in sequences]
    if absent := [one for one in chosen if one not in there]:
        raise ValueError(f"sequences {absent}: the trace has {there}")
    found = [_measured(trace, table, sequence, numbers, heads) for sequence in chosen]
    known = found[0].heads
    sources = _in_order([one.queries for one in found])
    targets = _in_order([one.keys for one in found])
    mass = np.full((len(chosen), len(numbers), len(known), len(sources), len(targets)), np.nan)
    flat = np.full((len(chosen), len(sources), len(targets)), np.nan)
    counts = np.zeros((len(chosen), len(sources)), dtype=int)
    for i, one in enumerate(found):
        columns = [targets.index(name) for name in one.keys]
        for name, mask in one.queries.items():
            row = sources.index(name)
            counts[i, row] = mask.sum()
            # A target that a sequence has not got nothing.
            mass[i, :, :, row], flat[i, row] = 0.0, 0.0
            flat[i, row, columns] = one.even[name]
            for j, shares in enumerate(one.by_layer):
                mass[i, j, :, row, columns] = shares[name].T
    coords: dict[str, Any] = {
        "sequence": chosen, "layer": numbers, "head": known, "source": sources, "target": targets,
    }  # fmt: skip

    def labelled(values: NDArray[Any], *dims: str) -> xr.DataArray:
        return xr.DataArray(values, dims=dims, coords={axis: coords[axis] for axis in dims})

    return AttentionMass(
        labelled(mass, *coords),
        labelled(flat, "sequence", "source", "target"),
        labelled(counts, "sequence", "source"),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """Of one sequence: shares `[h key group]` by layer and group of queries."""

    heads: list[int]
    by_layer: list[dict[str, Floats]]
    even: dict[str, Floats]
    queries: Groups
    keys: Groups


def _measured(
    trace: HasPatterns,
    table: pd.DataFrame,
    sequence: int,
    layers: Sequence[int],
    heads: Sequence[int] | None,
) -> _Measured:
    # The tokens of a sequence, and so the groups, are the same in every layer.
    first = trace.pattern(layers[0], sequence)
    queries, keys = groups(first, table, sequence)
    known: list[int] = []
    by_layer = []
    for layer in layers:
        known, maps_HST = chosen_heads(trace.pattern(layer, sequence), heads)
        by_layer.append(masses(maps_HST, queries, keys))
    return _Measured(known, by_layer, evenly(first, queries, keys), queries, keys)


def groups(pattern: xr.DataArray, table: pd.DataFrame, sequence: int) -> tuple[Groups, Groups]:
    """Which queries and which keys of a pattern are in each group; empty groups are left out.

    The groups are the column `group` of the table of tokens, or follow from its `content`.
    """
    mine = table[table["sequence"] == sequence]
    if "group" in mine:
        by_pos = dict(zip(mine["pos"], mine["group"], strict=True))
        order = tuple(dict.fromkeys(table["group"]))
    else:
        by_pos, order = _by_content(mine, sequence), _WHOLE
    first = min(int(p) for p in pattern["key_pos"].values)

    def group(pos: int) -> str:
        if pos not in by_pos:
            raise ValueError(f"position {pos} is not in trace.tokens: take the whole sequence")
        return FIRST if pos == first else str(by_pos[pos])

    found = []
    for axis in ("query", "key"):
        names = [group(int(pos)) for pos in pattern[f"{axis}_pos"].values]
        wanted = order if axis == "query" else (FIRST, *order)
        masks = {name: np.array([one == name for one in names]) for name in wanted}
        found.append({name: mask for name, mask in masks.items() if mask.any()})
    return found[0], found[1]


def _by_content(mine: pd.DataFrame, sequence: int) -> dict[int, str]:
    pictures = mine["content"].isin(["image", "video"])
    if not pictures.any():
        raise ValueError(
            f"sequence {sequence} has no picture in this trace: nothing to compare. Take those "
            "that have one, or give labels="
        )
    start = int(mine.loc[pictures, "pos"].min())
    found = {}
    for pos, content, phase in zip(mine["pos"], mine["content"], mine["phase"], strict=True):
        text = "generated" if phase == "decode" else "text before" if pos < start else "text after"
        found[int(pos)] = {"text": text, "delimiter": "delimiters"}.get(content, "picture")
    return found


def masses(map_ST: Floats, queries: Groups, keys: Groups) -> dict[str, Floats]:
    """For each group of queries the mean share that each group of keys gets, `[… key group]`.

    `map_ST` is one map `[s t]`, or several, `[… s t]`.
    """
    return {
        name: np.stack(
            [map_ST[..., mask, :][..., there].sum(-1).mean(-1) for there in keys.values()], axis=-1
        )
        for name, mask in queries.items()
    }


def evenly(pattern: xr.DataArray, queries: Groups, keys: Groups) -> dict[str, Floats]:
    """The same if every query looked evenly at the tokens up to itself."""
    query_S, key_T = (pattern[f"{axis}_pos"].values.astype(int) for axis in ("query", "key"))
    visible_ST = (key_T[None, :] <= query_S[:, None]).astype(np.float64)
    return masses(visible_ST / visible_ST.sum(1, keepdims=True), queries, keys)


def chosen_heads(pattern: xr.DataArray, heads: Sequence[int] | None) -> tuple[list[int], Floats]:
    """The numbers of these heads, or of all, and their maps `[h s t]`."""
    known = [int(head) for head in pattern["head"].values]
    chosen = known if heads is None else [int(head) for head in heads]
    if not chosen or (absent := [head for head in chosen if head not in known]):
        raise ValueError(f"heads {absent if chosen else []}: heads {known} were kept")
    maps_HST = np.asarray(pattern.values, dtype=np.float64)
    return chosen, maps_HST[[known.index(head) for head in chosen]]


def kept_layers(trace: HasPatterns) -> list[int]:
    """Those whose patterns were kept."""
    return [layer for layer in trace.layers if ("pattern", layer, "attn") in trace]


def _labelled(table: pd.DataFrame, labels: str | Sequence[str]) -> pd.DataFrame:
    if isinstance(labels, str):
        if labels not in table:
            raise ValueError(f"labels={labels!r} is no column of trace.tokens: {list(table)}")
        return table.assign(group=table[labels].astype(str))
    if len(labels) != len(table):
        raise ValueError(f"{len(labels)} labels for {len(table)} tokens; give one for each row")
    return table.assign(group=[str(label) for label in labels])


def _in_order(found: Sequence[Groups]) -> list[str]:
    """All names, in the order of the longest list of them."""
    longest = max(found, key=len)
    return list(dict.fromkeys([*longest, *(name for one in found for name in one)]))


def _divided(sums: Floats, counts: Floats) -> Floats:
    shape = np.broadcast_shapes(sums.shape, counts.shape)
    out: Floats = np.full(shape, np.nan)
    return np.divide(sums, counts, out=out, where=counts > 0)


def _interval(sums: Floats, counts_QS: Floats, n_draws: int, seed: int) -> tuple[Floats, Floats]:
    """Of the ratio sum / number, over draws of whole sequences; `sums` is `[q … s t]`."""
    drawn_PQ = draws_of(len(sums), n_draws, seed).astype(float)
    out = np.full((2, *sums.shape[1:]), np.nan)
    for source, count_Q in enumerate(counts_QS.T):
        if np.count_nonzero(count_Q) < 2:
            continue
        n_P = drawn_PQ @ count_Q
        mine = np.tensordot(drawn_PQ[n_P > 0], sums[..., source, :], axes=1)
        ratios = mine / n_P[n_P > 0].reshape(-1, *[1] * (mine.ndim - 1))
        out[..., source, :] = ends(ratios)
    return out[0], out[1]
