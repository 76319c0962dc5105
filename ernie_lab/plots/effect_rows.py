"""How an effect is drawn and told: dot, interval, stem from no effect, noise floor, figures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ernie_lab.interventions.bootstrap import few_drawn
from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.tokens import drawable, shortened

if TYPE_CHECKING:
    import pandas as pd

    from ernie_lab.interventions.comparison import Comparison

LABEL_WIDTH = 46  # characters
FLOOR = "#d7dce3"
EFFECT, BESIDE, APART = OKABE_ITO["blue"], OKABE_ITO["orange"], MUTED
NO_FLOOR = "No noise floor was measured (noise=0)."
_GAP = 1.15  # rows between the two groups, with the heading of the second
_SEEN = 0.004  # of the axis: a narrower floor cannot be seen
_CLOSE = 20  # rows: from here on they are closer and smaller


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is written: its value at no effect, and what it means to be off that."""

    name: str
    unit: str = ""
    null: float = 0.0
    below: str = ""
    above: str = ""

    @property
    def label(self) -> str:
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def direction(self) -> str:
        ways = (f"← {self.below}" if self.below else "", f"{self.above} →" if self.above else "")
        return "     ".join(filter(None, ways))

    @property
    def heading(self) -> str:
        return self.name[:1].upper() + self.name[1:]


METRICS = {
    "loss_change": Metric(
        "loss change", "nats per token", 0.0, "better than intact", "worse than intact"
    ),
    "kl": Metric("KL(base || edited)", "nats per token", 0.0, "", "further from intact"),
    "top1_agreement": Metric(
        "top-1 agreement", "share of tokens", 1.0, "another token is the likeliest more often"
    ),
    "logit_diff_change": Metric(
        "change of the logit difference", "right - wrong", 0.0,
        "towards the wrong answer", "towards the right answer",
    ),
    "flips": Metric("set flips", "share of the k experts", 0.0, "", "more experts are others"),
}  # fmt: skip


def metric_of(comparison: Comparison, metric: str) -> Metric:
    """How to write it; raises where the comparison has no such metric, or no value of it."""
    if metric not in comparison.metrics:
        raise ValueError(
            f"metric={metric!r}: this comparison has {', '.join(comparison.metrics)}"
            + ("; logit_diff_change needs answers=" if metric == "logit_diff_change" else "")
        )
    if not np.isfinite(comparison.conditions[metric].to_numpy(dtype=float)).any():
        raise ValueError(f"metric={metric!r}: no condition has a value of it")
    return METRICS.get(metric, Metric(metric))


def rows_of(conditions: pd.DataFrame, metric: str) -> pd.DataFrame:
    """value, low, high, floor, apart (controls) and a note, one row for each condition."""
    import pandas as pd

    rows = {
        name: conditions[f"{metric}{end}"].astype(float)
        for name, end in {"value": "", "low": "_low", "high": "_high", "floor": "_floor"}.items()
    }
    idle = (conditions["n_changed"] == 0).map({True: "changed nothing", False: ""})
    return pd.DataFrame(rows).assign(apart=conditions["control"].astype(bool), note=idle)


def floor_of(rows: pd.DataFrame) -> float:
    """The largest; NaN where none was measured. (Those of one metric are all the same.)"""
    found = rows["floor"].to_numpy(dtype=float)
    return float(np.nanmax(found)) if np.isfinite(found).any() else float("nan")


def is_told(row: Any, words: Metric) -> bool:
    """Can this effect be told from none: by its interval, and by the noise of equivalent runs?"""
    if not np.isfinite(row.value) or row.value == words.null:
        return False
    inside = row.low <= words.null <= row.high  # False where there is no interval
    noise = abs(row.floor - words.null) if np.isfinite(row.floor) else 0.0
    return not inside and abs(row.value - words.null) > noise


def in_figures(row: Any, words: Metric) -> str:
    """`+0.85 [0.71, 0.99]`, and what is noted of the row."""
    if not np.isfinite(row.value):
        return "no value"
    sign = "+" if words.below and words.null == 0 else ""
    interval = f" [{row.low:.2g}, {row.high:.2g}]" if np.isfinite(row.low) else ""
    return f"{row.value:{sign}.3g}{interval}" + (f" {row.note}" if row.note else "")


def places(rows: pd.DataFrame) -> Floats:
    """The height of each row: those apart come last, one gap below."""
    apart = rows["apart"].to_numpy(dtype=bool)
    return np.arange(len(rows), dtype=float) + _GAP * (apart & bool((~apart).any()))


def sheet_size(rows: pd.DataFrame, y: Floats, *, two: bool = False) -> tuple[float, float]:
    left = float(np.clip(max(len(str(name)) for name in rows.index) * 0.072, 0.9, 3.4))
    height = 0.44 if two else 0.32 if len(rows) <= _CLOSE else 0.225
    return 5.9 + left, (y[-1] + 1) * height + 2.0


def draw_marks(
    ax: Axes, y: Floats, rows: pd.DataFrame, words: Metric, *, marker: str = "o", colour: str = ""
) -> None:
    """Stem, interval, dot and figures of each row."""
    size = 8.0 if len(rows) <= _CLOSE else 6.6
    told: list[Any] = list(rows.itertuples())
    for place, row in zip(y, told, strict=True):
        own = colour or (APART if row.apart else EFFECT)
        ax.annotate(
            in_figures(row, words), (1, place), xycoords=("axes fraction", "data"), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=size, annotation_clip=False,
        )  # fmt: skip
        value, low, high = (float(x) for x in (row.value, row.low, row.high))
        if not np.isfinite(value):
            continue
        look: dict[str, Any] = {"color": own, "solid_capstyle": "butt"}
        ax.plot([words.null, value], [place, place], lw=4.5, alpha=0.22, zorder=2, **look)
        if np.isfinite(low):
            ax.plot([low, high], [place, place], lw=1.6, zorder=3, **look)
        fill = own if is_told(row, words) else "white"
        ax.plot([value], [place], marker, ms=5.5, mfc=fill, mec=own, mew=1.4, zorder=4)


def draw_axes(ax: Axes, y: Floats, rows: pd.DataFrame, words: Metric, heading: str) -> None:
    """Names, the line of no effect, and the heading of the rows that stand apart."""
    size = 8.5 if len(rows) <= _CLOSE else 7.0
    ax.axvline(words.null, color=INK, lw=0.9, zorder=1)
    shown = [drawable(shortened(str(name), LABEL_WIDTH)) for name in rows.index]
    ax.set_yticks(y, [text for text, _ in shown], parse_math=False)
    for tick, (_, fonts) in zip(ax.get_yticklabels(), shown, strict=True):
        tick.set(fontfamily=list(fonts), fontsize=size)
    n_apart = int(rows["apart"].sum())
    if 0 < n_apart < len(rows):
        first = float(y[len(rows) - n_apart])
        ax.axhline(first - 1.08, color=RULE, lw=0.8)
        ax.annotate(
            heading, (0, first - 0.72), xycoords=("axes fraction", "data"), xytext=(-6, 0),
            textcoords="offset points", ha="right", va="center", color=MUTED, fontstyle="italic",
            fontsize=size,
        )  # fmt: skip
    ax.set_ylim(y[-1] + 0.6, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=RULE, lw=0.5, alpha=0.7, zorder=0)
    ax.set_axisbelow(True)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel("\n".join(filter(None, (words.label, words.direction))))


def limits(tables: list[pd.DataFrame], words: Metric, floor: float) -> tuple[float, float]:
    """Room for every interval, no effect and, unless it would dwarf them, the floor."""
    every = [table[["value", "low", "high"]].to_numpy(dtype=float).ravel() for table in tables]
    values = np.concatenate([*every, [words.null]])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    size = abs(floor - words.null) if np.isfinite(floor) else 0.0
    if size <= 2 * (high - low) or high == low:
        low, high = min(low, words.null - size), max(high, words.null + size)
    margin = 0.06 * ((high - low) or 1.0)
    return low - margin, high + margin


def floor_patch(words: Metric, floor: float, ends: tuple[float, float]) -> list[Patch]:
    """The floor's entry of a legend; none where none was measured."""
    if not np.isfinite(floor):
        return []
    seen = 2 * abs(floor - words.null) > _SEEN * (ends[1] - ends[0])
    return [Patch(fc=FLOOR, label="noise floor" if seen else "noise floor (too thin to see)")]


def legend(
    ax: Axes, words: Metric, floor: float, ends: tuple[float, float], beside: str = ""
) -> None:
    dot: dict[str, Any] = {"lw": 1.6, "marker": "o", "ms": 5.5, "color": EFFECT}
    other: dict[str, Any] = dot | {"marker": "s", "color": BESIDE}
    handles: list[Line2D | Patch] = [
        Line2D([], [], label="effect, 95 % interval", **dot),
        Line2D([], [], label="not told from none", **dot | {"mfc": "white", "lw": 0, "mew": 1.4}),
    ]
    handles += [Line2D([], [], label=shortened(beside, 36), **other)] if beside else []
    handles += floor_patch(words, floor, ends)
    ax.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.3,
        ncols=2 if beside else len(handles), columnspacing=1.2, handlelength=1.5, fontsize=7.5,
    )  # fmt: skip


def in_words(table: pd.DataFrame) -> str:
    """`748 predicted tokens of 12 documents`, of a comparison's conditions."""
    first = table.iloc[0]
    n = int(first["n_documents"])
    return f"{int(first['n_tokens']):,} predicted tokens of {n:,} document{'' if n == 1 else 's'}"


def said_of_interval(table: pd.DataFrame) -> str:
    n = int(table["n_documents"].iloc[0])
    if n < 2:
        return "One document: no interval."
    return f"Lines: 95 % interval, paired bootstrap over documents.{few_drawn(n)}"


def said_of_floor(floor: float, words: Metric, n_runs: int) -> str:
    if not np.isfinite(floor):
        return NO_FLOOR
    return (
        f"Noise floor {abs(floor - words.null):.2g}: the 95th percentile of what {n_runs} "
        "equivalent runs differ by."
    )


def alt_of(rows: pd.DataFrame, words: Metric, floor: float, model: str) -> str:
    told = [
        f"{row.Index}{' (control)' if row.apart else ''} {in_figures(row, words)}"
        for row in rows.itertuples()
    ]
    shown = "; ".join(told[:15]) + (f"; and {len(told) - 15} more" if len(told) > 15 else "")
    known = f" Noise floor {abs(floor - words.null):.2g}." if np.isfinite(floor) else ""
    of = f" of {model}" if model else ""
    return f"{words.heading}{of} with 95 % intervals, {len(told)} rows: {shown}.{known}"
