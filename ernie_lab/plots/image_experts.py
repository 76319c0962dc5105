"""A picture or a clip, each token's box tinted and numbered by the expert that it chose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ernie_lab.plots.panels import (
    HUES,
    LEAST_NUMBERED,
    MAX_NUMBERS,
    VEIL,
    Layout,
    box_lines,
    crosses,
    draw_picture,
    lay_over,
    layout,
    number_axes,
    panel_title,
    value_bar,
    write_in_boxes,
)
from ernie_lab.plots.pictures import (
    Floats,
    Integers,
    Shown,
    Span,
    TraceLike,
    bank_of,
    chosen_layers,
    medium_of,
    model_name,
    shown,
)
from ernie_lab.plots.view import View

MAX_PAIRS = 8
_RANKS = ("first", "second", "third")
_FULL_TITLE = 1.9  # inches


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """One slot of one layer on one picture; -1 and NaN where the bank did not see the token."""

    ids_RC: Integers
    weights_RC: Floats

    @classmethod
    def of(cls, ledger: Any, picture: Shown, layer: int, slot: int) -> Choices:
        """`layer` is the place on the axis, not the layer's number."""
        ids, weights = ledger.expert_ids, ledger.expert_weights
        index_RC = picture.indices(ids)
        ids_RC = picture.folded(np.asarray(ids.values[layer, :, slot], float), index_RC)
        weights_RC = picture.folded(np.asarray(weights.values[layer, :, slot], float), index_RC)
        return cls(np.where(np.isfinite(ids_RC), ids_RC, -1).astype(np.int64), weights_RC)

    def counts(self, n_experts: int) -> Integers:
        return np.bincount(self.ids_RC[self.ids_RC >= 0], minlength=n_experts)


@overload
def plot_image_experts(
    trace: TraceLike, *, image: int = ..., layer: int | None = ...,
    layers: Sequence[int] | None = ..., slot: int = ..., frame: int | None = ...,
    bank: str = ..., rows: Span | None = ..., cols: Span | None = ..., model: str | None = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_image_experts(
    trace: TraceLike, *, image: int = ..., layer: int | None = ...,
    layers: Sequence[int] | None = ..., slot: int = ..., frame: int | None = ...,
    bank: str = ..., rows: Span | None = ..., cols: Span | None = ..., model: str | None = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_image_experts(
    trace: TraceLike,
    *,
    image: int = 0,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    slot: int = 0,
    frame: int | None = None,
    bank: str = "vision",
    rows: Span | None = None,
    cols: Span | None = None,
    model: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """The picture, then one panel per layer: in each token's box the expert it chose first.

    Up to 8 experts have a colour each; of more the colour is the weight, and only the number
    tells who it is. `slot=1` shows the second choice, and so on (in the order of the selection
    scores). Of a clip the pair of frames with `frame` is shown, see `plot_clip_experts`. `rows`
    and `cols` `(start, stop)` narrow the picture, in tokens.
    """
    ledger = bank_of(trace, bank)
    picture = shown(trace, image, frame, rows, cols)
    numbers, places = chosen_layers(ledger.expert_ids, layer, layers)
    slot = _slot(ledger, slot)
    choices = [Choices.of(ledger, picture, place, slot) for place in places]
    with_picture = 0 if ax is not None else 1
    plan = layout(len(numbers) + with_picture, picture, least=LEAST_NUMBERED, narrow="layers=[…]")
    _refuse_many(len(numbers), picture, "layers=[…]")
    n_experts = trace.n_experts
    with plan.sheet(ax, bar=n_experts > len(HUES)) as sheet:
        panels = plan.axes(sheet, alone=plan.n == 1, bar=n_experts > len(HUES))
        if with_picture:
            draw_picture(panels[0], picture, pale=False)
            panel_title(panels[0], "what the model saw")
        drawn = None
        for ax_, number, one in zip(panels[with_picture:], numbers, choices, strict=True):
            drawn = draw_choices(ax_, picture, one, n_experts, plan)
            most = f": {_busiest(one, n_experts)}" if plan.width >= _FULL_TITLE else ""
            panel_title(ax_, f"layer {number}{most}")
        for i, panel in enumerate(panels):
            left, bottom = plan.is_edge(i)
            number_axes(panel, picture, plan.width, left=left, bottom=bottom)
        if drawn is not None:
            value_bar(sheet, drawn, "weight in the routed output", plan.size[1])
        named = [(f"layer {n}", one) for n, one in zip(numbers, choices, strict=True)]
        return sheet.finish(
            title or f"Which {bank} expert each part of {picture.label} went to{_rank(slot)}",
            _caption(trace, picture, ledger, slot, bank, model) if caption is None else caption,
            f"{picture.label}, {picture.size}, each box with the {bank} expert it went to"
            f"{_rank(slot)}. Most often, {_often(named, n_experts)}",
        )


def plot_clip_experts(
    trace: TraceLike,
    *,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    image: int = 0,
    slot: int = 0,
    frames: Span | None = None,
    bank: str = "vision",
    model: str | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """A clip from left to right: each column is a pair of frames, which share their tokens.

    Above the two frames as the model saw them, below one line per layer as in
    `plot_image_experts`. `image` is the clip's number in `trace.media`; `frames=(start, stop)`
    narrows it.
    """
    ledger = bank_of(trace, bank)
    medium = medium_of(trace, image)
    if medium.kind == "image":
        raise ValueError(f"picture {image} is an image, not a clip: take plot_image_experts")
    start, stop = (0, int(medium.grid[0])) if frames is None else frames
    pairs = range(start - start % 2, stop, 2)
    if not 0 < len(pairs) <= MAX_PAIRS:
        raise ValueError(
            f"{len(pairs)} pairs of frames, possible are 1 to {MAX_PAIRS}: narrow with "
            f"frames=(start, stop), for example frames=(0, {2 * MAX_PAIRS})"
        )
    numbers, places = chosen_layers(ledger.expert_ids, layer, layers)
    slot, n_experts = _slot(ledger, slot), trace.n_experts
    pictures = [shown(trace, image, frame) for frame in pairs]
    n = len(pairs) * (2 + len(numbers))
    plan = layout(
        n, pictures[0], least=LEAST_NUMBERED, narrow="layers=[…] or frames=(start, stop)",
        columns=[len(pairs)], narrowest=0.9,
    )  # fmt: skip
    _refuse_many(len(pairs) * len(numbers), pictures[0], "layers=[…] or frames=(start, stop)")
    every = []
    with plan.sheet(None, bar=n_experts > len(HUES)) as sheet:
        panels = plan.axes(sheet, alone=False, bar=n_experts > len(HUES))
        drawn = None
        for column, picture in enumerate(pictures):
            mine = panels[column :: len(pairs)]
            draw_picture(mine[0], picture, pale=False)
            draw_picture(mine[1], _other(picture), pale=False)
            panel_title(mine[0], _at(medium, picture.frame), size=7.5)
            panel_title(mine[1], _at(medium, picture.frame + 1), size=7.5)
            for ax, number, place in zip(mine[2:], numbers, places, strict=True):
                one = Choices.of(ledger, picture, place, slot)
                every.append((f"layer {number}, frame {picture.frame}", one))
                drawn = draw_choices(ax, picture, one, n_experts, plan)
                panel_title(ax, f"layer {number}" if column == 0 else "", size=7.5)
        for i, panel in enumerate(panels):
            left, bottom = plan.is_edge(i)
            number_axes(panel, pictures[0], plan.width, left=left, bottom=bottom)
        if drawn is not None:
            value_bar(sheet, drawn, "weight in the routed output", plan.size[1])
        first = pictures[0]
        view = sheet.finish(
            title
            or f"Which {bank} expert each part of {first.name} went to{_rank(slot)}, "
            "from frame to frame",
            _caption(trace, first, ledger, slot, bank, model)
            + " Two frames one below the other share their tokens."
            if caption is None
            else caption,
            f"{first.name}, frames {pairs[0]} to {pairs[-1] + 1}, {first.size} for two frames, "
            f"each box with the {bank} expert it went to{_rank(slot)}. Most often, "
            + _often(every, n_experts),
        )
        assert isinstance(view, View)
        return view


def draw_choices(ax: Axes, picture: Shown, one: Choices, n_experts: int, plan: Layout) -> Any:
    """Returns what a colour bar is made of, None where colour is only a name."""
    box = plan.width / picture.shape[1]
    draw_picture(ax, picture, pale=True)
    drawn = None
    if n_experts <= len(HUES):
        bare = np.zeros((1, 4))  # the last, so that -1 takes it
        ax.imshow(
            np.vstack([HUES, bare])[one.ids_RC], extent=picture.extent, interpolation="nearest",
            zorder=2, aspect=ax.get_aspect(),
        )  # fmt: skip
        crosses(ax, picture, one.ids_RC < 0, box)
    else:
        drawn = lay_over(ax, picture, one.weights_RC, Normalize(0, 1), VEIL, box)
    box_lines(ax, picture, box)
    texts = [[str(e) if e >= 0 else "" for e in line] for line in one.ids_RC.tolist()]
    write_in_boxes(ax, picture, texts, box, digits=len(str(n_experts - 1)))
    return drawn


def _other(picture: Shown) -> Shown:
    """The second frame of the pair, in the same boxes."""
    assert picture.second_YXC is not None
    return Shown(
        picture.image, picture.kind, picture.frame + 1, picture.frames, picture.sequence,
        picture.second_YXC, picture.positions_RC, picture.row, picture.col,
    )  # fmt: skip


def _at(medium: Any, frame: int) -> str:
    times = medium.timestamps
    return f"frame {frame}" + (f", {times[frame]:.1f} s" if frame < len(times) else "")


def _slot(ledger: Any, slot: int) -> int:
    k = ledger.expert_ids.shape[-1]
    if not 0 <= slot < k:
        raise ValueError(f"slot={slot}: {k} experts are chosen per token, slots 0 to {k - 1}")
    return slot


def _refuse_many(n: int, picture: Shown, narrow: str) -> None:
    if n * picture.positions_RC.size > MAX_NUMBERS:
        raise ValueError(
            f"{n} x {picture.positions_RC.size} numbered boxes, at most {MAX_NUMBERS}: narrow with "
            f"{narrow}, or take a part of the picture, rows=(start, stop) and cols=(start, stop)"
        )


def _busiest(one: Choices, n_experts: int) -> str:
    counts_E = one.counts(n_experts)
    return f"expert {counts_E.argmax()} in {counts_E.max()} of {counts_E.sum()}"


def _caption(
    trace: TraceLike, picture: Shown, ledger: Any, slot: int, bank: str, model: str | None
) -> str:
    name, k = model_name(trace, model), ledger.expert_ids.shape[-1]
    n = trace.n_experts
    source = f"{name}, " if name else ""
    which = "" if slot == 0 else f"{_RANKS[slot] if slot < len(_RANKS) else f'{slot + 1}th'} "
    rank = f"with the {which}highest selection score"
    colour = (
        "The colour repeats the number"
        if n <= len(HUES)
        else "The number is the expert, the colour its weight"
    )
    missing = "" if picture.n_tokens == picture.positions_RC.size else " ×: token not in the trace."
    return (
        f"{source}{picture.size}, {k} of {n} {bank} experts each; in the box: the one {rank}. "
        f"{colour}. Even use would put each expert in {1 / n:.1%} of the boxes. A picture of who "
        f"was chosen, not of what the expert does.{missing}"
    )


def _rank(slot: int) -> str:
    return f" {_RANKS[slot]}" if slot < len(_RANKS) else f", choice {slot + 1}"


def _often(named: Sequence[tuple[str, Choices]], n_experts: int) -> str:
    parts = []
    for name, one in named:
        counts_E = one.counts(n_experts)
        top = [e for e in np.argsort(-counts_E, kind="stable")[:3].tolist() if counts_E[e]]
        listed = ", ".join(f"{e} in {counts_E[e]}" for e in top)
        parts.append(f"{name}: {listed or 'none'} of {counts_E.sum()} boxes")
    return "; ".join(parts[:6]) + ("; …" if len(parts) > 6 else ".")
