"""One token's router at one layer: who was chosen, by how much, and what the bias did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray

from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.token_names import name_of
from ernie_lab.plots.tokens import drawable, shown_text
from ernie_lab.plots.view import Sheet, View

Floats = NDArray[np.float64]

CHOSEN = OKABE_ITO["blue"]
ADDED = OKABE_ITO["orange"]
DISPLACED = OKABE_ITO["vermillion"]
OTHER = "#d5dae1"
RUNNER_UP = "#8d97a5"


@dataclass(frozen=True, slots=True)
class Choice:
    """The ledger of one choice; sets of expert numbers as in the design's bias ledger."""

    probs: Floats
    bias: Floats  # centred
    scores: Floats
    chosen: frozenset[int]
    by_score: frozenset[int]
    by_prob: frozenset[int]
    order: tuple[int, ...]  # experts by falling score; ties go to the lower number

    @classmethod
    def of(cls, probs: ArrayLike, bias: ArrayLike | None, chosen: ArrayLike) -> Choice:
        probs_E = np.asarray(probs, dtype=np.float64).ravel()
        bias_E = np.zeros_like(probs_E) if bias is None else np.asarray(bias, dtype=np.float64)
        ids = [int(e) for e in np.asarray(chosen).ravel()]
        if bias_E.shape != probs_E.shape:
            raise ValueError(f"{bias_E.size} biases for {probs_E.size} experts")
        if not 0 < len(set(ids)) == len(ids) or not set(ids) <= set(range(probs_E.size)):
            raise ValueError(f"chosen={ids}: distinct experts of 0..{probs_E.size - 1} are needed")
        bias_E = bias_E - bias_E.mean()
        scores_E = probs_E + bias_E
        order = np.argsort(-scores_E, kind="stable")
        by_prob = np.argsort(-probs_E, kind="stable")
        k = len(ids)
        return cls(
            probs_E, bias_E, scores_E, frozenset(ids),
            frozenset(order[:k].tolist()), frozenset(by_prob[:k].tolist()),
            tuple(order.tolist()),
        )  # fmt: skip

    @property
    def added(self) -> frozenset[int]:
        return self.by_score - self.by_prob

    @property
    def displaced(self) -> frozenset[int]:
        return self.by_prob - self.by_score

    @property
    def edited(self) -> bool:
        """The choice does not follow from these scores: somebody edited the routing."""
        return self.chosen != self.by_score

    @property
    def last_and_runner_up(self) -> tuple[int, int] | None:
        """The k-th and the (k+1)-th expert by score; None when all are chosen."""
        k = len(self.chosen)
        return None if k == len(self.order) else (self.order[k - 1], self.order[k])

    @property
    def margin(self) -> float:
        pair = self.last_and_runner_up
        return float("nan") if pair is None else float(self.scores[pair[0]] - self.scores[pair[1]])


@overload
def plot_router_token(
    probs: ArrayLike, chosen: ArrayLike, bias: ArrayLike | None = ..., *, token: Any,
    layer: int, position: int | None = ..., bank: str = ...,
    sort: Literal["score", "index"] = ..., show: int = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_router_token(
    probs: ArrayLike, chosen: ArrayLike, bias: ArrayLike | None = ..., *, token: Any,
    layer: int, position: int | None = ..., bank: str = ...,
    sort: Literal["score", "index"] = ..., show: int = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_router_token(
    probs: ArrayLike,
    chosen: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    token: Any,
    layer: int,
    position: int | None = None,
    bank: str = "",
    sort: Literal["score", "index"] = "score",
    show: int = 64,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Bars: router probability of each expert. Ticks: selection score, probability + bias.

    `probs` `[e]`, `chosen` the k expert ids, `bias` the layer's correction bias `[e]` (centred
    here, since only its differences choose). `sort="index"` keeps the experts' own order, so
    that several pictures compare. Of more than `show` experts the best by score are drawn.
    `token` is its text, or a row of `trace.tokens` (then a token of a picture is called by its
    place and `position` is known); `bank` says whose router this is in a model that has two.
    """
    if sort not in ("score", "index"):
        raise ValueError(f"sort={sort!r}: 'score' or 'index'")
    choice = Choice.of(probs, bias, chosen)
    shown = [e for i, e in enumerate(choice.order) if i < show or e in choice.chosen]
    shown = sorted(shown) if sort == "index" else shown
    if not isinstance(token, str | bytes):
        position = int(token["pos"]) if position is None else position
        token = name_of(token)
    text = shown_text(token)
    with Sheet(ax, float(np.clip(len(shown) * 0.13 + 2.0, 7.2, 10.5)), 4.3) as sheet:
        _bars(sheet.ax, choice, shown)
        if bias is not None:
            _bias(sheet.ax, choice, shown)
        _cut(sheet.ax, choice, shown, sort)
        _axes(sheet.ax, choice, shown, sort, bias is not None)
        _legend(sheet.ax, choice, bias is not None, above=ax is None and sort == "index")
        at = "" if position is None else f" (position {position})"
        where = f"token “{text}”{at}"
        return sheet.finish(
            title or f"How {f'the {bank} router of ' if bank else ''}layer {layer} routed {where}",
            _caption(choice, model, len(shown), bias, bank) if caption is None else caption,
            _alt(choice, where, layer, bank, model),
            f"Token: {text}" if drawable(text)[0] != text else "",
        )


def _colour(choice: Choice, expert: int) -> str:
    if expert in choice.chosen:
        return ADDED if expert in choice.added else CHOSEN
    pair = choice.last_and_runner_up
    return RUNNER_UP if pair and expert == pair[1] else OTHER


def _bars(ax: Axes, choice: Choice, shown: Sequence[int]) -> None:
    for x, expert in enumerate(shown):
        dropped = expert in choice.displaced and expert not in choice.chosen
        colour = "white" if dropped else _colour(choice, expert)
        ax.bar(
            x, choice.probs[expert], width=0.74, color=colour,
            edgecolor=DISPLACED if dropped else "none", linewidth=1.3 if dropped else 0,
            hatch="//////" if dropped else None, zorder=2,
        )  # fmt: skip


def _bias(ax: Axes, choice: Choice, shown: Sequence[int]) -> None:
    """An arrow from the probability to the score that really chose."""
    for x, expert in enumerate(shown):
        low, high = choice.probs[expert], choice.scores[expert]
        ax.plot([x, x], [low, high], color=INK, lw=0.9, zorder=3)
        ax.plot([x - 0.37, x + 0.37], [high, high], color=INK, lw=1.6, zorder=4)


def _cut(ax: Axes, choice: Choice, shown: Sequence[int], sort: str) -> None:
    pair = choice.last_and_runner_up
    if pair is None or any(expert not in shown for expert in pair):
        return
    last, runner_up = (float(choice.scores[expert]) for expert in pair)
    for height in (last, runner_up):
        ax.axhline(height, color=MUTED, lw=0.7, ls=(0, (4, 3)), zorder=1)
    if sort == "score":
        ax.axvline(len(choice.by_score) - 0.5, color=INK, lw=0.9, zorder=1)
    # Outside the axes, where no bar can be.
    ax.annotate(
        f"margin {choice.margin:.2g}\nto runner-up {pair[1]}",
        (1, (last + runner_up) / 2), xycoords=ax.get_yaxis_transform(), xytext=(5, 0),
        textcoords="offset points", fontsize=8.5, color=INK, va="center", annotation_clip=False,
    )  # fmt: skip


def _axes(ax: Axes, choice: Choice, shown: Sequence[int], sort: str, biased: bool) -> None:
    size = 8.0 if len(shown) <= 36 else 6.4
    ax.set_xticks(range(len(shown)), [str(e) for e in shown], fontsize=size)
    for tick, expert in zip(ax.get_xticklabels(), shown, strict=True):
        if expert in choice.chosen:
            tick.set_fontweight("bold")
        else:
            tick.set_color(MUTED)
    ax.tick_params(axis="x", length=0, pad=2, rotation=90 if len(shown) > 36 else 0)
    ax.set_xlim(-0.8, len(shown) - 0.2)
    values = np.concatenate([choice.probs[list(shown)], choice.scores[list(shown)], [0.0]])
    span = float(np.ptp(values)) or 1.0
    ax.set_ylim(min(0.0, values.min() - 0.04 * span), values.max() + 0.14 * span)
    ax.axhline(0, color=RULE, lw=0.8, zorder=2.5)
    order = "in order of selection score" if sort == "score" else "by its number"
    ax.set_xlabel(f"expert, {order}")
    ax.set_ylabel("router probability" + ("; score = probability + bias" if biased else ""))


def _legend(ax: Axes, choice: Choice, biased: bool, above: bool) -> None:
    kept = choice.chosen - choice.added
    handles: list[Line2D | Patch] = [Patch(fc=CHOSEN, label="chosen")] if kept else []
    if choice.chosen & choice.added:
        handles.append(Patch(fc=ADDED, label="chosen only thanks to the bias (added)"))
    if choice.displaced - choice.chosen:
        handles.append(
            Patch(
                fc="white", ec=DISPLACED, hatch="//////", label="kept out by the bias (displaced)"
            )
        )
    if choice.last_and_runner_up is not None and not choice.edited:
        handles.append(Patch(fc=RUNNER_UP, label="runner-up"))
    handles.append(Patch(fc=OTHER, label="not chosen"))
    if biased:
        handles.append(Line2D([], [], color=INK, lw=1.6, label="selection score; line to it: bias"))
    if above:
        ax.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=2, handlelength=1.4,
            borderaxespad=0.3, columnspacing=1.6,
        )  # fmt: skip
    else:
        ax.legend(handles=handles, loc="upper right", borderaxespad=0.1, handlelength=1.4)


def _experts(experts: frozenset[int]) -> str:
    return ", ".join(map(str, sorted(experts))) or "none"


def _caption(choice: Choice, model: str, n_shown: int, bias: ArrayLike | None, bank: str) -> str:
    n, k = len(choice.order), len(choice.chosen)
    parts = [
        f"{model + ', ' if model else ''}{k} of {n} {bank + ' ' if bank else ''}experts chosen; "
        f"uniform probability 1/{n} = {1 / n:.4f}."
    ]
    if bias is not None:
        parts.append(
            "The correction bias (centred: only differences matter) moves who is chosen, never "
            f"the weights. Added: {_experts(choice.added)}; "
            f"displaced: {_experts(choice.displaced)}."
        )
    if choice.edited:
        parts.append(
            "The chosen set is not the top of these scores: routing was edited. By score it "
            f"would be {_experts(choice.by_score)}; margin and runner-up are by score."
        )
    if n_shown < n:
        rest = 1 - choice.probs[list(choice.order[:n_shown])].sum()
        parts.append(f"{n - n_shown} experts with {rest:.1%} of the probability are not drawn.")
    return " ".join(parts)


def _alt(choice: Choice, where: str, layer: int, bank: str, model: str) -> str:
    ranked = sorted(choice.chosen, key=lambda e: -choice.scores[e])
    chosen = ", ".join(f"{e} ({choice.probs[e]:.3f})" for e in ranked)
    pair = choice.last_and_runner_up
    runner_up = f" Runner-up {pair[1]}, margin {choice.margin:.2g}." if pair else ""
    whose = f"{bank.capitalize()} router" if bank else "Router"
    return (
        f"{whose} of layer {layer}{f' of {model}' if model else ''} for {where}: chosen experts "
        f"(probability) {chosen}.{runner_up} Added by the bias: {_experts(choice.added)}; "
        f"displaced: {_experts(choice.displaced)}."
    )
