"""Quantities that run over the layers: lines with intervals, a twin dashed, true layer numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike

from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE

MAX_LAYERS = 128
_NUMBERS = 14  # so many layer numbers fit side by side in a panel of a row of three

# What a token is, and which bank: one colour and one marker everywhere.
KINDS = MappingProxyType(
    {
        "text": (OKABE_ITO["blue"], "o"),
        "image": (OKABE_ITO["orange"], "s"),
        "vision": (OKABE_ITO["orange"], "s"),
        "video": (OKABE_ITO["purple"], "D"),
        "delimiter": (OKABE_ITO["green"], "^"),
    }
)
_OTHERS = tuple(zip(("vermillion", "sky", "black", "purple", "green"), "vP*Dp", strict=True))


def look_of(name: str, others: Sequence[str]) -> tuple[str, str]:
    """Colour and marker of a kind of token; of other names, by their place among those."""
    if name in KINDS:
        return KINDS[name]
    strangers = [other for other in others if other not in KINDS]
    if len(strangers) > len(_OTHERS):
        raise ValueError(
            f"{len(strangers)} kinds besides {', '.join(KINDS)}: at most {len(_OTHERS)} can be "
            "told apart; compare fewer"
        )
    colour, marker = _OTHERS[strangers.index(name)]
    return OKABE_ITO[colour], marker


@dataclass(frozen=True, slots=True, eq=False)
class Line:
    """One quantity by layer; `low` and `high` are its interval. `twin`: of an untrained model."""

    layers: Sequence[int]
    values: ArrayLike
    colour: str
    marker: str = "o"
    low: ArrayLike | None = None
    high: ArrayLike | None = None
    twin: bool = False


def draw(ax: Axes, line: Line) -> None:
    """Dots on a line, its interval a veil and thin bars; a twin hollow and dashed."""
    x, y = np.asarray(line.layers), np.asarray(line.values, dtype=float)
    small = len(x) > 20
    look: dict[str, Any] = {"color": line.colour, "marker": line.marker, "ms": 3 if small else 5}
    if line.twin:
        look |= {
            "mfc": "white",
            "mew": 0.9,
            "ls": (0, (3, 2)),
            "lw": 0.9,
            "ms": 2.5 if small else 4,
        }
    else:
        look |= {"lw": 1.4}
    ax.plot(x, y, zorder=2 if line.twin else 3, **look)
    if line.low is None or line.high is None:
        return
    low, high = (np.asarray(one, dtype=float) for one in (line.low, line.high))
    if not line.twin:
        ax.fill_between(x, low, high, color=line.colour, alpha=0.16, lw=0, zorder=1)
    ax.vlines(x, low, high, color=line.colour, lw=0.9, zorder=2)


def layer_axis(ax: Axes, layers: Sequence[int], *, label: bool = True) -> None:
    """True numbers below, no more than fit, and a light grid."""
    numbers = [int(layer) for layer in layers]
    if not 0 < len(numbers) <= MAX_LAYERS:
        raise ValueError(f"{len(numbers)} layers, 1 to {MAX_LAYERS} can be drawn: take some")
    step = next(s for s in (1, 2, 4, 5, 10) if len(numbers) / s <= _NUMBERS)
    ax.set_xticks(numbers[::step], [str(number) for number in numbers[::step]])
    ax.set_xlim(numbers[0] - 0.5, numbers[-1] + 0.5)
    ax.grid(axis="y", color=RULE, lw=0.5, zorder=0)
    ax.set_axisbelow(True)
    if label:
        ax.set_xlabel("layer")


def handle(name: str, colour: str, marker: str = "o") -> Line2D:
    return Line2D([], [], color=colour, marker=marker, ms=5, lw=1.4, label=name)


def twin_handle() -> Line2D:
    look: dict[str, Any] = {"color": MUTED, "marker": "o", "mfc": "white", "mew": 0.9, "ms": 4}
    return Line2D([], [], lw=0.9, ls=(0, (3, 2)), label="untrained twin", **look)


def null_handle(name: str) -> Line2D:
    return Line2D([], [], color=MUTED, lw=1.0, ls=":", label=name)


def panel_name(ax: Axes, title: str, under: str = "") -> None:
    """A short title, and below it in grey what to know to read the panel."""
    lines = under.count("\n") + 1 if under else 0
    ax.set_title(title, fontsize=9, fontweight="bold", pad=4 + 10.5 * lines, color=INK, loc="left")
    if under:
        ax.annotate(
            under, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points",
            fontsize=7.5, color=MUTED, va="bottom", ha="left", linespacing=1.2, parse_math=False,
        )  # fmt: skip
