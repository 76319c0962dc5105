"""What edits did, by condition, with controls apart; and by which path, direct or re-routed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.display import ranges
from ernie_lab.plots.effect_rows import (
    BESIDE,
    FLOOR,
    METRICS,
    Metric,
    alt_of,
    draw_axes,
    draw_marks,
    floor_of,
    in_words,
    legend,
    limits,
    metric_of,
    places,
    rows_of,
    said_of_floor,
    said_of_interval,
    sheet_size,
)
from ernie_lab.plots.given import require
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

    from ernie_lab.interventions.comparison import Comparison

Order = Literal["given", "effect"]

MAX_CONDITIONS = 60


@overload
def plot_effects(
    comparison: Comparison, *, metric: str = ..., order: Order = ...,
    beside: Comparison | None = ..., beside_name: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_effects(
    comparison: Comparison, *, metric: str = ..., order: Order = ...,
    beside: Comparison | None = ..., beside_name: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_effects(
    comparison: Comparison,
    *,
    metric: str = "loss_change",
    order: Order = "given",
    beside: Comparison | None = None,
    beside_name: str = "on other prompts",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One row for each condition of an `el.compare`: its effect, interval and noise floor.

    Controls stand apart, below. A filled dot is an effect whose 95 % interval leaves out "no
    effect" and that exceeds the noise floor; a hollow dot is not. The figures stand on the right.

    Args:
        metric: one of `comparison.metrics`.
        order: of the conditions, and of the controls: as given, or by size of the effect.
        beside: the same conditions on other prompts, drawn below each row in orange.
    """
    require(comparison, "Comparison", "plot_effects", "el.compare(…)")
    words = metric_of(comparison, metric)
    rows = _ordered(rows_of(comparison.conditions, metric), words, order)
    tables = [rows] if beside is None else [rows, _same(beside, rows, metric)]
    floor = floor_of(rows)
    said = [
        f"{model or comparison.provenance.model}.",
        f"n = {in_words(comparison.conditions)};",
        f"loss of the intact model {comparison.conditions['loss_base'].iloc[0]:.3f} nats.",
        said_of_interval(comparison.conditions),
        f"Hollow: the interval holds {words.null:g}, or the effect is within the floor.",
        said_of_floor(floor, words, len(comparison.noise)),
    ]
    if beside is not None:
        said.append(f"Orange: {beside_name}, n = {in_words(beside.conditions)}.")
    return _draw(
        tables,
        words,
        heading="controls",
        beside_name="" if beside is None else beside_name,
        ax=ax,
        title=title or f"{words.heading}, by what was changed",
        caption=" ".join(said) if caption is None else caption,
        model=model or comparison.provenance.model,
    )


@overload
def plot_mediation(
    effects: Any, *, measure: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_mediation(
    effects: Any, *, measure: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_mediation(
    effects: Any,
    *,
    measure: str = "loss",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """By which path an edit acts: TE, FE, RE and their interaction, from `el.effects`.

    `measure` is one of `effects.table.measure`: these add up. KLs do not, and are in the table.
    """
    require(effects, "Effects", "plot_mediation", "el.effects(…)")
    table = effects.table[effects.table["measure"] == measure].set_index("effect")
    if not len(table):
        known = ", ".join(map(repr, dict.fromkeys(effects.table["measure"])))
        raise ValueError(f"measure={measure!r}: these effects are on {known}")
    rows = table.loc[[name for name in _PATHS if name in table.index]]
    rows = rows[["value", "low", "high", "floor"]].astype(float).assign(note="")
    rows["apart"] = ["ids only" in name for name in rows.index]
    rows.index = rows.index.map(_PATHS)
    words = _MEASURES[measure]
    found = effects.comparison
    said = [
        f"{model or found.provenance.model}.",
        f"n = {in_words(found.conditions)}.",
        "FE: the edit, forbidden to re-route. RE: its routing alone, in the model without the "
        "edit. Interaction: what neither has; above 0 the two together do more than each.",
        f"Routing held in layers {ranges(effects.frozen_layers)}.",
        said_of_interval(found.conditions),
        said_of_floor(floor_of(rows), words, len(found.noise)),
    ]
    return _draw(
        [rows],
        words,
        heading="ids held, weights free",
        ax=ax,
        title=title or f"{words.heading}, by the path it takes",
        caption=" ".join(said) if caption is None else caption,
        model=model or found.provenance.model,
    )


_PATHS = {
    "TE": "TE: total, routing free",
    "FE": "FE: routing held",
    "RE": "RE: re-routing alone",
    "interaction": "interaction: TE - FE - RE",
    "FE (ids only)": "FE (ids only)",
    "RE (ids only)": "RE (ids only)",
    "interaction (ids only)": "interaction (ids only)",
}
_MEASURES = {"loss": METRICS["loss_change"], "logit difference": METRICS["logit_diff_change"]}


def _draw(
    tables: list[pd.DataFrame],
    words: Metric,
    *,
    heading: str,
    beside_name: str = "",
    ax: Axes | None,
    title: str,
    caption: str,
    model: str,
) -> View | Axes:
    rows, floor = tables[0], floor_of(tables[0])
    y, two = places(rows), len(tables) > 1
    with Sheet(ax, *sheet_size(rows, y, two=two)) as sheet:
        axes = sheet.ax
        ends = limits(tables, words, floor)
        draw_axes(axes, y, rows, words, heading)
        axes.set_xlim(*ends)
        if np.isfinite(floor):
            size = abs(floor - words.null)
            axes.axvspan(words.null - size, words.null + size, color=FLOOR, lw=0, zorder=0)
        draw_marks(axes, y - 0.17 * two, rows, words)
        if two:
            draw_marks(axes, y + 0.17, tables[1], words, marker="s", colour=BESIDE)
        legend(axes, words, floor, ends, beside_name)
        return sheet.finish(title, caption, alt_of(rows, words, floor, model))


def _ordered(rows: pd.DataFrame, words: Metric, order: Order) -> pd.DataFrame:
    if order not in ("given", "effect"):
        raise ValueError(f'order={order!r} must be "given" or "effect"')
    if not 0 < len(rows) <= MAX_CONDITIONS:
        raise ValueError(
            f"{len(rows)} conditions, 1 to {MAX_CONDITIONS} can be drawn: pass a part, "
            "dataclasses.replace(comparison, conditions=comparison.conditions.head("
            f"{MAX_CONDITIONS}))"
        )
    if order == "effect":
        size = (rows["value"] - words.null).abs()
        rows = rows.loc[size.sort_values(ascending=False, kind="stable").index]
    return rows.sort_values("apart", kind="stable")


def _same(beside: Comparison, rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    metric_of(beside, metric)
    if absent := [str(name) for name in rows.index if name not in beside.conditions.index]:
        raise ValueError(f"beside= has no condition {', '.join(map(repr, absent[:3]))}")
    return rows_of(beside.conditions, metric).loc[rows.index]
