"""Tokens x layers: which experts every token went to."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from numpy.typing import ArrayLike, NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.token_groups import instead_of
from ernie_lab.plots.pictures import TraceLike, model_name
from ernie_lab.plots.style import INK, MARK, MUTED, PALE, RULE
from ernie_lab.plots.token_names import Tokens, names
from ernie_lab.plots.tokens import Labels, coordinate, labels, prompt_length
from ernie_lab.plots.view import Sheet, View

MAX_TOKENS = 160
MAX_LAYERS = 64
_GAP = 0.085  # inches between bands


@overload
def plot_expert_map(
    expert_ids: ArrayLike | TraceLike,
    expert_weights: ArrayLike | None = ...,
    *,
    n_experts: int | None = ...,
    bank: str = ...,
    tokens: Tokens | None = ...,
    layers: Sequence[int] | None = ...,
    window: tuple[int, int] | None = ...,
    only_layers: Sequence[int] | None = ...,
    n_prompt: int | None = ...,
    model: str = ...,
    ax: None = None,
    title: str | None = ...,
    caption: str | None = ...,
) -> View: ...
@overload
def plot_expert_map(
    expert_ids: ArrayLike | TraceLike,
    expert_weights: ArrayLike | None = ...,
    *,
    n_experts: int | None = ...,
    bank: str = ...,
    tokens: Tokens | None = ...,
    layers: Sequence[int] | None = ...,
    window: tuple[int, int] | None = ...,
    only_layers: Sequence[int] | None = ...,
    n_prompt: int | None = ...,
    model: str = ...,
    ax: Axes,
    title: str | None = ...,
    caption: str | None = ...,
) -> Axes: ...
def plot_expert_map(
    expert_ids: ArrayLike | TraceLike,
    expert_weights: ArrayLike | None = None,
    *,
    n_experts: int | None = None,
    bank: str = "",
    tokens: Tokens | None = None,
    layers: Sequence[int] | None = None,
    window: tuple[int, int] | None = None,
    only_layers: Sequence[int] | None = None,
    n_prompt: int | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One column per token, one band per layer; the height in a band is the expert.

    `expert_ids` and `expert_weights` are (layer, token, slot) of one sequence; an id below zero
    or NaN means not routed. `layers` and `tokens` default to the arrays' coordinates `layer` and
    `text`, when they have them. `window=(start, stop)` and `only_layers=[…]` narrow the picture;
    positions and layer numbers stay the true ones. `n_prompt` (or the coordinate `phase`) draws
    the border between prompt and generated tokens.

    In place of `expert_ids` a trace will do, without weights, tokens and `n_experts`; of a model
    with two banks of experts it needs `bank=`, and its picture has the tokens of that bank alone.
    So will the routing of one bank, `trace.routing(bank)`.
    """
    ids: Any = expert_ids
    if isinstance(ids, TraceLike):
        trace, ledger = ids, ids.routing(_bank(ids, bank) or None)
        ids, expert_weights, n_experts = ledger.expert_ids, ledger.expert_weights, trace.n_experts
        tokens = trace.tokens if tokens is None else tokens
        model = model_name(trace, model or None)
    elif hasattr(ids, "expert_ids"):
        n_experts, bank = n_experts_of(ids), _own_bank(ids, bank)
        ids, expert_weights = ids.expert_ids, ids.expert_weights
    if way := instead_of(ids):
        raise TypeError(
            f"plot_expert_map draws a trace or expert ids, not a {type(ids).__name__}: {way}"
        )
    if n_experts is None:
        raise ValueError("n_experts= is needed: expert ids alone do not tell it")
    ids_LTK, weights_LTK = _arrays(ids, expert_weights, n_experts)
    layers = _numbers(layers, coordinate(ids, "layer"), len(ids_LTK), "layers")
    sequences = set(coordinate(ids, "sequence") or ())
    if len(sequences) > 1:
        raise ValueError(
            f"{len(sequences)} sequences, and an expert map shows one: trace.sel(sequence=0)"
        )
    n_prompt = prompt_length(ids) if n_prompt is None else n_prompt
    words = names(ids, tokens)
    words = [str(i) for i in range(ids_LTK.shape[1])] if words is None else words
    if len(words) != ids_LTK.shape[1]:
        raise ValueError(f"{len(words)} tokens for {ids_LTK.shape[1]} columns of expert_ids")

    start, stop, _ = slice(*(window or (None, None))).indices(len(words))
    rows = _rows(layers, only_layers)
    if stop - start > MAX_TOKENS or stop <= start:
        raise ValueError(
            f"{max(stop - start, 0)} tokens to draw, possible are 1 to {MAX_TOKENS}: narrow with "
            f"window=(start, stop), for example window=(0, {min(MAX_TOKENS, len(words))})"
        )
    if len(rows) > MAX_LAYERS:
        raise ValueError(f"{len(rows)} layers, at most {MAX_LAYERS}: narrow with only_layers=[…]")
    layers = [layers[row] for row in rows]
    ids_LTK = ids_LTK[rows, start:stop]
    weights_LTK = None if weights_LTK is None else weights_LTK[rows, start:stop]
    found = coordinate(ids, "pos") or range(len(words))
    positions = [int(pos) for pos in found][start:stop]
    label = labels(words[start:stop], positions=positions)

    n_layers, n_tokens, _ = ids_LTK.shape
    column = float(np.clip(8.2 / n_tokens, 0.098, 0.30))
    band = float(np.clip(12.5 / n_layers - _GAP, 0.36, np.clip(n_experts * 0.055, 0.36, 1.1)))
    longest = max(len(text) for text in label.texts)
    bottom = 0.35 + 0.075 * longest * min(1.0, column / 0.16)
    width = max(5.6, n_tokens * column + 1.9)
    height = n_layers * (band + _GAP) + bottom + 1.25
    with Sheet(ax, width, height) as sheet:
        gap = n_experts * _GAP / band
        tops = np.arange(n_layers, dtype=np.float64) * (n_experts + gap)
        _paper(sheet.ax, tops, n_experts, n_tokens)
        marks = _marks(sheet.ax, ids_LTK, weights_LTK, tops, n_experts / (band * 72))
        _axes(sheet.ax, tops, n_experts, n_tokens, layers, label, positions, column, band)
        jumps = _jumps(sheet.ax, positions)
        if n_prompt is not None and start < n_prompt < stop:
            _border(sheet.ax, n_prompt - start)
        if weights_LTK is not None:
            bar = sheet.ax.figure.colorbar(
                marks, ax=sheet.ax, shrink=min(1.0, 2.4 / height), aspect=14, pad=0.012
            )
            bar.set_label("weight in the routed output")
            bar.outline.set_visible(False)
        return sheet.finish(
            title
            or f"Which {bank + ' ' if bank else ''}experts each token went to, layer by layer",
            caption
            if caption is not None
            else _caption(model, ids_LTK, n_experts, label, bank, jumps),
            _alt(ids_LTK, layers, n_experts, model, bank),
            f"Tokens shown as boxes: {label.full}" if label.boxed else "",
        )


def _arrays(
    expert_ids: ArrayLike, expert_weights: ArrayLike | None, n_experts: int
) -> tuple[NDArray[np.int64], NDArray[np.float64] | None]:
    """Both as plain arrays that fit each other; -1 where a token was not routed."""
    raw_LTK = np.asarray(expert_ids, dtype=np.float64)
    if raw_LTK.ndim != 3:
        raise ValueError(f"expert_ids has shape {raw_LTK.shape}, expected (layer, token, slot)")
    ids_LTK = np.where(np.isfinite(raw_LTK), raw_LTK, -1).astype(np.int64)
    if ids_LTK.max(initial=-1) >= n_experts:
        raise ValueError(f"expert id {ids_LTK.max()} with n_experts={n_experts}: ids start at 0")
    weights_LTK = None if expert_weights is None else np.asarray(expert_weights, dtype=np.float64)
    if weights_LTK is not None and weights_LTK.shape != ids_LTK.shape:
        raise ValueError(f"weights {weights_LTK.shape} do not fit expert_ids {ids_LTK.shape}")
    return ids_LTK, weights_LTK


def _numbers(
    given: Sequence[int] | None, found: Sequence[Any] | None, size: int, name: str
) -> list[int]:
    if isinstance(given, Integral):
        raise TypeError(
            f"{name}={given} numbers the rows of expert_ids, one for each: a list of {size}; "
            f"only_layers=[{given}] draws one of them"
        )
    numbers = [int(x) for x in (given if given is not None else found or range(size))]
    if len(numbers) != size:
        raise ValueError(f"{name} has {len(numbers)} numbers for {size} rows")
    return numbers


def _rows(layers: Sequence[int], wanted: Sequence[int] | None) -> list[int]:
    if wanted is None:
        return list(range(len(layers)))
    if isinstance(wanted, Integral):
        raise TypeError(f"only_layers={wanted} must be a list: only_layers=[{wanted}]")
    absent = [layer for layer in wanted if layer not in layers]
    if absent or not len(wanted):
        raise ValueError(f"only_layers={list(wanted)}: the data has layers {list(layers)}")
    return [list(layers).index(layer) for layer in wanted]


def _paper(ax: Axes, tops: NDArray[np.float64], n_experts: int, n_tokens: int) -> None:
    for top in tops:
        ax.axhspan(top, top + n_experts, color=PALE, lw=0, zorder=0)
        for line in range(1, 4):
            ax.axhline(top + line * n_experts / 4, color="white", lw=0.6, zorder=0.5)
    for edge in range(1, n_tokens):
        ax.axvline(edge, color="white", lw=0.9 if n_tokens <= 60 else 0.4, zorder=0.6)


def _marks(
    ax: Axes,
    ids_LTK: NDArray[np.int64],
    weights_LTK: NDArray[np.float64] | None,
    tops: NDArray[np.float64],
    rows_per_point: float,
) -> PolyCollection:
    """One box per chosen slot, drawn at least 1.9 points high; the heaviest lie on top."""
    layer, token, _ = chosen = np.nonzero(ids_LTK >= 0)
    weight = np.full(len(layer), 1.0) if weights_LTK is None else weights_LTK[chosen]
    order = np.argsort(weight, kind="stable")
    x, y = token[order], tops[layer[order]] + ids_LTK[chosen][order] + 0.5
    half = max(0.44, 0.5 * 1.9 * rows_per_point)
    corners = np.array([(0.06, -half), (0.94, -half), (0.94, half), (0.06, half)])
    boxes = np.stack([x, y], axis=-1)[:, None, :] + corners
    marks = PolyCollection(list(boxes), array=weight[order], cmap=MARK, lw=0, zorder=2)
    marks.set_clim(0, 1)  # the same scale in every picture, so that pictures can be compared
    ax.add_collection(marks, autolim=False)
    return marks


def _axes(
    ax: Axes,
    tops: NDArray[np.float64],
    n_experts: int,
    n_tokens: int,
    layers: Sequence[int],
    label: Labels,
    positions: Sequence[int],
    column: float,
    band: float,
) -> None:
    size = float(np.clip(column * 72 * 0.78, 5.6, 8.5))
    ax.set_xlim(0, n_tokens)
    ax.set_ylim(tops[-1] + n_experts, 0)
    ax.set_xticks(
        np.arange(n_tokens) + 0.5, label.texts, rotation=90, fontsize=size,
        fontfamily=list(label.fonts), parse_math=False,
    )  # fmt: skip
    # Positions stay where both kinds of tick meet.
    ax.xaxis.remove_overlapping_locs = ax.yaxis.remove_overlapping_locs = False
    step = next(s for s in (1, 5, 10, 20) if s * column >= 0.28)
    places = [i for i in range(n_tokens) if positions[i] % step == 0]
    ax.set_xticks([i + 0.5 for i in places], [str(positions[i]) for i in places], minor=True)
    ax.tick_params(
        axis="x", which="minor", bottom=False, labelbottom=False, labeltop=True, length=0,
        labelsize=7, labelcolor=MUTED, pad=1,
    )  # fmt: skip
    ax.set_yticks(tops + n_experts / 2, [f"layer {n}" for n in layers], parse_math=False)
    ax.tick_params(axis="y", length=0, pad=20, labelsize=8.5)
    ax.tick_params(axis="x", which="major", length=0, pad=2)
    inner = [0, n_experts // 2, n_experts - 1] if band >= 0.55 else [0, n_experts - 1]
    ends = [(top + e + 0.5, e) for top in tops for e in inner]
    ax.set_yticks([y for y, _ in ends], [str(e) for _, e in ends], minor=True)
    ax.tick_params(axis="y", which="minor", length=0, pad=3, labelsize=6, labelcolor=MUTED)
    # The long form does not fit beside one or two bands.
    full = f"layer; within it expert 0 (top) to {n_experts - 1}"
    ax.set_ylabel(full if len(layers) > 2 else "expert")
    ax.set_xlabel("token (its position on top)")
    for side in ("top", "right", "left", "bottom"):
        ax.spines[side].set_visible(False)


def _border(ax: Axes, place: int) -> None:
    ax.axvline(place, color=INK, lw=1.2, zorder=3)
    ax.annotate(
        "generated →", (place, 1), xycoords=("data", "axes fraction"), xytext=(3, 11),
        textcoords="offset points", fontsize=7.5, color=INK, annotation_clip=False,
        bbox={"fc": "white", "ec": RULE, "lw": 0.5, "pad": 1.5},
    )  # fmt: skip


def _jumps(ax: Axes, positions: Sequence[int]) -> bool:
    """A dotted line where tokens between two columns are not drawn."""
    places = [i for i in range(1, len(positions)) if positions[i] != positions[i - 1] + 1]
    for place in places:
        ax.axvline(place, color=MUTED, lw=1.0, ls=(0, (1, 2)), zorder=2.5)
    return bool(places)


def _bank(trace: TraceLike, bank: str) -> str:
    if len(trace.banks) > 1 and bank not in trace.banks:
        ways = " or ".join(f"bank={name!r}" for name in trace.banks)
        raise ValueError(
            f"bank={bank!r}: this model has two banks of experts, and expert 5 of the one is not "
            f"expert 5 of the other: pass {ways}"
        )
    return bank


def _own_bank(routing: Any, bank: str) -> str:
    own = getattr(routing, "bank", None) or ""
    if bank and bank != own:
        raise ValueError(f"bank={bank!r}: this is the routing of {own or 'the only'} bank")
    return own


def _caption(
    model: str, ids_LTK: NDArray[np.int64], n_experts: int, label: Labels, bank: str, jumps: bool
) -> str:
    _, n_tokens, k = ids_LTK.shape
    blank = " Empty: not routed." if (ids_LTK < 0).any() else ""
    source = f"{model}, " if model else ""
    only = f" of the {bank} bank" if bank else ""
    between = " Dotted: tokens in between that are not drawn." if jumps else ""
    return (
        f"{source}{n_tokens} tokens{only}, {k} of {n_experts} routed experts per token and layer. "
        "Each mark is one chosen expert; darker means more weight. A picture of who was chosen, "
        f"not of what the expert does.{blank}{between} {label.note}"
    ).strip()


def _alt(
    ids_LTK: NDArray[np.int64], layers: Sequence[int], n_experts: int, model: str, bank: str
) -> str:
    busiest = []
    for layer, ids_TK in zip(layers, ids_LTK, strict=True):
        counts = np.bincount(ids_TK[ids_TK >= 0], minlength=n_experts)
        if counts.sum():
            share = counts.max() / counts.sum()
            busiest.append(f"layer {layer}: expert {counts.argmax()} {share:.0%}")
    shown = "; ".join(busiest[:6]) + ("; …" if len(busiest) > 6 else "")
    return (
        f"Expert map{f' of {model}' if model else ''}: {ids_LTK.shape[1]} tokens"
        f"{f' of the {bank} bank' if bank else ''}, "
        f"{len(layers)} layers, {ids_LTK.shape[2]} of {n_experts} experts each. Busiest by share "
        f"of slots (uniform {1 / n_experts:.1%}): {shown}."
    )
