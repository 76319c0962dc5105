"""The same token in different contexts: does routing read the token or what stands around it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from ernie_lab.analysis.contexts import KINDS
from ernie_lab.plots.given import require
from ernie_lab.plots.style import INK, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

_LOOK = {
    "token and previous": ("same {label} after the same one, other text", "blue", "o", "-"),
    "token": ("same {label}, other text", "vermillion", "s", "-"),
    "document": ("other {label}, same text", "green", "^", "-"),
    "neither": ("other {label}, other text: reference", "black", "", "--"),
}
_LEAST_PAIRS = 20
_APART = 0.052  # of the height, between the words at the right


@overload
def plot_contexts(
    table: pd.DataFrame, *, label: str = ..., bank: str = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_contexts(
    table: pd.DataFrame, *, label: str = ..., bank: str = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_contexts(
    table: pd.DataFrame,
    *,
    label: str = "token",
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """What `el.analysis.context_overlap` returns: overlap of expert sets by kind of pair and layer.

    `label` says what is the same or other ("token", "glyph"). Shaded: 95 % over documents. A kind
    with fewer than 20 pairs is left out, and the caption says so.
    """
    require(table, "DataFrame", "plot_contexts", "el.analysis.context_overlap(routing)")
    absent = [name for name in ("layer", "kind", "jaccard", "low", "high") if name not in table]
    if absent or table.empty:
        raise ValueError(
            f"the table has {'no rows' if table.empty else 'no column ' + ', '.join(absent)}: "
            "plot_contexts draws what el.analysis.context_overlap(routing) returns"
        )
    unknown = sorted(set(table["kind"]) - set(KINDS))
    if unknown:
        raise ValueError(f"kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    table, few = _enough(table)
    layers = sorted({int(layer) for layer in table["layer"]})
    width = float(np.clip(len(layers) * 0.5, 3.6, 7.4))
    with Sheet(ax, width + 3.1, 4.75) as sheet:
        ends = {}
        for kind in KINDS:
            mine = table[table["kind"] == kind].sort_values("layer")
            if mine.empty:
                continue
            _, hue, marker, dash = _LOOK[kind]
            x, y = mine["layer"].to_numpy(), mine["jaccard"].to_numpy(dtype=float)
            look: dict[str, Any] = {
                "color": OKABE_ITO[hue],
                "ls": dash,
                "lw": 1.6,
                "marker": marker,
                "ms": 4,
            }
            sheet.ax.plot(x, y, zorder=3, **look)
            sheet.ax.fill_between(
                x, mine["low"].to_numpy(dtype=float), mine["high"].to_numpy(dtype=float),
                color=OKABE_ITO[hue], alpha=0.16, lw=0, zorder=2,
            )  # fmt: skip
            ends[kind] = float(y[-1])
        _axes(sheet.ax, layers)
        _words(sheet.ax, ends, label)
        return sheet.finish(
            title or f"Do {bank + ' ' if bank else ''}experts read the {label} or its context?",
            _caption(table, model, bank, label, few) if caption is None else caption,
            _alt(table, layers, model, bank, label),
        )


def _enough(table: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Without the kinds of which too few pairs were found, and a sentence that says so."""
    if "n_pairs" not in table:
        return table, ""
    pairs = table.groupby("kind", sort=False)["n_pairs"].min()
    few = pairs[pairs < _LEAST_PAIRS]
    if len(few) == len(pairs):
        raise ValueError(
            f"no kind has {_LEAST_PAIRS} pairs (most: {pairs.max()}): run more texts, or give "
            "labels that more of them share, by="
        )
    named = "; ".join(f"{kind} ({count})" for kind, count in few.items())
    told = f"Not drawn, fewer than {_LEAST_PAIRS} pairs: {named}. " if named else ""
    return table[~table["kind"].isin(few.index)], told


def _axes(ax: Axes, layers: list[int]) -> None:
    ax.set_ylim(0, 1.02)
    ax.set_xlim(layers[0] - 0.35, layers[-1] + 0.35)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    if len(layers) <= 14:
        ax.set_xticks(layers, [str(layer) for layer in layers])
    ax.set_xlabel("layer")
    ax.set_ylabel("mean overlap of expert sets (Jaccard)")
    ax.grid(axis="y", color=RULE, lw=0.5, alpha=0.6)
    ax.set_axisbelow(True)


def _words(ax: Axes, ends: dict[str, float], label: str) -> None:
    """What each line is, beside its end; moved apart where ends are close."""
    rising = sorted(ends, key=ends.__getitem__)
    places = [ends[kind] for kind in rising]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + _APART)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - _APART)
    for kind, place in zip(rising, places, strict=True):
        words, hue, _, _ = _LOOK[kind]
        ax.annotate(
            words.format(label=label), (1.0, place), xycoords=("axes fraction", "data"),
            xytext=(8, 0), textcoords="offset points", va="center", fontsize=8,
            color=INK if hue == "black" else OKABE_ITO[hue], annotation_clip=False,
        )  # fmt: skip


def _caption(table: pd.DataFrame, model: str, bank: str, label: str, few: str) -> str:
    head = ", ".join(filter(None, (model, f"{bank} bank" if bank else "")))
    first = table[table["layer"] == table["layer"].iloc[0]].set_index("kind")
    counted = "; ".join(
        f"{kind} {int(row.n_pairs):,}" for kind, row in first.iterrows() if "n_pairs" in first
    )
    n_labels = int(first["n_labels"].max()) if "n_labels" in first else None
    return (
        f"{head + '. ' if head else ''}Jaccard overlap of the expert sets of two tokens: 1 the "
        f"same experts, 0 none in common. The dashed line is how alike any two are. Above it, the "
        f"same {label} in other texts: the {label} is read (at 1, nothing else); other {label}s in "
        "one text: the text is. "
        + (f"{n_labels} {label}s found in two texts, each counts once. " if n_labels else "")
        + (f"Pairs: {counted}. " if counted else "")
        + few
        + "Shaded: 95 % over documents."
    )


def _alt(table: pd.DataFrame, layers: list[int], model: str, bank: str, label: str) -> str:
    parts = []
    for kind in KINDS:
        mine = table[table["kind"] == kind].sort_values("layer")
        if not mine.empty:
            values = mine["jaccard"].to_numpy(dtype=float)
            words = _LOOK[kind][0].format(label=label)
            parts.append(f"{words} {values[0]:.2f} to {values[-1]:.2f}")
    return (
        f"Mean overlap of expert sets{f' of {model}' if model else ''}"
        f"{f', {bank} bank' if bank else ''}, from layer {layers[0]} to {layers[-1]}: "
        f"{'; '.join(parts)}."
    )
