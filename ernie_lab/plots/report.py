"""One self-contained HTML file: figures, tables and token text, readable without a network."""

from __future__ import annotations

import html
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, Union

from ernie_lab.plots.token_text import TokenHTML
from ernie_lab.plots.view import View, write_atomic

if TYPE_CHECKING:
    import pandas as pd

Item: TypeAlias = Union[str, View, TokenHTML, "pd.DataFrame"]

MAX_BYTES = 20_000_000
MAX_ROWS = 200
_COARSE_DPI = 72.0

# The policy makes the promise checkable: nothing is loaded, no script runs.
_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8885; --soft: #8882; }}
body {{ font: 16px/1.55 system-ui, sans-serif; max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }}
h1 {{ line-height: 1.2; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }}
p {{ max-width: 46rem; white-space: pre-wrap; }}
nav ul {{ padding-left: 1.2rem; }}
figure {{ margin: 1rem 0; }}
figure img {{ background: #fff; border-radius: 6px; padding: 6px; box-sizing: border-box; }}
figcaption {{ font-size: .85rem; opacity: .8; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }}
thead th {{ background: var(--soft); }}
.loss {{ border-left: 4px solid #d55e00; padding: .3rem .8rem; background: var(--soft); }}
</style>
</head>
<body>
<h1>{title}</h1>
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what follows it, in order: paragraphs, Views, DataFrames, token text."""

    heading: str
    items: Sequence[Item]


def report(
    path: str | os.PathLike[str],
    *,
    title: str,
    sections: Sequence[Section],
    intro: str = "",
    max_bytes: int = MAX_BYTES,
) -> Path:
    """Write the file, all or nothing, and return its path.

    Tables show their first 200 rows. Past `max_bytes` pictures are drawn again at 72 dpi, and
    what still does not fit is left out from the end; each loss is stated in its place and counted
    at the top.
    """
    for section in sections:
        _check(section)
    body, losses = _body(sections, None, max_bytes)
    if losses:
        body, losses = _body(sections, _COARSE_DPI, max_bytes)
        losses.insert(0, f"pictures drawn at {_COARSE_DPI:.0f} dpi")
    head = _HEAD.format(title=html.escape(title))
    top = f"<p>{html.escape(intro)}</p>\n" if intro else ""
    if losses:
        listed = html.escape("; ".join(losses))
        top += f'<p class="loss">Kept under {max_bytes / 1e6:.1f} MB: {listed}.</p>\n'
    links = "".join(
        f'<li><a href="#s{i}">{html.escape(s.heading)}</a></li>' for i, s in enumerate(sections)
    )
    contents = f"<nav><ul>{links}</ul></nav>\n" if len(sections) > 1 else ""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it: {path / 'report.html'}")
    write_atomic(path, f"{head}{top}{contents}{body}</body>\n</html>\n".encode())
    return path


def _check(section: Section) -> None:
    import pandas as pd

    for item in section.items:
        if not isinstance(item, str | View | TokenHTML | pd.DataFrame):
            raise TypeError(
                f"section {section.heading!r} has a {type(item).__name__}; a report takes text, "
                "Views, DataFrames and token_html (other HTML could load things)"
            )


def _body(sections: Sequence[Section], dpi: float | None, max_bytes: int) -> tuple[str, list[str]]:
    """The sections as HTML within `max_bytes`, and what had to be left out."""
    parts: list[str] = []
    losses: list[str] = []
    used = len(_HEAD)
    for i, section in enumerate(sections):
        parts.append(f'<h2 id="s{i}">{html.escape(section.heading)}</h2>\n')
        for name, piece in _pieces(section, dpi):
            size = len(piece.encode())
            if used + size > max_bytes:
                losses.append(f"left out {name}, {size / 1e3:,.0f} kB")
                piece = f'<p class="loss">Left out for size: {html.escape(name)}.</p>\n'
            parts.append(piece)
            used += len(piece.encode())
    return "".join(parts), losses


def _pieces(section: Section, dpi: float | None) -> Iterator[tuple[str, str]]:
    for item in section.items:
        if isinstance(item, str):
            yield "a paragraph", f"<p>{html.escape(item)}</p>\n"
        elif isinstance(item, View):
            yield f"the figure “{item.title}”", _figure(item, dpi)
        elif isinstance(item, TokenHTML):
            yield "a text", f"<figure>{item.html}</figure>\n"
        else:
            yield f"a table of {len(item):,} rows", _table(item)


def _figure(view: View, dpi: float | None) -> str:
    note = f"<figcaption>{html.escape(view.note)}</figcaption>" if view.note else ""
    return f"<figure>{view.img(view.png(dpi))}{note}</figure>\n"


def _table(table: pd.DataFrame) -> str:
    rest = len(table) - MAX_ROWS
    cut = f"<p>First {MAX_ROWS} of {len(table):,} rows.</p>" if rest > 0 else ""
    named = table.index.nlevels == 1 and table.index.name not in (None, *table.columns)
    flat = table.head(MAX_ROWS).reset_index() if named else table.head(MAX_ROWS)
    shown = flat.to_html(
        index=not named, border=0, escape=True, float_format=lambda x: f"{x:.4g}", na_rep="–"
    )
    return f'<div class="table">{shown}</div>{cut}\n'
