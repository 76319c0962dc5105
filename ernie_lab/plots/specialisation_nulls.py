"""Bits per layer: what the learned router tells, beside what routers tell that learned nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ernie_lab.interventions.bootstrap import few_drawn
from ernie_lab.plots.given import require
from ernie_lab.plots.layer_columns import layer_columns, width_of
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    from ernie_lab.analysis.specialisation import Specialisation

_LEARNED, _TWIN, _PERMUTED = OKABE_ITO["blue"], OKABE_ITO["green"], MUTED
# The two ways to redraw are two columns of one colour family.
_REDRAWN = {"norm": "#E69F00", "variance": "#f3cf80"}
# Where each mark stands in its layer's column, from -0.5 to 0.5.
_PLACE = {"permuted": -0.34, "untrained": -0.18, "norm": 0.0, "variance": 0.14, "learned": 0.32}


@overload
def plot_specialisation(
    found: Specialisation, *, model: str = ..., ax: None = None, title: str | None = ...,
    caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_specialisation(
    found: Specialisation, *, model: str = ..., ax: Axes, title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_specialisation(
    found: Specialisation,
    *,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`specialisation`, layer by layer: learned router, redrawn ones, twins, permuted labels.

    A filled dot is above 95 % of the redrawn routers of both kinds, a hollow one is not. Bars
    span 90 % of the redrawn routers, thin lines all of them, the notch is the median.
    """
    require(
        found,
        "Specialisation",
        "plot_specialisation",
        "el.analysis.specialisation(routing, labels, lab)",
    )
    model = model or found.model
    n = len(found.layers)
    with Sheet(ax, _width(n), 4.4) as sheet:
        axes, x = sheet.ax, np.arange(n, dtype=float)
        thick = 72 * (_width(n) - 1.0) / n
        for row, layer in enumerate(found.layers):
            _nulls(axes, row, found, layer, thick)
        _learned(axes, x, found, thick)
        layer_columns(axes, found.layers, bands=True)
        axes.axhline(0, color=RULE, lw=0.8, zorder=1)
        axes.set_ylabel(f"bits between {found.subject}")
        _legend(axes, found)
        return sheet.finish(
            title or f"What an expert tells of the {found.label}, and what a random router tells",
            _caption(found, model) if caption is None else caption,
            _alt(found, model),
        )


def _width(n_layers: int) -> float:
    """Wide enough for the legend, which must not squeeze the axes."""
    return max(width_of(n_layers, 0.75), 7.2)


def _nulls(ax: Axes, row: int, found: Specialisation, layer: int, thick: float) -> None:
    below, above = (float(found.table[name][layer]) for name in ("permuted", "permuted_p95"))
    of = found.nulls[found.nulls["layer"] == layer]
    bar = float(np.clip(thick * 0.1, 2.0, 7.0))
    for variant, colour in _REDRAWN.items():
        drawn = of.loc[of["null"].str.endswith(f"equal {variant}"), "bits"].to_numpy()
        x = row + _PLACE[variant]
        low, high = np.quantile(drawn, [0.05, 0.95])
        ax.plot([x, x], [drawn.min(), drawn.max()], color=colour, lw=1, zorder=2)
        ax.plot([x, x], [low, high], color=colour, lw=bar, solid_capstyle="butt", zorder=3)
        half = 0.05
        middle = float(np.median(drawn))
        ax.plot([x - half, x + half], [middle, middle], color=INK, lw=1.1, zorder=4)
    x = row + _PLACE["permuted"]
    ax.plot([x, x], [min(below, 0.0), above], color=_PERMUTED,
            lw=bar * 0.7, solid_capstyle="butt", zorder=3)  # fmt: skip
    twins = of.loc[of["null"] == "untrained twin", "bits"].to_numpy()
    ax.plot(np.full(len(twins), row + _PLACE["untrained"]), twins, "D", ms=bar * 0.75,
            mfc="none", mec=_TWIN, mew=1.1, zorder=3)  # fmt: skip


def _learned(ax: Axes, x: np.ndarray, found: Specialisation, thick: float) -> None:
    table, place = found.table, x + _PLACE["learned"]
    size = float(np.clip(thick * 0.14, 3.2, 7.0))
    ax.plot(place, table["bits"], color=_LEARNED, lw=0.9, alpha=0.45, zorder=4)
    ax.vlines(place, table["low"], table["high"], color=_LEARNED, lw=1.4, zorder=5)
    for at, bits, above in zip(place, table["bits"], table["above"], strict=True):
        ax.plot(at, bits, "o", ms=size, mfc=_LEARNED if above else "white", mec=_LEARNED, mew=1.4,
                zorder=6)  # fmt: skip


def _legend(ax: Axes, found: Specialisation) -> None:
    n = found.n_redrawn
    dot: dict[str, Any] = {"marker": "o", "ls": "", "ms": 6, "mec": _LEARNED, "mew": 1.4}
    entries: list[tuple[Any, str]] = [
        (
            Line2D([], [], mfc=_LEARNED, **dot),
            "learned router, above 95 % of the redrawn",
        ),
        (Line2D([], [], mfc="white", **dot), "learned router, not above"),
        (Patch(color=_REDRAWN["norm"]), f"{n} redrawn routers, equal row norms"),
        (Patch(color=_REDRAWN["variance"]), f"{n} redrawn routers, equal variance"),
    ]
    if (found.nulls["null"] == "untrained twin").any():
        twin = Line2D([], [], marker="D", ls="", ms=5, mfc="none", mec=_TWIN, mew=1.1)
        entries.append((twin, "untrained twin"))
    entries.append((Patch(color=_PERMUTED), "permuted labels, 95 % below"))
    handles, words = zip(*entries, strict=True)
    ax.legend(handles, words, loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=2,
              columnspacing=1.4, handletextpad=0.6, borderaxespad=0.2)  # fmt: skip


def _caption(found: Specialisation, model: str) -> str:
    table = found.table
    twin = "" if table["untrained"].isna().all() else " Untrained twins read their own states."
    return (
        f"{model + '. ' if model else ''}{found.n_tokens:,} tokens of {found.n_documents} "
        f"documents; at most {table['label_bits'].max():.2f} bits, the entropy of the "
        f"{found.label}. Lines on dots: 95 %, over documents."
        f"{few_drawn(found.n_documents)} Redrawn: a random gate on the very same "
        "hidden states, its load made the learned one's on other documents; bar 90 % of "
        f"draws, thin line all, notch the median.{twin} Permuted: {found.by}. Information is not "
        "function: this does not show that any expert is needed."
    )


def _alt(found: Specialisation, model: str) -> str:
    parts = [
        f"layer {row.Index} {row.bits:.3f} (redrawn median {row.norm_median:.3f} and "
        f"{row.variance_median:.3f}, 95th percentile {row.norm_p95:.3f} and {row.variance_p95:.3f})"
        for row in found.table.itertuples()
    ]
    shown = parts if len(parts) <= 8 else [*parts[:3], "…", *parts[-3:]]
    return (
        f"Bits between {found.subject}{f' of {model}' if model else ''}: {'; '.join(shown)}. "
        f"{found.above_in_words[0].upper()}{found.above_in_words[1:]}."
    )
