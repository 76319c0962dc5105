"""Layers x heads: what each head looks at, beside looking evenly and an untrained twin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from numpy.typing import NDArray

from ernie_lab.plots.given import require
from ernie_lab.plots.style import AMOUNT, INK, OKABE_ITO, PALE, RULE
from ernie_lab.plots.view import Sheet, View

Floats = NDArray[np.float64]

MAX_HEADS, MAX_LAYERS = 128, 128
_ACROSS = 4  # panels in a row
_WRITTEN = (8, 12)  # up to so many heads and layers the numbers stand in the cells
_COLOURS = AMOUNT.with_extremes(bad=PALE)
_EVEN, _TWIN = OKABE_ITO["vermillion"], OKABE_ITO["orange"]
_SHARES = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)
_WORDS = {
    "entropy": "entropy: how widely it looks",
    "effective_keys": "effective number of keys",
    "sink": "sink: on the first token",
    "self": "self: on the token itself",
    "previous": "previous: the token before",
    "distance": "mean distance",
    "duplicate": "duplicate: same token before",
    "induction": "induction: what came next",
}
_SHOWN = ("sink", "previous", "induction", "duplicate", "self", "entropy", "distance")


@dataclass(frozen=True, slots=True, eq=False)
class Panel:
    """One statistic `[layer, head]` and its references, NaN where there is none."""

    name: str
    unit: str
    value_LH: Floats
    even_L: Floats
    n_L: NDArray[np.int64]
    beyond_LH: NDArray[np.bool_]
    twin: tuple[float, float]

    @property
    def even(self) -> float:
        return float(np.nanmean(self.even_L))

    @property
    def top(self) -> float:
        return float(np.nanmax([np.nanmax(self.value_LH), np.nanmax(self.even_L)]))


@overload
def plot_attention_statistics(
    found: Any, statistic: str | Sequence[str] | None = ..., *, untrained: Any = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_attention_statistics(
    found: Any, statistic: str | Sequence[str] | None = ..., *, untrained: Any = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_attention_statistics(
    found: Any,
    statistic: str | Sequence[str] | None = None,
    *,
    untrained: Any = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Heat maps of what `attention_statistics` found, one panel for each `statistic`.

    A red line in the colour bar is the value of looking evenly. `untrained` are the statistics of
    an untrained twin on the same texts: an orange band in the bar is the range over all its
    heads, and a dot in a cell says that the head's interval lies outside it. Shares are coloured
    by their square root on one scale, 0 to 1; the others from 0 to their largest value. On `ax`
    one statistic is drawn.
    """
    require(
        found, "Dataset", "plot_attention_statistics", "el.analysis.attention_statistics(trace)"
    )
    panels = [_panel(found, name, untrained) for name in _chosen(found, statistic)]
    if ax is not None and len(panels) != 1:
        raise ValueError(f"{len(panels)} statistics do not fit on one ax: name one of them")
    layers, heads = ([int(n) for n in found[axis].values] for axis in ("layer", "head"))
    if len(heads) > MAX_HEADS or len(layers) > MAX_LAYERS:
        raise ValueError(
            f"{len(layers)} layers x {len(heads)} heads, at most {MAX_LAYERS} x {MAX_HEADS}: pass "
            "found.sel(layer=[…]) or found.sel(head=[…])"
        )
    across = min(len(panels), _ACROSS)
    lines = -(-len(panels) // across)
    written = len(heads) <= _WRITTEN[0] and len(layers) <= _WRITTEN[1]
    wide = float(np.clip(len(heads) * (0.36 if written else 0.15), 1.5, 4.2))
    tall = float(np.clip(len(layers) * (0.28 if written else 0.14), 1.3, 5.2))
    size = (max(across * (wide + 1.0) + 0.2, 5.0), lines * (tall + 0.62) + 1.35)
    with Sheet(ax, *size, (lines, across)) as sheet:
        for i, (place, panel) in enumerate(zip(sheet.axes, panels, strict=False)):
            _draw(place, panel, layers, heads, written, tall)
            edge = (i % across == 0, i + across >= len(panels))
            _label(place, *edge)
            if ax is None and len(panels) > 1:
                words = _WORDS.get(panel.name, panel.name)
                place.set_title(words, fontsize=8.5, fontweight="normal", pad=4)
        for place in sheet.axes[len(panels) :]:
            place.set_axis_off()
        return sheet.finish(
            title or _title(panels),
            _caption(found, panels, untrained, model) if caption is None else caption,
            _alt(panels, layers, heads, model),
        )


def _chosen(found: Any, statistic: str | Sequence[str] | None) -> list[str]:
    if "group" in found.dims:
        groups = ", ".join(repr(group) for group in found["group"].values.tolist())
        raise ValueError(f"one group of queries at a time, found.sel(group=…): {groups}")
    known = [str(name) for name in found["statistic"].values]
    there = [name for name in known if int(found["n"].sel(statistic=name).max()) > 0]
    if statistic is None:
        return [name for name in _SHOWN if name in there]
    names = [statistic] if isinstance(statistic, str) else list(statistic)
    for name in names:
        if name not in known:
            raise ValueError(f"no statistic {name!r}; there are {', '.join(known)}")
        if name not in there:
            raise ValueError(f"{name}: no query of these texts has it, for want of repeats")
    if not names:
        raise ValueError("no statistic to draw: leave statistic out, or name one")
    return names


def _panel(found: Any, name: str, twin: Any) -> Panel:
    one = found.sel(statistic=name)
    value_LH = one["value"].values
    seen = (np.nan, np.nan)
    beyond_LH = np.zeros(value_LH.shape, bool)
    if twin is not None:
        other = twin.sel(statistic=name)["value"].values
        seen = (float(np.nanmin(other)), float(np.nanmax(other)))
        beyond_LH = (one["low"].values > seen[1]) | (one["high"].values < seen[0])
    unit = str(one["unit"].item())
    return Panel(name, unit, value_LH, one["even"].values, one["n"].values, beyond_LH, seen)


def _draw(
    ax: Axes, panel: Panel, layers: list[int], heads: list[int], written: bool, tall: float
) -> None:
    norm = PowerNorm(0.5, 0, 1) if panel.unit == "share" else Normalize(0, panel.top)
    image = ax.imshow(
        np.ma.masked_invalid(panel.value_LH), cmap=_COLOURS, norm=norm, aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    for axis, numbers, most in ((ax.xaxis, heads, 10), (ax.yaxis, layers, 16)):
        step = next(s for s in (1, 2, 4, 8, 16) if len(numbers) / s <= most)
        axis.set_ticks(range(0, len(numbers), step), [str(n) for n in numbers[::step]])
    ax.tick_params(length=0, pad=2, labelsize=7.5)
    for spine in ax.spines.values():
        spine.set_color(RULE)
        spine.set_visible(True)
    for layer, head in np.argwhere(np.isfinite(panel.value_LH)).tolist():
        value, beyond = panel.value_LH[layer, head], bool(panel.beyond_LH[layer, head])
        dark = float(norm(value)) > 0.55
        if written:
            text = f"{value:.2f}" if panel.top < 10 else f"{value:.1f}"
            ax.text(
                head, layer, text, ha="center", va="center", fontsize=6.5,
                color="white" if dark else INK,
            )  # fmt: skip
        if beyond:
            at = (head + 0.38, layer - 0.34) if written else (head, layer)
            ax.plot(*at, marker=".", ms=3.2, mew=0, color="white" if dark else INK)
    _bar(ax, image, panel, tall)


def _bar(ax: Axes, image: Any, panel: Panel, tall: float) -> None:
    bar = ax.figure.colorbar(image, ax=ax, shrink=min(1.0, 1.9 / tall), aspect=11, pad=0.03)
    if panel.unit == "share":
        bar.set_ticks(list(_SHARES), labels=[f"{tick:g}" for tick in _SHARES])
    bar.set_label(panel.unit, fontsize=7.5, labelpad=2)
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2, labelsize=7)
    if np.isfinite(panel.twin[0]):
        bar.ax.axhspan(*panel.twin, xmin=0.55, xmax=1, color=_TWIN, lw=1.5)
    bar.ax.axhline(panel.even, color=_EVEN, lw=1.4)


def _label(ax: Axes, left: bool, bottom: bool) -> None:
    if left:
        ax.set_ylabel("layer")
    if bottom:
        ax.set_xlabel("head")


def _title(panels: Sequence[Panel]) -> str:
    if len(panels) == 1:
        words = _WORDS.get(panels[0].name, panels[0].name)
        return f"Attention of every head. {words[0].upper()}{words[1:]}"
    return "What every attention head looks at"


def _caption(found: Any, panels: Sequence[Panel], twin: Any, model: str) -> str:
    n = max(int(panel.n_L.max()) for panel in panels)
    fewer = [p for p in panels if 0 < int(p.n_L.max()) < n]
    some = ", ".join(f"{p.name} {int(p.n_L.max()):,}" for p in fewer)
    n_documents = int(found.attrs.get("n_documents", 1))
    evenly = ", ".join(f"{panel.name} {_short(panel.even)}" for panel in panels)
    text = (
        f"{model + ', ' if model else ''}mean over {n:,} queries"
        f"{f' ({some})' if some else ''} of {n_documents} "
        f"document{'s' if n_documents > 1 else ''}. Red line in the bar: looking evenly "
        f"({evenly})."
    )
    if any(panel.unit == "share" for panel in panels):
        text += " Shares are coloured by their square root."
    if twin is not None:
        text += (
            " Orange: the range over all heads of the untrained twin. Dot: the 95 % interval lies "
            "outside that range."
        )
    if any(np.isnan(panel.value_LH).any() for panel in panels):
        text += " Grey: not kept."
    return text + " A pattern says where a head looks, not what it does."


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}"


def _alt(panels: Sequence[Panel], layers: list[int], heads: list[int], model: str) -> str:
    parts = []
    for panel in panels:
        layer, head = divmod(int(np.nanargmax(panel.value_LH)), len(heads))
        against = (
            f", untrained twin {panel.twin[0]:.2f} to {panel.twin[1]:.2f}"
            if np.isfinite(panel.twin[0])
            else ""
        )
        parts.append(
            f"{panel.name}: {np.nanmin(panel.value_LH):.2f} to {np.nanmax(panel.value_LH):.2f} "
            f"{panel.unit}, most in layer {layers[layer]} head {heads[head]} (evenly "
            f"{panel.even:.2f}{against})"
        )
    return (
        f"Attention statistics{f' of {model}' if model else ''}, {len(layers)} layers x "
        f"{len(heads)} heads. {'; '.join(parts)}."
    )
