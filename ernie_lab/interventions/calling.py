"""Functions that tell of an argument they do not have: by their public name, with the nearest."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

# What ready-made edits pass on to `el.at`.
TOKENS = ("phase", "steps", "positions", "where", "sequence")
_NARROWED = (
    "To narrow it to some tokens: `phase=`, `steps=`, `positions=`, `where=`, `sequence=`, as in "
    "`el.at`."
)
# What experts are called by one function or another.
_EXPERTS = ("ids", "expert", "experts")

Fn = TypeVar("Fn", bound=Callable[..., Any])


def called(name: str) -> Callable[[Fn], Fn]:
    """The function as users call it: `name` behind `el.`; its docstring says how to narrow it.

    Python itself would name an inner function, or miss `layer` where `layers` was given.
    """

    def public(fn: Fn) -> Fn:
        parameters = inspect.signature(fn).parameters.values()
        own = [one.name for one in parameters if one.kind is not one.VAR_KEYWORD]
        narrows = len(own) < len(parameters)
        known = (*own, *TOKENS) if narrows else tuple(own)

        @functools.wraps(fn)
        def checked(*args: Any, **given: Any) -> Any:
            if unknown := next((key for key in given if key not in known), None):
                meant = _nearest(unknown, known)
                near = f", did you mean {meant!r}?" if meant else "."
                tokens = f"; to narrow tokens: {', '.join(TOKENS)}" if narrows else ""
                raise TypeError(
                    f"{name}() has no argument {unknown!r}{near} It takes {', '.join(own)}{tokens}"
                )
            return fn(*args, **given)

        checked.__name__ = checked.__qualname__ = name.rpartition(".")[2]
        if narrows:
            checked.__doc__ = f"{inspect.cleandoc(fn.__doc__ or '')}\n\n{_NARROWED}"
        return cast("Fn", checked)

    return public


def _nearest(unknown: str, known: Sequence[str]) -> str | None:
    if unknown in _EXPERTS and (other := [one for one in known if one in _EXPERTS]):
        return other[0]
    begun = [one for one in known if one.startswith(unknown) or unknown.startswith(one)]
    return next(iter(begun or difflib.get_close_matches(unknown, known, n=1)), None)
