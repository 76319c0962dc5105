"""The balance of routing, layer by layer: four statistics beside what uniform routing gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from ernie_lab.plots.given import require
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.tokens import drawable, shortened
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

# What each statistic is called on its axis, its value at perfect balance, and its worst bound.
_NAMES = {
    "max_violation": ("MaxVio: busiest expert's excess, × fair share", 0.0),
    "cv": ("CV of the loads: std / mean", 0.0),
    "entropy": ("entropy of the loads / log E", 1.0),
    "gini": ("Gini coefficient of the loads", 0.0),
    "least_loaded": ("idlest expert's load, × fair share", 1.0),
    "document_max_violation": ("MaxVio within a document, mean", 0.0),
}
STATISTICS = ("max_violation", "cv", "entropy", "least_loaded")
MAX_GROUPS = 8
MAX_LAYERS = 128
_BAND = "#dfe3e8"
# Of layers times groups: beyond, intervals would hide the values they belong to.
_MOST_INTERVALS = 60
_LABEL_WIDTH = 14


@overload
def plot_balance(
    table: pd.DataFrame, *, statistics: Sequence[str] = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_balance(
    table: pd.DataFrame, *, statistics: Sequence[str] = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_balance(
    table: pd.DataFrame,
    *,
    statistics: Sequence[str] = STATISTICS,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One panel per statistic of a `balance_by` table: value and interval over the layers.

    Grey: where uniform routing of as many tokens lies in 90 % of draws; with several groups, of
    the smallest and the largest group together. A filled point is outside the band of its own
    group, a hollow one inside it. On `ax` the first of `statistics` is drawn.
    """
    require(table, "DataFrame", "plot_balance", "el.analysis.balance_by(routing)")
    groups = _groups(table)
    layers = [int(layer) for layer in dict.fromkeys(table.index.get_level_values("layer"))]
    wanted = list(statistics) if ax is None else list(statistics)[:1]
    _check(table, wanted, groups, layers)
    columns = 1 if len(wanted) == 1 else 2
    rows = -(-len(wanted) // columns)
    with_intervals = len(layers) * len(groups) <= _MOST_INTERVALS
    width = 4.9 if columns == 1 else 9.6
    with Sheet(ax, width, 2.35 * rows + 1.35, (rows, columns)) as sheet:
        for panel, name in zip(sheet.axes, wanted, strict=False):
            _panel(panel, table, name, groups, layers, with_intervals)
        for unused in sheet.axes[len(wanted) :]:
            unused.axis("off")
        by = "" if len(groups) == 1 else ", group by group"
        return sheet.finish(
            title or f"How balanced the routing is, layer by layer{by}",
            _caption(table, groups, model, with_intervals) if caption is None else caption,
            _alt(table, wanted, groups, layers, model),
        )


def _groups(table: pd.DataFrame) -> list[Any]:
    if list(table.index.names) != ["layer", "group"]:
        raise ValueError(
            f"the table's index is {list(table.index.names)}, expected layer and group: give what "
            "el.analysis.balance_by or balance_of_counts returned"
        )
    return list(dict.fromkeys(table.index.get_level_values("group")))


def _of(table: pd.DataFrame, group: Any) -> pd.DataFrame:
    mine: pd.DataFrame = table[table.index.get_level_values("group") == group]
    return mine


def _check(
    table: pd.DataFrame, wanted: Sequence[str], groups: Sequence[Any], layers: Sequence[int]
) -> None:
    known = [name for name in _NAMES if name in table]
    if not wanted or (absent := [name for name in wanted if name not in known]):
        raise ValueError(f"statistics={absent if wanted else []}; the table has {', '.join(known)}")
    if len(groups) > MAX_GROUPS:
        raise ValueError(
            f"{len(groups)} groups, at most {MAX_GROUPS} can be told apart: keep some, "
            "table[table.index.isin([…], level='group')]"
        )
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"{len(layers)} layers, at most {MAX_LAYERS}: narrow with table.loc[a:b]")


def _panel(
    ax: Axes,
    table: pd.DataFrame,
    name: str,
    groups: Sequence[Any],
    layers: Sequence[int],
    with_intervals: bool,
) -> None:
    place = {layer: x for x, layer in enumerate(layers)}
    _uniform(ax, table, name, layers)
    words, ideal = _NAMES[name]
    ax.axhline(ideal, color=RULE, lw=0.8, zorder=1)
    spread = np.linspace(-0.24, 0.24, len(groups)) if len(groups) > 1 else np.zeros(1)
    ends = []
    for shift, group, colour in zip(spread, groups, OKABE_ITO.values(), strict=False):
        mine = _of(table, group)
        at = [place[int(layer)] for layer in mine.index.get_level_values("layer")]
        x = np.array(at) + shift * with_intervals
        y = mine[name].to_numpy(dtype=float)
        ax.plot(x, y, color=colour, lw=1.1, alpha=0.75, zorder=3)
        if with_intervals:
            low, high = (mine[f"{name}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
            ax.vlines(x, low, high, color=colour, lw=1.3, alpha=0.85, zorder=3)
        beyond = _beyond(mine, name)
        faces = [colour if outside else "white" for outside in beyond]
        ax.scatter(
            x,
            y,
            s=22 if len(layers) <= 12 else 11,
            facecolors=faces,
            edgecolors=colour,
            linewidths=1.1,
            zorder=4,
        )
        ends.append((float(y[-1]), str(group), colour))
    step = next(s for s in (1, 2, 4, 8) if len(layers) / s <= 16)
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.set_xlabel("layer")
    ax.set_title(words, fontsize=8.5, fontweight="normal", color=INK, loc="left", pad=5)
    bottom, top = ax.get_ylim()
    ax.set_ylim(min(bottom, 0) if ideal == 0 else bottom, max(top, 1.0) if ideal == 1 else top)
    if len(groups) > 1:
        _direct_labels(ax, ends)


def _uniform(ax: Axes, table: pd.DataFrame, name: str, layers: Sequence[int]) -> None:
    """The band of each layer; MaxVio within documents has an average instead."""
    by_layer = table.groupby(level="layer")
    if f"{name}_uniform_p05" in table:
        low = by_layer[f"{name}_uniform_p05"].min().loc[list(layers)].to_numpy(dtype=float)
        high = by_layer[f"{name}_uniform_p95"].max().loc[list(layers)].to_numpy(dtype=float)
        edges = np.append(np.arange(len(layers)) - 0.5, len(layers) - 0.5)
        ax.fill_between(
            edges, np.append(low, low[-1]), np.append(high, high[-1]), step="post", color=_BAND,
            lw=0, zorder=0,
        )  # fmt: skip
        return
    mean = by_layer[f"{name}_uniform_mean"].max().loc[list(layers)].to_numpy(dtype=float)
    ax.plot(range(len(layers)), mean, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=2)


def _beyond(mine: pd.DataFrame, name: str) -> NDArray[np.bool_]:
    """Is the value less balanced than 95 % of uniform draws?"""
    values = mine[name].to_numpy(dtype=float)
    if f"{name}_uniform_p05" not in mine:
        return np.asarray(values > mine[f"{name}_uniform_mean"].to_numpy(dtype=float))
    if _NAMES[name][1] == 1:
        return np.asarray(values < mine[f"{name}_uniform_p05"].to_numpy(dtype=float))
    return np.asarray(values > mine[f"{name}_uniform_p95"].to_numpy(dtype=float))


def _direct_labels(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Each group's name beside the end of its line, moved apart where they would meet."""
    low, high = ax.get_ylim()
    apart = 0.088
    wanted = sorted(((value - low) / (high - low), text, c) for value, text, c in ends)
    heights: list[float] = []
    for height, _, _ in wanted:
        heights.append(max(height, heights[-1] + apart) if heights else max(height, 0.02))
    over = max(0.0, heights[-1] - 0.98)
    heights = [height - over for height in heights]
    # Moved down as a whole, the lower ones may overlap what they had made room for: spread anew.
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - apart)
    for at, (height, text, colour) in zip(heights, wanted, strict=True):
        shown, fonts = drawable(shortened(text, _LABEL_WIDTH))
        ax.annotate(
            "", (1.0, height), (1.055, at), xycoords="axes fraction", textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 1.1, "shrinkA": 0, "shrinkB": 0},
            annotation_clip=False,
        )  # fmt: skip
        ax.text(
            1.065, at, shown, transform=ax.transAxes, va="center", fontsize=7.5, color=INK,
            fontfamily=fonts, parse_math=False,
        )  # fmt: skip


def _caption(table: pd.DataFrame, groups: Sequence[Any], model: str, with_intervals: bool) -> str:
    sizes, k, n_experts = table["n_tokens"], int(table["k"].max()), int(table["n_experts"].max())
    n = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
    each = " in each layer and group" if len(groups) > 1 else ""
    # Of a recording, blocks of documents are what was counted apart.
    whole = "block" if "n_blocks" in table else "document"
    n_whole = int(table[f"n_{whole}s"].max())
    band = "of as many tokens" if len(groups) == 1 else "of as many tokens as any group has"
    parts = [
        f"{model + ': ' if model else ''}N = {n} tokens{each} × {k} of {n_experts} experts, "
        f"{'up to ' if len(groups) > 1 else ''}{n_whole} {whole}{'s' if n_whole != 1 else ''}"
        f"{' of neighbouring documents' if whole == 'block' else ''}"
        f"{' each' if len(groups) > 1 else ''}.",
        f"Grey: uniform random routing {band}, 5 to 95 %; filled points are less balanced than "
        "95 % of it at their own N.",
    ]
    if with_intervals and table["max_violation_low"].notna().any():
        parts.append(
            f"Vertical lines: 95 % intervals over {whole}s for endless text of this kind; they "
            "reach towards balance, since a finite sample looks more uneven than its source."
        )
    elif not with_intervals:
        parts.append("Intervals are in the table: too many to draw.")
    parts.append(
        "Tokens of one text are not independent, so the band is the least that chance does."
    )
    return " ".join(parts)


def _alt(
    table: pd.DataFrame, wanted: Sequence[str], groups: Sequence[Any], layers: Sequence[int],
    model: str,
) -> str:  # fmt: skip
    parts = []
    for name in wanted:
        beyond = int(sum(_beyond(_of(table, g), name).sum() for g in groups))
        said = []
        for group in groups:
            values = _of(table, group)[name]
            where = "" if len(groups) == 1 else f"{group} "
            said.append(f"{where}{values.min():.3g} to {values.max():.3g}")
        parts.append(
            f"{name.replace('_', ' ')}: {'; '.join(said)}; {beyond} of {len(table)} points less "
            "balanced than uniform routing"
        )
    return (
        f"Balance of routing{f' of {model}' if model else ''} in layers {layers[0]} to "
        f"{layers[-1]}. {'. '.join(parts)}."
    )
