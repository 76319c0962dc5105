"""Slices of a trace by label: which tokens and which sites survive."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ernie_lab.sites import Site
from ernie_lab.trace.integers import integers
from ernie_lab.trace.pictures import Picture, cells_of
from ernie_lab.trace.positions import PositionsLike, as_positions
from ernie_lab.trace.recorded import Recorded
from ernie_lab.trace.tokens import Tokens


def narrow(
    context: Tokens,
    rows_N: Tensor,
    sequence: int | Iterable[int] | None,
    position: PositionsLike | None,
    labels: Mapping[str, str | Iterable[str] | None],
) -> tuple[Tokens, Tensor, Tensor]:
    """The new context, the surviving rows in it, and the map old row -> new row or -1.

    The context loses whole sequences only, because attention reads keys outside a slice.
    `labels` are wanted values of columns of the tokens table, None for any.
    """
    present = list(dict.fromkeys(context.sequence))
    sequences = present if sequence is None else integers(sequence, "sequence")
    _require_there("sequence", sequences, present)
    survives = [token in set(sequences) for token in context.sequence]
    kept_context = [i for i, stays in enumerate(survives) if stays]
    if position is not None:
        _and(survives, _at(context, position, sequences))
    for name, wanted in labels.items():
        if wanted is not None:
            column = getattr(context, name)
            several = [wanted] if isinstance(wanted, str) else list(wanted)
            _require_there(name, several, sorted(set(column)))
            _and(survives, [label in several for label in column])

    here = torch.zeros(len(context), dtype=torch.bool)
    here[rows_N] = True
    here &= torch.tensor(survives, dtype=torch.bool)
    if not here.any():
        asked = {"sequence": sequence, "position": position, **labels}
        given = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
        raise ValueError(
            f"no token has {' and '.join(given)}; "
            f"the trace has {len(rows_N)} tokens of sequences {present}"
        )
    moved = torch.full((len(context),), -1)
    moved[kept_context] = torch.arange(len(kept_context))
    new_row = torch.where(here, moved, -1)
    return context.take(kept_context), new_row[here], new_row


def in_layers(
    values: Mapping[str, Recorded], layer: int | Iterable[int] | None, sites: Sequence[Site]
) -> dict[str, Recorded]:
    """The sites of these layers, and those outside the blocks."""
    if layer is None:
        return dict(values)
    n_layers = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    wanted = [number + n_layers if number < 0 else number for number in integers(layer, "layer")]
    there = sorted({kept.site.layer for kept in values.values() if kept.site.layer is not None})
    _require_there("layer", wanted, there)
    return {
        path: kept
        for path, kept in values.items()
        if kept.site.layer is None or kept.site.layer in wanted
    }


def narrowed(
    values: Mapping[str, Recorded],
    new_row: Tensor,
    sequences: Collection[int],
    media: Sequence[Picture],
) -> dict[str, Recorded]:
    """The rows of the surviving tokens, and the patches of pictures of these sequences."""
    survives = {
        row: torch.tensor(
            [media[image].sequence in sequences for image in cells_of(row, media)["image"]],
            dtype=torch.bool,
        )
        for row in {kept.site.row for kept in values.values() if kept.site.of_patches}
    }
    return {
        path: kept.of_cells(survives[kept.site.row])
        if kept.site.of_patches
        else kept.select(new_row, sequences)
        for path, kept in values.items()
    }


def _at(context: Tokens, position: PositionsLike, sequences: Sequence[int]) -> list[bool]:
    wanted = as_positions(position)
    lengths = {sequence: context.sequence.count(sequence) for sequence in sequences}
    among = {sequence: set(wanted.among(length)) for sequence, length in lengths.items()}
    longest = max(lengths.values())
    if beyond := wanted.beyond(longest):
        raise ValueError(f"positions {beyond} are in no sequence; the longest has {longest} tokens")
    return [
        pos in among.get(sequence, ())
        for sequence, pos in zip(context.sequence, context.pos, strict=True)
    ]


def _and(survives: list[bool], condition: Sequence[bool]) -> None:
    survives[:] = [a and b for a, b in zip(survives, condition, strict=True)]


def _require_there(what: str, wanted: Sequence[object], there: Sequence[object]) -> None:
    absent = [value for value in wanted if value not in there]
    if absent or not wanted:
        raise ValueError(f"{what}={absent} is not in this trace; it has {list(there)}")
