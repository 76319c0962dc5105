"""Which tokens are pictures, which bank of experts they go to, and their 3-D positions.

Everything follows from the token ids and the grids, so nobody can pass the one without the
other. Placeholders *and* the delimiters around them go to the vision bank; for positions the
delimiters are text (ernie-facts 3.4). Decoded tokens always go to the text bank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.inputs.errors import BatchError
from ernie_lab.inputs.media import Grid, Kind

PositionRule: TypeAlias = Literal["reference", "transformers"]

TEXT, IMAGE, VIDEO = 0, 1, 2
BANKS = ("text", "vision")


@dataclass(frozen=True, slots=True)
class Block:
    """The placeholders of one image or clip: `start` is the first of them in its sequence.

    `media` counts images and clips of one kind over the whole batch, in reading order.
    """

    sequence: int
    start: int
    kind: Kind
    media: int
    grid: Grid

    @property
    def stop(self) -> int:
        return self.start + self.grid.n_tokens


@dataclass(frozen=True, slots=True, eq=False)
class VisualLayout:
    """`modality_BS`: 0 text, 1 image, 2 video, delimiters being text. `bank_BS`: 0 text, 1 vision.

    `positions_BSR` are (time, height, width), 0 on padding; `next_position_B` is where each
    sequence goes on.
    """

    modality_BS: Int[Tensor, "b s"]
    bank_BS: Int[Tensor, "b s"]
    positions_BSR: Int[Tensor, "b s 3"]
    next_position_B: Int[Tensor, " b"]
    blocks: tuple[Block, ...]

    def to(self, device: torch.device | str | None) -> VisualLayout:
        """The same on another device."""
        return VisualLayout(
            self.modality_BS.to(device),
            self.bank_BS.to(device),
            self.positions_BSR.to(device),
            self.next_position_B.to(device),
            self.blocks,
        )


def visual_layout(
    input_ids_BS: Int[Tensor, "b s"],
    ids: VisualIds,
    image_grids: Sequence[Grid] = (),
    video_grids: Sequence[Grid] = (),
    mask_BS: Tensor | None = None,
    positions: PositionRule = "reference",
) -> VisualLayout:
    """Match placeholders with pictures and place every token.

    `mask_BS` is True on real tokens. Under "reference" (Baidu's processor, vLLM) text goes on
    after the largest position of a picture; under "transformers" it goes on max(rows, columns)
    after its first, which overlaps clips that are longer than wide (ernie-facts 3.3).

    Raises:
        BatchError: pictures and placeholders that do not match, with both counts.
    """
    if positions not in ("reference", "transformers"):
        raise BatchError(f'positions={positions!r} must be "reference" or "transformers".')
    real_BS = torch.ones_like(input_ids_BS, dtype=torch.bool) if mask_BS is None else mask_BS.bool()
    rows = [ids_S[real].tolist() for ids_S, real in zip(input_ids_BS, real_BS, strict=True)]
    blocks = tuple(_blocks(rows, ids, {"image": image_grids, "video": video_grids}))

    modality_BS = torch.full_like(input_ids_BS, TEXT)
    delimiters = torch.tensor([ids.image_start, ids.image_end, ids.video_start, ids.video_end])
    bank_BS = torch.isin(input_ids_BS, delimiters.to(input_ids_BS.device)) & real_BS
    positions_BSR = input_ids_BS.new_zeros(*input_ids_BS.shape, 3)
    ends = []
    for sequence, row in enumerate(rows):
        mine = [block for block in blocks if block.sequence == sequence]
        placed_SR, kinds_S, end = _place(len(row), mine, positions)
        positions_BSR[sequence, real_BS[sequence]] = placed_SR.to(positions_BSR)
        modality_BS[sequence, real_BS[sequence]] = kinds_S.to(modality_BS)
        ends.append(end)
    bank_BS = (bank_BS | (modality_BS != TEXT)).long()
    next_B = torch.tensor(ends, device=input_ids_BS.device)
    return VisualLayout(modality_BS, bank_BS, positions_BSR, next_B, blocks)


def _blocks(
    rows: Sequence[Sequence[int]], ids: VisualIds, grids: dict[Kind, Sequence[Grid]]
) -> Iterator[Block]:
    """The runs of placeholders, cut into pictures by the sizes of their grids."""
    runs = [(i, *run) for i, row in enumerate(rows) for run in _runs(row, ids)]
    for kind, given in grids.items():
        for number, grid in enumerate(given):
            _check_grid(grid, f"{kind} {number}")
        there = sum(stop - start for _, kind_, start, stop in runs if kind_ == kind)
        needed = sum(grid.n_tokens for grid in given)
        if there != needed:
            raise BatchError(
                f"the prompt has {there} {kind} placeholders, but {len(given)} {kind}s were given, "
                f"which make {needed} tokens. Every picture needs exactly its own placeholders: "
                "let the library write them (chat messages, or images= and videos=), or pass the "
                "pictures that they stand for."
            )
    used: dict[Kind, int] = {"image": 0, "video": 0}
    for sequence, kind, start, stop in runs:
        while start < stop:
            grid = grids[kind][used[kind]]
            block = Block(sequence, start, kind, used[kind], grid)
            if block.stop > stop:
                raise BatchError(
                    f"{kind} {used[kind]} makes {grid.n_tokens} tokens, but the run of "
                    f"placeholders at position {start} of sequence {sequence} has "
                    f"{stop - start}; the pictures are in another order than the prompt, or one "
                    "has another size."
                )
            yield block
            start, used[kind] = block.stop, used[kind] + 1


def _check_grid(grid: Grid, name: str) -> None:
    """Patches that the tower could not join in twos would be left over in silence."""
    t, h, w = grid
    if t < 1 or h < 2 or w < 2 or h % 2 or w % 2 or (t > 1 and t % 2):
        raise BatchError(
            f"the grid of {name} is {t} frames of {h} x {w} patches; rows and columns must be "
            "even, and frames one or an even number."
        )


def _runs(row: Sequence[int], ids: VisualIds) -> Iterator[tuple[Kind, int, int]]:
    """Maximal runs of placeholders: kind, first and past-the-end position.

    Released checkpoints have one placeholder for both kinds: then the delimiter before a run
    says which it is.
    """
    start, opened, previous = 0, "image", None
    for place, token in enumerate([*row, None]):
        if token != previous and previous in (ids.image, ids.video):
            kind: Kind = "video" if previous == ids.video else "image"
            if ids.image == ids.video:
                kind = "video" if opened == "video" else "image"
            yield kind, start, place
        if token != previous:
            start = place
        if token == ids.image_start:
            opened = "image"
        elif token == ids.video_start:
            opened = "video"
        elif token in (ids.image_end, ids.video_end):
            opened = "image"
        previous = token


def _place(
    n_tokens: int, blocks: Sequence[Block], rule: PositionRule
) -> tuple[Tensor, Tensor, int]:
    """Positions `[s 3]`, modality `[s]` and the next position of one sequence."""
    kinds_S = torch.zeros(n_tokens, dtype=torch.int64)
    pieces, done, at, largest = [], 0, 0, -1
    for block in blocks:
        pieces.append(_counted(at, block.start - done))
        at += block.start - done
        merged = block.grid.merged
        pieces.append(at + _grid_positions(merged))
        kinds_S[block.start : block.stop] = IMAGE if block.kind == "image" else VIDEO
        largest = max(largest, at + max(merged) - 1)
        # transformers forgets the time axis here, so a long clip overlaps what follows it.
        at += max(merged) if rule == "reference" else max(merged.h, merged.w)
        done = block.stop
    pieces.append(_counted(at, n_tokens - done))
    at += n_tokens - done
    return torch.cat(pieces), kinds_S, max(at, largest + 1)


def _counted(start: int, n: int) -> Tensor:
    """`[n 3]`: text, with one count on all three axes."""
    return torch.arange(start, start + n)[:, None].expand(-1, 3)


def _grid_positions(merged: Grid) -> Tensor:
    """`[m 3]`: (pair of frames, row, column) of every token of a picture."""
    axes = [torch.arange(size) for size in merged]
    return torch.cartesian_prod(*axes).reshape(-1, 3)
