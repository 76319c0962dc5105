"""Attention maps: one head with its tokens, or all heads of a layer side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from numpy.typing import ArrayLike, NDArray

from ernie_lab.plots.style import AMOUNT, MUTED, PALE, RULE
from ernie_lab.plots.token_names import Tokens, names
from ernie_lab.plots.tokens import Labels, coordinate, labels
from ernie_lab.plots.view import Sheet, View

Floats = NDArray[np.float64]

MAX_CELLS = 40_000_000  # of one map, before pooling
MAX_HEADS = 64
_LABELLED = 96  # more tokens than this get positions instead of their text
_HEAD_PIXELS = 512
_GRID_PIXELS = 640  # of a whole row of heads
# 64 steps: no eye sees more here, and the file of a noisy map is half as large.
_COLOURS = AMOUNT.resampled(64).with_extremes(bad=PALE)
_TICKS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


@overload
def plot_attention(
    pattern: ArrayLike, *, layer: int, head: int, tokens: Tokens | None = ...,
    queries: Sequence[int] | None = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_attention(
    pattern: ArrayLike, *, layer: int, head: int, tokens: Tokens | None = ...,
    queries: Sequence[int] | None = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_attention(
    pattern: ArrayLike,
    *,
    layer: int,
    head: int,
    tokens: Tokens | None = None,
    queries: Sequence[int] | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """One head's pattern `[query, key]`; a row sums to 1. `tokens` name the keys, by default
    the coordinate `key_text`; `trace.tokens` names tokens of a picture by their place in it.

    `queries` are the positions of the rows when not all queries were kept. The colour follows the
    square root of the weight, so that 0.05 is seen beside an attention sink. Above 512 queries or
    keys blocks are pooled by their maximum: thin lines survive, the caption says so.
    """
    map_ST = _checked(pattern, 2, f"trace['pattern', {layer}].sel(head={head})")
    n_queries, n_keys = map_ST.shape
    rows = _query_rows(pattern, queries, n_queries, n_keys)
    keys = names(pattern, tokens, "key_")
    _fits(keys, n_keys, rows, n_queries)
    masked = _masked(pattern, rows, n_keys)
    pooled, factors = _pooled(map_ST, masked, _HEAD_PIXELS)
    label = None if keys is None or n_keys > _LABELLED else labels(keys)
    side = float(np.clip(n_keys * 0.2, 3.4, 7.2))
    tall = float(np.clip(side * n_queries / n_keys, 1.6, side))
    words = 0.0 if label is None else max(map(len, label.texts)) * 0.068
    with Sheet(ax, side + words + 1.5, tall + words + 1.35) as sheet:
        image = _image(sheet.ax, pooled, n_keys, n_queries)
        _token_axes(sheet.ax, label, rows, n_keys, side / n_keys, tall / n_queries)
        _bar(sheet.ax, image, tall)
        return sheet.finish(
            title or f"Where layer {layer}, head {head} looks",
            _caption(model, n_queries, n_keys, factors, label, bool(masked.any()))
            if caption is None
            else caption,
            map_in_words(map_ST, rows, f"layer {layer}, head {head}", model),
            f"Tokens shown as boxes: {label.full}" if label and label.boxed else "",
        )


@overload
def plot_attention_heads(
    patterns: ArrayLike, *, layer: int, heads: Sequence[int] | None = ...,
    queries: Sequence[int] | None = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_attention_heads(
    patterns: ArrayLike, *, layer: int, heads: Sequence[int] | None = ...,
    queries: Sequence[int] | None = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_attention_heads(
    patterns: ArrayLike,
    *,
    layer: int,
    heads: Sequence[int] | None = None,
    queries: Sequence[int] | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """All heads `[head, query, key]` of one layer as small multiples on one colour scale.

    `heads` are the true head numbers, by default the array's coordinate `head`.
    """
    maps_HST = _checked(patterns, 3, f"trace['pattern', {layer}]")
    n_heads, n_queries, n_keys = maps_HST.shape
    known = heads if heads is not None else coordinate(patterns, "head")
    numbers = [int(h) for h in (range(n_heads) if known is None else known)]
    if len(numbers) != n_heads or n_heads > MAX_HEADS:
        raise ValueError(
            f"{len(numbers)} head numbers for {n_heads} maps (at most {MAX_HEADS}): "
            "pass patterns[start:stop] and heads=[…]"
        )
    rows = _query_rows(patterns, queries, n_queries, n_keys)
    _fits(None, n_keys, rows, n_queries)
    masked = _masked(patterns, rows, n_keys)
    columns = min(n_heads, 4 if n_heads <= 12 else 5 if n_heads <= 20 else 8)
    lines = -(-n_heads // columns)
    cell = 8.4 / max(columns, 4)
    with Sheet(ax, columns * cell + 1.2, lines * (cell * 1.02 + 0.1) + 1.15) as sheet:
        sheet.ax.axis("off")
        image: Any = None
        factors = (1, 1)
        for i, (number, map_ST) in enumerate(zip(numbers, maps_HST, strict=True)):
            line, column = divmod(i, columns)
            box = (column / columns, 1 - (line + 0.97) / lines, 0.93 / columns, 0.83 / lines)
            small = sheet.ax.inset_axes(box)
            pooled, factors = _pooled(map_ST, masked, _GRID_PIXELS // columns)
            image = _image(small, pooled, n_keys, n_queries)
            small.set_title(f"head {number}", fontsize=8, pad=2, fontweight="normal")
            ends = (line == lines - 1 or i + columns >= n_heads, column == 0)
            _small_axes(small, rows, n_keys, *ends)
        _bar(sheet.ax, image, lines * cell)
        return sheet.finish(
            title or f"Where the heads of layer {layer} look",
            _caption(model, n_queries, n_keys, factors, None, bool(masked.any()))
            if caption is None
            else caption,
            " ".join(
                map_in_words(map_ST, rows, f"layer {layer}, head {number}", "")
                for number, map_ST in zip(numbers[:4], maps_HST, strict=False)
            )
            + (f" And {n_heads - 4} more heads." if n_heads > 4 else ""),
        )


def _checked(given: ArrayLike, rank: int, way: str) -> Floats:
    """The weights as an array; `way` is what to pass in the place of something else."""
    wanted = "[query, key]" if rank == 2 else "[head, query, key]"
    # Before numpy looks at it: a trace can be indexed, and is no array.
    if not isinstance(given, list | tuple) and not hasattr(given, "__array__"):
        raise TypeError(f"a pattern {wanted} is wanted, not a {type(given).__name__}: pass {way}")
    raw: NDArray[Any] = np.asarray(given)
    if raw.ndim != rank or 0 in raw.shape:
        raise ValueError(
            f"a pattern of shape {raw.shape}, expected {wanted}, not empty: pass {way}"
        )
    if raw.size > MAX_CELLS:
        raise ValueError(
            f"{raw.size / 1e6:.0f} million cells, at most {MAX_CELLS // 10**6}: pass "
            "fewer heads or a range of queries (queries=[…] keeps their positions)"
        )
    values = np.asarray(raw, dtype=np.float64)
    if np.nanmin(values) < -1e-6 or np.nanmax(values) > 1 + 1e-3:
        raise ValueError("attention weights lie in 0..1; these look like scores: pass the pattern")
    return values


def _query_rows(
    pattern: Any, queries: Sequence[int] | None, n_queries: int, n_keys: int
) -> list[int]:
    """The key that each query row itself is: given, from the coordinates, or the last ones."""
    if queries is not None:
        return [int(q) for q in queries]
    query_pos, key_pos = coordinate(pattern, "query_pos"), coordinate(pattern, "key_pos")
    if query_pos is not None and key_pos is not None and set(query_pos) <= set(key_pos):
        return [key_pos.index(q) for q in query_pos]
    return list(range(n_keys - n_queries, n_keys))


def _masked(pattern: Any, rows: list[int], n_keys: int) -> NDArray[np.bool_]:
    """The keys that come after each query; in the vision tower every patch sees every other."""
    if coordinate(pattern, "query_row") is not None:
        return np.zeros((len(rows), n_keys), bool)
    return np.asarray(np.arange(n_keys)[None, :] > np.asarray(rows)[:, None])


def _fits(tokens: Sequence[Any] | None, n_keys: int, rows: list[int], n_queries: int) -> None:
    if tokens is not None and len(tokens) != n_keys:
        raise ValueError(f"{len(tokens)} tokens for {n_keys} keys")
    if len(rows) != n_queries or (n_queries > n_keys and rows[0] < 0):
        raise ValueError(f"{len(rows)} query positions for {n_queries} rows over {n_keys} keys")


def _pooled(map_ST: Floats, masked: NDArray[np.bool_], most: int) -> tuple[Any, tuple[int, int]]:
    """Block maxima, at most `most` a side; what no block member may see stays masked."""
    factors = tuple(-(-size // most) for size in map_ST.shape)
    padding = [(0, -size % factor) for size, factor in zip(map_ST.shape, factors, strict=True)]
    hidden = np.pad(masked, padding, constant_values=True)
    values = np.where(hidden, -np.inf, np.pad(np.nan_to_num(map_ST), padding))
    rows, columns = (size // f for size, f in zip(values.shape, factors, strict=True))
    blocks = values.reshape(rows, factors[0], columns, factors[1]).max(axis=(1, 3))
    return np.ma.masked_invalid(blocks), (factors[0], factors[1])


def _image(ax: Axes, pooled: Any, n_keys: int, n_queries: int) -> Any:
    image = ax.imshow(
        pooled, cmap=_COLOURS, norm=PowerNorm(0.5, 0, 1), aspect="auto",
        interpolation="nearest", extent=(-0.5, n_keys - 0.5, n_queries - 0.5, -0.5),
    )  # fmt: skip
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(RULE)
    return image


def _token_axes(
    ax: Axes, label: Labels | None, rows: list[int], n_keys: int, column: float, row: float
) -> None:
    ax.set_xlabel("key: the token looked at")
    ax.set_ylabel("query: the token that looks")
    if label is None:
        _positions(ax, rows, n_keys, 8)
        return
    size = float(np.clip(min(column, row) * 72 * 0.8, 5.0, 8.5))
    look: dict[str, Any] = {"fontsize": size, "fontfamily": list(label.fonts), "parse_math": False}
    ax.set_xticks(range(n_keys), label.texts, rotation=90, **look)
    inside = [i for i, q in enumerate(rows) if 0 <= q < n_keys]
    ax.set_yticks(inside, [label.texts[rows[i]] for i in inside], **look)
    ax.tick_params(length=0, pad=2)


def _positions(ax: Axes, rows: list[int], n_keys: int, most: int) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**3, 10**4) if n_keys / s <= most)
    ax.set_xticks(range(0, n_keys, step))
    places = [i for i, q in enumerate(rows) if q % step == 0]
    ax.set_yticks(places, [str(rows[i]) for i in places])


def _small_axes(ax: Axes, rows: list[int], n_keys: int, bottom: bool, left: bool) -> None:
    _positions(ax, rows, n_keys, 5)
    ax.tick_params(labelbottom=bottom, labelleft=left, labelsize=6.5, length=2, pad=1.5)
    if bottom:
        ax.set_xlabel("key position", fontsize=7, labelpad=1, color=MUTED)
    if left:
        ax.set_ylabel("query position", fontsize=7, labelpad=1, color=MUTED)


def _bar(ax: Axes, image: Any, height: float) -> None:
    bar = ax.figure.colorbar(image, ax=ax, shrink=min(1.0, 2.6 / height), aspect=15, pad=0.02)
    bar.set_ticks(list(_TICKS), labels=[f"{tick:g}" for tick in _TICKS])
    bar.set_label("attention weight")
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _caption(
    model: str, n_queries: int, n_keys: int, factors: tuple[int, int], label: Labels | None,
    causal: bool,
) -> str:  # fmt: skip
    size = f"{n_keys} tokens" if n_queries == n_keys else f"{n_queries} queries x {n_keys} keys"
    pooled = (
        f" One cell is the maximum of {factors[0]} queries x {factors[1]} keys."
        if max(factors) > 1
        else ""
    )
    later = "; grey: later tokens, which the query cannot see" if causal else ""
    return (
        f"{model + ', ' if model else ''}{size}. Each row sums to 1{later}. Colour by the square "
        f"root of the weight.{pooled} "
        f"{label.note if label else ''}"
    ).strip()


def map_in_words(map_ST: Floats, rows: list[int], what: str, model: str) -> str:
    """Where the mass goes, in words: first key, the token itself, the one before."""
    usable = [(i, q) for i, q in enumerate(rows) if 0 < q < map_ST.shape[1]]
    if not usable:
        return f"Attention of {what}{f' of {model}' if model else ''}: one token."
    parts = {
        "the first token": np.mean([map_ST[i, 0] for i, _ in usable]),
        "itself": np.mean([map_ST[i, q] for i, q in usable]),
        "the token before": np.mean([map_ST[i, q - 1] for i, q in usable]),
    }
    mass = ", ".join(f"{name} {share:.0%}" for name, share in parts.items())
    return (
        f"Attention of {what}{f' of {model}' if model else ''} over {map_ST.shape[1]} tokens. Mean "
        f"weight on {mass}."
    )
