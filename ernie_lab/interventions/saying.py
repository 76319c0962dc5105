"""How edits show themselves: as the call that makes them, without what is left at its default."""

from __future__ import annotations

import dataclasses
from typing import Any


def as_call(edit: Any) -> str:
    """`shared.swap(3, 7)`: the name of its kind, and every field that is not at its default."""
    said = []
    for field in dataclasses.fields(edit):
        value = getattr(edit, field.name)
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
        shown = list(shown) if isinstance(shown, tuple) else shown
        # A target says by itself which sites, layers and heads it means.
        said.append(repr(shown) if field.name == "target" else f"{field.name}={shown!r}")
    return f"{getattr(edit, 'said', edit.kind)}({', '.join(said)})"
