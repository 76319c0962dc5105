"""Token text coloured by a value per token, as HTML that cannot do anything but show it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.colors import Colormap, Normalize, to_hex
from numpy.typing import ArrayLike

from ernie_lab.plots.style import AMOUNT, DEVIATION
from ernie_lab.plots.token_names import Tokens, names, pictures
from ernie_lab.plots.tokens import coordinate, prompt_length, shown_text

MAX_TOKENS = 5000
_BORDER = '<span style="border-left:2px solid;margin:0 3px" title="generated"></span>'
_STOPS = 9  # of the legend's gradient


@dataclass(frozen=True, slots=True, repr=False)
class TokenHTML:
    """Coloured token text: HTML in a notebook, plain text with the extremes elsewhere."""

    html: str
    text: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return self.text


def token_html(
    values: ArrayLike,
    tokens: Tokens | None = None,
    *,
    name: str,
    unit: str = "",
    center: float | None = None,
    limits: tuple[float, float] | None = None,
    n_prompt: int | None = None,
    title: str = "",
    caption: str = "",
) -> TokenHTML:
    """The text of `tokens`, each on a background that stands for its value.

    Hovering shows position and value. With `center` the scale diverges from it (red above, blue
    below), without it white is the smallest value. A NaN has no colour and a dotted line. Every
    token is escaped and isolated, so that markup and right-to-left text stay inside it; `tokens`
    default to the array's coordinate `text`. `n_prompt` draws the border to generated tokens.
    The tokens of a picture are one chip with their mean; `tokens=trace.tokens` gives its grid.
    """
    values_N = np.asarray(values, dtype=np.float64)
    n_prompt = prompt_length(values) if n_prompt is None else n_prompt
    words = names(values, tokens)
    if values_N.ndim != 1 or words is None or len(words) != len(values_N):
        raise ValueError(
            f"values of shape {values_N.shape} for {'no' if words is None else len(words)} tokens; "
            "one value per token is needed"
        )
    if len(values_N) > MAX_TOKENS:
        raise ValueError(
            f"{len(values_N)} tokens, at most {MAX_TOKENS}: pass values[start:stop] and "
            "tokens[start:stop]"
        )
    scale = _scale(values_N, center, limits)
    cmap = AMOUNT if center is None else DEVIATION
    shown = [shown_text(token) for token in words]
    positions = [int(p) for p in coordinate(values, "pos") or range(len(shown))]
    chips = {start: (stop, chip) for start, stop, chip in pictures(values, tokens)}
    spans, plain, i = [], [], 0
    while i < len(shown):
        if n_prompt is not None and i == n_prompt:
            spans.append(_BORDER)
        stop, text = chips.get(i, (i + 1, shown[i]))
        plain.append(f"[{text}]" if i in chips else text)
        spans.append(_span(positions[i:stop], text, values_N[i:stop], name, unit, scale, cmap))
        if text.endswith("⏎"):
            spans.append("<br>")
        i = stop
    body = (
        (f"<div><b>{html.escape(title)}</b></div>" if title else "")
        + '<div style="line-height:1.75;font-size:14px;max-width:62em;overflow-wrap:anywhere">'
        + "".join(spans)
        + "</div>"
        + _legend(name, unit, scale, cmap, bool(np.isnan(values_N).any()))
        + (f"<div><small>{html.escape(caption)}</small></div>" if caption else "")
    )
    read = "".join(plain)
    return TokenHTML(
        f"<div>{body}</div>", _text(read, shown, positions, values_N, name, unit, title, caption)
    )


def _scale(values: Any, center: float | None, limits: tuple[float, float] | None) -> Normalize:
    finite = values[np.isfinite(values)]
    if limits is not None:
        low, high = limits
    elif not finite.size:
        low, high = 0.0, 1.0
    elif center is None:
        low, high = min(0.0, float(finite.min())), float(finite.max())
    else:
        reach = float(np.abs(finite - center).max())
        low, high = center - reach, center + reach
    return Normalize(low, high if high > low else low + 1.0, clip=True)


def _span(
    positions: Sequence[int], text: str, values: Any, name: str, unit: str, scale: Normalize,
    cmap: Colormap,
) -> str:  # fmt: skip
    """A token, or a picture with the mean of its tokens."""
    finite = values[np.isfinite(values)]
    value = float(finite.mean()) if finite.size else float("nan")
    known = f"{name}: {_number(value)} {unit}".rstrip()
    if len(positions) == 1:
        hover, edge = f"{text} · position {positions[0]} · {known}", ""
    else:
        ends = f", from {_number(finite.min())} to {_number(finite.max())}" if finite.size else ""
        hover = f"{text} · positions {positions[0]} to {positions[-1]} · mean {known}{ends}"
        edge = "border:1px solid #888;padding:0 5px;"
    if np.isfinite(value):
        red, green, blue, _ = cmap(float(scale(value)))
        # Relative luminance of WCAG 2 decides between dark and light letters.
        rgb = np.array([red, green, blue])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        bright = float(linear @ (0.2126, 0.7152, 0.0722)) > 0.18
        look = f"background:{to_hex((red, green, blue))};color:{'#111' if bright else '#fff'}"
    else:
        look = "border-bottom:2px dotted"
    return (
        f'<bdi title="{html.escape(hover)}" style="display:inline-block;white-space:pre;'
        f'line-height:1.45;padding:0 1px;margin:0 1px 1px 0;border-radius:2px;{edge}{look}">'
        f"{html.escape(text)}</bdi>"
    )


def _legend(name: str, unit: str, scale: Normalize, cmap: Colormap, gaps: bool) -> str:
    stops = ",".join(to_hex(cmap(x)) for x in np.linspace(0, 1, _STOPS))
    what = html.escape(f"{name} ({unit})" if unit else name)
    low, high = _number(float(scale.vmin or 0.0)), _number(float(scale.vmax or 0.0))
    return (
        f'<div style="margin-top:4px"><small>{what}: {low} '
        '<span style="display:inline-block;width:11em;height:.8em;vertical-align:-.05em;'
        f'border:1px solid #8888;background:linear-gradient(to right,{stops})"></span> {high}'
        f"{'; dotted: no value' if gaps else ''}</small></div>"
    )


def _number(value: float) -> str:
    return f"{value:.4g}" if np.isfinite(value) else "no value"


def _text(
    read: str,
    shown: Sequence[str],
    positions: Sequence[int],
    values: Any,
    name: str,
    unit: str,
    title: str,
    caption: str,
) -> str:
    known = [i for i in np.argsort(-values, kind="stable").tolist() if np.isfinite(values[i])]
    parts = [f"{shown[i]} ({positions[i]}) {_number(values[i])}" for i in known[:5]]
    highest = f"Highest {name}{f' ({unit})' if unit else ''}: {', '.join(parts) or 'no values'}"
    return "\n".join(filter(None, (title, read, highest, caption)))
