"""Flow between layers: columns of experts, ribbons for the tokens that go from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PolyCollection
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from ernie_lab.plots.style import DEVIATION, INK, MUTED, RULE
from ernie_lab.plots.view import Sheet, View

Floats = NDArray[np.float64]

MAX_LAYERS = 40
MAX_EXPERTS = 128
_GAPS = 0.14  # of the height, shared between the experts
_STEPS_A_ROW = 10
_BOX = 0.11  # of a column's width
_LEAST = (0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05)
_BEND = np.linspace(0, 1, 25)


@overload
def plot_expert_paths(
    steps: Any, *, least: float | None = ..., layers: Sequence[int] | None = ..., bank: str = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_expert_paths(
    steps: Any, *, least: float | None = ..., layers: Sequence[int] | None = ..., bank: str = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_expert_paths(
    steps: Any,
    *,
    least: float | None = None,
    layers: Sequence[int] | None = None,
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """What `el.analysis.path_steps` returns: first choices of consecutive mixture layers.

    A column is a layer, a box an expert, as high as its share of first choices, in the order of
    their numbers from above. A ribbon is as wide as the share of tokens that go from one to the
    next; its colour says how many times as many these are as the loads of both experts give.
    Only ribbons of at least `least` of the tokens are drawn, by default so that about 30 a step
    are left and 360 in all; what is hidden is stated. `layers` are those in which the steps to
    draw begin. More than 10 steps go on in a second row, unless `ax` is given.
    """
    flow = _flow(steps, layers)
    if least is None:
        least = _default_least(flow.shares_SEE)
    drawn_SEE = flow.shares_SEE >= max(least, 1e-12)
    if not drawn_SEE.any():
        raise ValueError(
            f"least={least:g}: the widest ribbon has {flow.shares_SEE.max():.3%} of the tokens"
        )
    lines = [flow] if ax is not None else _lines(flow)
    n_experts, n_columns = flow.shares_SEE.shape[1], len(lines[0].layers)
    column = float(np.clip(11.5 / n_columns, 0.5, 1.7))
    width = max(column * n_columns, 4.6)
    height = float(np.clip(n_experts * 0.135, 3.4, 8.4 if len(lines) == 1 else 5.8))
    scale = _scale(flow.lift()[drawn_SEE])
    size = (width + 1.2, (height + 0.45) * len(lines) + 1.3)
    with Sheet(ax, *size, grid=(len(lines), 1)) as sheet:
        first = 0
        for panel, line in zip(sheet.axes, lines, strict=True):
            steps_SEE = drawn_SEE[first : first + len(line.shares_SEE)]
            _draw(panel, line, steps_SEE, scale, column / height, n_columns)
            _name(panel, line, height)
            first += len(line.shares_SEE)
        _bar(sheet, scale, height)
        return sheet.finish(
            title or f"From {bank + ' ' if bank else ''}expert to expert, layer by layer",
            _caption(flow, drawn_SEE, least, model, bank) if caption is None else caption,
            _alt(flow, drawn_SEE, model, bank),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Flow:
    """Shares of tokens by step `[s e e]`; the layers are one more than the steps."""

    shares_SEE: Floats
    layers: list[int]
    n_tokens: int

    @property
    def loads(self) -> Floats:
        return np.concatenate([self.shares_SEE.sum(2), self.shares_SEE[-1:].sum(1)])

    def lift(self) -> Floats:
        load_LE = self.loads
        chance_SEE = load_LE[:-1, :, None] * load_LE[1:, None, :]
        return np.divide(
            self.shares_SEE, chance_SEE, where=chance_SEE > 0, out=np.ones_like(chance_SEE)
        )


def _flow(steps: Any, layers: Sequence[int] | None) -> _Flow:
    dims = getattr(steps, "dims", None)
    if dims != ("layer", "expert", "next_expert") or "next_layer" not in steps.coords:
        raise TypeError(
            "plot_expert_paths draws what el.analysis.path_steps(routing) returns, with dims "
            f"(layer, expert, next_expert) and next_layer; this has {dims or type(steps).__name__}"
        )
    if layers is not None:
        absent = sorted(set(layers) - set(steps.coords["layer"].values.tolist()))
        if absent:
            there = ", ".join(map(str, steps.coords["layer"].values.tolist()))
            raise ValueError(f"no step begins in layer {absent[0]}; they begin in {there}")
        steps = steps.sel(layer=list(layers))
    here = [int(layer) for layer in steps.coords["layer"].values]
    follows = [int(layer) for layer in steps.coords["next_layer"].values]
    if here[1:] != follows[:-1]:
        raise ValueError(f"the steps of layers {here} do not follow on each other")
    counts_SEE = np.asarray(steps.values, dtype=np.float64)
    if len(here) >= MAX_LAYERS or counts_SEE.shape[1] > MAX_EXPERTS:
        raise ValueError(
            f"{len(here) + 1} layers of {counts_SEE.shape[1]} experts; at most {MAX_LAYERS} of "
            f"{MAX_EXPERTS} can be told apart: narrow with layers=[…]"
        )
    totals = counts_SEE.sum((1, 2))
    if not (totals == totals[0]).all() or totals[0] <= 0:
        raise ValueError(f"the steps have {totals.tolist()} tokens; they must all have the same")
    return _Flow(counts_SEE / totals[0], [*here, follows[-1]], int(totals[0]))


def _lines(flow: _Flow) -> list[_Flow]:
    """Many layers in several rows; the last layer of a row is the first of the next."""
    n_steps = len(flow.shares_SEE)
    n_lines = -(-n_steps // _STEPS_A_ROW)
    per_line = -(-n_steps // n_lines)
    return [
        _Flow(
            flow.shares_SEE[at : at + per_line], flow.layers[at : at + per_line + 1], flow.n_tokens
        )
        for at in range(0, n_steps, per_line)
    ]


def _scale(lifts: Floats) -> ScalarMappable:
    """Ends at the power of two that nearly all ribbons lie within."""
    logs = np.abs(np.log2(np.clip(lifts, 2.0**-6, 2.0**6)))
    limit = float(np.clip(np.ceil(np.percentile(logs, 95)), 1, 6))
    return ScalarMappable(Normalize(-limit, limit), DEVIATION)


def _bar(sheet: Sheet, scale: ScalarMappable, height: float) -> None:
    limit = round(scale.get_clim()[1] or 1)
    panels: Any = sheet.axes if len(sheet.axes) > 1 else sheet.ax
    bar = sheet.ax.figure.colorbar(
        scale, ax=panels, pad=0.02, shrink=min(1.0, 2.8 / height / len(sheet.axes)), aspect=15,
        extend="both",
    )  # fmt: skip
    powers = range(-limit, limit + 1, 1 if limit < 4 else 2)
    bar.set_ticks(list(powers), labels=[f"1/{2**-p}×" if p < 0 else f"{2**p}×" for p in powers])
    bar.set_label("tokens, × what the loads give")
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _default_least(shares_SEE: Floats) -> float:
    """A round share that leaves at most about 30 ribbons a step and 360 in all, but a few."""
    wanted = int(np.clip(360, 6 * len(shares_SEE), 30 * len(shares_SEE)))
    widest = np.sort(shares_SEE, axis=None)[::-1]
    at = float(widest[min(wanted, len(widest) - 1)])
    return next((share for share in _LEAST if share >= at), float(widest[0]))


def _tops(load_E: Floats) -> Floats:
    """Upper edge of each expert's box, 0 at the top, 1 at the bottom."""
    gap = _GAPS / max(len(load_E) - 1, 1)
    heights = load_E * (1 - _GAPS)
    return np.concatenate([[0.0], np.cumsum(heights[:-1] + gap)])


def _draw(
    ax: Axes, flow: _Flow, drawn_SEE: NDArray[np.bool_], scale: ScalarMappable, aspect: float,
    n_columns: int,
) -> None:  # fmt: skip
    lifts_SEE = np.log2(np.clip(flow.lift(), 2.0**-9, None))
    tops = [_tops(load_E) for load_E in flow.loads]
    for step, shares_EE in enumerate(flow.shares_SEE):
        heights_EE = shares_EE * (1 - _GAPS)
        # Ribbons leave a box in the order of where they go, and arrive in that of where from.
        left_EE = tops[step][:, None] + np.cumsum(heights_EE, 1) - heights_EE
        right_EE = tops[step + 1][None, :] + np.cumsum(heights_EE, 0) - heights_EE
        found = np.argwhere(drawn_SEE[step])
        # Thin ones last, so that none is covered.
        found = found[np.argsort(-shares_EE[tuple(found.T)], kind="stable")]
        shapes = [
            _ribbon(step, left_EE[i, j], right_EE[i, j], heights_EE[i, j], aspect) for i, j in found
        ]
        colours = scale.to_rgba(lifts_SEE[step][tuple(found.T)])
        ax.add_collection(
            PolyCollection(
                shapes, facecolors=colours, alpha=0.8, linewidths=0.3, edgecolors=MUTED, zorder=2
            )
        )
    for place, load_E in enumerate(flow.loads):
        boxes = [
            [(place - _BOX, top), (place + _BOX, top), (place + _BOX, top + height),
             (place - _BOX, top + height)]
            for top, height in zip(tops[place], load_E * (1 - _GAPS), strict=True)
        ]  # fmt: skip
        ax.add_collection(PolyCollection(boxes, facecolors=INK, linewidths=0, zorder=3))
    ax.set_xlim(-0.35, n_columns - 0.65)
    ax.set_ylim(1.01, -0.01)


def _ribbon(step: int, left: float, right: float, height: float, aspect: float) -> Floats:
    """As wide across its own direction as it is high at its ends: a band of constant height would
    look thin where it is steep. `aspect` is a column's width over the figure's height."""
    bend, slope = _BEND**2 * (3 - 2 * _BEND), 6 * _BEND * (1 - _BEND)
    span = 1 - 2 * _BOX
    x, y = step + _BOX + _BEND * span, left + height / 2 + (right - left) * bend
    along_x, along_y = np.full_like(x, span * aspect), (right - left) * slope
    length = np.hypot(along_x, along_y)
    across_x, across_y = height / 2 * along_y / length / aspect, height / 2 * along_x / length
    across_x = np.clip(across_x, -0.3 * span, 0.3 * span)
    upper = np.column_stack([x + across_x, y - across_y])
    return np.concatenate([upper, np.column_stack([x - across_x, y + across_y])[::-1]])


def _name(ax: Axes, flow: _Flow, height: float) -> None:
    """Layers above their columns, numbers on the boxes that are high enough."""
    ax.xaxis.tick_top()
    ax.set_xticks(range(len(flow.layers)), [str(layer) for layer in flow.layers])
    ax.xaxis.set_label_position("top")
    ax.set_xlabel("layer")
    ax.set_yticks([])
    ax.set_ylabel("expert, from 0 above; box as high as its share")
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    n_experts = flow.loads.shape[1]
    size = 7.0 if n_experts <= 32 else 4.8
    for place, load_E in enumerate(flow.loads):
        for expert, (top, load) in enumerate(zip(_tops(load_E), load_E, strict=True)):
            box = load * (1 - _GAPS)
            if box * height * 72 >= 0.78 * size:
                ax.text(
                    place, top + box / 2, str(expert), ha="center", va="center", fontsize=size,
                    color="white", zorder=4,
                )  # fmt: skip


def _caption(flow: _Flow, drawn_SEE: NDArray[np.bool_], least: float, model: str, bank: str) -> str:
    used = int((flow.shares_SEE > 0).sum())
    carried = float(flow.shares_SEE[drawn_SEE].sum() / len(flow.shares_SEE))
    head = ", ".join(filter(None, (model, f"{bank} bank" if bank else "")))
    return (
        f"{head + ', ' if head else ''}N = {flow.n_tokens:,} tokens, first choices (highest "
        f"selection score). Drawn: {int(drawn_SEE.sum()):,} of {used:,} ribbons, those with at "
        f"least {least:.2%} of the tokens; they carry {carried:.0%} of all steps, the rest is "
        "hidden. White: as many tokens as the loads of both experts give; red more, blue fewer. "
        "Equal numbers in two layers are different experts. Boxes too low for a "
        "number have that between their neighbours'. How much of this is the token's id alone, "
        "path_information(…, given='id') tells."
    )


def _alt(flow: _Flow, drawn_SEE: NDArray[np.bool_], model: str, bank: str) -> str:
    step, i, j = np.unravel_index(int(flow.shares_SEE.argmax()), flow.shares_SEE.shape)
    lift = flow.lift()[step, i, j]
    return (
        f"Flow of {flow.n_tokens} tokens between the {bank + ' ' if bank else ''}experts"
        f"{f' of {model}' if model else ''} of layers {flow.layers[0]} to {flow.layers[-1]}, "
        f"{int(drawn_SEE.sum())} ribbons drawn. Widest: layer {flow.layers[step]} expert {i} to "
        f"layer {flow.layers[step + 1]} expert {j}, {flow.shares_SEE[step, i, j]:.1%} of the "
        f"tokens, {lift:.1f} times what the loads give."
    )
