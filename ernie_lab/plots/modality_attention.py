"""Attention between text and pictures: who looks at whom, layer by layer, beside looking evenly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from ernie_lab.analysis.attention_mass import attention_mass, kept_layers
from ernie_lab.plots.pictures import Floats, TraceLike, model_name
from ernie_lab.plots.style import AMOUNT, INK, MUTED, PALE, RULE
from ernie_lab.plots.view import Sheet, View

MAX_LAYERS = 64
_COLOURS = AMOUNT.with_extremes(bad=PALE)


def plot_modality_attention(
    trace: TraceLike,
    *,
    layers: Sequence[int] | None = None,
    sequence: int | None = None,
    heads: Sequence[int] | None = None,
    model: str | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Mean share of attention from groups of tokens (a panel each) to groups (columns).

    A row is a layer and sums to 1; the lowest row is what looking evenly at all visible tokens
    would give the same queries. Groups: text before the first picture, pictures, the delimiters
    around them, text after, generated tokens. The first token is a group of its own as a key,
    since attention rests on it for want of anything better, and no query. The mean is over
    queries and heads (`heads` takes some of them).
    """
    known: Any = trace
    numbers = kept_layers(known) if layers is None else [int(layer) for layer in layers]
    if not 0 < len(numbers) <= MAX_LAYERS:
        raise ValueError(f"{len(numbers)} layers, 1 to {MAX_LAYERS} can be drawn: pass layers=[…]")
    one = _sequence(trace.tokens, sequence)
    found = attention_mass(known, layers=numbers, sequences=[one], heads=heads)
    names, columns = list(found.sources), list(found.targets)
    mean, flat, counts = found.mass[0].mean("head"), found.even[0], found.n_queries[0]
    cells = {name: mean.sel(source=name).values for name in names}
    even = {name: flat.sel(source=name).values for name in names}
    n_heads = found.mass.sizes["head"]
    row_height = float(np.clip(6.0 / (len(numbers) + 1), 0.2, 0.34))
    width = max(0.35 * len(columns) + 0.25, 1.7)
    with Sheet(
        None, width * len(names) + 1.0, row_height * (len(numbers) + 1) + 2.6, (1, len(names))
    ) as sheet:
        for i, (ax, name) in enumerate(zip(sheet.axes, names, strict=True)):
            shares = np.where(even[name] > 0, np.vstack([cells[name], even[name]]), np.nan)
            _panel(ax, shares, numbers, columns, first=i == 0)
            ax.set_title(
                f"from {name} ({int(counts.sel(source=name))})", fontsize=8.5, fontweight="normal",
                pad=4,
            )  # fmt: skip
        drawn = sheet.axes[0].images[0]
        bar = sheet.figure.colorbar(
            drawn, ax=sheet.axes, shrink=min(1.0, 2.2 / (row_height * len(numbers) + 1)),
            aspect=14, pad=0.01,
        )  # fmt: skip
        bar.set_label("share of attention")
        bar.outline.set_edgecolor(RULE)
        source = model_name(trace, model)
        n_sequences = len(set(trace.tokens["sequence"]))
        which = f"Sequence {one} of {n_sequences}, counted from 0. " if n_sequences > 1 else ""
        text = (
            f"{source + '. ' if source else ''}{which}Each panel: the tokens that look (how many); "
            "each column: where they look, grey where they cannot. Percent of the attention, mean "
            f"over those tokens and {n_heads} head{'s' if n_heads > 1 else ''}; a row sums to 100. "
            "Even: what looking evenly at every visible token would give. The first token often "
            "takes what a head has no use for, so it is apart."
        )
        view = sheet.finish(
            title or "Who looks at the picture, and where the picture looks",
            text if caption is None else caption,
            _alt(cells, even, numbers, columns, source),
        )
        assert isinstance(view, View)
        return view


def _sequence(table: Any, sequence: int | None) -> int:
    there = sorted(int(one) for one in set(table["sequence"]))
    if sequence is None and len(there) == 1:
        return there[0]
    if sequence not in there:
        raise ValueError(f"sequence={sequence}: the trace has sequences {there}, name one")
    return int(sequence)


def _panel(
    ax: Axes, cells_LG: Floats, numbers: Sequence[int], columns: Sequence[str], *, first: bool
) -> None:
    """Layers from top to bottom, then a gap and the even row."""
    n = len(numbers)
    for values, top, tall in ((cells_LG[:-1], 0.0, n), (cells_LG[-1:], n + 0.4, 1)):
        ax.imshow(
            np.ma.masked_invalid(values), cmap=_COLOURS, vmin=0, vmax=1, aspect="auto",
            interpolation="nearest", extent=(-0.5, len(columns) - 0.5, top + tall, top),
        )  # fmt: skip
    for row, line in enumerate(cells_LG):
        y = row + 0.5 if row < n else n + 0.9
        for col in np.flatnonzero(np.isfinite(line)).tolist():
            value = line[col]
            ax.text(
                col, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7,
                color="white" if value > 0.5 else INK,
            )  # fmt: skip
    ax.set_xlim(-0.5, len(columns) - 0.5)
    ax.set_ylim(n + 1.4, 0)
    ax.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    ticks = [i + 0.5 for i in range(n)] + [n + 0.9]
    ax.set_yticks(ticks, [str(number) for number in numbers] + ["even"])
    ax.tick_params(length=0, labelleft=first, pad=2, labelsize=7.5)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.axhline(n + 0.2, color=MUTED, lw=0.7, ls=(0, (3, 3)))
    if first:
        ax.set_ylabel("layer")
        ax.set_xlabel("where they look")


def _alt(
    cells: Mapping[str, Floats], even: Mapping[str, Floats], numbers: Sequence[int],
    columns: Sequence[str], model: str,
) -> str:  # fmt: skip
    place = columns.index("picture")
    parts = []
    for name, shares in cells.items():
        top = int(shares[:, place].argmax())
        parts.append(
            f"{name}: {shares[:, place].mean():.0%} on the picture (most {shares[top, place]:.0%} "
            f"in layer {numbers[top]}; evenly {even[name][place]:.0%})"
        )
    return (
        f"Share of attention between text and picture{f' in {model}' if model else ''}, "
        f"{len(numbers)} layers. Mean over layers, {'; '.join(parts)}."
    )
