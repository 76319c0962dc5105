"""What the other bank would have written: by layer and direction, beside wrong choices at home."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ernie_lab.plots.by_layer import Line, draw, handle, layer_axis, panel_name, twin_handle
from ernie_lab.plots.given import require
from ernie_lab.plots.style import MUTED, OKABE_ITO
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

_OTHER = (OKABE_ITO["vermillion"], "o")
_LOT = (OKABE_ITO["black"], "D")
_SHUFFLED = (OKABE_ITO["sky"], "v")
_ROWS = {
    "cosine": ("cosine with the own\nbank's output", ("low", "high")),
    "size": ("size, times the\nown output", ("size_low", "size_high")),
    "change": ("change of the\nlayer's output", ("change_low", "change_high")),
}


def plot_counterfactual(
    tables: Mapping[str, pd.DataFrame],
    *,
    untrained: Mapping[str, pd.DataFrame] | None = None,
    model: str = "",
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """`cross_bank_counterfactual` of one or both directions, `{"text": …, "vision": …}`.

    A column for each direction, by whose tokens cross; rows: cosine, relative size, and how far the
    layer's output moves. `untrained` has the same tables of an untrained twin, dashed.
    """
    require(
        tables,
        Mapping,
        "plot_counterfactual",
        "el.analysis.cross_bank_counterfactual(trace, lab, bank) by name",
    )
    if not tables or any(name not in ("text", "vision") for name in tables):
        raise ValueError(
            f'tables of {list(tables)}: name each "text" or "vision", whose tokens cross'
        )
    with Sheet(None, 4.6 * len(tables) + 0.6, 7.0, (3, len(tables))) as sheet:
        grid = np.array(sheet.axes).reshape(3, len(tables))
        for column, (tokens, table) in enumerate(tables.items()):
            twin = None if untrained is None else untrained.get(tokens)
            for row, name in enumerate(_ROWS):
                _panel(grid[row, column], name, table, twin, first=column == 0, last=row == 2)
            other = "vision" if tokens == "text" else "text"
            panel_name(
                grid[0, column], f"{tokens} tokens → {other} bank",
                f"{int(table['n_tokens'].max()):,} tokens",
            )  # fmt: skip
        for row, name in enumerate(_ROWS):
            _same_scale(list(grid[row]), name)
        handles = [
            handle("the other bank", *_OTHER),
            handle("own bank, experts by lot", *_LOT),
            handle("the other bank, for another token", *_SHUFFLED),
            *([twin_handle()] if untrained else []),
        ]
        columns = 2 if len(tables) > 1 else 1
        sheet.figure.legend(handles=handles, loc="outside upper right", ncols=columns)
        text = (
            f"{model + '. ' if model else ''}What entered a layer, given to both banks; nothing "
            "upstream is changed. 1 in the upper row: the same output; blue: what the banks share "
            "whatever the token. Black: as many experts of the own bank drawn at random. Lowest "
            "row: ||other - own|| over ||own + shared||. Veil: 95 % interval over documents. How "
            "far an output moves is not what it costs: see the answers when banks are crossed."
        )
        view = sheet.finish(
            title or "The same tokens through the other bank's experts",
            text if caption is None else caption,
            _alt(tables, model),
        )
        assert isinstance(view, View)
        return view


def _panel(
    ax: Axes, name: str, table: pd.DataFrame, twin: pd.DataFrame | None, *, first: bool, last: bool
) -> None:
    layers = [int(layer) for layer in table.index]
    words, (low, high) = _ROWS[name]
    draw(ax, Line(layers, table[f"by_lot_{name}"], *_LOT))
    if name == "cosine":
        draw(ax, Line(layers, table["shuffled_cosine"], *_SHUFFLED))
    if twin is not None:
        draw(ax, Line([int(layer) for layer in twin.index], twin[name], *_OTHER, twin=True))
    draw(ax, Line(layers, table[name], *_OTHER, table[low], table[high]))
    layer_axis(ax, layers, label=last)
    ax.tick_params(labelbottom=last, labelleft=first)
    ax.axhline(0, color=MUTED, lw=0.8, zorder=1)
    if first:
        ax.set_ylabel(words)


def _same_scale(axes: list[Axes], name: str) -> None:
    """Both directions on one scale."""
    low = min(ax.get_ylim()[0] for ax in axes)
    high = max(ax.get_ylim()[1] for ax in axes)
    for ax in axes:
        if name == "cosine":
            ax.set_ylim(min(low, -0.1), 1.05)
        elif name == "change":
            ax.set_ylim(0, high)
        else:
            ax.set_ylim(low, high)
            ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.yaxis.set_major_formatter(lambda y, _: f"{2.0**y:g}" if y >= 0 else f"1/{2.0**-y:g}")


def _alt(tables: Mapping[str, pd.DataFrame], model: str) -> str:
    parts = []
    for tokens, table in tables.items():
        other = "vision" if tokens == "text" else "text"
        parts.append(
            f"{tokens} tokens through the {other} bank, layers {table.index[0]} to "
            f"{table.index[-1]}: cosine with the own output {table['cosine'].min():.2f} to "
            f"{table['cosine'].max():.2f} (own bank by lot {table['by_lot_cosine'].min():.2f} to "
            f"{table['by_lot_cosine'].max():.2f}; another token "
            f"{table['shuffled_cosine'].min():.2f} to {table['shuffled_cosine'].max():.2f}); "
            "the layer's output moves by "
            f"{table['change'].min():.2f} to {table['change'].max():.2f} of itself (by lot "
            f"{table['by_lot_change'].min():.2f} to {table['by_lot_change'].max():.2f})"
        )
    return f"{model + ': ' if model else ''}{'. '.join(parts)}."
