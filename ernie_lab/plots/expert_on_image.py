"""Where on a picture experts worked: the weight of one by layer, or of all experts of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ernie_lab.plots.panels import (
    LEAST_BOX,
    VEIL,
    box_lines,
    draw_picture,
    lay_over,
    layout,
    number_axes,
    panel_title,
    value_bar,
)
from ernie_lab.plots.pictures import (
    Floats,
    Shown,
    Span,
    TraceLike,
    bank_of,
    chosen_layers,
    model_name,
    shown,
)
from ernie_lab.plots.view import View

MAX_PANELS = 96
_GRID = (4, 8)


@overload
def plot_expert_on_image(
    trace: TraceLike, *, expert: int | None = ..., experts: Sequence[int] | None = ...,
    image: int = ..., layer: int | None = ..., layers: Sequence[int] | None = ...,
    frame: int | None = ..., bank: str = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_expert_on_image(
    trace: TraceLike, *, expert: int | None = ..., experts: Sequence[int] | None = ...,
    image: int = ..., layer: int | None = ..., layers: Sequence[int] | None = ...,
    frame: int | None = ..., bank: str = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_expert_on_image(
    trace: TraceLike,
    *,
    expert: int | None = None,
    experts: Sequence[int] | None = None,
    image: int = 0,
    layer: int | None = None,
    layers: Sequence[int] | None = None,
    frame: int | None = None,
    bank: str = "vision",
    rows: Span | None = None,
    cols: Span | None = None,
    model: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """The weight of one `expert` in each token's box, a panel per layer; bare: not chosen.

    Without `expert` one `layer` is needed: then there is a panel per expert, in their order
    (`experts=[…]` takes some of them). All panels share the scale 0 to 1.
    """
    ledger = bank_of(trace, bank)
    picture = shown(trace, image, frame, rows, cols)
    numbers, places = chosen_layers(ledger.expert_ids, layer, layers)
    wanted = _experts(expert, experts, numbers, trace.n_experts)
    per_layer = expert is not None
    pairs = [(place, e) for place in places for e in wanted]
    if len(pairs) > MAX_PANELS:
        raise ValueError(
            f"{len(pairs)} panels, at most {MAX_PANELS}: narrow with "
            f"{'layers=[…]' if per_layer else 'experts=[…]'}"
        )
    weights = [weight_of(ledger, picture, place, e) for place, e in pairs]
    names = [f"layer {n}" for n in numbers] if per_layer else [f"expert {e}" for e in wanted]
    before = 1 if per_layer and ax is None else 0
    n = len(pairs) + before
    plan = layout(
        n, picture, least=LEAST_BOX, narrow="layers=[…]" if per_layer else "experts=[…]",
        columns=None if per_layer or n <= _GRID[0] else [c for c in _GRID if c <= n],
        narrowest=0.95 if n > 16 else 1.5,
    )  # fmt: skip
    box = plan.width / picture.shape[1]
    with plan.sheet(ax, bar=True) as sheet:
        panels = plan.axes(sheet, alone=n == 1, bar=True)
        if before:
            draw_picture(panels[0], picture, pale=False)
            panel_title(panels[0], "what the model saw")
        drawn = None
        for panel, name, weight_RC in zip(panels[before:], names, weights, strict=True):
            draw_picture(panel, picture, pale=True)
            drawn = lay_over(panel, picture, weight_RC, Normalize(0, 1), VEIL, box)
            if box > 0.12:
                box_lines(panel, picture, box)
            chosen, seen = _counts(weight_RC)
            wide = plan.width > 1.4
            panel_title(
                panel, f"{name}: {chosen} of {seen}" if wide else f"{name}: {chosen}",
                muted=chosen == 0, size=8.5 if wide else 7.5,
            )  # fmt: skip
        for i, panel in enumerate(panels):
            left, bottom = plan.is_edge(i)
            number_axes(panel, picture, plan.width, left=left, bottom=bottom)
        value_bar(sheet, drawn, "weight in the routed output", plan.size[1])
        who = (
            f"{bank} expert {expert}" if per_layer else f"each {bank} expert of layer {numbers[0]}"
        )
        return sheet.finish(
            title or f"Where on {picture.label} {who} worked",
            _caption(trace, ledger, picture, bank, model) if caption is None else caption,
            f"{picture.label}, {picture.size}; where {who} was chosen. {_alt(names, weights)}",
        )


def weight_of(ledger: Any, picture: Shown, place: int, expert: int) -> Floats:
    """`[row col]`: the expert's weight, 0 where it was not chosen, NaN where no token is."""
    ids_NK, weights_NK = ledger.expert_ids.values[place], ledger.expert_weights.values[place]
    weight_N = np.where(ids_NK == expert, weights_NK, 0.0).sum(-1)
    return picture.folded(weight_N, picture.indices(ledger.expert_ids))


def _experts(
    expert: int | None, experts: Sequence[int] | None, layers: Sequence[int], n_experts: int
) -> list[int]:
    if expert is not None and experts is not None:
        raise ValueError("expert= and experts= are both given: one of them is needed")
    if expert is None and len(layers) != 1:
        raise ValueError(
            f"a panel per expert shows one layer, not {len(layers)}: name it with layer=, for "
            f"example layer={layers[0]}, or one expert with expert="
        )
    wanted = [expert] if expert is not None else range(n_experts) if experts is None else experts
    absent = [e for e in wanted if not 0 <= e < n_experts]
    if absent or not len(wanted):
        raise ValueError(f"experts {absent}: there are experts 0 to {n_experts - 1}")
    return [int(e) for e in wanted]


def _counts(weight_RC: Floats) -> tuple[int, int]:
    """Boxes in which the expert was chosen, and boxes with a token."""
    return int((weight_RC > 0).sum()), int(np.isfinite(weight_RC).sum())


def _caption(trace: TraceLike, ledger: Any, picture: Shown, bank: str, model: str | None) -> str:
    name, k, n = model_name(trace, model), ledger.expert_ids.shape[-1], trace.n_experts
    source = f"{name}, " if name else ""
    missing = "" if picture.n_tokens == picture.positions_RC.size else " ×: token not in the trace."
    return (
        f"{source}{picture.size}, {k} of {n} {bank} experts each. Above each panel: in how many "
        f"boxes the expert was chosen; even use would be {picture.n_tokens * k / n:.1f} of "
        f"{picture.n_tokens}. Bare picture: not chosen. A picture of who was chosen, not of what "
        f"the expert does.{missing}"
    )


def _alt(names: Sequence[str], weights: Sequence[Floats]) -> str:
    counts = [_counts(weight_RC)[0] for weight_RC in weights]
    order = sorted(range(len(names)), key=lambda i: -counts[i])[:6]
    parts = [f"{names[i]}: {counts[i]} of {_counts(weights[i])[1]} boxes" for i in order]
    never = sum(count == 0 for count in counts)
    rest = f" In {never} of {len(counts)} panels it was never chosen." if never else ""
    return f"Most in {'; '.join(parts)}{'; …' if len(counts) > 6 else ''}.{rest}"
