"""Attention of long inputs in numbers: reductions over keys, without a map of queries x keys.

The map of one layer at 32,768 tokens and 20 heads has 86 GB in fp32. What is usually asked of it
(how spread is it, how much goes to the first token, to an image, how far back) are sums over keys,
and they follow from the rotated queries and keys: two sites that grow with the length alone.

    run = lab.run(text, keep=el.keep("attn.q_rot", "attn.k_rot", layers=[3]), logits="loss")
    el.analysis.attention_summary(run.trace, layer=3)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from ernie_lab.analysis.attention_blocks import blocks, distance_edges, summands
from ernie_lab.sites import Site
from ernie_lab.trace.arrays import as_numpy, labelled, token_coords
from ernie_lab.trace.keys import lookup, require_kept
from ernie_lab.trace.recorded import Part
from ernie_lab.trace.tokens import Tokens
from ernie_lab.trace.trace import Trace

if TYPE_CHECKING:
    import xarray as xr

# Scores of a block of queries: enough for products to run at full speed, far below a map.
BLOCK_BYTES = 2**23
_LAST_AXIS = {
    "mass": ("group",),
    "top_key": ("rank",),
    "top_weight": ("rank",),
    "distance_mass": ("bin",),
}


def attention_summary(
    trace: Trace,
    layer: int,
    sequence: int | None = None,
    *,
    queries: Sequence[int] | None = None,
    groups: str | Sequence[Any] | None = None,
    top: int = 0,
    histogram: bool = False,
    block_bytes: int = BLOCK_BYTES,
) -> xr.Dataset:
    """What each head of a layer looks at, without its map. Needs `attn.q_rot` and `attn.k_rot`.

    Variables (head, query): `entropy` in nats; `largest`, the largest weight; `first`, the weight
    of the sequence's first token (a sink's mass); `own`, that of the query itself; `distance`,
    the mean number of tokens back. Equal to the same sums of `trace.pattern` to 1e-5 in fp32
    (tests/analysis/test_attention_summary.py).

    Args:
        sequence: may be left out where there is one.
        queries: positions to ask about; all that were kept unless given.
        groups: a label for each token of the sequence, or a column of `trace.tokens` such as
            `"content"`; adds `mass` (…, group), which sums to 1 over groups.
        top: how many of the largest keys to name; adds `top_key`, their positions, and
            `top_weight` (…, rank); -1 and 0 where a query has fewer keys.
        histogram: adds `distance_mass` (…, bin), the weight of keys by distance, in bins that
            begin at 0, 1, 2, 4, 8, …
        block_bytes: memory for the scores of a block of queries, and as much for its weights;
            but for rounding, nothing depends on it.

    Raises `NotKept` for what is missing, and `ValueError` where an edit changed `scores` or
    `pattern`: what flowed then does not follow from queries and keys.
    """
    import xarray as xr

    kept = _kept(trace, layer, sequence, queries)
    n_keys = len(kept.k_TGA)
    if not 0 <= top <= n_keys:
        raise ValueError(f"top={top}: sequence {kept.sequence} has {n_keys} keys")
    names, member_TC = _members(kept, groups)
    edges = distance_edges(n_keys) if histogram else []
    summed_CT = summands(member_TC)
    found = _joined(
        len(kept.pos_S),
        (
            block.reduced(summed_CT, top, edges)
            for block in blocks(kept.q_SHA, kept.k_TGA, kept.pos_S, block_bytes)
        ),
    )
    if not names:
        del found["mass"]
    axes = {name: ("head", "query", *_LAST_AXIS.get(name, ())) for name in found}
    last = {"group": names, "rank": list(range(top)), "bin": edges}
    named = {axis for of_one in axes.values() for axis in of_one}
    # One set of coordinates for all: those of a `DataArray` each would be copied and compared.
    return xr.Dataset(
        {name: (axes[name], as_numpy(values)) for name, values in found.items()},
        coords=kept.coords | {axis: members for axis, members in last.items() if axis in named},
        attrs={"layer": kept.layer, "sequence": kept.sequence},
    )


def attention_rows(
    trace: Trace,
    layer: int,
    queries: Sequence[int],
    sequence: int | None = None,
    *,
    block_bytes: int = BLOCK_BYTES,
) -> xr.DataArray:
    """The exact weights (head, query, key) of chosen queries; needs what `attention_summary` needs.

    A row costs heads x keys numbers, so the rows of a few hundred queries of a long text fit
    where the map of all does not. 0 for keys after the query.
    """
    kept = _kept(trace, layer, sequence, queries)
    n_keys = len(kept.k_TGA)
    rows = (
        {"pattern": pad(block.pattern(), (0, n_keys - block.weights_GXT.shape[-1]))}
        for block in blocks(kept.q_SHA, kept.k_TGA, kept.pos_S, block_bytes)
    )
    pattern_HST = _joined(len(kept.pos_S), rows)["pattern"]
    coords = kept.coords | token_coords(kept.keys, "key", "key_")
    return labelled(pattern_HST, ("head", "query", "key"), coords, "pattern")


def _joined(n_queries: int, parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The blocks' values `[h s …]` side by side, on the CPU.

    They are written into place: results kept one by one between the large buffers of the blocks
    would leave holes that no later, larger buffer fits into, and memory would grow without end.
    """
    found: dict[str, Tensor] = {}
    done = 0
    for part in parts:
        n = 0
        for name, values in part.items():
            n = values.shape[1]
            if name not in found:
                size = (len(values), n_queries, *values.shape[2:])
                found[name] = torch.empty(size, dtype=values.dtype)
            found[name][:, done : done + n] = values
        done += n
    return found


@dataclass(frozen=True, slots=True, eq=False)
class _Kept:
    """The queries and keys of one sequence in one layer, and whose they are."""

    layer: int
    sequence: int
    q_SHA: Tensor
    k_TGA: Tensor
    pos_S: Tensor
    queries: Tokens
    keys: Tokens

    @property
    def coords(self) -> dict[str, Any]:
        heads = {"head": np.arange(self.q_SHA.shape[1])}
        return heads | token_coords(self.queries, "query", "query_")


def _kept(trace: Trace, layer: int, sequence: int | None, queries: Sequence[int] | None) -> _Kept:
    sites = {name: lookup((name, layer, "attn"), trace.known_sites) for name in ("q_rot", "k_rot")}
    q_site, k_site = sites["q_rot"], sites["k_rot"]
    assert isinstance(q_site, Site)
    assert isinstance(k_site, Site)
    assert q_site.layer is not None
    _refuse_edited(trace, q_site)
    sequence = _only(trace.sequences, sequence)
    rows = [i for i, number in enumerate(trace.context.sequence) if number == sequence]
    asked, q_SHA = _queries(_part(trace, q_site), rows, sequence, queries)
    keys, k_TGA = _keys(_part(trace, k_site), k_site, rows, sequence)
    return _Kept(
        layer=q_site.layer,
        sequence=sequence,
        q_SHA=q_SHA.to(k_TGA.device),
        k_TGA=k_TGA,
        pos_S=torch.tensor(asked, device=k_TGA.device),
        queries=trace.context.take([rows[pos] for pos in asked]),
        keys=trace.context.take(keys),
    )


def _part(trace: Trace, site: Site) -> Part:
    recorded = trace.values[require_kept(site, trace.values)]
    if recorded.heads is not None:
        raise ValueError(f"{site.path} was kept for heads {list(recorded.heads)} alone; keep all")
    return recorded.parts[None]


def _refuse_edited(trace: Trace, q_site: Site) -> None:
    attention = q_site.path.removesuffix(".q_rot")
    after = {f"{attention}.scores", f"{attention}.pattern"} & set(trace.edited)
    if after:
        raise ValueError(
            f"an edit changed {', '.join(sorted(after))}, so weights do not follow from queries "
            f"and keys; keep {attention}.pattern and take its sums"
        )


def _queries(
    part: Part, rows: Sequence[int], sequence: int, wanted: Sequence[int] | None
) -> tuple[list[int], Tensor]:
    """Positions in the sequence, rising, and their queries `[s h a]`."""
    place = {row: i for i, row in enumerate(part.rows_N.tolist())}
    known = [pos for pos, row in enumerate(rows) if row in place]
    asked = known if wanted is None else sorted({int(pos) for pos in wanted})
    unknown = sorted(set(asked) - set(known))
    if unknown or not asked:
        raise ValueError(
            f"queries={unknown or list(asked)}: of sequence {sequence} ({len(rows)} tokens) the "
            f"queries of {len(known)} positions were kept"
            + (f", {known[0]} to {known[-1]}" if known else "")
        )
    return asked, part.values.detach()[[place[rows[pos]] for pos in asked]]


def _keys(
    part: Part, site: Site, rows: Sequence[int], sequence: int
) -> tuple[Sequence[int], Tensor]:
    """All of the sequence's rows, and their keys `[t g a]`."""
    place = {row: i for i, row in enumerate(part.rows_N.tolist())}
    missing = [pos for pos, row in enumerate(rows) if row not in place]
    if missing:
        raise ValueError(
            f"{site.path} lacks {len(missing)} of the {len(rows)} keys of sequence {sequence}, the "
            f"first at position {missing[0]}: keep it at all positions, take the summary before "
            "slicing the trace, and narrow with queries="
        )
    return rows, part.values.detach()[[place[row] for row in rows]]


def _members(kept: _Kept, groups: str | Sequence[Any] | None) -> tuple[list[str], Tensor]:
    """Names of the groups, and which key is in which, `[t c]`, 0 or 1."""
    n_keys, device = len(kept.k_TGA), kept.k_TGA.device
    if groups is None:
        return [], torch.zeros(n_keys, 0, device=device)
    if isinstance(groups, str):
        columns = kept.keys.columns()
        if groups not in columns:
            raise KeyError(f"groups={groups!r} is no column of the tokens: {list(columns)}")
        groups = columns[groups]
    labels = [str(label) for label in groups]
    if len(labels) != n_keys:
        raise ValueError(
            f"groups has {len(labels)} labels for the {n_keys} tokens of sequence {kept.sequence}; "
            "give one for each token, in order"
        )
    names = list(dict.fromkeys(labels))
    number_T = torch.tensor([names.index(label) for label in labels], device=device)
    return names, torch.nn.functional.one_hot(number_T, len(names)).float()


def _only(sequences: Sequence[int], sequence: int | None) -> int:
    if sequence is None and len(sequences) == 1:
        return sequences[0]
    if sequence is None or sequence not in sequences:
        raise ValueError(
            f"sequence={sequence}: this trace has sequences {list(sequences)}; name one of them"
        )
    return int(sequence)
