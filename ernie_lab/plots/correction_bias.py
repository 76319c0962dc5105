"""The correction bias against the load it had to correct, with and without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from ernie_lab.analysis.bias import BiasLedger
from ernie_lab.plots.given import require
from ernie_lab.plots.style import DEVIATION, INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]

MAX_PANELS = 6
MAX_LAYERS = 128
_WITH, _WITHOUT = OKABE_ITO["blue"], OKABE_ITO["vermillion"]


@overload
def plot_correction_bias(
    ledger: BiasLedger, *, layers: Sequence[int] | None = ..., bank: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_correction_bias(
    ledger: BiasLedger, *, layers: Sequence[int] | None = ..., bank: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_correction_bias(
    ledger: BiasLedger,
    *,
    layers: Sequence[int] | None = None,
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Centred bias of each expert against its load, without the bias and with it.

    Up to six layers: a panel each, one expert a pair of points, the load without the bias (on
    the same hidden states) hollow, with it filled. More layers: three heat maps of layers x
    experts, the experts of every layer in the order of their bias. `layers` narrows; on `ax` a
    single layer is drawn.
    """
    require(ledger, "BiasLedger", "plot_correction_bias", "el.analysis.bias_ledger(routing)")
    numbers = chosen(ledger, layers)
    name = f"{bank + ' ' if bank else ''}experts"
    if len(numbers) > MAX_PANELS:
        if ax is not None:
            raise ValueError(f"{len(numbers)} layers do not fit on one ax: layers=[n] narrows")
        return _maps(ledger, numbers, name, model, title, caption)
    if ax is not None and len(numbers) != 1:
        raise ValueError(f"layers {numbers} do not fit on one ax: layers=[n] narrows")
    columns = min(len(numbers), 3)
    rows = -(-len(numbers) // columns)
    with Sheet(ax, max(3.3 * columns, 5.4), 2.75 * rows + 1.5, (rows, columns)) as sheet:
        for panel, layer in zip(sheet.axes, numbers, strict=False):
            _panel(panel, ledger, layer)
        for unused in sheet.axes[len(numbers) :]:
            unused.axis("off")
        if ax is None and columns == 3:  # wide enough to have it beside the title
            lines = sheet.ax.get_legend_handles_labels()
            sheet.figure.legend(*lines, loc="outside upper right", ncols=2, borderaxespad=0.1)
        else:
            sheet.ax.legend(loc="best")
        return sheet.finish(
            title or f"What the correction bias does to the load of the {name}",
            _caption(ledger, numbers, model) if caption is None else caption,
            alt(ledger, numbers, model),
        )


def chosen(ledger: BiasLedger, layers: Sequence[int] | None) -> list[int]:
    """The layers to draw, true numbers."""
    there = [int(layer) for layer in ledger.layers.index]
    numbers = there if layers is None else [int(layer) for layer in layers]
    if absent := [layer for layer in numbers if layer not in there]:
        raise ValueError(f"layers={absent} are not in the ledger; it has {there}")
    if not numbers or len(numbers) > MAX_LAYERS:
        raise ValueError(f"{len(numbers)} layers; 1 to {MAX_LAYERS} can be drawn: layers=[…]")
    return numbers


def by_expert(ledger: BiasLedger, column: str, layers: Sequence[int]) -> Floats:
    """A column of the ledger's experts, `[l e]`."""
    return np.stack([ledger.experts.loc[n][column].to_numpy(dtype=float) for n in layers])


def _panel(ax: Axes, ledger: BiasLedger, layer: int) -> None:
    experts, row = ledger.experts.loc[layer], ledger.layers.loc[layer]
    bias, without, load = (
        experts[name].to_numpy(dtype=float) for name in ("bias", "local_load", "load")
    )
    ax.axhline(1, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    ax.axvline(0, color=RULE, lw=0.8, zorder=0)
    ax.vlines(bias, np.minimum(without, load), np.maximum(without, load), color=RULE, lw=1.4)
    look: dict[str, Any] = {"linewidths": 1.1, "zorder": 3}
    ax.scatter(
        bias,
        without,
        s=24,
        facecolors="white",
        edgecolors=_WITHOUT,
        label="load without the bias",
        **look,
    )
    ax.scatter(bias, load, s=24, color=_WITH, label="with it", **look)
    apart = 0.045 * float(np.ptp(bias))
    order = np.argsort(bias)
    numbered: list[int] = []
    for i in dict.fromkeys(
        [*order[[0, -1]].tolist(), *order[1:2].tolist(), *order[-2:-1].tolist()]
    ):
        if any(abs(bias[i] - bias[other]) < apart for other in numbered):
            continue  # its number would lie on one of the extremes', which come first
        numbered.append(i)
        ax.annotate(
            str(experts.index[i]), (bias[i], max(without[i], load[i])), xytext=(0, 5),
            textcoords="offset points", ha="center", fontsize=7, color=MUTED,
        )  # fmt: skip
    top = float(max(without.max(), load.max(), 1.2))
    ax.set_ylim(-0.04 * top, top * 1.13)
    ax.margins(x=0.08)
    ax.locator_params(axis="x", nbins=5)
    ax.set_xlabel("bias, centred (probability)")
    ax.set_ylabel("load, × fair share")
    ax.set_title(
        f"layer {layer}: MaxVio {row['local_max_violation']:.2f} → {row['max_violation']:.2f}, "
        f"r = {row['correlation']:+.2f}",
        fontsize=8.5, fontweight="normal", loc="left", color=INK,
    )  # fmt: skip


def _maps(
    ledger: BiasLedger, layers: list[int], name: str, model: str, title: str | None,
    caption: str | None,
) -> View:  # fmt: skip
    order_LE = np.argsort(by_expert(ledger, "bias", layers), axis=1)
    bias_LE, without_LE, load_LE = (
        np.take_along_axis(by_expert(ledger, column, layers), order_LE, 1)
        for column in ("bias", "local_load", "load")
    )
    logs = [np.log2(np.clip(x, 2.0**-9, None)) for x in (without_LE, load_LE)]
    limit = int(np.clip(np.ceil(np.percentile(np.abs(logs[0]), 95)), 1, 3))
    most = float(np.percentile(np.abs(bias_LE), 98)) or 1.0
    height = float(np.clip(len(layers) * 0.16, 2.2, 9.0))
    with Sheet(None, 9.6, height + 2.3, (1, 3)) as sheet:
        norms = [Normalize(-most, most), *[Normalize(-limit, limit)] * 2]
        words = ["correction bias, centred", "load without the bias", "load with it"]
        images = []
        for panel, values, norm, word in zip(
            sheet.axes, [bias_LE, *logs], norms, words, strict=True
        ):
            images.append(heat(panel, values, norm, layers))
            panel.set_title(word, fontsize=9, fontweight="normal", loc="left", color=INK)
            panel.set_xlabel("experts of the layer, by rising bias")
        for panel in sheet.axes[1:]:
            panel.set_ylabel("")
        _bar(sheet.axes[0], images[0], "probability", [-most, 0.0, most], "{:+.2g}")
        powers = [float(p) for p in range(-limit, limit + 1)]
        for panel, image in zip(sheet.axes[1:], images[1:], strict=True):
            _bar(panel, image, "load, × fair share", powers, "", [times(p) for p in powers])
        view = sheet.finish(
            title or f"What the correction bias does to the load of the {name}",
            _caption(ledger, layers, model, maps=True) if caption is None else caption,
            alt(ledger, layers, model),
        )
        assert isinstance(view, View)
        return view


def heat(ax: Axes, values_LE: Floats, norm: Normalize, layers: Sequence[int]) -> Any:
    """Layers x experts as colours, with true layer numbers."""
    n_layers, n_experts = values_LE.shape
    image = ax.imshow(
        values_LE, cmap=DEVIATION, norm=norm, aspect="auto", interpolation="nearest",
    )  # fmt: skip
    step = next(s for s in (1, 2, 4, 8) if n_layers / s <= 32)
    ax.set_yticks(range(0, n_layers, step), [str(layer) for layer in layers[::step]])
    every = 1 if n_experts <= 16 else 4 if n_experts <= 32 else 16
    ax.set_xticks(range(0, n_experts, every))
    ax.set_yticks(np.arange(n_layers - 1) + 0.5, minor=True)
    ax.grid(which="minor", axis="y", color="white", lw=0.5)
    ax.tick_params(which="both", length=0)
    ax.set_ylabel("layer")
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image


def times(power: float) -> str:
    return f"1/{2**-power:.0f}×" if power < 0 else f"{2**power:.0f}×" if power else "1"


def _bar(
    ax: Axes, image: Any, label: str, ticks: Sequence[float], form: str,
    words: Sequence[str] | None = None,
) -> None:  # fmt: skip
    bar = ax.figure.colorbar(
        image, ax=ax, orientation="horizontal", extend="both", pad=0.02, aspect=22
    )
    bar.set_ticks(list(ticks), labels=list(words or [form.format(t) for t in ticks]))
    bar.set_label(label)
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _caption(ledger: BiasLedger, layers: list[int], model: str, maps: bool = False) -> str:
    rows = ledger.layers.loc[layers]
    chance = [f"{end:.2f}" for end in rows["correlation_chance"].agg(["min", "max"])]
    n_experts = len(ledger.experts.loc[rows.index[0]])
    what = (
        "Experts are in the order of their bias, layer by layer: the same place in the three maps "
        "is the same expert."
        if maps
        else "One expert is one hollow and one filled point; numbers: smallest and largest "
        "biases. Dashed: the fair share."
    )
    return (
        f"{model + ': ' if model else ''}N = {ledger.n_tokens:,} tokens × {ledger.k} of "
        f"{n_experts} experts, {ledger.n_documents} documents. {what} Without: choice by "
        "probability alone on the same hidden states. Uniform routing of as many tokens stays "
        f"below MaxVio {rows['uniform_p95'].max():.2f} in 95 % of draws. r: of bias and load "
        "without it, over experts; training lowers the bias of an overloaded expert, so r < 0 is "
        f"its rule and no finding (|r| of random orders: 95 % below "
        f"{' to '.join(dict.fromkeys(chance))}{' by layer' * (len(layers) > 1)})."
    )


def alt(ledger: BiasLedger, layers: Sequence[int], model: str) -> str:
    rows: pd.DataFrame = ledger.layers.loc[list(layers)]
    said = "; ".join(
        f"layer {layer}: MaxVio {row['local_max_violation']:.2f} without, "
        f"{row['max_violation']:.2f} with, r {row['correlation']:+.2f}"
        for layer, row in rows.iloc[:12].iterrows()
    )
    more = "; …" if len(rows) > 12 else ""
    return (
        f"Correction bias{f' of {model}' if model else ''} against the load of the experts. "
        f"{said}{more}."
    )
