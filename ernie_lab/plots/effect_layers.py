"""Effects over layers: where an edit costs most, and how far its re-routing reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from ernie_lab.plots.effect_rows import (
    FLOOR,
    METRICS,
    floor_of,
    in_words,
    limits,
    metric_of,
    rows_of,
    said_of_floor,
    said_of_interval,
)
from ernie_lab.plots.given import require
from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.style import AMOUNT, INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.tokens import drawable, shortened
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import pandas as pd

    from ernie_lab.interventions.comparison import Comparison

MAX_LINES = 6
MAX_CONDITIONS = 60
_HUES = [OKABE_ITO[name] for name in ("blue", "vermillion", "green", "purple", "orange", "black")]
_MARKERS = "osD^vX"


@overload
def plot_effects_by_layer(
    comparison: Comparison, lines: Mapping[str, Mapping[int, str]], *, metric: str = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_effects_by_layer(
    comparison: Comparison, lines: Mapping[str, Mapping[int, str]], *, metric: str = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_effects_by_layer(
    comparison: Comparison,
    lines: Mapping[str, Mapping[int, str]],
    *,
    metric: str = "loss_change",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """A metric against the layer that was edited: one line for each kind of edit.

    `lines` says which condition is which: `{"shared off": {1: "shared 1", 2: "shared 2"}}`, kind
    to true layer to the condition's name. Conditions that are not named are left out.
    """
    require(comparison, "Comparison", "plot_effects_by_layer", "el.compare(…)")
    words = metric_of(comparison, metric)
    rows = rows_of(comparison.conditions, metric)
    _check_lines(lines, rows)
    layers = sorted({layer for line in lines.values() for layer in line})
    tables = {
        name: rows.loc[[line[layer] for layer in sorted(line)]] for name, line in lines.items()
    }
    floor = floor_of(rows)
    with Sheet(ax, float(np.clip(3.4 + 0.34 * len(layers), 6.4, 10.5)), 4.4) as sheet:
        axes, ends = sheet.ax, limits(list(tables.values()), words, floor)
        for i, (name, table) in enumerate(tables.items()):
            places = [layers.index(layer) for layer in sorted(lines[name])]
            shift = 0.06 * (i - (len(tables) - 1) / 2)
            _line(axes, np.array(places) + shift, table, i, name)
        _over_layers(axes, layers, words.null, floor)
        axes.set_ylim(*ends)
        axes.set_xlabel("layer that was edited")
        axes.set_ylabel(f"{words.label}\n{words.direction}" if words.direction else words.label)
        _legend(axes)
        said = [
            f"{model or comparison.provenance.model}. n = {in_words(comparison.conditions)}.",
            f"Thick line: {words.null:g}, the model without an edit.",
            said_of_interval(comparison.conditions),
            said_of_floor(floor, words, len(comparison.noise)),
        ]
        return sheet.finish(
            title or f"{words.heading}, by the layer that was edited",
            " ".join(said) if caption is None else caption,
            _alt_lines(
                {
                    name: dict(zip(sorted(lines[name]), t["value"], strict=True))
                    for name, t in tables.items()
                },
                words.label,
            ),
        )


@overload
def plot_routing_drift(
    comparison: Comparison, *, conditions: Sequence[str] | None = ..., bank: str | None = ...,
    model: str = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_routing_drift(
    comparison: Comparison, *, conditions: Sequence[str] | None = ..., bank: str | None = ...,
    model: str = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_routing_drift(
    comparison: Comparison,
    *,
    conditions: Sequence[str] | None = None,
    bank: str | None = None,
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Set flips of each layer, all that happened upstream included: how far re-routing reaches.

    Up to six conditions are lines with intervals over the noise floor; more are a heat map,
    one row each, `conditions` in their order. `bank` is needed where a model has two.
    """
    require(comparison, "Comparison", "plot_routing_drift", "el.compare(…)")
    table = _of_bank(comparison.routing, bank)
    names = [str(name) for name in dict.fromkeys(table["condition"])]
    shown = names if conditions is None else list(conditions)
    if absent := [name for name in shown if name not in names]:
        raise ValueError(f"no condition {absent[0]!r}; this comparison has {', '.join(names)}")
    if not 0 < len(shown) <= MAX_CONDITIONS:
        raise ValueError(
            f"{len(shown)} conditions, 1 to {MAX_CONDITIONS} can be drawn: name them in "
            "conditions=[…]"
        )
    table = table[table["condition"].isin(shown)]
    layers = sorted({int(layer) for layer in table["layer"]})
    frames = {
        name: table[table["condition"] == name].set_index("layer").loc[layers] for name in shown
    }
    n = int(next(iter(frames.values()))["n_tokens"].max())
    floor = float(table["flips_floor"].max())
    known = np.isfinite(floor)
    of_bank = f", {bank} bank" if bank else ""
    said = [
        f"{model or comparison.provenance.model}{of_bank}. n = {n:,} tokens.",
        "0: the experts of the unedited run; 1: none of them. Layers before the edit cannot drift.",
        f"Noise floor at most {floor:.2g}." if known else "No noise floor was measured (noise=0).",
    ]
    draw = _drift_lines if len(shown) <= MAX_LINES else _drift_map
    width = float(np.clip(3.6 + 0.3 * len(layers), 6.4, 11.0))
    tall = 4.2 if len(shown) <= MAX_LINES else 2.3 + 0.22 * len(shown)
    with Sheet(ax, width, tall) as sheet:
        draw(sheet.ax, frames, layers, floor)
        sheet.ax.set_xlabel("layer")
        if len(shown) <= MAX_LINES:
            said.insert(1, said_of_interval(comparison.conditions))
        return sheet.finish(
            title or f"Routing drift by layer{of_bank}",
            " ".join(said) if caption is None else caption,
            _alt_lines({name: frame["flips"] for name, frame in frames.items()}, "set flips"),
        )


def _drift_lines(
    ax: Axes, frames: Mapping[str, pd.DataFrame], layers: list[int], floor: float
) -> None:
    for i, (name, frame) in enumerate(frames.items()):
        rows = frame.rename(
            columns={"flips": "value", "flips_low": "low", "flips_high": "high"}
        ).assign(floor=frame["flips_floor"])
        shift = 0.06 * (i - (len(frames) - 1) / 2)
        _line(ax, np.arange(len(layers), dtype=float) + shift, rows, i, name)
    _over_layers(ax, layers, METRICS["flips"].null, floor)
    highest = max(
        float(frame["flips_high"].fillna(frame["flips"]).max()) for frame in frames.values()
    )
    ax.set_ylim(-0.03 * max(highest, 0.02), 1.08 * max(highest, 0.02))
    ax.set_ylabel("set flips (share of the k experts\nthat others took the place of)")
    _legend(ax)


def _drift_map(
    ax: Axes, frames: Mapping[str, pd.DataFrame], layers: list[int], floor: float
) -> None:
    flips_CL = np.array([frame["flips"].to_numpy(dtype=float) for frame in frames.values()])
    most = float(np.nanmax(flips_CL)) or 1.0
    image = ax.imshow(
        np.ma.masked_invalid(flips_CL), cmap=AMOUNT, norm=Normalize(0, most), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    names = [drawable(shortened(name, 46)) for name in frames]
    ax.set_yticks(range(len(names)), [text for text, _ in names], parse_math=False, fontsize=7)
    for tick, (_, fonts) in zip(ax.get_yticklabels(), names, strict=True):
        tick.set_fontfamily(list(fonts))
    _layer_ticks(ax, layers)
    ax.tick_params(length=0)
    shrink = min(1.0, 14 / len(frames))
    bar = ax.figure.colorbar(image, ax=ax, pad=0.015, aspect=20, shrink=shrink, anchor=(0, 1))
    bar.set_label("set flips (share of the k experts)")
    bar.outline.set_edgecolor(RULE)
    if np.isfinite(floor) and floor > 0.01 * most:
        bar.ax.axhline(floor, color=MUTED, lw=1.2, ls=(0, (3, 2)))


def _line(ax: Axes, x: Floats, rows: Any, i: int, name: str) -> None:
    value, low, high = (rows[end].to_numpy(dtype=float) for end in ("value", "low", "high"))
    look: dict[str, Any] = {"color": _HUES[i]}
    ax.plot(x, value, marker=_MARKERS[i], ms=5, lw=1.2, zorder=4, label=shortened(name, 46), **look)
    there = np.isfinite(low)
    ax.vlines(x[there], low[there], high[there], lw=2.0, alpha=0.55, zorder=3, **look)


def _over_layers(ax: Axes, layers: list[int], null: float, floor: float) -> None:
    ax.axhline(null, color=INK, lw=1.2, zorder=1)
    if np.isfinite(floor):
        size = abs(floor - null)
        ax.axhspan(null - size, null + size, color=FLOOR, lw=0, zorder=0)
    _layer_ticks(ax, layers)
    ax.set_xlim(-0.5, len(layers) - 0.5)
    ax.grid(axis="y", color=RULE, lw=0.5, alpha=0.7, zorder=0)
    ax.set_axisbelow(True)


def _layer_ticks(ax: Axes, layers: list[int]) -> None:
    step = next(s for s in (1, 2, 4, 8, 16) if len(layers) / s <= 32)
    ax.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _legend(ax: Axes) -> None:
    shown = ax.legend(
        loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.3, ncols=3,
        columnspacing=1.3, handlelength=1.8,
    )  # fmt: skip
    for text in shown.get_texts():
        text.set_parse_math(False)


def _check_lines(lines: Mapping[str, Mapping[int, str]], rows: pd.DataFrame) -> None:
    if not 0 < len(lines) <= MAX_LINES:
        raise ValueError(f"{len(lines)} lines, 1 to {MAX_LINES} can be told apart")
    for name, line in lines.items():
        if not line:
            raise ValueError(f"line {name!r} has no layer")
        if absent := [condition for condition in line.values() if condition not in rows.index]:
            raise ValueError(f"line {name!r}: this comparison has no condition {absent[0]!r}")


def _of_bank(routing: pd.DataFrame, bank: str | None) -> pd.DataFrame:
    if not len(routing):
        raise ValueError("no layer of this model routes: there is no drift")
    banks = [str(name) for name in dict.fromkeys(routing["bank"])]
    if bank is None and len(banks) > 1:
        raise ValueError(f"this model has banks {' and '.join(banks)}; name one, bank={banks[0]!r}")
    if bank is not None and bank not in banks:
        raise ValueError(f"bank={bank!r}: this comparison has {' and '.join(banks)}")
    return routing[routing["bank"] == (bank or banks[0])]


def _alt_lines(lines: Mapping[str, Any], label: str) -> str:
    """Where each line is furthest from 0; a line is values by layer."""
    parts = []
    for name, values in list(lines.items())[:8]:
        layer, value = max(dict(values).items(), key=lambda pair: abs(np.nan_to_num(pair[1])))
        parts.append(f"{name} largest in layer {layer}, {value:.3g}")
    more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
    told = "; ".join([*parts, *more])
    return f"{label[:1].upper()}{label[1:]} over layers, of {len(lines)}: {told}."
