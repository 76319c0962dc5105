"""What tokens are called: their text, or for a token of a picture its place in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from ernie_lab.plots.tokens import PlaceName, coordinate

if TYPE_CHECKING:
    import pandas as pd

Tokens: TypeAlias = Union[Sequence[str | bytes], "pd.DataFrame"]

_SHORT = {"image": "img", "video": "vid"}


def name_of(record: Any) -> str:
    """`img0 r1 c2` or `vid0 f4 r1 c2` of a row of `trace.tokens`, of text its text."""
    if record["content"] not in _SHORT:
        return str(record["text"])
    frame = f" f{record['frame']}" if record["content"] == "video" else ""
    return PlaceName(
        f"{_SHORT[record['content']]}{record['image']}{frame} r{record['row']} c{record['col']}"
    )


def rows_of(array: Any, tokens: Any, axis: str = "") -> list[dict[str, Any]] | None:
    """The rows of the tokens table that are on an axis of `array`, None without a table.

    `tokens` is `trace.tokens`, found by the coordinates sequence and pos where the array has
    them, else one row for each. `axis` is "query_" or "key_" for a pattern.
    """
    if not hasattr(tokens, "columns"):
        return None
    records: list[dict[str, Any]] = tokens.to_dict("records")
    pos, sequence = coordinate(array, f"{axis}pos"), coordinate(array, f"{axis}sequence")
    if pos is None or sequence is None:
        return records
    by_place = {(one["sequence"], one["pos"]): one for one in records}
    places = list(zip(sequence, pos, strict=True))
    absent = [place for place in places if place not in by_place]
    if absent:
        raise ValueError(
            f"tokens= has no position {absent[0][1]} of sequence {absent[0][0]}: pass the tokens "
            "table of the same trace"
        )
    return [by_place[place] for place in places]


def names(array: Any, tokens: Tokens | None, axis: str = "") -> list[str | bytes] | None:
    """Names along an axis: of `tokens` (texts, or `trace.tokens`), else the array's own texts."""
    rows = rows_of(array, tokens, axis)
    if rows is not None:
        return [name_of(row) for row in rows]
    if tokens is not None:
        return [*tokens]
    texts: list[str | bytes] | None = coordinate(array, f"{axis}text")
    return texts


def pictures(array: Any, tokens: Tokens | None) -> list[tuple[int, int, str]]:
    """Runs `(start, stop, name)` of tokens that are one picture, in words.

    The name has the grid where `tokens` is `trace.tokens`; from the array's coordinate
    `modality` alone only the kind and the number of tokens are known.
    """
    rows = rows_of(array, tokens)
    if rows is not None:
        marks: list[Any] = [
            (row["content"], row["sequence"], row["image"]) if row["content"] in _SHORT else None
            for row in rows
        ]
    elif tokens is None:
        kinds = coordinate(array, "modality") or []
        marks = [kind if kind in _SHORT else None for kind in kinds]
    else:
        return []
    found = []
    start = 0
    for i in range(1, len(marks) + 1):
        if i == len(marks) or marks[i] != marks[start]:
            if marks[start] is not None:
                mine = None if rows is None else rows[start:i]
                found.append((start, i, _in_words(marks[start], mine, i - start)))
            start = i
    return found


def _in_words(mark: Any, rows: Sequence[dict[str, Any]] | None, n_tokens: int) -> str:
    if rows is None:
        return f"{mark}: {n_tokens} tokens"
    kind, _, image = mark
    n_rows, n_cols, n_pairs = (len({row[name] for row in rows}) for name in ("row", "col", "frame"))
    word = "image" if kind == "image" else "clip"
    if n_rows * n_cols * n_pairs != n_tokens:
        return f"{word} {image}: {n_tokens} of its tokens"
    pairs = "" if n_pairs == 1 else f"{n_pairs} pairs of frames, each "
    return f"{word} {image}: {pairs}{n_rows}x{n_cols} tokens"
