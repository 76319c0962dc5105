"""What each edit costs: bars beside a control that the edit should leave alone, and the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, PALE, RULE
from ernie_lab.plots.tokens import drawable
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

MAX_BARS = 80
_EFFECT, _CONTROL = OKABE_ITO["blue"], OKABE_ITO["orange"]


@overload
def plot_ablation_bars(
    table: pd.DataFrame, *, name: str, unit: str = ..., noise: float | None = ...,
    control_name: str = ..., n: int | None = ..., baseline: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_ablation_bars(
    table: pd.DataFrame, *, name: str, unit: str = ..., noise: float | None = ...,
    control_name: str = ..., n: int | None = ..., baseline: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_ablation_bars(
    table: pd.DataFrame,
    *,
    name: str,
    unit: str = "",
    noise: float | None = None,
    control_name: str = "control",
    n: int | None = None,
    baseline: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One horizontal bar for each row of `table`, in its order; 0 is the unedited model.

    Columns: `condition` and `value`; `low` and `high` draw an interval; `control` (with
    `control_low`, `control_high`) is the same edit on prompts that should not need what was
    switched off, drawn below the bar. `noise` is the noise floor: the grey band is what
    equivalent runs differ by. `n` (prompts) and `baseline` (what 0 is) go into the caption.
    """
    _check(table)
    values, control = _column(table, "value"), _column(table, "control")
    assert values is not None
    names = [str(condition) for condition in table["condition"]]
    words = max(len(text) for text in names)
    left = float(np.clip(words * 0.075, 0.8, 3.4))
    bar = 0.36 if control is None else 0.46
    with Sheet(ax, 4.6 + left, len(names) * bar + 1.95) as sheet:
        axes = sheet.ax
        y = np.arange(len(names), dtype=float)
        thick, shift = (0.62, 0.0) if control is None else (0.38, 0.2)
        if noise is not None:
            axes.axvspan(-noise, noise, color=PALE, lw=0, zorder=0)
            for edge in (-noise, noise):
                axes.axvline(edge, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
        _bars(axes, y - shift, values, table, "", _EFFECT, thick)
        if control is not None:
            _bars(axes, y + shift, control, table, "control_", _CONTROL, thick)
        axes.axvline(0, color=INK, lw=0.9, zorder=3)
        shown = [drawable(text) for text in names]
        axes.set_yticks(y, [text for text, _ in shown], parse_math=False)
        for tick, (_, fonts) in zip(axes.get_yticklabels(), shown, strict=True):
            tick.set_fontfamily(list(fonts))
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.5, zorder=0)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{name} ({unit})" if unit else name)
        axes.set_ylabel("what was changed")
        _room_for_numbers(axes, table)
        _legend(axes, name, control_name if control is not None else "", noise)
        return sheet.finish(
            title or f"{name[:1].upper()}{name[1:]} when parts are switched off",
            _caption(table, noise, n, baseline, model, unit) if caption is None else caption,
            _alt(names, values, control, control_name, name, unit, noise),
        )


def _check(table: pd.DataFrame) -> None:
    absent = [column for column in ("condition", "value") if column not in table]
    if absent:
        raise ValueError(
            f"the table has no column {' and '.join(absent)}; it has {list(table.columns)}"
        )
    if "control" in table and table["control"].dtype == bool:
        raise ValueError(
            "column 'control' says which conditions are controls, as in Comparison.conditions, "
            "and here it is a number for each bar. Take it out: table.drop(columns='control')"
        )
    if not 0 < len(table) <= MAX_BARS:
        raise ValueError(
            f"{len(table)} conditions, 1 to {MAX_BARS} can be drawn: pass table.head({MAX_BARS})"
        )
    for prefix in ("", "control_"):
        ends = [f"{prefix}{end}" in table for end in ("low", "high")]
        if ends[0] != ends[1]:
            raise ValueError(f"an interval needs both {prefix}low and {prefix}high")


def _column(table: pd.DataFrame, name: str) -> Floats | None:
    return table[name].to_numpy(dtype=float, na_value=np.nan) if name in table else None


def _bars(
    ax: Axes, y: Floats, values: Floats, table: pd.DataFrame, prefix: str, colour: str, thick: float
) -> None:
    bars = ax.barh(y, values, height=thick, color=colour, zorder=2)
    low, high = _column(table, f"{prefix}low"), _column(table, f"{prefix}high")
    for i, bar in enumerate(bars):
        value, middle = float(bar.get_width()), bar.get_y() + thick / 2
        ends = [value, 0.0]
        if low is not None and high is not None and np.isfinite(low[i]) and np.isfinite(high[i]):
            ax.plot([low[i], high[i]], [middle, middle], color=INK, lw=1.2, zorder=4)
            ends += [low[i], high[i]]
        if np.isfinite(value):
            right = value >= 0
            ax.annotate(
                f"{value:+.3g}", (max(ends) if right else min(ends), middle),
                xytext=(4 if right else -4, 0), textcoords="offset points", va="center",
                ha="left" if right else "right", fontsize=7.5, color=INK,
            )  # fmt: skip
        else:
            ax.annotate("no value", (0, middle), xytext=(4, 0), textcoords="offset points",
                        va="center", fontsize=7.5, color=MUTED)  # fmt: skip


def _room_for_numbers(ax: Axes, table: pd.DataFrame) -> None:
    ends = [column for name in ("value", "low", "high", "control", "control_low", "control_high")
            if (column := _column(table, name)) is not None]  # fmt: skip
    every = np.append(np.concatenate(ends), 0.0)
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    span = (high - low) or 1.0
    ax.set_xlim(low - (0.2 if low < 0 else 0.02) * span, high + (0.16 if high > 0 else 0.02) * span)


def _legend(ax: Axes, name: str, control_name: str, noise: float | None) -> None:
    handles: list[Patch | Line2D] = []
    if control_name:
        handles += [Patch(fc=_EFFECT, label=name), Patch(fc=_CONTROL, label=control_name)]
    if noise is not None:
        handles.append(Line2D([], [], color=MUTED, lw=0.8, ls=(0, (4, 3)), label="noise floor"))
    if handles:
        ax.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1, 1.0), ncols=3, borderaxespad=0.2,
            columnspacing=1.4, handlelength=1.4,
        )  # fmt: skip


def _caption(
    table: pd.DataFrame, noise: float | None, n: int | None, baseline: str, model: str, unit: str
) -> str:
    parts = [f"{model}." if model else "", f"n = {n:,} prompts." if n is not None else ""]
    parts.append(f"0: {baseline}." if baseline else "0: the model without an edit.")
    if "low" in table:
        parts.append("Thin lines: the intervals given with the values.")
    if noise is not None:
        parts.append(
            f"Grey: within the noise floor, {noise:.3g}{' ' + unit if unit else ''}, by which "
            "equivalent runs differ; an effect inside it is none that can be seen."
        )
    return " ".join(filter(None, parts))


def _alt(
    names: list[str], values: Floats,
    control: Floats | None, control_name: str, name: str,
    unit: str, noise: float | None,
) -> str:  # fmt: skip
    parts = []
    for i, (text, value) in enumerate(zip(names, values, strict=True)):
        beside = "" if control is None else f" ({control_name} {control[i]:.3g})"
        parts.append(f"{text} {value:.3g}{beside}")
    floor = f" Noise floor {noise:.3g}." if noise is not None else ""
    shown = "; ".join(parts[:12]) + ("; …" if len(parts) > 12 else "")
    return f"Bars of {name}{f' in {unit}' if unit else ''}: {shown}.{floor}"
