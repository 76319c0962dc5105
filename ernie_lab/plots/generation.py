"""One quantity along the tokens of a prompt and its continuation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import ArrayLike, NDArray

from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, PALE
from ernie_lab.plots.token_names import Tokens, names
from ernie_lab.plots.tokens import coordinate, labels, prompt_length
from ernie_lab.plots.view import Sheet, View

_LABELLED = 120
MAX_TOKENS = 4000


@overload
def plot_generation(
    values: ArrayLike, *, name: str, n_prompt: int | None = ..., unit: str = ...,
    tokens: Tokens | None = ..., layers: Sequence[int] | None = ...,
    baseline: float | None = ..., model: str = ..., ax: None = None, title: str | None = ...,
    caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_generation(
    values: ArrayLike, *, name: str, n_prompt: int | None = ..., unit: str = ...,
    tokens: Tokens | None = ..., layers: Sequence[int] | None = ...,
    baseline: float | None = ..., model: str = ..., ax: Axes, title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_generation(
    values: ArrayLike,
    *,
    name: str,
    n_prompt: int | None = None,
    unit: str = "",
    tokens: Tokens | None = None,
    layers: Sequence[int] | None = None,
    baseline: float | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """`values` `[token]` or `[layer, token]` by token, the border prompt | generated drawn.

    The border is `n_prompt` or, by default, the first "decode" of the coordinate `phase`.
    With layers: the median, and the range between the lowest and the highest layer shaded.
    `baseline` is a value to compare with (for example the router entropy of a uniform choice).
    """
    values_LT = np.atleast_2d(np.asarray(values, dtype=np.float64))
    n_layers, n_tokens = values_LT.shape
    if values_LT.ndim != 2 or not 0 < n_tokens <= MAX_TOKENS:
        raise ValueError(
            f"values of shape {values_LT.shape}: (layer, token) or (token,), at most {MAX_TOKENS} "
            "tokens; pass values[..., start:stop]"
        )
    border = prompt_length(values) if n_prompt is None else n_prompt
    n_prompt = n_tokens if border is None else border
    words = names(values, tokens)
    if words is not None and len(words) != n_tokens:
        raise ValueError(f"{len(words)} tokens for {n_tokens} values")
    known = layers if layers is not None else coordinate(values, "layer")
    label = labels(words) if words is not None and n_tokens <= _LABELLED else None
    below = 0.0 if label is None else max(map(len, label.texts)) * 0.07
    with Sheet(ax, float(np.clip(n_tokens * 0.16 + 1.4, 6.4, 11.5)), 3.4 + below) as sheet:
        axes = sheet.ax
        x = np.arange(n_tokens)
        if n_prompt < n_tokens:
            _border(axes, n_prompt)
        if n_layers > 1:
            axes.fill_between(
                x, np.nanmin(values_LT, 0), np.nanmax(values_LT, 0), color=OKABE_ITO["sky"],
                alpha=0.35, lw=0, zorder=2, label="lowest to highest layer",
            )  # fmt: skip
        middle = np.nanmedian(values_LT, axis=0)
        axes.plot(
            x, middle, color=OKABE_ITO["blue"], lw=1.5, zorder=3,
            marker="o" if n_tokens <= 160 else None, ms=3.2,
            label="median over layers" if n_layers > 1 else name,
        )  # fmt: skip
        if baseline is not None:
            axes.axhline(baseline, color=MUTED, lw=0.9, ls=(0, (4, 3)), label="baseline", zorder=1)
        axes.set_xlim(-0.6, n_tokens - 0.4)
        axes.margins(y=0.12)
        if label is not None:
            axes.set_xticks(
                x, label.texts, rotation=90, fontfamily=list(label.fonts), parse_math=False,
                fontsize=8 if n_tokens <= 60 else 6,
            )  # fmt: skip
            axes.tick_params(axis="x", length=0)
        elif (positions := coordinate(values, "pos")) is not None:
            places = [int(i) for i in axes.get_xticks() if 0 <= i < n_tokens]
            axes.set_xticks(places, [str(positions[i]) for i in places])
        axes.set_xlabel("token" if label is not None else "position")
        axes.set_ylabel(f"{name} ({unit})" if unit else name)
        if n_layers > 1 or baseline is not None:
            axes.legend(
                loc="lower right",
                bbox_to_anchor=(1, 1.07),
                ncols=3,
                borderaxespad=0,
                columnspacing=1.4,
            )
        what = f"{name[:1].upper()}{name[1:]} along the tokens"
        note = f"Tokens shown as boxes: {label.full}" if label and label.boxed else ""
        own = _caption(model, n_prompt, n_tokens, known, baseline, label.note if label else "")
        return sheet.finish(
            title or what, own if caption is None else caption,
            _alt(name, unit, middle, n_prompt, model), note,
        )  # fmt: skip


def _border(ax: Axes, n_prompt: int) -> None:
    ax.axvspan(-0.5, n_prompt - 0.5, color=PALE, lw=0, zorder=0)
    ax.axvline(n_prompt - 0.5, color=INK, lw=1.0, zorder=1)
    for place, text, side in ((-4, "prompt", "right"), (4, "generated", "left")):
        ax.annotate(
            text, (n_prompt - 0.5, 1), xycoords=("data", "axes fraction"), ha=side, va="bottom",
            xytext=(place, 3), textcoords="offset points", fontsize=8, color=MUTED,
        )  # fmt: skip


def _caption(
    model: str, n_prompt: int, n_tokens: int, layers: Sequence[int] | None,
    baseline: float | None, note: str,
) -> str:  # fmt: skip
    span = f" Layers {min(layers)} to {max(layers)}." if layers else ""
    base = f" Baseline {baseline:.4g}." if baseline is not None else ""
    return (
        f"{model + ', ' if model else ''}{n_prompt} prompt and {n_tokens - n_prompt} generated "
        f"tokens.{span}{base} {note}"
    ).strip()


def _alt(name: str, unit: str, middle: NDArray[np.float64], n_prompt: int, model: str) -> str:
    parts = []
    for phase, part in (("prompt", middle[:n_prompt]), ("generated", middle[n_prompt:])):
        if np.isfinite(part).any():
            parts.append(f"{phase} mean {np.nanmean(part):.4g}, lowest {np.nanmin(part):.4g}")
    return (
        f"{name}{f' in {unit}' if unit else ''} by token{f' of {model}' if model else ''}: "
        f"{'; '.join(parts) or 'no values'}."
    )
