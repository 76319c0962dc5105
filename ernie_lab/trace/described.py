"""What the steps of a run tell of its tokens: phase, modality, bank, and cells of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from ernie_lab.inputs.visual_layout import BANKS, IMAGE
from ernie_lab.trace.pictures import CELL, Picture
from ernie_lab.trace.rows import StepRows

_MODALITIES = ("text", "image", "video")

Column = list[list[Any]]


def phases(steps: Sequence[StepRows], lengths: Sequence[int]) -> Column:
    """`prefill` or `decode`, of every token of every sequence."""
    return _filled(steps, lengths, [step.phase for step in steps])


def columns(
    steps: Sequence[StepRows], lengths: Sequence[int], pictures: Sequence[Picture]
) -> dict[str, Column]:
    """Those columns of the tokens table that follow from modality, bank and grids, if given."""
    if all(step.modality_BS is None and step.bank_BS is None for step in steps):
        return {}
    modality = _filled(steps, lengths, [step.modality_BS for step in steps], _MODALITIES)
    bank = _filled(steps, lengths, [step.bank_BS for step in steps], BANKS)
    # The vision bank also takes what stands around a picture.
    content = [
        [
            "delimiter" if (kind, where) == ("text", "vision") else kind
            for kind, where in zip(kinds, banks, strict=True)
        ]
        for kinds, banks in zip(modality, bank, strict=True)
    ]
    cells: dict[str, Column] = {name: [[None] * length for length in lengths] for name in CELL}
    for image, picture in enumerate(pictures):
        for pos, cell in enumerate(picture.cells(), start=picture.start):
            for name, value in zip(CELL, (image, *cell), strict=True):
                cells[name][picture.sequence][pos] = value
    return {"modality": modality, "bank": bank, "content": content, **cells}


def pictures_of(steps: Sequence[StepRows]) -> tuple[Picture, ...]:
    """Every picture and where its tokens stand, from the grids and modalities of the prefill."""
    found: list[Picture] = []
    for step in steps:
        if not step.grids:
            continue
        assert step.modality_BS is not None
        tokens = step.image_tokens.among(step.rows[None])
        kind_N = step.modality_BS[step.image_tokens.member_N.view_as(step.modality_BS)]
        first = 0
        for grid in step.grids:
            last = first + grid.n_tokens - 1
            sequence, start = int(tokens.sequence_N[first]), int(tokens.pos_N[first])
            if (int(tokens.sequence_N[last]), int(tokens.pos_N[last])) != (
                sequence,
                start + last - first,
            ):
                raise ValueError(
                    f"the {grid.n_tokens} tokens of picture {len(found)} do not stand together; "
                    "step.grids must be in reading order"
                )
            kind: Literal["image", "video"] = "image" if kind_N[first] == IMAGE else "video"
            found.append(Picture(sequence, start, kind, grid))
            first = last + 1
    return tuple(found)


def _filled(
    steps: Sequence[StepRows],
    lengths: Sequence[int],
    values: Sequence[str | Tensor | None],
    names: Sequence[str] = ("",),
) -> Column:
    """One value per token: the step's own, or `names[number]`; the first name where it is None."""
    column: Column = [[""] * length for length in lengths]
    for step, value in zip(steps, values, strict=True):
        every = step.rows[None]
        if isinstance(value, str):
            mine = [value] * len(every.pos_N)
        elif value is None:
            mine = [names[0]] * len(every.pos_N)
        else:
            mine = [names[i] for i in value.flatten()[every.flat_N.cpu()].tolist()]
        for sequence, pos, one in zip(
            every.sequence_N.tolist(), every.pos_N.tolist(), mine, strict=True
        ):
            column[sequence][pos] = one
    return column
