"""Token strings that can be drawn anywhere: whitespace visible, no glyph missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

from ernie_lab.display import visible
from ernie_lab.plots.style import style

BASE_FONT = "DejaVu Sans"  # ships with matplotlib
HOLLOW = "▯"

# Families that people have for what DejaVu lacks, most legible first; matched anywhere in a name.
_LIKELY = (
    "noto sans cjk sc", "noto sans sc", "source han sans", "noto sans cjk", "wenquanyi micro",
    "wenquanyi", "pingfang", "hiragino sans gb", "microsoft yahei", "heiti", "simhei", "songti",
    "simsun", "droid sans fallback", "arial unicode", "unifont", "noto sans", "noto emoji",
    "symbola", "noto serif cjk", "cjk",
)  # fmt: skip
_NOT_FONTS = ("last resort", "color", "display")


def shortened(text: str, width: int) -> str:
    """At most `width` characters, the middle left out."""
    if len(text) <= width:
        return text
    head = width // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


class PlaceName(str):
    """A name that we give to a token of a picture, such as `img0 r1 c2`; shown as it is."""

    __slots__ = ()


def shown_text(token: str | bytes) -> str:
    """`visible`, but a name of ours keeps its spaces."""
    return str(token) if isinstance(token, PlaceName) else visible(token)


@dataclass(frozen=True, slots=True)
class Labels:
    """Token texts that this machine's fonts can draw.

    `boxed` maps the position of a token that they cannot to its text: in a picture it shows as ▯
    and its position.
    """

    texts: tuple[str, ...]
    fonts: tuple[str, ...]
    boxed: dict[int, str]

    @property
    def note(self) -> str:
        """One sentence for the caption, empty when every token could be drawn."""
        if not self.boxed:
            return ""
        return f"{HOLLOW}n: token at position n, in a script that no font on this machine has."

    @property
    def full(self) -> str:
        """The boxed tokens in full, for places where a browser draws the text."""
        return ", ".join(f"{i} {text}" for i, text in self.boxed.items())


def labels(
    tokens: Sequence[str | bytes], *, width: int = 14, positions: Sequence[int] | None = None
) -> Labels:
    """Drawable labels of `tokens`, at most `width` characters each."""
    positions = range(len(tokens)) if positions is None else positions
    shown = [shown_text(token) for token in tokens]
    fonts, missing = _fonts(frozenset("".join(shown)))
    texts: list[str] = []
    boxed: dict[int, str] = {}
    for position, text in zip(positions, shown, strict=True):
        if missing.isdisjoint(text):
            texts.append(shortened(text, width))
        else:
            boxed[position] = text
            texts.append(f"{HOLLOW}{position}")
    return Labels(tuple(texts), fonts, boxed)


def drawable(text: str) -> tuple[str, tuple[str, ...]]:
    """`text` with ▯ for what no font here has, and the fonts to draw it with: for titles."""
    fonts, missing = _fonts(frozenset(re.sub(r"[\n\t]", " ", text)))
    return "".join(HOLLOW if character in missing else character for character in text), fonts


@lru_cache(maxsize=256)
def _fonts(characters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that together draw `characters`, DejaVu first, and what none of them has."""
    chosen = [BASE_FONT]
    missing = {ord(character) for character in characters} - _charmap(_path(BASE_FONT))
    for family, path in _candidates():
        if not missing:
            break
        found = missing & _charmap(path)
        if found:
            chosen.append(family)
            missing -= found
    return tuple(chosen), frozenset(map(chr, missing))


def _path(family: str) -> str:
    with style():  # only for its silence about fonts of one weight
        return str(font_manager.findfont(family, fallback_to_default=True))


def _candidates() -> Iterable[tuple[str, str]]:
    """(family, the file matplotlib would draw it with) of the likely fonts of this machine."""
    families = {entry.name for entry in font_manager.fontManager.ttflist}
    usable = [f for f in sorted(families) if not any(word in f.lower() for word in _NOT_FONTS)]
    seen: set[str] = set()
    for wanted in _LIKELY:
        for family in usable:
            if wanted in family.lower() and family not in seen:
                seen.add(family)
                yield family, _path(family)


@lru_cache(maxsize=128)
def _charmap(path: str) -> frozenset[int]:
    if not Path(path).is_file():
        return frozenset()
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError, ValueError):  # bitmap-only and broken fonts
        return frozenset()


def coordinate(array: Any, name: str) -> list[Any] | None:
    """A coordinate of a labelled array (xarray's `coords`), None where it has none."""
    coords = getattr(array, "coords", None)
    if coords is None or name not in coords:
        return None
    return list(coords[name].values.reshape(-1).tolist())


def prompt_length(array: Any) -> int | None:
    """How many tokens came before the first generated one, by the coordinate `phase`."""
    phases = coordinate(array, "phase") or []
    return phases.index("decode") if "decode" in phases else None
