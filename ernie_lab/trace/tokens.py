"""The tokens table: one row per token that went through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

_NAMED = ("modality", "content", "bank")
_CELL = ("image", "row", "col", "frame")
_GIVEN = (*_NAMED, *_CELL)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Columns of equal length, rows ordered by (sequence, pos).

    `text` is for display and may hold anything: parts of characters, control characters, lone
    surrogates. `content` is text, delimiter, image or video, and `modality` counts delimiters as
    text. `bank` is the bank of experts that the token's kind goes to (`text` in a text model); an
    edit may send it elsewhere. `image` numbers the pictures of `Trace.media`; `row`, `col` and
    `frame` are the token's place in it, a token of a clip standing for `frame` and `frame + 1`.
    All four are None for text and delimiters.
    """

    sequence: tuple[int, ...]
    pos: tuple[int, ...]
    id: tuple[int, ...]
    text: tuple[str, ...]
    modality: tuple[str, ...]
    phase: tuple[str, ...]
    content: tuple[str, ...]
    bank: tuple[str, ...]
    image: tuple[int | None, ...]
    row: tuple[int | None, ...]
    col: tuple[int | None, ...]
    frame: tuple[int | None, ...]

    def __post_init__(self) -> None:
        lengths = {name: len(column) for name, column in self.columns().items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"columns of the tokens table differ in length: {lengths}")

    @classmethod
    def of(
        cls,
        ids: Sequence[Sequence[int]],
        phases: Sequence[Sequence[str]],
        texts: Sequence[Sequence[str]] | None = None,
        columns: Mapping[str, Sequence[Sequence[Any]]] | None = None,
    ) -> Tokens:
        """`phases` has one entry per recorded token; the other lists may be one longer.

        One longer, because the last sampled token of a generation is never read by the model:
        it has no routing, so it has no row.
        """
        unknown = sorted(set(columns or ()) - set(_GIVEN))
        if unknown:
            raise ValueError(f"columns {unknown} are not in the tokens table: {list(_GIVEN)}")
        if texts is None:
            texts = [[str(int(token)) for token in sequence] for sequence in ids]
        every: dict[str, Sequence[Sequence[Any]]] = {
            **{name: [["text"] * len(sequence) for sequence in ids] for name in _NAMED},
            **{name: [[None] * len(sequence) for sequence in ids] for name in _CELL},
            **(columns or {}),
            "id": [[int(token) for token in sequence] for sequence in ids],
            "text": texts,
        }
        for name, column in every.items():
            _require_lengths(name, column, phases)
        joined = {
            name: tuple(
                value
                for values, phase in zip(column, phases, strict=True)
                for value in list(values)[: len(phase)]
            )
            for name, column in every.items()
        }
        return cls(
            sequence=tuple(i for i, phase in enumerate(phases) for _ in phase),
            pos=tuple(pos for phase in phases for pos in range(len(phase))),
            phase=tuple(name for phase in phases for name in phase),
            **joined,
        )

    def __len__(self) -> int:
        return len(self.pos)

    def columns(self) -> dict[str, tuple[Any, ...]]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def take(self, rows: Sequence[int]) -> Tokens:
        return Tokens(
            **{name: tuple(column[i] for i in rows) for name, column in self.columns().items()}
        )

    def table(self) -> pd.DataFrame:
        """As a DataFrame; `text` is stored by Python, because Arrow refuses lone surrogates."""
        import numpy as np
        import pandas as pd

        texts = pd.StringDtype("python", na_value=np.nan)
        dtypes: dict[str, Any] = {"sequence": "int64", "pos": "int64", "id": "int64"}
        dtypes |= dict.fromkeys(("text", "phase", *_NAMED), texts)
        dtypes |= dict.fromkeys(_CELL, "Int64")
        return pd.DataFrame(
            {
                name: pd.Series(list(column), dtype=dtypes[name])
                for name, column in self.columns().items()
            }
        )


def _require_lengths(
    name: str, column: Sequence[Sequence[Any]], phases: Sequence[Sequence[str]]
) -> None:
    if len(column) != len(phases):
        raise ValueError(f"{name}: {len(column)} sequences given, {len(phases)} recorded")
    for sequence, (values, phase) in enumerate(zip(column, phases, strict=True)):
        if len(values) - len(phase) not in (0, 1):
            raise ValueError(
                f"{name} of sequence {sequence}: {len(values)} given, {len(phase)} tokens "
                "recorded; give one per token, at most the last sampled one more"
            )
