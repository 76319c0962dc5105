"""When routers settle: agreement of earlier checkpoints with the final one, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.plots.given import require
from ernie_lab.plots.layer_columns import layer_columns, names_at_the_end, width_of
from ernie_lab.plots.style import INK, MARK, MUTED, PALE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

MAX_CHECKPOINTS = 8


@overload
def plot_saturation(
    tables: Mapping[str, pd.DataFrame], *, final: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_saturation(
    tables: Mapping[str, pd.DataFrame], *, final: str = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_saturation(
    tables: Mapping[str, pd.DataFrame],
    *,
    final: str = "the final checkpoint",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`router_saturation` of several checkpoints, by their names, the earliest first.

    Later ones are darker. The grey band is chance: from what uniform routers agree by to what
    the real loads alone give, the highest of all shown.
    """
    require(tables, Mapping, "plot_saturation", "el.analysis.router_saturation(…) by name")
    if not 0 < len(tables) <= MAX_CHECKPOINTS:
        raise ValueError(
            f"{len(tables)} checkpoints, 1 to {MAX_CHECKPOINTS} can be told apart: pass fewer"
        )
    layers = [list(table.index) for table in tables.values()]
    if any(each != layers[0] for each in layers):
        raise ValueError(f"the checkpoints have different layers: {layers}")
    numbers = [int(layer) for layer in layers[0]]
    width = width_of(len(numbers)) + 0.9
    uniform = max(float(t["uniform"].max()) for t in tables.values())
    chance = max(float(t["independent"].max()) for t in tables.values())
    with Sheet(ax, width, 3.9) as sheet:
        axes, x = sheet.ax, np.arange(len(numbers))
        axes.axhspan(min(uniform, chance), chance, color=PALE, lw=0, zorder=0)
        axes.axhline(uniform, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.axhline(1, color=INK, lw=0.9, zorder=1)
        ends = []
        for i, table in enumerate(tables.values()):
            colour = MARK((i + 1) / len(tables) * 0.85)
            axes.vlines(x, table["low"], table["high"], color=colour, lw=1.4, zorder=3)
            axes.plot(x, table["saturation"], "o-", color=colour, ms=4.5, lw=1.3, zorder=4)
            ends.append(float(table["saturation"].iloc[-1]))
        names_at_the_end(axes, list(tables), ends)
        inside: dict[str, Any] = {
            "ha": "left",
            "fontsize": 7.5,
            "color": MUTED,
            "transform": axes.get_yaxis_transform(),
        }
        axes.text(0.01, 1.012, final, va="bottom", **inside)
        axes.text(0.01, uniform - 0.012, "uniform routing", va="top", **inside)
        layer_columns(axes, numbers)
        axes.set_ylim(0, 1.09)
        axes.set_ylabel("share of chosen experts in common")
        return sheet.finish(
            title or "How early routers choose as they will in the end",
            _caption(tables, final, model, uniform, chance) if caption is None else caption,
            _alt(tables, numbers, final, model, uniform),
        )


def _caption(
    tables: Mapping[str, pd.DataFrame], final: str, model: str, uniform: float, chance: float
) -> str:
    first = next(iter(tables.values()))
    return (
        f"{model + '. ' if model else ''}Router saturation (OLMoE): mean share of the experts that "
        f"a token's router chose and {final} chooses too. {first['n_tokens'].max():,.0f} tokens of "
        f"{first['n_documents'].max():.0f} documents; lines on dots: 95 %, over documents. Chance: "
        f"{uniform:.3g} for uniform routing; up to {chance:.3g} (grey) if only the loads were "
        "common. It is of the whole network up to the router, and says nothing of what experts do."
    )


def _alt(
    tables: Mapping[str, pd.DataFrame], numbers: list[int], final: str, model: str, uniform: float
) -> str:
    parts = []
    for name, table in tables.items():
        values = table["saturation"]
        told = ", ".join(f"{value:.2f}" for value in values)
        if len(values) > 8:
            told = f"{values.min():.2f} to {values.max():.2f}"
        parts.append(f"{name}: {told}")
    return (
        f"Share of chosen experts in common with {final}{f' of {model}' if model else ''}, layers "
        f"{numbers[0]} to {numbers[-1]}. {'; '.join(parts)}. Uniform routing {uniform:.2f}."
    )
