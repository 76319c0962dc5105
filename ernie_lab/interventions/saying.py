"""How edits show themselves: as the call that makes them, without what is left at its default."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

# The metadata of a field that the function takes under another name.
AS = "as"


def as_call(edit: Any, unsaid: str = "") -> str:
    """`experts.off(5, 8, bank='text')`: behind `el.`, it makes an equal edit.

    What the function cannot do without stands by its place, the rest by its name. Recorded
    numbers show as `<rows of 12 tokens, 1a2b3c4d>` in the place of the trace they are from.
    """
    name = getattr(edit, "said", edit.kind)
    placed, named = [], []
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        by_place = field.default is dataclasses.MISSING
        if field.name == unsaid or (not by_place and value == field.default):
            continue
        if field.name == "target":
            placed += [] if name in _OF_ONE_SITE else [shown(value.what)]
            narrowed = {"layers": value.layers, "heads": value.heads}
            named += [f"{key}={shown(n)}" for key, n in narrowed.items() if n is not None]
        elif by_place and AS not in field.metadata:
            placed.append(shown(value))
        else:
            named.append(f"{field.metadata.get(AS, field.name)}={shown(value)}")
    return f"{name}({', '.join([*placed, *named])})"


# Functions that imply the site.
_OF_ONE_SITE = (
    *("shared.zero", "shared.scale", "shared.mean", "shared.resample"),
    "edits.knockout",
)


def times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def shown(value: Any) -> str:
    """As one would type it: one number for a tuple of one, a range for many in a row."""
    if isinstance(value, tuple) and len(value) == 1:
        return repr(value[0])
    if isinstance(value, tuple):
        first, n = value[0], len(value)
        in_a_row = n > 3 and isinstance(first, int) and value == tuple(range(first, first + n))
        return f"range({first}, {first + n})" if in_a_row else repr(list(value))
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    return repr(value)
