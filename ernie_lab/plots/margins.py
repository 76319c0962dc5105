"""How close the choices were: margins beside the noise, and what flips at which margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from ernie_lab.plots.given import require
from ernie_lab.plots.style import AMOUNT, INK, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

MAX_LAYERS = 128
_BAR, _NOISE = OKABE_ITO["blue"], OKABE_ITO["vermillion"]
# Of layers and bins: beyond, a number would not fit into its cell.
_NUMBERED = (16, 14)


@overload
def plot_margins(
    table: pd.DataFrame, *, bank: str = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_margins(
    table: pd.DataFrame, *, bank: str = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_margins(
    table: pd.DataFrame,
    *,
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """The distribution of margins of each layer, from `margin_table`, on a logarithmic axis.

    Bar: the middle half, with the median; line: 5th to 95th percentile. Where the table has
    `noise`, its level is marked and the share of tokens within it written at the right.
    """
    require(table, "DataFrame", "plot_margins", "el.analysis.margin_table(routing)")
    layers = _layers(table, ["p05", "p25", "p50", "p75", "p95"])
    points = table[["p05", "p25", "p50", "p75", "p95"]].to_numpy(dtype=float)
    has_noise = "noise" in table
    noise = table["noise"].to_numpy(dtype=float) if has_noise else np.full(len(table), np.nan)
    least = _least(points, noise)
    points = np.clip(points, least, None)
    row = float(np.clip(7.5 / len(layers), 0.19, 0.42))
    with Sheet(ax, 7.2, row * len(layers) + 2.0) as sheet:
        axes, y = sheet.ax, np.arange(len(layers))
        axes.hlines(y, points[:, 0], points[:, 4], color=_BAR, lw=1.2, zorder=2)
        axes.barh(
            y, points[:, 3] - points[:, 1], left=points[:, 1], height=0.56, color=_BAR, zorder=3,
        )  # fmt: skip
        axes.vlines(points[:, 2], y - 0.28, y + 0.28, color="white", lw=1.8, zorder=4)
        axes.set_xscale("log")
        # The default labels are TeX, which our style never reads.
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if has_noise:
            shown = np.where(noise > 0, noise, np.nan)
            axes.scatter(shown, y, marker="|", s=row * 1400, color=_NOISE, lw=1.8, zorder=5)
            _shares(axes, table["within_noise"].to_numpy(dtype=float), row)
        step = next(s for s in (1, 2, 4, 8) if len(layers) / s <= 40)
        axes.set_yticks(y[::step], [str(layer) for layer in layers[::step]])
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.5)
        axes.set_axisbelow(True)
        axes.set_xlabel("margin: score of the last chosen minus the first left out (probability)")
        axes.set_ylabel("layer")
        return sheet.finish(
            title or f"How close the choices of {bank + ' ' if bank else ''}experts are",
            _caption(table, model, has_noise) if caption is None else caption,
            _alt(table, layers, model, has_noise),
        )


def _layers(table: pd.DataFrame, columns: Sequence[str]) -> list[int]:
    if absent := [column for column in columns if column not in table]:
        raise ValueError(f"the table has no column {', '.join(absent)}; it has {list(table)}")
    if not 0 < len(table) <= MAX_LAYERS:
        raise ValueError(f"{len(table)} layers, 1 to {MAX_LAYERS} can be drawn: table.loc[[…]]")
    return [int(layer) for layer in table.index]


def _least(points: Floats, noise: Floats) -> float:
    """Where the logarithmic axis begins: nothing at 0 can be shown on it."""
    positive = np.concatenate([points.ravel(), noise])
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if not len(positive):
        raise ValueError("every margin is 0: there is nothing to show on a logarithmic axis")
    return float(positive.min()) / 1.5


def _shares(ax: Axes, within: Floats, row: float) -> None:
    for y, share in enumerate(within):
        ax.text(
            1.02, y, f"{100 * share:.2g} %", transform=ax.get_yaxis_transform(), va="center",
            fontsize=8 if row > 0.22 else 6.5, color=INK,
        )  # fmt: skip
    ax.annotate(
        "within noise", (1.02, 1), xycoords="axes fraction", xytext=(0, 4), va="bottom",
        textcoords="offset points", fontsize=7.5, color=_NOISE,
    )  # fmt: skip


def _caption(table: pd.DataFrame, model: str, has_noise: bool) -> str:
    n = int(table["n_tokens"].max())
    text = (
        f"{model + ': ' if model else ''}N = {n:,} tokens. Bar: the middle half of the tokens, "
        "white: the median; line: 5th to 95th percentile."
    )
    if has_noise:
        text += (
            f" Red: the noise level, {_span(table['noise'])}, "
            "beyond which runs that should be the same differ in 5 % of tokens; right: the share "
            "of tokens whose margin is no larger, whose choice such a run may change."
        )
    return text


def _span(values: pd.Series[float]) -> str:
    low, high = f"{values.min():.2g}", f"{values.max():.2g}"
    return low if low == high else f"{low} to {high}"


def _alt(table: pd.DataFrame, layers: Sequence[int], model: str, has_noise: bool) -> str:
    median = table["p50"]
    text = (
        f"Margins of the choice of experts{f' of {model}' if model else ''}, layers {layers[0]} "
        f"to {layers[-1]}: medians {median.min():.2g} to {median.max():.2g}, smallest in layer "
        f"{median.idxmin()}."
    )
    if has_noise:
        within = table["within_noise"]
        text += (
            f" Noise level {_span(table['noise'])}; within it "
            f"{_span(100 * within)} % of the tokens."
        )
    return text


@overload
def plot_margin_flips(
    table: pd.DataFrame, *, what: str = ..., bank: str = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_margin_flips(
    table: pd.DataFrame, *, what: str = ..., bank: str = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_margin_flips(
    table: pd.DataFrame,
    *,
    what: str = "the other run",
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Set flips by layer and size of the margin, from `flips_by_margin`: a heat map.

    `what` names the run that is compared, such as "bfloat16" or "without the bias".
    """
    require(
        table,
        "DataFrame",
        "plot_margin_flips",
        "el.analysis.flips_by_margin(base, other)",
        ("flips", "margin_low", "margin_high"),
    )
    wide = table["flips"].unstack("bin")
    layers = [int(layer) for layer in wide.index]
    if len(layers) > MAX_LAYERS:
        raise ValueError(f"{len(layers)} layers, at most {MAX_LAYERS}: narrow with table.loc[a:b]")
    values = 100 * wide.to_numpy(dtype=float)
    if not np.isfinite(values).any():
        raise ValueError("no bin of the table has a token")
    first = table.xs(layers[0], level="layer")
    edges = [float(first["margin_low"].iloc[0]), *first["margin_high"].astype(float)]
    row = float(np.clip(6.5 / len(layers), 0.18, 0.4))
    limit = float(np.nanmax(values)) or 1.0
    with Sheet(ax, 7.8, row * len(layers) + 2.1) as sheet:
        image = sheet.ax.imshow(
            np.ma.masked_invalid(values), cmap=AMOUNT, norm=Normalize(0, limit), aspect="auto",
            interpolation="nearest",
        )  # fmt: skip
        if len(layers) <= _NUMBERED[0] and values.shape[1] <= _NUMBERED[1]:
            for y, x in np.argwhere(np.isfinite(values)).tolist():
                dark = values[y, x] > 0.58 * limit
                sheet.ax.text(
                    x, y, f"{values[y, x]:.2g}", ha="center", va="center", fontsize=7.5,
                    color="white" if dark else INK,
                )  # fmt: skip
        step = next(s for s in (1, 2, 4, 8) if len(layers) / s <= 36)
        sheet.ax.set_yticks(range(0, len(layers), step), [str(n) for n in layers[::step]])
        ticks = np.arange(len(edges)) - 0.5
        sheet.ax.set_xticks(ticks, [f"{edge:.2g}" for edge in edges], fontsize=7)
        sheet.ax.tick_params(length=0)
        sheet.ax.set_xlabel("margin in the base run (probability)")
        sheet.ax.set_ylabel("layer")
        for spine in sheet.ax.spines.values():
            spine.set_visible(False)
        bar = sheet.ax.figure.colorbar(image, ax=sheet.ax, pad=0.02, aspect=18)
        bar.set_label("slots filled otherwise, %")
        bar.outline.set_edgecolor(RULE)
        n = int(table["n_tokens"].groupby(level="layer").sum().max())
        return sheet.finish(
            title
            or f"Which choices of {bank + ' ' if bank else ''}experts change, by margin: {what}",
            f"{model + ': ' if model else ''}{what} against the base run, {n:,} tokens. In each "
            "cell: 1 − |S ∩ S'| / k, mean over the tokens of that layer whose margin in the base "
            "run lies between the edges. Upstream states differ too. Intervals are in the table."
            if caption is None
            else caption,
            f"Set flips{f' of {model}' if model else ''} between {what} and the base run, by layer "
            f"and margin: {np.nanmean(values[:, 0]):.2g} % at the smallest margins, "
            f"{np.nanmean(values[:, -1]):.2g} % at the largest, on average over layers; largest "
            f"{limit:.2g} %.",
        )
