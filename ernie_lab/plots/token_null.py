"""How much of routing the token's id alone foretells, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.plots.given import require
from ernie_lab.plots.layer_columns import layer_columns, names_at_the_end, width_of
from ernie_lab.plots.style import MUTED, OKABE_ITO
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

_TOKEN, _FREE = OKABE_ITO["blue"], OKABE_ITO["orange"]


@overload
def plot_token_null(
    table: pd.DataFrame, *, model: str = ..., ax: None = None, title: str | None = ...,
    caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_token_null(
    table: pd.DataFrame, *, model: str = ..., ax: Axes, title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_token_null(
    table: pd.DataFrame,
    *,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`token_id_null`: slots predicted from the token id, from no context at all, by guessing.

    What is left above the blue line needs context, or more text to learn the ids from.
    """
    require(
        table,
        "DataFrame",
        "plot_token_null",
        "el.analysis.token_id_null(routing)",
        ("token_id", "context_free", "uniform"),
    )
    numbers = [int(layer) for layer in table.index]
    with Sheet(ax, width_of(len(numbers)) + 0.9, 3.9) as sheet:
        axes, x = sheet.ax, np.arange(len(numbers))
        lines = {"token_id": (_TOKEN, "token id alone"), "context_free": (_FREE, "same for all")}
        axes.vlines(x, table["low"], table["high"], color=_TOKEN, lw=1.6, zorder=3)
        for name, (colour, _) in lines.items():
            axes.plot(x, table[name], "o-", color=colour, ms=4.5, lw=1.3, zorder=4)
        ends = [float(table[name].iloc[-1]) for name in lines]
        names_at_the_end(axes, [words for _, words in lines.values()], ends)
        uniform = float(table["uniform"].max())
        axes.axhline(uniform, color=MUTED, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.text(0.01, uniform - 0.012, "guessing", transform=axes.get_yaxis_transform(),
                  va="top", fontsize=7.5, color=MUTED)  # fmt: skip
        layer_columns(axes, numbers)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of slots predicted right")
        return sheet.finish(
            title or "How much of the routing the token alone foretells",
            _caption(table, model) if caption is None else caption,
            _alt(table, numbers, model),
        )


def _caption(table: pd.DataFrame, model: str) -> str:
    row = table.iloc[0]
    return (
        f"{model + '. ' if model else ''}Blue: a token's experts, predicted as those that its id "
        f"went to most often in other documents ({row['n_fitted']:,.0f} tokens), measured on "
        f"{row['n_tokens']:,.0f}; lines on dots: 95 %, over documents. {row['seen']:.0%} of them "
        "have an id that was seen there. Orange: the most used experts for every token. Dashed: k "
        "of E by lot. What is above blue needs context, or more text to learn the ids from."
    )


def _alt(table: pd.DataFrame, numbers: list[int], model: str) -> str:
    def told(name: str) -> str:
        values = table[name]
        if len(values) > 8:
            return f"{values.iloc[0]:.2f} to {values.iloc[-1]:.2f}"
        return ", ".join(f"{value:.2f}" for value in values)

    return (
        f"Share of slots predicted right{f' in {model}' if model else ''}, layers {numbers[0]} to "
        f"{numbers[-1]}: token id alone {told('token_id')}; most used experts "
        f"{told('context_free')}; guessing {table['uniform'].max():.2f}."
    )
