"""The axis of layers: one column for each, its true number below."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.plots.style import INK, PALE, RULE
from ernie_lab.plots.tokens import shortened

MAX_LAYERS = 128


def width_of(n_layers: int, per_layer: float = 0.6) -> float:
    """Inches of a figure with a column for each layer."""
    if n_layers > MAX_LAYERS:
        raise ValueError(f"{n_layers} layers, at most {MAX_LAYERS}: narrow with layers=")
    return float(np.clip(1.2 + n_layers * per_layer, 6.4, 9.6))


def layer_columns(ax: Axes, layers: Sequence[int], *, bands: bool = False) -> None:
    """Column i is layer `layers[i]`, over a light grid of values.

    `bands` shades every other column, for several marks in each.
    """
    n = len(layers)
    step = 1 if n <= 32 else 4
    ax.set_xticks(range(0, n, step), [str(layer) for layer in layers[::step]])
    ax.set_xlim(-0.55, n - 0.45)
    ax.set_xlabel("layer")
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y", color=RULE, lw=0.5)
    ax.set_axisbelow(True)
    if bands:
        for column in range(1, n, 2):
            ax.axvspan(column - 0.5, column + 0.5, color=PALE, alpha=0.7, lw=0, zorder=0)


def names_at_the_end(ax: Axes, names: Sequence[str], ends: Sequence[float]) -> None:
    """The name of each line, right of the axes at the height of its last point, kept apart.

    For axes of about one unit of height.
    """
    places = np.array(ends, dtype=float)
    for below, above in pairwise(np.argsort(places)):
        places[above] = max(places[above], places[below] + 0.06)
    for name, place in zip(names, places, strict=True):
        ax.annotate(
            shortened(name, 20), (1, place), xycoords=ax.get_yaxis_transform(), xytext=(4, 0),
            textcoords="offset points", va="center", fontsize=8, color=INK,
            annotation_clip=False, parse_math=False,
        )  # fmt: skip
