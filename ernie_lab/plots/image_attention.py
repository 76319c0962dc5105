"""How one token looks at a picture: its attention to each part, and how much goes elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from ernie_lab.plots.panels import (
    LEAST_BOX,
    VEIL,
    box_lines,
    draw_picture,
    lay_over,
    layout,
    number_axes,
    outline,
    panel_title,
    value_bar,
    write_in_boxes,
)
from ernie_lab.plots.pictures import (
    Floats,
    Shown,
    Span,
    TraceLike,
    indices,
    medium_of,
    model_name,
    shown,
)
from ernie_lab.plots.token_names import name_of
from ernie_lab.plots.tokens import coordinate, shown_text
from ernie_lab.plots.view import View

Heads: TypeAlias = "Literal['mean', 'all'] | int | Sequence[int]"

MAX_HEADS = 64
_WRITTEN = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One query's attention `[head, key]`, and what each key is."""

    weights_HT: Floats
    heads: tuple[int, ...]
    position: int
    text: str
    on_picture_T: Any
    on_others_T: Any
    index_RC: Any
    visible_T: Any
    sink: str

    def mass(self) -> dict[str, Floats]:
        """Shares by head: this picture, others, the first token, the token itself, the rest."""
        before = self.weights_HT * self.visible_T
        picture_H = before[:, self.on_picture_T].sum(1)
        others_H = before[:, self.on_others_T].sum(1)
        any_T = self.on_picture_T | self.on_others_T
        first_H = np.where(any_T[0], 0.0, before[:, 0])
        own = self.visible_T.sum() - 1
        own_H = np.where(any_T[own] or own == 0, 0.0, before[:, own])
        rest_H = before.sum(1) - picture_H - others_H - first_H - own_H
        return {
            "the picture": picture_H,
            "other pictures": others_H,
            f"the first token {self.sink}": first_H,
            "itself": own_H,
            "other tokens": rest_H,
        }


@overload
def plot_image_attention(
    trace: TraceLike, *, layer: int, query: int | Literal["last"] = ..., heads: Heads = ...,
    image: int = ..., frame: int | None = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_image_attention(
    trace: TraceLike, *, layer: int, query: int | Literal["last"] = ..., heads: Heads = ...,
    image: int = ..., frame: int | None = ..., rows: Span | None = ..., cols: Span | None = ...,
    model: str | None = ..., ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_image_attention(
    trace: TraceLike,
    *,
    layer: int,
    query: int | Literal["last"] = "last",
    heads: Heads = "mean",
    image: int = 0,
    frame: int | None = None,
    rows: Span | None = None,
    cols: Span | None = None,
    model: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Attention weights from the token at position `query` to each box of the picture.

    `heads="mean"` averages them, a number or a list takes true head numbers, a panel each,
    `"all"` all of them. The colour follows the square root of the weight up to the highest on
    this picture, which is framed. The title gives the share that the whole picture gets, the
    caption where the rest goes, and what uniform attention would give.
    """
    medium = medium_of(trace, image)
    picture = shown(trace, image, frame, rows, cols)
    row = _row(trace, trace.pattern(layer, int(medium.sequence)), picture, query)
    names, maps = _maps(row, heads, picture)
    before = 1 if ax is None else 0
    n = len(maps) + before
    plan = layout(n, picture, least=LEAST_BOX, narrow="heads=[…]")
    box = plan.width / picture.shape[1]
    highest = max(float(np.nanmax(map_RC)) for map_RC in maps)
    norm = PowerNorm(0.5, 0, highest if highest > 0 else 1.0)
    with plan.sheet(ax, bar=True) as sheet:
        panels = plan.axes(sheet, alone=n == 1, bar=True)
        if before:
            draw_picture(panels[0], picture, pale=False)
            panel_title(panels[0], "what the model saw")
        drawn = None
        mass_H = row.mass()["the picture"]
        for name, map_RC, panel in zip(names, maps, panels[before:], strict=True):
            draw_picture(panel, picture, pale=True)
            drawn = lay_over(panel, picture, map_RC, norm, VEIL, box)
            if box > 0.12:
                box_lines(panel, picture, box)
            if box >= _WRITTEN:
                write_in_boxes(panel, picture, _percents(map_RC), box, digits=3)
            outline(panel, picture, *divmod(int(np.nanargmax(map_RC)), picture.shape[1]))
            own = mass_H.mean() if name is None else mass_H[row.heads.index(name)]
            panel_title(panel, f"{'mean of heads' if name is None else f'head {name}'}: {own:.0%}")
        for i, panel in enumerate(panels):
            left, bottom = plan.is_edge(i)
            number_axes(panel, picture, plan.width, left=left, bottom=bottom)
        value_bar(sheet, drawn, "attention weight", plan.size[1])
        share = _share(mass_H, names, row)
        whom = f"“{shown_text(row.text)}” (position {row.position})"
        return sheet.finish(
            title or f"Layer {layer}: {whom} gives {share} of its attention to {picture.name}",
            _caption(row, names, box, model_name(trace, model)) if caption is None else caption,
            f"Attention of {whom} to {picture.label}, {picture.size}, layer {layer}: {share}. "
            + _alt(names, maps, picture),
        )


def _row(trace: TraceLike, pattern: Any, picture: Shown, query: int | str) -> Row:
    positions = [int(p) for p in coordinate(pattern, "query_pos") or []]
    keys = [int(p) for p in coordinate(pattern, "key_pos") or []]
    wanted = positions[-1] if query == "last" else int(query)
    if wanted not in positions:
        raise ValueError(
            f"query={query!r}: attention was kept of positions {positions[0]} to {positions[-1]}"
        )
    table = trace.tokens
    mine = table[table["sequence"] == picture.sequence].set_index("pos")
    whole = [int(p) for p in mine.index[mine["image"] == picture.image]]
    if not set(whole) <= set(keys):
        raise ValueError("the pattern does not have all tokens of the picture among its keys")
    if wanted < min(whole):
        raise ValueError(
            f"query={wanted} comes before the picture (positions {min(whole)} to {max(whole)}), "
            "so it cannot see it: take a later one"
        )
    weights_HT = np.asarray(pattern.values[:, positions.index(wanted)], dtype=np.float64)
    keys_T = np.array(keys)
    texts = coordinate(pattern, "key_text") or [""] * len(keys)
    known = coordinate(pattern, "head")
    index_RC = indices(_Keys(pattern), picture.sequence, picture.positions_RC)
    return Row(
        weights_HT,
        tuple(int(h) for h in (range(len(weights_HT)) if known is None else known)),
        wanted,
        name_of(mine.loc[wanted]) if wanted in mine.index else str(texts[keys.index(wanted)]),
        np.isin(keys_T, whole),
        np.isin(keys_T, mine.index[mine["image"].notna() & (mine["image"] != picture.image)]),
        np.where(picture.positions_RC <= wanted, index_RC, -1),
        keys_T <= wanted,
        f"“{shown_text(str(texts[0]))}”",
    )


class _Keys:
    """The key axis of a pattern, under the names of a token axis."""

    def __init__(self, pattern: Any) -> None:
        names = {"key_pos": "pos", "key_sequence": "sequence"}
        self.coords = {
            ours: pattern.coords[theirs] for theirs, ours in names.items()
            if theirs in pattern.coords
        }  # fmt: skip


def _maps(row: Row, heads: Heads, picture: Shown) -> tuple[list[int | None], list[Floats]]:
    """A head number (None for the mean) and `[row col]` for each panel."""
    if heads == "mean":
        names: list[int | None] = [None]
        rows = [row.weights_HT.mean(0)]
    else:
        wanted = (
            list(row.heads) if isinstance(heads, str) else
            [heads] if isinstance(heads, int) else [int(h) for h in heads]
        )  # fmt: skip
        if heads not in ("mean", "all") and isinstance(heads, str):
            raise ValueError(f"heads={heads!r}: 'mean', 'all', a number or a list of numbers")
        absent = [h for h in wanted if h not in row.heads]
        if absent or not 0 < len(wanted) <= MAX_HEADS:
            raise ValueError(
                f"heads={heads}: heads {list(row.heads)} were kept; at most {MAX_HEADS} at a time"
            )
        names = [*wanted]
        rows = [row.weights_HT[row.heads.index(h)] for h in wanted]
    return names, [picture.folded(weights_T, row.index_RC) for weights_T in rows]


def _share(mass_H: Floats, names: Sequence[int | None], row: Row) -> str:
    shares = [
        float(mass_H.mean()) if name is None else float(mass_H[row.heads.index(name)])
        for name in names
    ]
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    return low if low == high else f"{low} to {high}"


def _percents(map_RC: Floats) -> list[list[str]]:
    """Percent without its sign; a dot for less than half of one."""
    return [
        ["" if not np.isfinite(x) else "·" if x < 0.005 else f"{100 * x:.0f}" for x in line]
        for line in map_RC
    ]


def _caption(row: Row, names: Sequence[int | None], box: float, model: str) -> str:
    picked = list(range(len(row.heads))) if None in names else [
        row.heads.index(name) for name in names if name is not None
    ]  # fmt: skip
    parts = ", ".join(
        f"{name} {mass_H[picked].mean():.0%}" for name, mass_H in row.mass().items()
        if mass_H[picked].mean() > 0 or name == "the picture"
    )  # fmt: skip
    n_seen, n_visible = int((row.on_picture_T & row.visible_T).sum()), int(row.visible_T.sum())
    mass_H = row.mass()["the picture"]
    best = int(mass_H.argmax())
    how = "mean of" if len(picked) > 1 else "attention of"
    listed = f"{len(picked)} heads" if len(picked) > 1 else f"head {row.heads[picked[0]]}"
    return (
        f"{model + ': ' if model else ''}{how} {listed}: {parts}. Looking evenly at all "
        f"{n_visible} tokens it can see would give the picture {n_seen / n_visible:.0%}. The head "
        f"that looks most: {row.heads[best]}, {mass_H[best]:.0%}. Framed: the box with most"
        + ("; numbers in percent, a dot is less than half of one." if box >= _WRITTEN else ".")
        + (" ×: a later token, which it cannot see." if (row.index_RC < 0).any() else "")
    )


def _alt(names: Sequence[int | None], maps: Sequence[Floats], picture: Shown) -> str:
    parts = []
    for name, map_RC in list(zip(names, maps, strict=True))[:6]:
        row, col = divmod(int(np.nanargmax(map_RC)), picture.shape[1])
        who = "the mean of the heads" if name is None else f"head {name}"
        parts.append(
            f"{who}, most at row {row + picture.row}, column {col + picture.col} "
            f"({map_RC[row, col]:.1%})"
        )
    return "; ".join(parts) + ("; …" if len(maps) > 6 else ".")
