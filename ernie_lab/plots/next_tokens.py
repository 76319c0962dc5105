"""What the model expects next, with and without an edit: probabilities side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.plots.given import require
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.tokens import labels
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

MAX_TOKENS = 40
BASE, EDITED = MUTED, OKABE_ITO["blue"]


@overload
def plot_next_tokens(
    table: pd.DataFrame, *, actual: str | None = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_next_tokens(
    table: pd.DataFrame, *, actual: str | None = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_next_tokens(
    table: pd.DataFrame,
    *,
    actual: str | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Two bars for each row of `table`, in its order: `token`, and probabilities `base`, `edited`.

    `actual` is the token with which the text really goes on, if it is among them.
    """
    require(
        table, "DataFrame", "plot_next_tokens", "explore_ablation(…).change.next_tokens(position)"
    )
    if absent := [name for name in ("token", "base", "edited") if name not in table]:
        raise ValueError(f"the table has no column {' and '.join(absent)}; it has {list(table)}")
    if not 0 < len(table) <= MAX_TOKENS:
        raise ValueError(f"{len(table)} tokens, 1 to {MAX_TOKENS} can be drawn: table.head(10)")
    drawn = labels([str(token) for token in table["token"]], width=18)
    base, edited = (table[name].to_numpy(dtype=float) for name in ("base", "edited"))
    y = np.arange(len(table), dtype=float)
    with Sheet(ax, 7.0, 1.5 + 0.32 * len(table)) as sheet:
        for values, shift, colour, name in (
            (base, -0.19, BASE, "intact"), (edited, 0.19, EDITED, "edited"),
        ):  # fmt: skip
            sheet.ax.barh(y + shift, values, height=0.36, color=colour, label=name, zorder=2)
            for place, value in zip(y + shift, values, strict=True):
                sheet.ax.annotate(
                    f"{100 * value:.3g} %", (value, place), xytext=(4, 0), va="center",
                    textcoords="offset points", fontsize=7, color=INK,
                )  # fmt: skip
        sheet.ax.set_yticks(y, drawn.texts, parse_math=False)
        for tick, token in zip(sheet.ax.get_yticklabels(), table["token"], strict=True):
            tick.set(fontfamily=list(drawn.fonts))
            tick.set_fontweight("bold" if str(token) == actual else "normal")
        sheet.ax.set_ylim(len(table) - 0.4, -0.6)
        sheet.ax.set_xlim(0, 1.12 * float(np.nanmax([base, edited, np.full(len(y), 1e-6)])))
        sheet.ax.tick_params(axis="y", length=0)
        sheet.ax.grid(axis="x", color=RULE, lw=0.5, zorder=0)
        sheet.ax.set_xlabel("probability of the next token")
        sheet.ax.set_ylabel("next token")
        sheet.ax.legend(loc="lower right", borderaxespad=0.4)
        bold = " Bold: how the text goes on." if actual in set(table["token"]) else ""
        said = f"{model + '. ' if model else ''}The {len(table)} likeliest of both.{bold}"
        told = "; ".join(
            f"{token} {b:.3g} intact, {e:.3g} edited"
            for token, b, e in zip(table["token"], base, edited, strict=True)
        )
        return sheet.finish(
            title or "Next token, with and without the edit",
            said if caption is None else caption,
            f"Probabilities of the next token: {told}.",
            f"Tokens: {drawn.full}" if drawn.boxed else "",
        )
