"""Which experts go together: a heat map over pairs, beside what their loads alone would give."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ernie_lab.plots.similarity import (
    ORDERED,
    Floats,
    Order,
    Square,
    colour_bar,
    draw_square,
    mark_chance,
    name_axes,
    one_layer,
    ordered,
    side_of,
)
from ernie_lab.plots.style import AMOUNT, DEVIATION
from ernie_lab.plots.view import Sheet, View

_LABELS = {
    "share": "share of expert's tokens",
    "jaccard": "tokens of both / of either",
    "lift": "tokens together, × chance",
}
_READ = {
    "share": "Row: of this expert's tokens, the share that also went to the column's.",
    "jaccard": "Tokens that went to both experts, over those that went to either.",
    "lift": (
        "White: together as often as the loads alone give, each token choosing distinct experts "
        "with these loads and nothing else; red more often, blue less."
    ),
}


@overload
def plot_coactivation(
    together: Any, *, layer: int | None = ..., order: Order = ..., bank: str = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_coactivation(
    together: Any, *, layer: int | None = ..., order: Order = ..., bank: str = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_coactivation(
    together: Any,
    *,
    layer: int | None = None,
    order: Order = "alike",
    bank: str = "",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """What `el.analysis.coactivation` returns, for one layer.

    By default experts that go together stand next to each other, under their true numbers;
    `order="number"` keeps them as they are. A lift is drawn on a logarithmic scale, so that twice
    and half as often are equally far from white.
    """
    measure = getattr(together, "attrs", {}).get("measure")
    if measure not in _LABELS:
        raise ValueError(
            "plot_coactivation draws what el.analysis.coactivation(routing) returns; this has no "
            "measure. For other matrices there is plot_similarity"
        )
    one, layer = one_layer(together, layer)
    logs = np.log2(np.clip(np.asarray(one, dtype=float), 2.0**-4, None))
    square = ordered(one, order, alike=logs if measure == "lift" else None)
    side = side_of(square)
    with Sheet(ax, side[0] + 1.95, side[1] + 2.1) as sheet:
        if measure == "lift":
            _draw_lift(sheet.ax, square, side, _chance(together.attrs, len(square.rows)))
        else:
            top = float(square.apart.max(initial=0)) or 1.0
            image = draw_square(sheet.ax, square, AMOUNT, Normalize(0, top), side, _share)
            colour_bar(sheet.ax, image, _LABELS[measure], side[1])
        same = "expert" if measure != "share" else "also went to expert"
        name_axes(sheet.ax, "expert", same)
        return sheet.finish(
            title or _title(bank, layer),
            _caption(square, together.attrs, model, bank, order) if caption is None else caption,
            _alt(square, together.attrs, model, bank, layer),
        )


def _draw_lift(
    ax: Axes, square: Square, side: tuple[float, float], chance: tuple[float, float]
) -> None:
    # The scale ends at 2, 4 or 8 times; a pair that never met is the darkest blue.
    apart = square.apart
    spread = np.abs(np.log2(apart[apart > 0]))
    limit = int(np.clip(np.ceil(np.percentile(spread, 98)), 1, 3)) if spread.size else 1
    with np.errstate(divide="ignore"):
        logs: Floats = np.log2(square.values)
    logs[np.isneginf(logs)] = -9.0
    image = draw_square(ax, square, DEVIATION, Normalize(-limit, limit), side, _times, logs)
    bar = colour_bar(ax, image, _LABELS["lift"], side[1], extend="both")
    powers = np.arange(-limit, limit + 0.1, 0.5 if limit == 1 else 1)
    bar.set_ticks(powers.tolist(), labels=[_power(p) for p in powers])
    mark_chance(bar, [float(np.log2(bound)) for bound in chance if bound > 0])


def _chance(told: dict[str, Any], n_experts: int) -> tuple[float, float]:
    """Within which 95 % of the lifts of two experts of average load lie when loads decide."""
    from scipy.stats import binom

    k, n_tokens = int(told["k"]), int(told["n_tokens"])
    pair = k * (k - 1) / (n_experts * (n_experts - 1))
    low, high = binom.ppf([0.025, 0.975], n_tokens, pair) / (n_tokens * pair)
    return float(low), float(high)


def _share(value: float) -> str:
    return f"{value:.2f}".replace("0.", ".", 1) if value < 0.995 else "1"


def _times(value: float) -> str:
    return "0" if value == 0 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _power(power: float) -> str:
    if power in (-1, -2, -3):
        return f"1/{2**-power:.0f}×"
    return f"{2.0**power:.2g}×"


def _title(bank: str, layer: int | None) -> str:
    where = "" if layer is None else f" in layer {layer}"
    return f"Which {bank + ' ' if bank else ''}experts go together{where}"


def _caption(square: Square, told: dict[str, Any], model: str, bank: str, order: Order) -> str:
    n_experts, k = len(square.rows), int(told["k"])
    i, j, high = square.extreme(True)
    apart = square.apart
    head = ", ".join(filter(None, (model, f"{bank} bank" if bank else "")))
    lines = [
        f"{head + ', ' if head else ''}N = {told['n_tokens']:,} tokens × {k} of {n_experts} "
        f"experts. {_READ[told['measure']]}",
        f"From {apart.min():.2f} to {apart.max():.2f}; most: {i} and {j}, {high:.2f}.",
    ]
    if told["measure"] == "lift":
        low, most = _chance(told, n_experts)
        lines.append(
            f"Lines on the colour bar: chance alone leaves 95 % of pairs of average load within "
            f"{low:.2f} to {most:.2f} (if tokens were independent)."
        )
    elif told["measure"] == "share":
        lines.append(f"Balanced experts by chance: {(k - 1) / (n_experts - 1):.2f}.")
    if order == "alike":
        lines.append(ORDERED)
    lines.append(
        "The largest of many is too large: coactivated_pairs picks on half of the texts, reports "
        "on the other."
    )
    return " ".join(lines)


def _alt(square: Square, told: dict[str, Any], model: str, bank: str, layer: int | None) -> str:
    i, j, high = square.extreme(True)
    m, n, low = square.extreme(False)
    where = "".join(
        (f" of {model}" if model else "", f", {bank} bank" if bank else "",
         "" if layer is None else f", layer {layer}")
    )  # fmt: skip
    return (
        f"Heat map of co-activation ({_LABELS[told['measure']]}){where}, {len(square.rows)} "
        f"experts over {told['n_tokens']} tokens. Most: experts {i} and {j}, {high:.2f}; least: "
        f"{m} and {n}, {low:.2f}."
    )
