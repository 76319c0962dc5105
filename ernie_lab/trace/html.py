"""How a trace shows itself, as text and in a notebook."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from ernie_lab.display import in_words, ranges, visible

if TYPE_CHECKING:
    from ernie_lab.trace.trace import Trace

_MOST_SITES = 12
_MOST_TOKENS = 60
_MOST_PICTURES = 4


def as_text(trace: Trace) -> str:
    rows = site_rows(trace)
    width = max([24, *(len(name) for name, _, _ in rows)])
    lines = [
        f"Trace of {trace.provenance.line()}",
        f"  {counts(trace)}",
        *(f"  {name:<{width}} {layers}  {size}" for name, layers, size in rows),
        f"  kept: {trace.keep}; t.tokens, t[site], t.to_frame(), t.sel(...), t.save(folder)",
    ]
    lines[2:2] = [f"  {note}" for note in notes(trace)]
    return "\n".join(lines)


def as_html(trace: Trace) -> str:
    rows = "".join(
        f"<tr><td style='text-align:left'><code>{escape(name)}</code></td>"
        f"<td style='text-align:left'>{escape(layers)}</td><td>{escape(size)}</td></tr>"
        for name, layers, size in site_rows(trace)
    )
    said = "".join(f"<div><small>{escape(note)}</small></div>" for note in notes(trace))
    created = f"; {escape(trace.provenance.created)}" if trace.provenance.created else ""
    return (
        f"<div><b>Trace</b> of {escape(trace.provenance.line())}<br>{escape(counts(trace))}"
        f"{said}<div style='line-height:1.9;max-width:60em'>{_token_spans(trace)}</div>"
        "<table><thead><tr><th style='text-align:left'>site</th>"
        "<th style='text-align:left'>layers</th><th>size</th></tr></thead>"
        f"<tbody>{rows}</tbody></table>"
        f"<small>kept: {escape(trace.keep)}{created}</small></div>"
    )


def counts(trace: Trace) -> str:
    total = sum(kept.n_bytes for kept in trace.values.values())
    phases = [trace.context.phase[i] for i in trace.rows_N.tolist()]
    parts = [f"{phases.count(phase)} {phase}" for phase in dict.fromkeys(phases)]
    return (
        f"{_many(len(trace), 'token')} ({', '.join(parts)}) of "
        f"{_many(len(trace.sequences), 'sequence')}, {_many(len(trace.sites), 'site')}, "
        f"{in_words(total)}"
    )


def notes(trace: Trace) -> list[str]:
    found = [trace.provenance.edited] if trace.provenance.edited else []
    if trace.media:
        grids = [
            f"{number}: {picture.kind} of "
            + (f"{picture.grid.t} x " if picture.kind == "video" else "")
            + f"{picture.grid.h} x {picture.grid.w} patches"
            for number, picture in enumerate(trace.media[:_MOST_PICTURES])
        ]
        more = [f"{len(trace.media) - _MOST_PICTURES} more"] * (len(trace.media) > _MOST_PICTURES)
        found.append(f"{_many(len(trace.media), 'picture')}: {', '.join(grids + more)}")
    if len(trace.banks) > 1:
        taken = [trace.context.bank[i] for i in trace.rows_N.tolist()]
        shares = ", ".join(f"{bank} {taken.count(bank)}" for bank in trace.banks)
        moved = any(path.endswith(".moe.bank") for path in trace.edited)
        which = (
            "expected bank (an edit of moe.bank may have moved some)"
            if moved
            else "bank of experts"
        )
        found.append(f"tokens by {which}: {shares}; t.routing(bank)")
    if "decode" in trace.context.phase:
        found.append(
            "the last sampled token was never read by the model: it has no routing and no row"
        )
    return found


def site_rows(trace: Trace) -> list[tuple[str, str, str]]:
    """One row per name: its layers and its size over all of them."""
    layers: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for kept in trace.values.values():
        name = re.sub(r"^vision\.blocks\.\d+\.", "vision.blocks.*.", kept.site.quantity)
        sizes[name] = sizes.get(name, 0) + kept.n_bytes
        layers.setdefault(name, []).extend([] if kept.site.layer is None else [kept.site.layer])
    rows = [
        (name, ranges(layers[name]) if layers[name] else "", in_words(sizes[name]))
        for name in layers
    ]
    if len(rows) <= _MOST_SITES:
        return rows
    rest = rows[_MOST_SITES:]
    size = sum(sizes[name] for name, _, _ in rest)
    return [*rows[:_MOST_SITES], (f"… {len(rest)} more names", "", in_words(size))]


def _token_spans(trace: Trace) -> str:
    """A span for each token, and one for all tokens of a picture."""
    images = trace.context.image
    rows, shown = [], set()
    for i in trace.rows_N.tolist():
        if images[i] is None or images[i] not in shown:
            rows.append(i)
            shown.add(images[i])
    spans = [
        f"<bdi title='sequence {trace.context.sequence[i]}, pos {trace.context.pos[i]}, "
        f"id {trace.context.id[i]}, {escape(trace.context.phase[i])}' style='border:1px solid "
        f"{'#8888' if trace.context.phase[i] == 'prefill' else '#c60'};border-radius:3px;"
        f"padding:0 2px'>{escape(_shown(trace, i))}</bdi>"
        for i in rows[:_MOST_TOKENS]
    ]
    more = f" … {len(rows) - _MOST_TOKENS} more" if len(rows) > _MOST_TOKENS else ""
    return " ".join(spans) + more


def _shown(trace: Trace, row: int) -> str:
    image = trace.context.image[row]
    if image is None:
        return visible(trace.context.text[row])
    return f"{trace.context.content[row]} {image}: {trace.context.image.count(image)} tokens"


def _many(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
