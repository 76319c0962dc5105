"""Where a name is that `ernie_lab` itself does not have, told without importing what has it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path


def in_words(name: str, own: Iterable[str], modules: Mapping[str, str]) -> str:
    """`: it is el.widgets.explore_routing`, `, did you mean el.load?`, or nothing.

    `own` are the names of `ernie_lab`, `modules` its public modules by the name they have there.
    """
    if name.startswith("_"):  # what tools ask every module for
        return ""
    places: dict[str, list[str]] = {}
    for module, path in modules.items():
        for known in _public(path):
            places.setdefault(known, []).append(f"el.{module}.{known}")
    places |= {known: [f"el.{known}"] for known in own}
    if name in places:
        return f": it is {' or '.join(places[name])}"
    near = get_close_matches(name, places, n=1)
    return f", did you mean {' or '.join(places[near[0]])}?" if near else "; dir(el) lists all"


def _public(module: str) -> list[str]:
    """The `__all__` of a module of this package. Read, since importing may bring matplotlib."""
    path = Path(__file__).parent.joinpath(*module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(known) for known in ast.literal_eval(node.value)]
    return []
