"""A picture under any value per token: entropy, margin, an effect, an attention row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike

from ernie_lab.plots.panels import (
    DIVERGING_VEIL,
    LEAST_BOX,
    VEIL,
    box_lines,
    draw_picture,
    lay_over,
    layout,
    number_axes,
    panel_title,
    value_bar,
    write_in_boxes,
)
from ernie_lab.plots.pictures import Floats, Shown, Span, TraceLike, model_name, shown
from ernie_lab.plots.tokens import coordinate
from ernie_lab.plots.view import View

_WRITTEN = 0.3  # inches of a box that holds a number
MAX_PANELS = 64


@overload
def plot_image_value(
    trace: TraceLike, values: ArrayLike, *, name: str, unit: str = ..., image: int = ...,
    frame: int | None = ..., layers: Sequence[int] | None = ..., center: float | None = ...,
    limits: tuple[float, float] | None = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_image_value(
    trace: TraceLike, values: ArrayLike, *, name: str, unit: str = ..., image: int = ...,
    frame: int | None = ..., layers: Sequence[int] | None = ..., center: float | None = ...,
    limits: tuple[float, float] | None = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_image_value(
    trace: TraceLike,
    values: ArrayLike,
    *,
    name: str,
    unit: str = "",
    image: int = 0,
    frame: int | None = None,
    layers: Sequence[int] | None = None,
    center: float | None = None,
    limits: tuple[float, float] | None = None,
    rows: Span | None = None,
    cols: Span | None = None,
    model: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Any value per token as a veil over the picture, on one scale for all panels.

    `values` is `[token]`, or `[layer, token]` for a panel per layer: an array of the trace (its
    tokens are found by their coordinates), or plain numbers, one for each row of `trace.tokens`
    or one for each token of the whole picture, in reading order. `layers` takes some layers of a
    labelled array and names those of a plain one. With `center` the scale diverges from it
    (red above, blue below), else a bare picture is the lowest value or 0. A cross: no value.
    """
    picture = shown(trace, image, frame, rows, cols)
    values_LN, index_RC, numbers = _values(trace, values, picture, layers)
    maps = [picture.folded(values_N, index_RC) for values_N in values_LN]
    if not 0 < len(maps) <= MAX_PANELS:
        raise ValueError(f"{len(maps)} panels, at most {MAX_PANELS}: narrow with layers=[…]")
    norm = scale(np.stack(maps), center, limits)
    before = 1 if ax is None else 0
    n = len(maps) + before
    plan = layout(n, picture, least=LEAST_BOX, narrow="layers=[…]")
    box = plan.width / picture.shape[1]
    with plan.sheet(ax, bar=True) as sheet:
        panels = plan.axes(sheet, alone=n == 1, bar=True)
        if before:
            draw_picture(panels[0], picture, pale=False)
            panel_title(panels[0], "what the model saw")
        drawn = None
        cmap = VEIL if center is None else DIVERGING_VEIL
        for i, (panel, map_RC) in enumerate(zip(panels[before:], maps, strict=True)):
            draw_picture(panel, picture, pale=True)
            drawn = lay_over(panel, picture, map_RC, norm, cmap, box)
            if box > 0.12:
                box_lines(panel, picture, box)
            if box >= _WRITTEN:
                write_in_boxes(panel, picture, _written(map_RC), box, digits=4)
            panel_title(panel, name if numbers is None else f"layer {numbers[i]}")
        for i, panel in enumerate(panels):
            left, bottom = plan.is_edge(i)
            number_axes(panel, picture, plan.width, left=left, bottom=bottom)
        value_bar(sheet, drawn, f"{name} ({unit})" if unit else name, plan.size[1])
        what = f"{name[:1].upper()}{name[1:]} on {picture.label}"
        return sheet.finish(
            title
            or (what if numbers is None or len(numbers) > 1 else f"{what}, layer {numbers[0]}"),
            _caption(model_name(trace, model), picture, maps, unit, center)
            if caption is None
            else caption,
            f"{what}, {picture.size}. " + _alt(picture, maps, numbers, unit),
        )


def _values(
    trace: TraceLike, values: Any, picture: Shown, layers: Sequence[int] | None
) -> tuple[Floats, Any, list[int] | None]:
    """`[layer token]`, where each box's token is on that axis, and the layers' true numbers."""
    raw = np.asarray(values, dtype=np.float64)
    if raw.ndim not in (1, 2):
        raise ValueError(f"values of shape {raw.shape}: (token,) or (layer, token) is needed")
    known = coordinate(values, "layer")
    numbers = None if known is None else [int(n) for n in known]
    values_LN = np.atleast_2d(raw)
    if layers is not None and numbers is None:
        numbers = list(layers)
    elif layers is not None and numbers is not None:
        if absent := [n for n in layers if n not in numbers]:
            raise ValueError(f"layers {absent}: the values have layers {numbers}")
        values_LN = values_LN[[numbers.index(n) for n in layers]]
        numbers = list(layers)
    if numbers is not None and len(numbers) != len(values_LN):
        raise ValueError(f"{len(numbers)} layer numbers for {len(values_LN)} rows of values")
    return values_LN, _index(trace, values, values_LN.shape[1], picture), numbers


def _index(trace: TraceLike, values: Any, size: int, picture: Shown) -> Any:
    if coordinate(values, "pos") is not None:
        return picture.indices(values)
    table = trace.tokens
    if size == len(table):
        places = {p: i for i, (s, p) in enumerate(zip(table["sequence"], table["pos"], strict=True))
                  if s == picture.sequence}  # fmt: skip
    else:
        mine = table.loc[table["image"] == picture.image, "pos"]
        if size != len(mine):
            raise ValueError(
                f"{size} values: one for each of the {len(table)} rows of trace.tokens is needed, "
                f"or one for each of the {len(mine)} tokens of {picture.name}, or an array of the "
                "trace with the coordinates sequence and pos"
            )
        places = {p: i for i, p in enumerate(sorted(mine))}
    return np.vectorize(lambda p: places.get(p, -1), otypes=[int])(picture.positions_RC)


def scale(maps: Floats, center: float | None, limits: tuple[float, float] | None) -> Normalize:
    """From 0 or the lowest to the highest value, or as far below `center` as above it."""
    finite = maps[np.isfinite(maps)]
    if not finite.size:
        raise ValueError("no finite value on this picture: nothing to draw")
    if limits is not None:
        low, high = limits
    elif center is None:
        low, high = min(0.0, float(finite.min())), float(finite.max())
    else:
        reach = float(np.abs(finite - center).max())
        low, high = center - reach, center + reach
    return Normalize(low, high if high > low else low + 1.0, clip=True)


def _written(map_RC: Floats) -> list[list[str]]:
    """Numbers short enough for a box; none where there is no value."""
    largest = float(np.nanmax(np.abs(map_RC), initial=0.0))
    places = 0 if largest >= 100 else 1 if largest >= 10 else 2
    return [[f"{x:.{places}f}" if np.isfinite(x) else "" for x in line] for line in map_RC]


def _caption(
    model: str, picture: Shown, maps: Sequence[Floats], unit: str, center: float | None
) -> str:
    values = np.concatenate([map_RC[np.isfinite(map_RC)] for map_RC in maps])
    missing = any(not np.isfinite(map_RC).all() for map_RC in maps)
    each = " in each layer" if len(maps) > 1 else ""
    return (
        f"{model + ', ' if model else ''}{picture.size}{each}; mean {values.mean():.3g}, lowest "
        f"{values.min():.3g}, highest {values.max():.3g}{' ' + unit if unit else ''}."
        + (f" Blue below {center:g}, red above." if center is not None else "")
        + (" ×: no value." if missing else "")
    )


def _alt(picture: Shown, maps: Sequence[Floats], numbers: Sequence[int] | None, unit: str) -> str:
    parts = []
    for i, map_RC in enumerate(maps[:6]):
        if not np.isfinite(map_RC).any():
            continue
        ends = []
        for word, place in (("highest", np.nanargmax(map_RC)), ("lowest", np.nanargmin(map_RC))):
            row, col = divmod(int(place), picture.shape[1])
            ends.append(
                f"{word} {map_RC[row, col]:.3g}{' ' + unit if unit else ''} at row "
                f"{row + picture.row}, column {col + picture.col}"
            )
        where = "" if numbers is None else f"layer {numbers[i]}: "
        parts.append(where + ", ".join(ends))
    return "; ".join(parts) + ("; …" if len(maps) > 6 else ".")
