"""How alike states are whatever their axes: layers against layers, and paired tokens by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.analysis.cka import LayerCKA
from ernie_lab.plots.by_layer import (
    Line,
    draw,
    handle,
    layer_axis,
    null_handle,
    panel_name,
    twin_handle,
)
from ernie_lab.plots.given import require
from ernie_lab.plots.style import AMOUNT, INK, MUTED, OKABE_ITO, PALE, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

MAX_PANELS = 6
_WITH_NUMBERS = 10


def plot_layer_cka(
    found: LayerCKA | Mapping[str, LayerCKA],
    *,
    model: str = "",
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Heat maps of `layer_cka`, layers x layers, a panel for each kind of token or model."""
    panels = dict(found) if isinstance(found, Mapping) else {"": found}
    if not 0 < len(panels) <= MAX_PANELS:
        raise ValueError(f"{len(panels)} panels, 1 to {MAX_PANELS} fit: give some of them")
    across = 2 if len(panels) == 4 else min(len(panels), 3)
    down = -(-len(panels) // across)
    with Sheet(None, 3.3 * across + 1.0, 3.5 * down + 1.3, (down, across)) as sheet:
        for ax, (name, one) in zip(sheet.axes, panels.items(), strict=False):
            _square(ax, one)
            under = f"{one.n_rows:,} tokens of {one.n_documents:,} documents"
            panel_name(ax, name or "all tokens", f"{under}; chance ≤ {one.null_p95:.2f}")
        for ax in sheet.axes[len(panels) :]:
            ax.axis("off")
        bar = sheet.figure.colorbar(
            sheet.axes[0].images[0], ax=sheet.axes, shrink=0.7, aspect=18, pad=0.01
        )
        bar.set_label("debiased linear CKA")
        bar.outline.set_edgecolor(RULE)
        text = (
            f"{model + '. ' if model else ''}1: the same tokens are alike in both layers, up to a "
            "rotation and one scale; 0: as alike as unrelated states are. Chance: what 95 % of the "
            "draws with tokens shuffled in one layer stay below, in the worst pair of layers. In a "
            "residual stream neighbouring layers are alike by construction, trained or not."
        )
        view = sheet.finish(
            title or "Which layers hold alike states",
            text if caption is None else caption,
            _square_alt(panels, model),
        )
        assert isinstance(view, View)
        return view


def _square(ax: Axes, one: LayerCKA) -> None:
    cells, layers = one.value.values, [int(layer) for layer in one.value["layer"].values]
    ax.imshow(cells, cmap=AMOUNT, vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    n = len(layers)
    step = next(s for s in (1, 2, 4, 8) if n / s <= 16)
    ticks = range(0, n, step)
    ax.set_xticks(ticks, [str(layers[i]) for i in ticks])
    ax.set_yticks(ticks, [str(layers[i]) for i in ticks])
    ax.tick_params(length=0)
    ax.set_xlabel("layer")
    ax.set_ylabel("layer")
    for spine in ax.spines.values():
        spine.set_visible(False)
    if n <= _WITH_NUMBERS:
        for row, col in np.ndindex(n, n):
            colour = "white" if cells[row, col] > 0.5 else INK
            words = f"{cells[row, col]:.2f}".replace("-0.00", "0.00")
            ax.text(col, row, words, ha="center", va="center", fontsize=7, color=colour)


@overload
def plot_paired_cka(
    table: pd.DataFrame, *, untrained: pd.DataFrame | None = ..., pairs: str = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_paired_cka(
    table: pd.DataFrame, *, untrained: pd.DataFrame | None = ..., pairs: str = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_paired_cka(
    table: pd.DataFrame,
    *,
    untrained: pd.DataFrame | None = None,
    pairs: str = "pairs",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`paired_cka` by layer, beside shuffled pairs; `pairs` says what belongs together."""
    require(table, "DataFrame", "plot_paired_cka", "el.analysis.paired_cka(…)", ("cka", "null_p95"))
    layers = [int(layer) for layer in table.index]
    with Sheet(ax, 6.4, 3.7) as sheet:
        own = sheet.ax
        own.fill_between(layers, own.get_ylim()[0], table["null_p95"], color=PALE, lw=0, zorder=0)
        own.plot(layers, table["null_p95"], color=MUTED, lw=1.0, ls=":", zorder=1)
        if untrained is not None:
            twin = [int(layer) for layer in untrained.index]
            ends = (untrained["low"], untrained["high"])
            draw(own, Line(twin, untrained["cka"], MUTED, "o", *ends, twin=True))
        colour = OKABE_ITO["blue"]
        draw(own, Line(layers, table["cka"], colour, "o", table["low"], table["high"]))
        layer_axis(own, layers)
        everything: list[Any] = [one["low"] for one in (table, untrained) if one is not None]
        lowest = min([float(np.nanmin(low)) for low in everything if low.notna().any()] or [0.0])
        own.set_ylim(min(lowest, -0.05), None)
        own.axhline(0, color=MUTED, lw=0.8, zorder=1)
        own.set_ylabel("debiased linear CKA")
        handles = [handle("paired", colour), null_handle("pairs shuffled: 5 % lie above")]
        own.legend(handles=[*handles, *([twin_handle()] if untrained is not None else [])])
        n = int(table["n"].iloc[0])
        text = (
            f"{model + '. ' if model else ''}N = {n:,} {pairs}, one of each in either set. Above "
            "the dotted line: what is alike in the one set is alike in the other, more than in "
            "shuffled pairs. Bars: 95 % by jackknife over documents."
            + (" Hollow: a twin with random weights." if untrained is not None else "")
        )
        peak = int(table["cka"].to_numpy().argmax())
        return sheet.finish(
            title or "Do two sets of tokens hold alike states?",
            text if caption is None else caption,
            f"CKA of {n} {pairs}{f' in {model}' if model else ''} by layer: "
            + ", ".join(f"{layer} {row.cka:.2f}" for layer, row in table.iterrows())
            + f"; highest in layer {layers[peak]}, where 95 % of shuffled pairs stay below "
            f"{table['null_p95'].iloc[peak]:.2f}.",
        )


def _square_alt(panels: Mapping[str, LayerCKA], model: str) -> str:
    parts = []
    for name, one in panels.items():
        cells = one.value.values
        next_to = np.diagonal(cells, 1) if len(cells) > 1 else np.array([1.0])
        parts.append(
            f"{name or 'all tokens'}: neighbouring layers {next_to.min():.2f} to "
            f"{next_to.max():.2f}, first and last {cells[0, -1]:.2f}, chance at most "
            f"{one.null_p95:.2f}"
        )
    return f"CKA between layers{f' of {model}' if model else ''}. {'; '.join(parts)}."
