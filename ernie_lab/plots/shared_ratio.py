"""How much of a mixture layer's output the shared experts write, by what tokens are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.plots.by_layer import Line, draw, handle, layer_axis, look_of, twin_handle
from ernie_lab.plots.given import require
from ernie_lab.plots.style import MUTED
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

_COLUMNS = {"ratio": ("median", "low", "high"), "share": ("share", "share_low", "share_high")}


@overload
def plot_shared_ratio(
    table: pd.DataFrame, *, value: Literal["ratio", "share"] = ...,
    untrained: pd.DataFrame | None = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_shared_ratio(
    table: pd.DataFrame, *, value: Literal["ratio", "share"] = ...,
    untrained: pd.DataFrame | None = ..., model: str = ..., ax: Axes, title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_shared_ratio(
    table: pd.DataFrame,
    *,
    value: Literal["ratio", "share"] = "ratio",
    untrained: pd.DataFrame | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`shared_to_routed` of several layers as lines, one for each kind of token.

    `value="ratio"`: the median of ||shared|| / ||routed||, on a scale of doublings. `"share"`: the
    part of the layer's output that is the shared block's. `untrained` is the same table of an
    untrained twin, dashed.
    """
    require(table, "DataFrame", "plot_shared_ratio", "el.analysis.shared_to_routed(…)")
    if value not in _COLUMNS:
        raise ValueError(f'value={value!r} must be "ratio" or "share"')
    if "layer" not in table.index.names:
        raise ValueError("the table is of one layer; give shared and routed (layer, token, width)")
    layers = [int(layer) for layer in table.index.unique("layer")]
    kinds = [str(kind) for kind in table.index.unique("content")]
    middle, low, high = _COLUMNS[value]
    with Sheet(ax, 6.2, 3.9) as sheet:
        for own, twin in ((table, False), (untrained, True)):
            if own is None:
                continue
            for kind in kinds:
                rows = own.xs(kind, level="content")
                colour, marker = look_of(kind, kinds)
                ends = (rows[low], rows[high])
                numbers = [int(layer) for layer in rows.index]
                draw(sheet.ax, Line(numbers, rows[middle], colour, marker, *ends, twin=twin))
        layer_axis(sheet.ax, layers)
        if value == "ratio":
            sheet.ax.set_yscale("log", base=2)
            sheet.ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y >= 1 else f"1/{1 / y:g}")
            sheet.ax.axhline(1, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
        sheet.ax.set_ylabel(
            "‖shared‖ / ‖routed‖, median" if value == "ratio" else "share of the layer's output"
        )
        handles = [handle(kind, *look_of(kind, kinds)) for kind in kinds]
        handles += [twin_handle()] if untrained is not None else []
        where: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5)}
        sheet.ax.legend(handles=handles, **(where if ax is None else {"loc": "best"}))
        return sheet.finish(
            title or "What the shared experts write, beside the routed ones",
            _caption(table, kinds, value, model, untrained is not None)
            if caption is None
            else caption,
            _alt(table, kinds, middle, value, model),
        )


def _caption(table: pd.DataFrame, kinds: list[str], value: str, model: str, twin: bool) -> str:
    counts = table["n_tokens"].groupby("content").max()
    what = (
        "Above 1 the shared block's output is the larger one; sizes alone, the two may point apart."
        if value == "ratio"
        else "Mean of shared . out / ||out||^2; what remains to 1 is the routed experts'."
    )
    return (
        f"{model + '. ' if model else ''}N = {', '.join(f'{counts[k]:,} {k}' for k in kinds)} "
        f"tokens. {what} Veil: 95 % interval over documents. "
        + ("Dashed: a twin with random weights, same tokens. " if twin else "")
        + "Large is not important: switching the block off tells."
    )


def _alt(table: pd.DataFrame, kinds: list[str], column: str, value: str, model: str) -> str:
    parts = []
    for kind in kinds:
        rows = table.xs(kind, level="content")[column]
        values = ", ".join(f"{number:.2g}" for number in _thinned(rows.to_numpy()))
        parts.append(f"{kind} {values}")
    name = "Size of the shared over the routed output" if value == "ratio" else "Share"
    first, last = table.index.unique("layer")[[0, -1]]
    return (
        f"{name} of the shared experts{f' of {model}' if model else ''}, layers {first} to {last}: "
        f"{'; '.join(parts)}."
    )


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most eight of them, the ends included."""
    places = np.unique(np.linspace(0, len(values) - 1, min(8, len(values))).round().astype(int))
    return np.asarray(values[places])
