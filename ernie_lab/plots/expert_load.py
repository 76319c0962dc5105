"""Layers x experts: load relative to a fair share, beside what chance alone would give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import ArrayLike, NDArray

from ernie_lab.analysis.balance import Reference, max_violation, multinomial_reference
from ernie_lab.plots.style import DEVIATION, INK, MUTED, RULE
from ernie_lab.plots.tokens import coordinate
from ernie_lab.plots.view import Sheet, View

MAX_EXPERTS = 512
_DRAWS = 1000
_MOST_CROSSES = 150


@overload
def plot_expert_load(
    load: ArrayLike, *, n_tokens: int, k: int, layers: Sequence[int] | None = ...,
    bank: str = ..., model: str = ..., ax: None = None, title: str | None = ...,
    caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_expert_load(
    load: ArrayLike, *, n_tokens: int, k: int, layers: Sequence[int] | None = ...,
    bank: str = ..., model: str = ..., ax: Axes, title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_expert_load(
    load: ArrayLike,
    *,
    n_tokens: int,
    k: int,
    layers: Sequence[int] | None = None,
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Heat map of `load` `[layer, expert]` (shares or counts), 1 = the fair share 1/E.

    Colour is logarithmic and symmetric, so that half and double are equally far from white.
    At the right: MaxVio of each layer; the line above gives the value that uniform routing of
    the same `n_tokens` (each to `k` experts) exceeds in 5 % of draws.
    """
    load_LE = np.atleast_2d(np.asarray(load, dtype=np.float64))
    n_layers, n_experts = load_LE.shape
    if n_experts > MAX_EXPERTS:
        raise ValueError(f"{n_experts} experts, at most {MAX_EXPERTS}: pass load[:, start:stop]")
    known = layers if layers is not None else coordinate(load, "layer")
    numbers = [int(x) for x in (range(n_layers) if known is None else known)]
    if len(numbers) != n_layers:
        raise ValueError(f"{len(numbers)} layer numbers for {n_layers} rows of load")
    violation_L = max_violation(load_LE)
    relative_LE = load_LE / load_LE.mean(axis=1, keepdims=True)
    reference = multinomial_reference(n_tokens, n_experts, k, "max_violation", n_random=_DRAWS)

    # The scale ends at 2, 4 or 8 times: enough for nearly all cells, round numbers for the bar.
    spread = np.abs(np.log2(relative_LE[relative_LE > 0]))
    limit = int(np.clip(np.ceil(np.percentile(spread, 95)), 1, 3))
    row = float(np.clip(7.2 / n_layers, 0.2, 0.36))
    width = float(np.clip(n_experts * 0.13, 5.0, 8.6)) + 2.4
    with Sheet(ax, width, n_layers * row + 1.9) as sheet:
        image = sheet.ax.imshow(
            np.log2(np.clip(relative_LE, 2.0**-9, None)), cmap=DEVIATION, aspect="auto",
            norm=Normalize(-limit, limit), interpolation="nearest",
            extent=(-0.5, n_experts - 0.5, n_layers - 0.5, -0.5),
        )  # fmt: skip
        _axes(sheet.ax, numbers, n_experts)
        if len(unused := np.argwhere(load_LE == 0)) <= _MOST_CROSSES:
            sheet.ax.scatter(unused[:, 1], unused[:, 0], marker="x", s=14, lw=1, color="white")
        _margin(sheet.ax, violation_L, reference)
        _bar(sheet.ax, image, limit, n_layers * row)
        return sheet.finish(
            title or f"How evenly the {bank + ' ' if bank else ''}experts are used, layer by layer",
            _caption(model, n_tokens, k, load_LE, reference) if caption is None else caption,
            _alt(relative_LE, violation_L, numbers, n_tokens, model, reference),
        )


def _axes(ax: Axes, numbers: Sequence[int], n_experts: int) -> None:
    step = 1 if n_experts <= 32 else 4 if n_experts <= 96 else 32
    ax.set_xticks(range(0, n_experts, step))
    ax.set_yticks(range(len(numbers)), [str(n) for n in numbers])
    ax.set_yticks(np.arange(len(numbers) - 1) + 0.5, minor=True)
    ax.set_xticks(np.arange(n_experts - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.5)
    ax.tick_params(which="both", length=0)
    ax.set_xlabel("expert")
    ax.set_ylabel("layer")
    for spine in ax.spines.values():
        spine.set_visible(False)


def _margin(ax: Axes, violation_L: NDArray[np.float64], reference: Reference) -> None:
    """MaxVio in a column of its own, bold where it is beyond what chance gives."""
    place = ax.get_yaxis_transform()
    for row, value in enumerate(violation_L):
        beyond = value > reference.p95
        ax.text(
            1.075, row, f"{value:.2f}", transform=place, ha="right", va="center", fontsize=8,
            fontweight="bold" if beyond else "normal", color=INK if beyond else MUTED,
        )  # fmt: skip
    ax.annotate(
        "MaxVio", (1.075, 1), xycoords="axes fraction", xytext=(0, 15), fontsize=8, ha="right",
        textcoords="offset points", color=INK, va="bottom",
    )  # fmt: skip
    ax.annotate(
        f"95 % of uniform ≤ {reference.p95:.2f}", (1.075, 1), xycoords="axes fraction",
        xytext=(0, 4), textcoords="offset points", fontsize=7, ha="right", color=MUTED, va="bottom",
    )  # fmt: skip


def _bar(ax: Axes, image: Any, limit: int, height: float) -> None:
    bar = ax.figure.colorbar(
        image, ax=ax, extend="both", pad=0.02, shrink=min(1.0, 2.4 / height), aspect=13
    )
    powers = np.arange(-limit, limit + 0.1, 0.5 if limit == 1 else 1)
    bar.set_ticks(powers.tolist(), labels=[_times(p) for p in powers])
    bar.set_label("load, × fair share")
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _times(power: float) -> str:
    if power == 0:
        return "1"
    return f"1/{2**-power:.0f}×" if power in (-1, -2, -3) else f"{2.0**power:.2g}×"


def _caption(
    model: str, n_tokens: int, k: int, load_LE: NDArray[np.float64], reference: Reference
) -> str:
    n_experts = load_LE.shape[1]
    unused = int((load_LE == 0).sum())
    cross = " (×)" if unused <= _MOST_CROSSES else " (darkest blue)"
    return (
        f"{model + ', ' if model else ''}N = {n_tokens:,} tokens × {k} of {n_experts} experts; "
        f"white = fair share, {1 / n_experts:.2%} of the slots. MaxVio: the busiest expert's "
        f"excess over it. Uniform random routing of {n_tokens:,} tokens already gives "
        f"{reference.mean:.2f} on average and more than {reference.p95:.2f} in 5 % of {_DRAWS:,} "
        "draws; bold is beyond that. Tokens of one text are not independent: it is no test."
        + (f" Without any token{cross}: {unused} of {load_LE.size}." if unused else "")
    )


def _alt(
    relative_LE: NDArray[np.float64],
    violation_L: NDArray[np.float64],
    numbers: Sequence[int],
    n_tokens: int,
    model: str,
    reference: Reference,
) -> str:
    row, expert = divmod(int(relative_LE.argmax()), relative_LE.shape[1])
    beyond = int((violation_L > reference.p95).sum())
    return (
        f"Expert load{f' of {model}' if model else ''} over {n_tokens} tokens, {len(numbers)} "
        f"layers x {relative_LE.shape[1]} experts. Busiest: layer {numbers[row]} expert {expert}, "
        f"{relative_LE.max():.2f} times its fair share. MaxVio {violation_L.min():.2f} to "
        f"{violation_L.max():.2f}; {beyond} of {len(numbers)} layers beyond {reference.p95:.2f}, "
        "the 95th percentile of uniform routing."
    )
