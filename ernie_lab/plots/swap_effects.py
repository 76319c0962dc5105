"""What it costs to exchange the parts of two layers: a heat map over pairs of layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.style import DEVIATION, INK, MUTED, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

MAX_LAYERS = 128
# Of layers: beyond these an interval, or a number, could not be read in its cell.
_WITH_INTERVALS, _WITH_NUMBERS = 8, 14
_DARK = 0.62  # of the scale: from here on the text is white


@overload
def plot_swap_effects(
    table: pd.DataFrame, *, name: str, unit: str = ..., below: str = ..., above: str = ...,
    diagonal: str = ..., noise: float | None = ..., n: int | None = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_swap_effects(
    table: pd.DataFrame, *, name: str, unit: str = ..., below: str = ..., above: str = ...,
    diagonal: str = ..., noise: float | None = ..., n: int | None = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_swap_effects(
    table: pd.DataFrame,
    *,
    name: str,
    unit: str = "",
    below: str = "swapped",
    above: str = "",
    diagonal: str = "",
    noise: float | None = None,
    n: int | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One cell for each row of `table`: row layer `i`, column layer `j`, colour `value`.

    A swap has no direction, so the two triangles can hold two experiments: rows with i > j lie
    `below` the diagonal, i < j `above`, i = j on it; the words say what each is. `low` and `high`
    are intervals, written where there is room; a value whose interval holds 0, or that lies
    within `noise`, is grey. Layers are true layer numbers.
    """
    layers, cells, low, high = _matrices(table)
    n_layers = len(layers)
    limit = float(np.nanmax(np.abs(cells))) or 1.0
    unseen = np.abs(cells) <= (0.0 if noise is None else noise)
    unseen |= (low <= 0) & (high >= 0)
    side = float(np.clip(n_layers * 0.95, 3.4, 8.0))
    with Sheet(ax, side + 1.9, side * 0.72 + 1.95) as sheet:
        image = sheet.ax.imshow(
            np.ma.masked_invalid(cells), cmap=DEVIATION, norm=Normalize(-limit, limit),
            aspect="auto", interpolation="nearest",
        )  # fmt: skip
        _axes(sheet.ax, layers)
        if n_layers <= _WITH_NUMBERS:
            _numbers(sheet.ax, cells, low, high, limit, unseen)
        unit_words = f"{name} ({unit})" if unit else name
        bar = sheet.ax.figure.colorbar(image, ax=sheet.ax, pad=0.02, aspect=16)
        bar.set_label(unit_words)
        bar.outline.set_edgecolor(RULE)
        bar.ax.tick_params(length=2)
        places = _places(below, above, diagonal, cells)
        return sheet.finish(
            title or f"{name[:1].upper()}{name[1:]} when two layers exchange their parts",
            _caption(places, low, noise, n, unit, model) if caption is None else caption,
            _alt(layers, cells, places, name, unit, model, noise),
        )


def _matrices(table: pd.DataFrame) -> tuple[list[int], Floats, Floats, Floats]:
    absent = [column for column in ("i", "j", "value") if column not in table]
    if absent:
        raise ValueError(
            f"the table has no column {' and '.join(absent)}; it has {list(table.columns)}"
        )
    if ("low" in table) != ("high" in table):
        raise ValueError("an interval needs both low and high")
    layers = sorted({int(x) for column in ("i", "j") for x in table[column]})
    if not 0 < len(layers) <= MAX_LAYERS:
        raise ValueError(f"{len(layers)} layers, 1 to {MAX_LAYERS} can be drawn: narrow the table")
    if table.duplicated(["i", "j"]).any():
        raise ValueError("two rows of the table are for the same i and j: which is meant?")
    if not np.isfinite(table["value"].to_numpy(dtype=float)).any():
        raise ValueError("no value in the table is a number")
    rows = [layers.index(int(i)) for i in table["i"]]
    cols = [layers.index(int(j)) for j in table["j"]]
    found = []
    for column in ("value", "low", "high"):
        matrix = np.full((len(layers), len(layers)), np.nan)
        if column in table:
            matrix[rows, cols] = table[column].to_numpy(dtype=float, na_value=np.nan)
        found.append(matrix)
    return layers, found[0], found[1], found[2]


def _axes(ax: Axes, layers: list[int]) -> None:
    n = len(layers)
    step = next(s for s in (1, 2, 4, 8) if n / s <= 32)
    ticks = range(0, n, step)
    ax.set_xticks(ticks, [str(layers[i]) for i in ticks])
    ax.set_yticks(ticks, [str(layers[i]) for i in ticks])
    ax.set_xticks(np.arange(n - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(n - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=1.0)
    ax.tick_params(which="both", length=0)
    ax.set_xlabel("layer j")
    ax.set_ylabel("layer i")
    for spine in ax.spines.values():
        spine.set_visible(False)
    for i in range(n):
        frame = Rectangle((i - 0.5, i - 0.5), 1, 1, fill=False, ec=MUTED, lw=0.9, zorder=2)
        ax.add_patch(frame)


def _numbers(ax: Axes, cells: Floats, low: Floats, high: Floats, limit: float, unseen: Any) -> None:
    room = len(cells) <= _WITH_INTERVALS
    for row, col in np.argwhere(np.isfinite(cells)).tolist():
        value = cells[row, col]
        dark = abs(value) > _DARK * limit
        colour = "white" if dark else MUTED if unseen[row, col] else INK
        ends = (low[row, col], high[row, col])
        interval = room and np.isfinite(ends).all()
        look: dict[str, Any] = {"ha": "center", "color": colour, "zorder": 3}
        ax.text(
            col, row - 0.06 * interval, f"{value:+.3g}",
            va="bottom" if interval else "center",
            fontsize=8.5 if room else 6.5, fontweight="normal" if unseen[row, col] else "bold",
            **look,
        )  # fmt: skip
        if interval:
            words = f"{ends[0]:+.2g} … {ends[1]:+.2g}"
            ax.text(col, row + 0.08, words, va="top", fontsize=6.5, **look)


def _places(below: str, above: str, diagonal: str, cells: Floats) -> dict[str, tuple[str, Floats]]:
    """What each part of the square is, where it has a name and values."""
    n = len(cells)
    parts = {
        "below the diagonal": (below, cells[np.tril_indices(n, -1)]),
        "above it": (above, cells[np.triu_indices(n, 1)]),
        "on it": (diagonal, np.diag(cells)),
    }
    return {
        place: (words, values[np.isfinite(values)])
        for place, (words, values) in parts.items()
        if words and np.isfinite(values).any()
    }


def _caption(
    places: dict[str, tuple[str, Floats]], low: Floats, noise: float | None, n: int | None,
    unit: str, model: str,
) -> str:  # fmt: skip
    said = "; ".join(f"{place}: {words}" for place, (words, _) in places.items())
    parts = [
        f"{model}." if model else "",
        f"n = {n:,} prompts." if n is not None else "",
        f"{said[:1].upper()}{said[1:]}." if said else "",
        "0: the model without an edit.",
    ]
    if np.isfinite(low).any():
        parts.append("Small: the intervals given with the values; grey where one holds 0.")
    if noise is not None:
        parts.append(f"Noise floor {noise:.2g}{' ' + unit if unit else ''}; within it: grey.")
    return " ".join(filter(None, parts))


def _alt(
    layers: list[int], cells: Floats, places: dict[str, tuple[str, Floats]], name: str,
    unit: str, model: str, noise: float | None,
) -> str:  # fmt: skip
    row, col = divmod(int(np.nanargmax(np.abs(cells))), len(layers))
    ranges = "; ".join(
        f"{place} ({words}) {values.min():.3g} to {values.max():.3g}"
        for place, (words, values) in places.items()
    )
    return (
        f"Heat map of {name}{f' in {unit}' if unit else ''}{f' of {model}' if model else ''} over "
        f"pairs of {len(layers)} layers: {ranges}. Largest at i = {layers[row]}, "
        f"j = {layers[col]}: {cells[row, col]:.3g}."
        + (f" Noise floor {noise:.2g}." if noise is not None else "")
    )
