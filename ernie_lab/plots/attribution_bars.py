"""A number as the sum of its parts: what each component added, the rest, and whether it closes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ernie_lab.plots.given import require
from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.tokens import shown_text
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    from ernie_lab.analysis.attribution import Attribution

MAX_BARS = 60
_FOR, _AGAINST, _REST = OKABE_ITO["blue"], OKABE_ITO["orange"], "#b4bcc7"
_BANKS = ("text", "vision")
_NAMES = {
    "embed": "embedding",
    "head": "attention head",
    "attn_bias": "attention bias",
    "mlp": "dense MLP",
    "shared": "shared experts",
    "head_bias": "bias of the output head",
    "neuron": "neuron",
    "mlp_bias": "bias of the MLP",
}


@overload
def plot_attribution(
    attribution: Attribution, row: int | None = ..., *, n: int = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_attribution(
    attribution: Attribution, row: int | None = ..., *, n: int = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_attribution(
    attribution: Attribution,
    row: int | None = None,
    *,
    n: int = 12,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Signed bars: what the largest `n` components add to a number, and all others together.

    `attribution` is what `el.analysis.router_attribution`, `direct_logit_attribution` or
    `neuron_attribution` returned. `row` is one of its numbers (a row of `targets`); None draws the
    mean over all of them, with thin lines from the 5th to the 95th percentile. The last bar is
    the sum of the others; the caption says what the model had and how far the sum is from it.
    """
    require(
        attribution, "Attribution", "plot_attribution", "el.analysis.direct_logit_attribution(…)"
    )
    summed = _Sum.of(attribution, row, n)
    names = [*summed.names, *summed.rest_name, "sum"]
    values = np.array([*summed.values, *summed.rest, summed.total])
    width = 4.6 + float(np.clip(max(map(len, names)) * 0.075, 1.2, 3.4))
    with Sheet(ax, width, len(names) * 0.29 + 1.95) as sheet:
        axes = sheet.ax
        y = np.arange(len(names), dtype=float)
        y[-1] += 0.35  # the sum is no summand
        _bars(axes, y, values, len(summed.rest))
        if summed.spread is not None:
            for at, (low, high) in zip(y, summed.spread, strict=False):
                axes.plot([low, high], [at, at], color=INK, lw=1.0, zorder=4)
        _numbers(axes, y, values, summed.spread)
        axes.axvline(0, color=INK, lw=0.9, zorder=3)
        axes.axhline(y[-1] - 0.67, color=MUTED, lw=0.8)
        axes.set_yticks(y, names, parse_math=False)
        axes.set_ylim(y[-1] + 0.6, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=RULE, lw=0.5, zorder=0)
        axes.set_axisbelow(True)
        axes.set_xlabel("adds to it (logits)")
        axes.set_ylabel("component")
        _legend(axes, bool(summed.rest))
        return sheet.finish(
            title or _title(attribution, row),
            _caption(attribution, summed, row, model) if caption is None else caption,
            _alt(names, values, summed, model),
        )


@dataclass(frozen=True, slots=True)
class _Sum:
    """The bars, in falling size; `rest` is empty where every component has its own."""

    names: list[str]
    values: Floats
    rest_name: list[str]
    rest: list[float]
    total: float
    exact: float
    spread: Floats | None  # low and high over the numbers, for each bar but the last

    @classmethod
    def of(cls, attribution: Attribution, row: int | None, n: int) -> _Sum:
        n_rows = len(attribution.values)
        if not n_rows or (row is not None and not -n_rows <= row < n_rows):
            raise ValueError(f"row={row}: the attribution has {n_rows} numbers")
        if not 0 < n <= MAX_BARS:
            raise ValueError(f"n={n} bars, 1 to {MAX_BARS} can be drawn")
        of_rows = attribution.values if row is None else attribution.values[[row]]
        value_C = of_rows.mean(0)
        order = np.argsort(-np.abs(value_C), kind="stable")
        first, others = order[:n], order[n:]
        rest = [float(value_C[others].sum())] if len(others) else []
        spread = None
        if row is None and n_rows > 1:
            parts = [of_rows[:, first], *([of_rows[:, others].sum(1, keepdims=True)] * len(rest))]
            spread = np.percentile(np.concatenate(parts, 1), [5, 95], axis=0).T
        exact_R = attribution.targets["value"].to_numpy(dtype=float)
        return cls(
            names=[_name(attribution, int(c), row) for c in first],
            values=value_C[first],
            rest_name=[f"the other {len(others)}"] if rest else [],
            rest=rest,
            total=float(value_C.sum()),
            exact=float(exact_R.mean() if row is None else exact_R[row]),
            spread=spread,
        )


def _name(attribution: Attribution, component: int, row: int | None) -> str:
    """`layer 4, attention head 3`; of one number, the expert that was in a slot."""
    kind, layer, index = (
        attribution.components[name].iloc[component] for name in ("kind", "layer", "index")
    )
    if kind != "slot":
        name = _NAMES.get(kind, kind)
        where = name if _absent(index) else f"{name} {index}"
    elif row is None:
        where = f"expert in slot {index}"
    else:
        expert = attribution.experts[row, component]
        bank = attribution.banks[row, component]
        two = bool((attribution.banks > 0).any())
        where = f"{_BANKS[bank]} expert {expert}" if two else f"expert {expert}"
    return where if _absent(layer) else f"layer {layer}, {where}"


def _absent(value: Any) -> bool:
    import pandas as pd

    return bool(pd.isna(value))


def _bars(ax: Axes, y: Floats, values: Floats, n_rest: int) -> None:
    colours = [_FOR if value >= 0 else _AGAINST for value in values]
    colours[-1] = INK
    if n_rest:
        colours[-2] = _REST
    ax.barh(y, values, height=0.66, color=colours, zorder=2)


def _numbers(ax: Axes, y: Floats, values: Floats, spread: Floats | None) -> None:
    lows, highs = np.minimum(values, 0.0), np.maximum(values, 0.0)
    if spread is not None:
        lows[: len(spread)] = np.minimum(lows[: len(spread)], spread[:, 0])
        highs[: len(spread)] = np.maximum(highs[: len(spread)], spread[:, 1])
    for at, value, low, high in zip(y, values, lows, highs, strict=True):
        right = value >= 0
        ax.annotate(
            f"{value:+.3g}", (high if right else low, at),
            xytext=(4 if right else -4, 0), textcoords="offset points", va="center",
            ha="left" if right else "right", fontsize=7.5, color=INK,
        )  # fmt: skip
    low, high = float(lows.min()), float(highs.max())
    span = (high - low) or 1.0
    room = 0.14 if (values < 0).any() else 0.02
    ax.set_xlim(low - room * span, high + 0.14 * span)


def _legend(ax: Axes, rest: bool) -> None:
    handles = [Patch(fc=_FOR, label="for"), Patch(fc=_AGAINST, label="against")]
    handles += [Patch(fc=_REST, label="the others together")] if rest else []
    ax.legend(
        handles=[*handles, Patch(fc=INK, label="sum")], loc="lower right", bbox_to_anchor=(1, 1.0),
        ncols=4, borderaxespad=0.2, columnspacing=1.4, handlelength=1.4,
    )  # fmt: skip


def _title(attribution: Attribution, row: int | None) -> str:
    targets = attribution.targets
    n = len(targets)
    if row is None:
        return f"{attribution.title}: mean of {n:,} number{'' if n == 1 else 's'}"
    one = targets.iloc[row]
    at = f"token “{shown_text(one['text'])}” (position {one['pos']})"
    if "expert" in targets:
        bank = f", {one['bank']} bank" if (attribution.banks > 0).any() else ""
        return (
            f"Why expert {one['expert']} rather than {one['against']} "
            f"in layer {one['layer']}{bank}: {at}"
        )
    against = f" against token id {one['against']}" if "against" in targets else ""
    return f"{attribution.title}: token id {one['token']}{against} after {at}"


def _caption(attribution: Attribution, summed: _Sum, row: int | None, model: str) -> str:
    mean = "the mean of the values " if row is None else "the value "
    parts = [
        f"{model}." if model else "",
        f"{attribution.title}." if row is not None else "",
        f"The bars sum to {summed.total:+.6f}; {mean}that the model had: {summed.exact:+.6f}.",
        f"Residual error of all {len(attribution.targets):,} sums: "
        f"{attribution.residual_error:.1e} of the largest.",
    ]
    if summed.spread is not None:
        parts.append(
            "Thin lines: 5th to 95th percentile over the numbers. Signs cancel in a mean; "
            ".by(…) gives mean sizes."
        )
    return " ".join(filter(None, parts))


def _alt(names: list[str], values: Floats, summed: _Sum, model: str) -> str:
    shown = "; ".join(f"{name} {value:+.3g}" for name, value in zip(names, values, strict=True))
    of = f" of {model}" if model else ""
    had = f"The model had {summed.exact:+.3g}."
    return f"Bars of what components{of} add to a number: {shown}. {had}"
