"""An ablation's result as HTML: next tokens side by side, figures, drift by layer, its code."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ernie_lab.display import visible
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, PALE, RULE

if TYPE_CHECKING:
    import pandas as pd

BASE, EDITED, WARN = MUTED, OKABE_ITO["blue"], OKABE_ITO["vermillion"]
_BAR, _TALL = 88, 90  # pixels of the longest bar, and of a column of 100 %
_NUMBERED = 16  # layers: of more, the figures are in the titles alone

STYLE = f"""<style>
.ernie-ablation .widget-html-content {{ color: {INK}; line-height: 1.4; }}
.ernie-ablation {{ background: #fff; border: 1px solid {RULE}; border-radius: 4px;
  padding: 8px 10px; max-width: 1120px; box-sizing: border-box; }}
.ernie-ablation .widget-label {{ color: {INK}; }}
.ernie-ablation .ea-title {{ font-weight: 600; font-size: 14px; }}
.ernie-ablation .ea-hint {{ color: {MUTED}; font-size: 12px; }}
.ernie-ablation .ea-two {{ display: flex; flex-wrap: wrap; gap: 4px 28px;
  align-items: flex-start; }}
.ernie-ablation table.ea {{ border-collapse: collapse; font-size: 12px;
  font-variant-numeric: tabular-nums; margin: 2px 0 6px; }}
.ernie-ablation table.ea th {{ font-weight: 600; text-align: left; padding: 0 12px 2px 0;
  background: none; }}
.ernie-ablation table.ea td {{ text-align: left; padding: 1px 12px 1px 0; background: none;
  white-space: nowrap; }}
.ernie-ablation table.ea td code {{ white-space: normal; font-size: 11px; }}
.ernie-ablation .ea-two > div {{ flex: 0 0 auto; max-width: 100%; }}
.ernie-ablation .ea-two > div:last-child {{ flex: 1 1 320px; min-width: 0; }}
.ernie-ablation .ea-two > div:last-child td {{ white-space: normal; }}
.ernie-ablation table.ea tr {{ background: none !important; }}
.ernie-ablation .ea-bar {{ display: inline-block; height: 11px; vertical-align: -1px;
  margin-right: 5px; border-radius: 1px; }}
.ernie-ablation .ea-drift {{ display: flex; align-items: flex-end; gap: 2px; overflow-x: auto;
  font-size: 10px; text-align: center; padding: 2px 0 4px; }}
.ernie-ablation .ea-drift span {{ display: block; min-width: 12px; flex: 0 0 auto; }}
.ernie-ablation .ea-drift .ea-wide {{ width: 34px; }}
.ernie-ablation .ea-drift i {{ display: block; background: {EDITED}; min-height: 1px; }}
.ernie-ablation pre {{ background: {PALE}; padding: 5px 8px; margin: 2px 0; font-size: 12px;
  white-space: pre-wrap; user-select: all; border-radius: 3px; color: {INK}; }}
.ernie-ablation .ea-warn {{ border-left: 4px solid {WARN}; padding: 2px 8px; font-size: 12px;
  background: {PALE}; margin: 3px 0; white-space: pre-wrap; }}
.ernie-ablation button.widget-toggle-button {{ padding: 0 4px; }}
.ernie-ablation button.widget-toggle-button.mod-active {{ background: {WARN}; color: #fff; }}
.ernie-ablation :focus-visible {{ outline: 2px solid {WARN}; outline-offset: 1px; }}
</style>"""


def next_tokens_html(table: pd.DataFrame, after: str, actual: int | None) -> str:
    """Two bars a token. `after` is the context's end; `actual` the id the text goes on with."""
    most = max(float(table[["base", "edited"]].to_numpy().max()), 1e-9)
    rows = []
    for row in table.to_dict("records"):
        bars = "".join(
            f"<td><span class='ea-bar' style='width:{_BAR * row[name] / most:.1f}px;"
            f"background:{colour}'></span>{100 * row[name]:.3g} %</td>"
            for name, colour in (("base", BASE), ("edited", EDITED))
        )
        goes_on = row["id"] == actual
        word = f"<bdi>{html.escape(visible(row['token']))}</bdi>"
        word = f"<b>{word}</b> ← the text" if goes_on else word
        change = 100 * (row["edited"] - row["base"])
        rows.append(f"<tr><td>{word}</td>{bars}<td>{change:+.2g}</td></tr>")
    return (
        f"<div class='ea-title'>next token after <bdi>…{html.escape(after)}</bdi></div>"
        "<table class='ea'><thead><tr><th>token</th><th>intact</th><th>edited</th>"
        f"<th>points</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def figures_html(figures: Mapping[str, str], counts: list[tuple[str, int, int]]) -> str:
    """What changed, and what each edit did: applied, and changed a number."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td><b>{html.escape(value)}</b></td></tr>"
        for name, value in figures.items()
    )
    edits = "".join(
        f"<tr><td><code>{html.escape(words)}</code></td><td>{n_fired}</td><td>{n_changed}</td></tr>"
        for words, n_fired, n_changed in counts
    )
    head = "<tr><th>edit</th><th>n_fired</th><th>n_changed</th></tr>"
    listed = f"<table class='ea'>{head}{edits}</table>" if counts else ""
    return f"<div class='ea-title'>what changed</div><table class='ea'>{rows}</table>{listed}"


def drift_html(flips: Mapping[str, Mapping[int, float]]) -> str:
    """Columns by layer, one row of them for each bank; heights are shares of all experts."""
    found = [
        "<div class='ea-title'>routing drift by layer</div><div class='ea-hint'>share of each "
        "token's experts that others took the place of</div>"
    ]
    for bank, by_layer in flips.items():
        told = ", ".join(f"layer {layer} {100 * x:.0f} %" for layer, x in by_layer.items())
        wide = len(by_layer) <= _NUMBERED
        columns = "".join(
            f"<span class='{'ea-wide' if wide else ''}' title='layer {layer}: {100 * x:.1f} %'>"
            + (f"{100 * x:.0f}&nbsp;%" if wide else "")
            + f"<i style='height:{_TALL * x:.0f}px'></i>{layer}</span>"
            for layer, x in by_layer.items()
        )
        name = f"{bank} bank: " if bank else ""
        found.append(
            f"<div class='ea-drift' role='img' aria-label='{name}{told}'>"
            f"<span class='ea-hint'>{name}layer</span>{columns}</div>"
        )
    return "".join(found)


def code_html(code: str) -> str:
    return (
        "<div class='ea-hint'>the same as code (a click selects it):</div>"
        f"<pre class='ernie-code' tabindex='0'>{html.escape(code)}</pre>"
    )


def warning_html(*words: str) -> str:
    return "".join(f"<div class='ea-warn' role='alert'>{html.escape(said)}</div>" for said in words)
