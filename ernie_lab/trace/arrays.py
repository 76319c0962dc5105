"""Recorded tensors as xarray: named axes, real layer and head numbers, token coordinates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ernie_lab.dims import AXIS_NAMES
from ernie_lab.trace.pictures import CELL, Picture, cells_of
from ernie_lab.trace.recorded import Part, Recorded
from ernie_lab.trace.tokens import Tokens

if TYPE_CHECKING:
    import xarray as xr

_INTEGERS = ("sequence", "pos", "id")
_TOKEN_COORDS = (*_INTEGERS, "text", "modality", "phase")
# Axes whose members have numbers worth showing; the others are only counted.
_NUMBERED = ("expert", "slot", "head", "kv_head")


def as_numpy(x: Tensor) -> np.ndarray[Any, np.dtype[Any]]:
    """Read-only, on the CPU; bfloat16, which numpy lacks, becomes float32."""
    x = x.detach().cpu()
    array = (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    array = array.view()
    array.flags.writeable = False
    return array


def token_coords(tokens: Tokens, axis: str = "token", prefix: str = "") -> dict[str, Any]:
    """Coordinates along a token axis.

    Texts are objects, since numpy's own strings drop trailing NULs, and lone surrogates are
    written out (`\\udce4`), since Arrow refuses them: `Trace.tokens` has the exact texts.
    """
    columns = {name: getattr(tokens, name) for name in _TOKEN_COORDS}
    columns["text"] = [
        text.encode("utf-8", "backslashreplace").decode("utf-8") for text in tokens.text
    ]
    return {
        prefix + name: (axis, np.array(column, dtype=int if name in _INTEGERS else object))
        for name, column in columns.items()
    }


def labelled(
    values: Tensor, dims: Sequence[str], coords: Mapping[str, Any], name: str, meaning: str = ""
) -> xr.DataArray:
    """`values` under these axis names; numbered axes without a coordinate count from 0."""
    import xarray as xr

    counted = {
        axis: np.arange(size)
        for axis, size in zip(dims, values.shape, strict=True)
        if axis in _NUMBERED and axis not in coords
    }
    return xr.DataArray(
        as_numpy(values),
        dims=list(dims),
        coords={**counted, **coords},
        name=name,
        attrs={"meaning": meaning} if meaning else {},
    )


def rows_array(recorded: Recorded, context: Tokens, media: Sequence[Picture] = ()) -> xr.DataArray:
    """A site with one row per token, patch or block of patches: (token, …), (patch, …)."""
    part, site = recorded.parts[None], recorded.site
    dims = _dims(recorded)
    if site.of_patches:
        coords = cell_coords(part.rows_N, site.row, media, dims[0])
    else:
        tokens = context.take(part.rows_N.tolist())
        coords = token_coords(tokens, dims[0])
        if site.row == "m":
            cells = {name: np.array(getattr(tokens, name), dtype=int) for name in CELL}
            coords |= {name: (dims[0], column) for name, column in cells.items()}
    coords |= _heads(recorded)
    return labelled(part.values, dims, coords, site.path, site.meaning)


def cell_coords(rows_N: Tensor, row: str, media: Sequence[Picture], axis: str) -> dict[str, Any]:
    """Coordinates along an axis of patches or blocks: its number, image, frame, row and col."""
    cells = {name: (axis, column[rows_N.numpy()]) for name, column in cells_of(row, media).items()}
    return {axis: rows_N.numpy()} | cells


def part_array(
    recorded: Recorded, key: int | None, context: Tokens, media: Sequence[Picture]
) -> xr.DataArray:
    """One part: rows, the map of one sequence, or that of one frame."""
    if key is None:
        return rows_array(recorded, context, media)
    if recorded.site.ragged:
        return map_array(recorded, key, context)
    return frame_array(recorded, key, media)


def layers_array(stack: Sequence[Recorded], context: Tokens, name: str) -> xr.DataArray:
    """The same site of several layers: (layer, token, …)."""
    rows_N, values = stacked(stack)
    coords = token_coords(context.take(rows_N.tolist())) | _heads(stack[0])
    coords["layer"] = [recorded.site.layer for recorded in stack]
    dims = ["layer", *_dims(stack[0])]
    return labelled(values, dims, coords, name, stack[0].site.meaning)


def map_array(recorded: Recorded, sequence: int, context: Tokens) -> xr.DataArray:
    """A ragged site of one sequence: (head, query, key); both axes carry pos and text."""
    part = recorded.parts[sequence]
    queries = context.take(part.rows_N.tolist())
    keys = context.take([i for i, seq in enumerate(context.sequence) if seq == sequence])
    coords = (
        token_coords(queries, "query", "query_")
        | token_coords(keys, "key", "key_")
        | _heads(recorded)
    )
    dims = ("head", "query", "key")
    return labelled(part.values, dims, coords, recorded.site.path, recorded.site.meaning)


def frame_array(recorded: Recorded, number: int, media: Sequence[Picture]) -> xr.DataArray:
    """Attention within one frame: (head, query, key), each patch with its row and column."""
    part = recorded.parts[number]
    cells = {name: column[part.rows_N.numpy()] for name, column in cells_of("p", media).items()}
    coords = _heads(recorded) | {
        f"{axis}_{name}": (axis, cells[name])
        for axis in ("query", "key")
        for name in ("row", "col")
    }
    coords |= {name: int(cells[name][0]) for name in ("image", "frame")}
    site = recorded.site
    return labelled(part.values, ("head", "query", "key"), coords, site.path, site.meaning)


def stacked(stack: Sequence[Recorded]) -> tuple[Tensor, Tensor]:
    """Row indices and values `[l n …]` of sites that were kept at the same tokens."""
    first = stack[0]
    for other in stack[1:]:
        if not _alike(first, other):
            if first.site.bank is not None and first.heads == other.heads:
                raise ValueError(
                    f"{first.site.path} and {other.site.path} have other tokens: an edit of "
                    "moe.bank moved some, or they were kept with different filters. Take one "
                    "layer, t[path] or t.sel(layer=...)"
                )
            raise ValueError(
                f"{first.site.path} and {other.site.path} were kept with different filters or "
                "sizes and cannot be stacked; take them one at a time, t[path]"
            )
    parts: list[Part] = [recorded.parts[None] for recorded in stack]
    return parts[0].rows_N, torch.stack([part.values.detach() for part in parts])


def _alike(a: Recorded, b: Recorded) -> bool:
    rows, others = a.parts[None], b.parts[None]
    return (
        a.heads == b.heads
        and rows.values.shape == others.values.shape
        and bool((rows.rows_N == others.rows_N).all())
    )


def _dims(recorded: Recorded) -> list[str]:
    letters = recorded.site.dims.split()
    first = "token" if recorded.site.row == "b" else AXIS_NAMES[recorded.site.row]
    inner = letters[2:] if recorded.site.row == "b" else letters[1:]
    return [first, *(AXIS_NAMES[letter] for letter in inner)]


def _heads(recorded: Recorded) -> dict[str, Any]:
    return {} if recorded.heads is None else {"head": list(recorded.heads)}
