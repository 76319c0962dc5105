"""Who gains and who loses by the correction bias: slots brought to each expert, slots taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ernie_lab.analysis.bias import BiasLedger
from ernie_lab.plots.correction_bias import Floats, by_expert, chosen, heat
from ernie_lab.plots.given import require
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet, View

MAX_ROWS, MAX_BARS = 8, 32
_GAINED, _LOST = OKABE_ITO["blue"], OKABE_ITO["orange"]


@overload
def plot_expert_shift(
    ledger: BiasLedger, *, layers: Sequence[int] | None = ..., bank: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_expert_shift(
    ledger: BiasLedger, *, layers: Sequence[int] | None = ..., bank: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_expert_shift(
    ledger: BiasLedger,
    *,
    layers: Sequence[int] | None = None,
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Percent of tokens that the bias brings to each expert, and takes from it.

    Up to eight layers of 32 experts: bars, gained upwards and lost downwards, the difference a
    line across. Beyond that, or on `ax` with several layers, a heat map of the difference.
    `layers` narrows.
    """
    require(ledger, "BiasLedger", "plot_expert_shift", "el.analysis.bias_ledger(routing)")
    numbers = chosen(ledger, layers)
    added_LE, displaced_LE = (
        100 * by_expert(ledger, column, numbers) for column in ("added", "displaced")
    )
    slots_L = 100 * ledger.layers.loc[numbers, "local_slots"].to_numpy(dtype=float)
    name = f"{bank + ' ' if bank else ''}experts"
    as_bars = len(numbers) <= MAX_ROWS and added_LE.shape[1] <= MAX_BARS
    if ax is not None:
        as_bars = as_bars and len(numbers) == 1
    words = (
        title or f"Which {name} gain and lose tokens by the correction bias",
        _caption(ledger, numbers, model, as_bars) if caption is None else caption,
        _alt(added_LE, displaced_LE, numbers, model),
    )
    if as_bars:
        width = float(np.clip(added_LE.shape[1] * 0.42, 5.0, 9.0))
        grid = (len(numbers), 1)
        with Sheet(ax, width, 1.15 * len(numbers) + 1.55, grid) as sheet:
            _bars(sheet.axes[: len(numbers)], added_LE, displaced_LE, numbers, slots_L)
            return sheet.finish(*words)
    height = float(np.clip(len(numbers) * 0.19, 2.0, 9.0))
    with Sheet(ax, 8.6, height + 2.0) as sheet:
        _map(sheet.ax, added_LE - displaced_LE, numbers, slots_L)
        return sheet.finish(*words)


def _bars(
    axes: Sequence[Axes], added_LE: Floats, displaced_LE: Floats, layers: Sequence[int],
    slots_L: Floats,
) -> None:  # fmt: skip
    n_experts = added_LE.shape[1]
    x = np.arange(n_experts)
    for ax, added_E, displaced_E, layer, slots in zip(
        axes, added_LE, displaced_LE, layers, slots_L, strict=True
    ):
        ax.bar(x, added_E, width=0.72, color=_GAINED, zorder=2, label="gained")
        ax.bar(x, -displaced_E, width=0.72, color=_LOST, zorder=2, label="lost")
        net_E = added_E - displaced_E
        ax.hlines(net_E, x - 0.36, x + 0.36, color=INK, lw=1.6, zorder=3, label="difference")
        ax.axhline(0, color=MUTED, lw=0.8, zorder=4)
        # Each layer its own scale: one expert that loses 60 % would flatten all the others.
        ax.set_ylim(-1.15 * (displaced_E.max() or 0.1), 1.15 * (added_E.max() or 0.1))
        ax.set_xlim(-0.6, n_experts - 0.4)
        ax.grid(axis="y", color=RULE, lw=0.4, zorder=0)
        ax.set_axisbelow(True)
        ax.locator_params(axis="y", nbins=4)
        ax.set_xticks(x, [str(i) for i in x] if ax is axes[-1] else [""] * n_experts)
        ax.tick_params(axis="x", length=0)
        ax.set_ylabel(f"layer {layer}\n% of tokens", fontsize=8)
        ax.text(
            1.008, 0.5, f"{slots:.1f} %\nof slots", transform=ax.transAxes, fontsize=7.5,
            va="center", color=MUTED,
        )  # fmt: skip
    axes[-1].set_xlabel("expert")
    axes[0].legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2, columnspacing=1.4,
        handlelength=1.2, title=None,
    )  # fmt: skip


def _map(ax: Axes, net_LE: Floats, layers: Sequence[int], slots_L: Floats) -> None:
    limit = float(np.percentile(np.abs(net_LE), 99)) or 1.0
    image = heat(ax, net_LE, Normalize(-limit, limit), layers)
    n_experts = net_LE.shape[1]
    ax.set_xticks(range(0, n_experts, 1 if n_experts <= 32 else 4))
    ax.set_xlabel("expert")
    size = 7.5 if len(layers) <= 40 else 5.0
    for row, slots in enumerate(slots_L):
        ax.text(
            1.055, row, f"{slots:.0f} %", transform=ax.get_yaxis_transform(), ha="right",
            va="center", fontsize=size, color=MUTED,
        )  # fmt: skip
    ax.annotate(
        "slots filled\notherwise", (1.055, 1), xycoords="axes fraction", xytext=(0, 4),
        textcoords="offset points", fontsize=7, ha="right", va="bottom", color=MUTED,
    )  # fmt: skip
    bar = ax.figure.colorbar(image, ax=ax, extend="both", pad=0.02, aspect=22)
    bar.set_label("gained minus lost, % of tokens")
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _caption(ledger: BiasLedger, layers: Sequence[int], model: str, as_bars: bool) -> str:
    n_experts = len(ledger.experts.loc[layers[0]])
    how = (
        "Bars: percent of all tokens which the bias brings to the expert (up) and takes from it "
        "(down); black: the difference. Each layer has its own scale."
        if as_bars
        else "Colour: percent of all tokens gained minus lost."
    )
    fair = 100 * ledger.k / n_experts
    return (
        f"{model + ': ' if model else ''}N = {ledger.n_tokens:,} tokens × {ledger.k} of "
        f"{n_experts} experts. {how} A fair share is {fair:.3g} % of the tokens. At the right: "
        "the share of the layer's slots that the bias fills otherwise. Compared with the choice "
        "by probability alone on the same hidden states. Added and displaced are sets: who took "
        "whose place is not defined."
    )


def _alt(added_LE: Floats, displaced_LE: Floats, layers: Sequence[int], model: str) -> str:
    net_LE = added_LE - displaced_LE
    said = "; ".join(
        f"layer {layer}: most gained by expert {net_E.argmax()} ({net_E.max():+.1f} %), most lost "
        f"by expert {net_E.argmin()} ({net_E.min():+.1f} %)"
        for layer, net_E in zip(layers[:12], net_LE, strict=False)
    )
    return (
        f"Tokens that the correction bias{f' of {model}' if model else ''} brings to experts and "
        f"takes from them, percent of all tokens. {said}{'; …' if len(layers) > 12 else ''}."
    )
