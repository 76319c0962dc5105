"""What a figure was given, against what it draws: a trace in the place of a table is said so."""

from __future__ import annotations

from collections.abc import Iterable


def require(
    found: object, kind: type | str, plot: str, source: str, columns: Iterable[str] = ()
) -> None:
    """Raises when a figure was given something else than what `source` returns.

    `kind` may be a name, so that a figure need not import what it draws. `columns` are those that
    a table must have.
    """
    name = kind if isinstance(kind, str) else kind.__name__
    there = {base.__name__ for base in type(found).__mro__}
    if not (name in there if isinstance(kind, str) else isinstance(found, kind)):
        raise TypeError(f"{plot} draws the {name} of {source}; this is a {type(found).__name__}")
    has = list(getattr(found, "columns", ()))
    if missing := [column for column in columns if column not in has]:
        raise ValueError(
            f"the table has no column {', '.join(missing)}; it has {has}. {plot} draws what "
            f"{source} returns"
        )
