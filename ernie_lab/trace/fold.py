"""Rows of a picture put back where they lie on it, and the pixels that its tokens cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_lab.inputs.media import Cell
from ernie_lab.trace.pictures import CELL, Integers, Picture
from ernie_lab.trace.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_ROWS = ("patch", "block", "image_token", "token")


def folded(
    array: xr.DataArray, image: int, media: Sequence[Picture], context: Tokens
) -> xr.DataArray:
    """The rows of one picture as (frame, row, col), in raster order, in place of their axis."""
    import xarray as xr

    if not 0 <= image < len(media):
        raise ValueError(f"no picture {image}; the trace has {len(media)}, counted from 0")
    axes = [axis for axis in _ROWS if axis in array.dims]
    if not axes:
        raise ValueError(f"{array.name} has axes {array.dims}: no {', '.join(_ROWS)} to fold")
    axis = axes[0]
    cells = _cells(array, axis, context)
    mine = (cells["image"] == image).nonzero()[0]
    shape = _shape(axis, media[image])
    if len(mine) != np.prod(shape):
        raise ValueError(
            f"{array.name} has {len(mine)} of the {np.prod(shape)} rows of picture {image}; the "
            "others were not kept, are in another slice, or went to another bank of experts"
        )
    order = mine[np.lexsort([cells[name][mine] for name in ("col", "row", "frame")])]
    ordered, place = array.isel({axis: order}), array.dims.index(axis)
    dims = (*array.dims[:place], "frame", "row", "col", *array.dims[place + 1 :])
    values = ordered.values.reshape(*ordered.shape[:place], *shape, *ordered.shape[place + 1 :])
    coords: dict[Any, Any] = {
        name: coord for name, coord in array.coords.items() if axis not in coord.dims
    }
    coords |= {"frame": np.unique(cells["frame"][order])}
    coords |= {"row": np.arange(shape[1]), "col": np.arange(shape[2]), "image": image}
    values.flags.writeable = False
    return xr.DataArray(values, dims=dims, coords=coords, name=array.name, attrs=array.attrs)


def _cells(array: xr.DataArray, axis: str, context: Tokens) -> Mapping[str, Integers]:
    """image, frame, row and col along the axis; -1 where a token belongs to no picture."""
    if axis != "token":
        return {name: array.coords[name].values for name in CELL}
    places = zip(context.sequence, context.pos, strict=True)
    row_of = {place: row for row, place in enumerate(places)}
    sequences, positions = array.coords["sequence"].values, array.coords["pos"].values
    rows = [row_of[place] for place in zip(sequences.tolist(), positions.tolist(), strict=True)]
    columns = {name: getattr(context, name) for name in CELL}
    return {
        name: np.array([-1 if column[row] is None else column[row] for row in rows], dtype=int)
        for name, column in columns.items()
    }


def _shape(axis: str, picture: Picture) -> tuple[int, int, int]:
    """Of the grid of its patches, blocks or tokens."""
    merged = picture.grid.merged
    match axis:
        case "patch":
            return picture.grid
        case "block":
            return (picture.grid.t, merged.h, merged.w)
        case _:
            return merged


def boxes(media: Sequence[Picture], tokens: Tokens) -> pd.DataFrame:
    """One row for each image token: its cell, and its pixels as shown and as given."""
    import pandas as pd

    rows = []
    places = zip(tokens.sequence, tokens.pos, *(getattr(tokens, c) for c in CELL), strict=True)
    for sequence, pos, image, *place in places:
        if image is None:
            continue
        cell, picture = Cell(*place), media[image]
        shown, original = picture.box(cell), picture.original_box(cell)
        rows.append((sequence, pos, image, *cell, *shown, *original))
    sides = ("left", "top", "right", "bottom")
    names = ["sequence", "pos", *CELL, *sides, *(f"original_{side}" for side in sides)]
    return pd.DataFrame(rows, columns=names)
