"""Two routings of the same tokens: where they differ, by token, layer and margin."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from ernie_lab.analysis.routing_diff import RoutingDiff
from ernie_lab.display import ranges
from ernie_lab.interventions.bootstrap import few_drawn
from ernie_lab.plots.given import require
from ernie_lab.plots.style import AMOUNT, INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.token_names import Tokens, names
from ernie_lab.plots.tokens import Labels, coordinate, labels
from ernie_lab.plots.view import Sheet, View

MAX_TOKENS = 160
MAX_LAYERS = 64
_FIRST, _MEAN, _FLOOR = OKABE_ITO["vermillion"], OKABE_ITO["blue"], OKABE_ITO["orange"]
_LOWER = 2.35  # inches of the two panels below


def plot_routing_diff(
    diff: RoutingDiff,
    *,
    called: tuple[str, str] = ("a", "b"),
    sequence: int | None = None,
    window: tuple[int, int] | None = None,
    tokens: Tokens | None = None,
    model: str = "",
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Above, one sequence: the set flips of every token in every layer. Below, all tokens: mean
    flips by layer with the noise floor, and by the margin that the choice had in the first.

    Args:
        called: what the two routings are, such as `("float32", "bfloat16")`.
        sequence: the one above; the first if absent.
        window: `(start, stop)` of its tokens, where it has more than 160.
        tokens: texts of the sequence's tokens, or `trace.tokens`; the diff's own if absent.
    """
    require(diff, "RoutingDiff", "plot_routing_diff", "el.analysis.routing_diff(a, b)")
    shown, shown_of = _of_sequence(diff, sequence)
    start, stop, _ = slice(*(window or (None, None))).indices(shown.sizes["token"])
    layers = [int(layer) for layer in diff.by_layer.index]
    if not 0 < stop - start <= MAX_TOKENS:
        raise ValueError(
            f"{max(stop - start, 0)} tokens to draw, possible are 1 to {MAX_TOKENS}: narrow with "
            f"window=(start, stop), for example window=(0, {MAX_TOKENS})"
        )
    if len(layers) > MAX_LAYERS:
        raise ValueError(
            f"{len(layers)} layers, at most {MAX_LAYERS}: narrow with trace.sel(layer)"
        )
    shown = shown.isel(token=slice(start, stop))
    words = names(shown, tokens) or [str(i) for i in range(shown.sizes["token"])]
    positions = [int(pos) for pos in coordinate(shown, "pos") or range(start, stop)]
    label = labels(words, positions=positions)
    flips_LT = np.asarray(shown.values, dtype=np.float64)

    column = float(np.clip(8.6 / len(words), 0.098, 0.3))
    row = float(np.clip(4.4 / len(layers), 0.135, 0.3))
    longest = max(len(text) for text in label.texts)
    width = float(np.clip(len(words) * column + 1.9, 8.2, 17.6))
    upper = row * len(layers) + 0.42 + 0.075 * longest * min(1.0, column / 0.16)
    with Sheet(None, width, upper + _LOWER + 1.75) as sheet:
        sheet.ax.remove()
        grid = sheet.figure.add_gridspec(2, 2, height_ratios=[upper, _LOWER], hspace=0.06)
        _map(sheet.figure.add_subplot(grid[0, :]), flips_LT, layers, label, positions, column)
        _by_layer(sheet.figure.add_subplot(grid[1, 0]), diff, layers)
        _by_margin(sheet.figure.add_subplot(grid[1, 1]), diff, called[0])
        view = sheet.finish(
            title or f"Where routing differs: {called[1]} against {called[0]}",
            _caption(diff, called, model, shown_of, label) if caption is None else caption,
            _alt(diff, called, model, layers),
            f"Tokens shown as boxes: {label.full}" if label.boxed else "",
        )
        assert isinstance(view, View)
        return view


def _of_sequence(diff: RoutingDiff, sequence: int | None) -> tuple[Any, str]:
    """The flips of one sequence, and which of how many it is, in words."""
    numbers = coordinate(diff.flips, "sequence")
    known = list(dict.fromkeys(numbers)) if numbers else []
    if sequence is not None and sequence not in known:
        raise ValueError(f"sequence={sequence}: the diff has sequences {ranges(known)}")
    if len(known) < 2:
        return diff.flips, ""
    wanted = known[0] if sequence is None else sequence
    mine_N = np.array(numbers) == wanted
    return diff.flips.isel(token=mine_N), f"sequence {wanted} of {len(known)}"


def _map(
    ax: Axes,
    flips_LT: NDArray[np.float64],
    layers: list[int],
    label: Labels,
    positions: list[int],
    column: float,
) -> None:
    n_layers, n_tokens = flips_LT.shape
    most = max(0.5, float(flips_LT.max()))
    image = ax.imshow(
        flips_LT, cmap=AMOUNT, norm=Normalize(0, most), aspect="auto", interpolation="nearest"
    )
    ax.hlines(np.arange(n_layers + 1) - 0.5, -0.5, n_tokens - 0.5, color=RULE, lw=0.4, zorder=1.5)
    if not flips_LT.any():
        words = "no token of this sequence has another expert in any layer"
        ax.text(
            (n_tokens - 1) / 2, (n_layers - 1) / 2, words, ha="center", va="center", color=MUTED,
            bbox={"fc": "white", "ec": "none"},
        )  # fmt: skip
    first = [(np.argmax(x > 0), t) for t, x in enumerate(flips_LT.T) if (x > 0).any()]
    if first:
        y, x = np.array(first).T
        area = min(26.0, (column * 72 * 0.62) ** 2)
        ax.scatter(x, y - 0.5, marker="v", s=area, color=_FIRST, lw=0, zorder=3)
    size = float(np.clip(column * 72 * 0.78, 5.6, 8.5))
    ax.set_xticks(
        range(n_tokens), label.texts, rotation=90, fontsize=size, fontfamily=list(label.fonts),
        parse_math=False,
    )  # fmt: skip
    step = next(s for s in (1, 5, 10, 20) if s * column >= 0.28)
    places = [i for i in range(n_tokens) if positions[i] % step == 0]
    ax.xaxis.remove_overlapping_locs = False
    ax.set_xticks(places, [str(positions[i]) for i in places], minor=True)
    ax.tick_params(
        axis="x", which="minor", bottom=False, labelbottom=False, labeltop=True, length=0,
        labelsize=7, labelcolor=MUTED, pad=3,
    )  # fmt: skip
    ax.set_yticks(range(n_layers), [str(layer) for layer in layers])
    ax.tick_params(which="major", length=0, pad=2)
    ax.tick_params(axis="y", labelsize=8 if n_layers < 20 else 6.5)
    ax.set_ylim(n_layers - 0.5, -0.95)
    ax.set_ylabel("layer")
    ax.set_xlabel("token (its position on top)")
    for spine in ax.spines.values():
        spine.set_visible(False)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.012, aspect=14, shrink=0.95)
    bar.set_label("set flips")
    bar.outline.set_edgecolor(RULE)


def _by_layer(ax: Axes, diff: RoutingDiff, layers: list[int]) -> None:
    table = 100 * diff.by_layer[["flips", "flips_low", "flips_high", "flips_floor"]].astype(float)
    places = np.arange(len(layers))
    ax.vlines(places, table["flips_low"], table["flips_high"], color=_MEAN, lw=1.6, zorder=3)
    ax.plot(places, table["flips"], "o", color=_MEAN, ms=4.5, zorder=4, clip_on=False)
    if table["flips_floor"].notna().any():
        ax.hlines(
            table["flips_floor"], places - 0.38, places + 0.38, color=_FLOOR, lw=2.2, zorder=2.6,
            clip_on=False,
        )  # fmt: skip
    most = float(np.nanmax(table[["flips", "flips_high", "flips_floor"]].to_numpy()))
    if most > 50 * diff.by_lot:
        ax.axhline(100 * diff.by_lot, color=MUTED, lw=1, ls=":", zorder=1)
        ax.annotate(
            "two lots", (1, 100 * diff.by_lot), xycoords=("axes fraction", "data"),
            xytext=(-2, 2), textcoords="offset points", ha="right", fontsize=7.5, color=MUTED,
        )  # fmt: skip
        most = max(most, 100 * diff.by_lot)
    step = 1 if len(layers) <= 16 else 2 if len(layers) <= 32 else 4
    ax.set_xticks(places[::step], [str(layer) for layer in layers[::step]])
    ax.set_xlim(-0.6, len(layers) - 0.4)
    _frame(ax, most)
    ax.set_xlabel("layer")
    ax.set_ylabel("slots filled otherwise, %")
    ax.set_title("all tokens, by layer", fontsize=8.5, fontweight="normal", color=INK)


def _by_margin(ax: Axes, diff: RoutingDiff, first: str) -> None:
    table = diff.by_margin
    ax.set_title("all tokens and layers, by margin", fontsize=8.5, fontweight="normal", color=INK)
    if not len(table):
        ax.set_axis_off()
        ax.text(0.5, 0.5, f"{first} has no margins", ha="center", color=MUTED, parse_math=False)
        return
    values = 100 * table[["flips", "low", "high"]].to_numpy(dtype=float)
    places = np.arange(len(table))
    ax.bar(places, values[:, 0], width=0.86, color="#b9d3ea", zorder=2)
    ax.vlines(places, values[:, 1], values[:, 2], color=_MEAN, lw=1.6, zorder=3)
    edges = [float(table["margin_low"].iloc[0]), *table["margin_high"].astype(float)]
    step = 1 if len(edges) <= 6 else 2
    marks = [f"{edge:.2g}" for edge in edges[::step]]
    ax.set_xticks(np.arange(len(edges))[::step] - 0.5, marks, fontsize=7)
    ax.set_xlim(-0.6, len(table) - 0.4)
    _frame(ax, float(np.nanmax(values)))
    ax.set_xlabel(f"margin in {first} (probability)", parse_math=False)


def _frame(ax: Axes, most: float) -> None:
    ax.set_ylim(0, 1.12 * most if most > 0 else 1)
    ax.tick_params(axis="x", length=0, pad=5)
    ax.grid(axis="y", color=RULE, lw=0.5)
    ax.set_axisbelow(True)


def _caption(
    diff: RoutingDiff, called: tuple[str, str], model: str, shown_of: str, label: Labels
) -> str:
    n, documents = diff.flips.sizes["token"], diff.n_documents
    above = f"Above: {shown_of}. " if shown_of else ""
    floor = (
        f" Orange: the noise floor, which {diff.n_equivalent} runs that should equal "
        f"{called[0]} exceed in 5 %."
        if diff.n_equivalent
        else " No noise floor: no equivalent runs were given."
    )
    ends = (
        f" Lines: 95 % intervals over documents.{few_drawn(documents)}"
        if diff.n_documents > 1
        else " One document, so no intervals."
    )
    return (
        f"{model + ': ' if model else ''}{called[1]} against {called[0]}, {n:,} tokens of "
        f"{documents} document{'s' * (documents > 1)}, {diff.k} of {diff.n_experts} experts. "
        f"{above}Set flips: "
        "1 − |S ∩ S'| / k; red: the first layer in which a token diverges. States upstream differ "
        f"too, so flips add up from layer to layer. Two lots would give {diff.by_lot:.2g}."
        f"{ends}{floor} {label.note}"
    ).strip()


def _alt(diff: RoutingDiff, called: tuple[str, str], model: str, layers: list[int]) -> str:
    flips = diff.by_layer["flips"]
    n_diverging = int(np.isfinite(diff.first_layer.values).sum())
    margin = ""
    if len(diff.by_margin):
        rows = diff.by_margin["flips"].astype(float)
        margin = (
            f" At the smallest margins {100 * rows.iloc[0]:.2g} % of slots flip, at the largest "
            f"{100 * rows.iloc[-1]:.2g} %."
        )
    return (
        f"Routing of {called[1]} against {called[0]}{f' of {model}' if model else ''}: "
        f"{n_diverging} of {diff.flips.sizes['token']} tokens diverge in some of {len(layers)} "
        f"layers. Mean set flips {100 * flips.min():.2g} to {100 * flips.max():.2g} %, most in "
        f"layer {flips.idxmax()}.{margin}"
    )
