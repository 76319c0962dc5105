"""What an expert search found, as HTML: a context a line, coloured by the expert's weight."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
from matplotlib.colors import Normalize, to_hex

from ernie_lab.analysis.search import Contexts
from ernie_lab.plots.style import AMOUNT
from ernie_lab.plots.token_names import name_of
from ernie_lab.plots.token_text import TokenHTML
from ernie_lab.plots.tokens import shown_text

MAX_LINES = 300
_STOPS = 9
_CELL = "padding:1px 6px;border:0;vertical-align:baseline;"


def context_html(
    found: Contexts, *, n: int = 30, model: str = "", title: str | None = None
) -> TokenHTML:
    """The first `n` hits of `el.analysis.find`, one a line, the hit outlined in the middle.

    The background of each token is the weight that the expert had on it, white where it was not
    chosen, dotted where another bank of experts read the token. Every token is escaped and
    isolated. Hovering shows position and weight. A row of tokens of one picture is one chip.
    """
    if not 0 < n <= MAX_LINES:
        raise ValueError(f"n={n}: 1 to {MAX_LINES} lines can be shown; found.table has all")
    # One scale for all: the largest weight of this expert in what was searched.
    scale = Normalize(0.0, found.largest or 1.0, clip=True)
    tokens: list[Any] = found.reading.to_dict("records")
    place = {(one["sequence"], one["pos"]): i for i, one in enumerate(tokens)}
    lines = [
        _line(tokens, place[row.sequence, row.pos], row, found.window, scale)
        for row in found.table.head(n).itertuples()
    ]
    gaps = bool(found.reading["weight"].isna().any())
    head = title or f"Where layer {found.layer}, expert {found.expert} is chosen{found.query}"
    less = "" if len(lines) == len(found) else f" {len(lines)} of {len(found)} lines are shown."
    caption = f"{model + '. ' if model else ''}{found.summary}{less} Largest weight first."
    body = (
        f"<div><b>{html.escape(head)}</b></div>"
        '<table style="border-collapse:collapse;font-size:13px;line-height:1.5;margin:4px 0">'
        f"{_heads()}{''.join(lines)}</table>{_legend(scale, gaps)}"
        f"<div><small>{html.escape(caption)}</small></div>"
    )
    return TokenHTML(f'<div style="overflow-x:auto">{body}</div>', f"{head}\n{found!r}")


def _heads() -> str:
    look = f'style="{_CELL}text-align:{{}};font-weight:normal"'
    names = (("before", "right"), ("token", "center"), ("after", "left"), ("weight", "right"),
             ("slot", "right"), ("sequence:position", "left"))  # fmt: skip
    cells = (f'<th scope="col" {look.format(side)}><small>{name}</small></th>'
             for name, side in names)  # fmt: skip
    return f'<tr style="background:none">{"".join(cells)}</tr>'


def _line(tokens: list[dict[str, Any]], at: int, row: Any, window: int, scale: Normalize) -> str:
    mine = tokens[at]["sequence"]
    before = [one for one in tokens[max(0, at - window) : at] if one["sequence"] == mine]
    after = [one for one in tokens[at + 1 : at + 1 + window] if one["sequence"] == mine]
    cells = (
        ("right", _spans(before, scale), "white-space:nowrap;"),
        ("center", _span(tokens[at], scale, "outline:2px solid #D55E00;"), "white-space:nowrap;"),
        ("left", _spans(after, scale), "white-space:nowrap;"),
        ("right", f"{row.weight:.3f}", ""), ("right", str(row.slot), ""),
        ("left", f"{row.sequence}:{row.pos}", ""),
    )  # fmt: skip
    inside = "".join(
        f'<td style="{_CELL}text-align:{side};{more}">{text}</td>' for side, text, more in cells
    )
    return f'<tr style="background:none">{inside}</tr>'


def _spans(tokens: list[dict[str, Any]], scale: Normalize) -> str:
    parts, start = [], 0
    for i in range(1, len(tokens) + 1):
        if i == len(tokens) or _picture(tokens[i]) != _picture(tokens[start]):
            run = tokens[start:i]
            if _picture(run[0]) is None:
                parts += [_span(one, scale) for one in run]
            else:
                parts.append(_chip(run, scale))
            start = i
    return "".join(parts)


def _picture(token: dict[str, Any]) -> tuple[str, Any] | None:
    kind = token["content"]
    return (kind, token["image"]) if kind in ("image", "video") else None


def _chip(run: list[dict[str, Any]], scale: Normalize) -> str:
    """Tokens of one picture in a row: their number, their mean weight."""
    weights = [one["weight"] for one in run if np.isfinite(one["weight"])]
    mean = float(np.mean(weights)) if weights else float("nan")
    kind, image = _picture(run[0]) or ("", "")
    text = f"{kind} {image} ×{len(run)}"
    hover = f"{text} · positions {run[0]['pos']} to {run[-1]['pos']} · {_known(mean, 'mean ')}"
    return _bdi(text, hover, mean, scale, "border:1px solid #888;padding:0 4px;")


def _span(token: dict[str, Any], scale: Normalize, more: str = "") -> str:
    text = _name(token)
    weight = float(token["weight"])
    return _bdi(text, f"{text} · position {token['pos']} · {_known(weight)}", weight, scale, more)


def _name(token: dict[str, Any]) -> str:
    """Of a picture's token its place, where the reading knows it."""
    placed = token.get("row") is not None and _picture(token) is not None
    return shown_text(name_of(token) if placed else str(token["text"]))


def _known(weight: float, mean: str = "") -> str:
    return f"{mean}weight {weight:.3f}" if np.isfinite(weight) else "not read by this bank"


def _bdi(text: str, hover: str, weight: float, scale: Normalize, more: str) -> str:
    look = "border-bottom:2px dotted #888"
    if np.isfinite(weight):
        colour = AMOUNT(float(scale(weight)))
        # The scale is monotone in lightness: from here on white letters read better.
        letters = "#111" if float(scale(weight)) < 0.5 else "#fff"
        look = f"background:{to_hex(colour)};color:{letters}"
    return (
        f'<bdi title="{html.escape(hover)}" style="display:inline-block;white-space:pre;'
        f'padding:0 1px;border-radius:2px;{more}{look}">{html.escape(text)}</bdi>'
    )


def _legend(scale: Normalize, gaps: bool) -> str:
    stops = ",".join(to_hex(AMOUNT(x)) for x in np.linspace(0, 1, _STOPS))
    return (
        "<div><small>weight of the expert: 0 "
        '<span style="display:inline-block;width:9em;height:.8em;vertical-align:-.05em;'
        f'border:1px solid #8888;background:linear-gradient(to right,{stops})"></span> '
        f"{scale.vmax:.3f}{'; dotted: not read by this bank of experts' if gaps else ''}"
        "</small></div>"
    )
