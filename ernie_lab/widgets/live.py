"""What every view that a browser draws has in common: its script, and a still picture beside it."""

from __future__ import annotations

import base64
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.colors import Colormap

from ernie_lab.plots.pictures import TraceLike
from ernie_lab.plots.view import View

T = TypeVar("T", int, str)

_HERE = Path(__file__).parent
_SHADES = 64


def script(*names: str) -> str:
    """Files of this folder as one module: a notebook fetches nothing, so they travel inside."""
    return "\n".join((_HERE / name).read_text(encoding="utf-8") for name in names)


def shades(cmap: Colormap) -> list[list[float]]:
    """A colour scale of the figures for a canvas: red, green, blue of 0..255 and opacity."""
    return [
        [round(255 * r), round(255 * g), round(255 * b), round(a, 3)]
        for r, g, b, a in cmap([i / (_SHADES - 1) for i in range(_SHADES)]).tolist()
    ]


def with_still(shown: Any, still: View, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A widget's mime bundle with a picture, for where no kernel runs (GitHub, HTML)."""
    data, metadata = shown if isinstance(shown, tuple) else (shown or {}, {})
    png = still.png()
    picture = {
        "text/html": still.img(png),
        "image/png": base64.b64encode(png).decode(),
        "text/plain": text,
    }
    return {**data, **picture}, metadata


def traced(given: Any, caller: str) -> TraceLike:
    """The trace that a view was given; raises where it is something else."""
    if not isinstance(given, TraceLike):
        way = ": pass its .trace" if hasattr(given, "trace") else ""
        raise TypeError(f"{caller} takes a Trace, not {type(given).__name__}{way}")
    return given


def require_state(explorer: Any, name: str) -> None:
    """Raise where a public name that is set is none of a view's state: nothing would change."""
    if name.startswith("_") or hasattr(type(explorer), name):
        return
    state = [known for known in explorer.trait_names(sync=True) if not known.startswith("_")]
    near = get_close_matches(name, state, n=1)
    raise AttributeError(
        f"{type(explorer).__name__} has no {name!r}"
        + (f", did you mean {near[0]!r}?" if near else f"; its state: {', '.join(sorted(state))}")
    )


def one_of(name: str, value: T, known: list[T]) -> T:
    if value not in known:
        raise ValueError(f"{name}={value!r}: this trace has {known}")
    return value


def below(name: str, value: int, n: int, what: str, *, none: bool = False) -> int:
    """A place or number of `n`; with `none`, -1 means that none is meant."""
    if 0 <= value < n or (none and value == -1):
        return value
    way = ", or -1 for none" if none else ""
    raise ValueError(f"{name}={value}: {what} 0..{n - 1}{way}")
