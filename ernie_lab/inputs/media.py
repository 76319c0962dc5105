"""What the model reads of one picture or clip, and where each token of it lies on the pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from jaxtyping import Float
from torch import Tensor

Kind: TypeAlias = Literal["image", "video"]
Pixels: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

# The tower joins 2 x 2 patches, then 2 frames, into one token (ernie-facts 3.6).
SPATIAL_MERGE, TEMPORAL_MERGE = 2, 2


class Grid(NamedTuple):
    """Frames, and rows and columns of patches in each. An image has one frame, a clip two or more.

    A single frame is its own pair, so it makes as many tokens as a pair of frames does.
    """

    t: int
    h: int
    w: int

    @property
    def n_patches(self) -> int:
        return self.t * self.h * self.w

    @property
    def merged(self) -> Grid:
        """The grid of tokens: (pairs of frames, rows, columns)."""
        pairs = 1 if self.t == 1 else self.t // TEMPORAL_MERGE
        return Grid(pairs, self.h // SPATIAL_MERGE, self.w // SPATIAL_MERGE)

    @property
    def n_tokens(self) -> int:
        return self.merged.n_patches


class Box(NamedTuple):
    """Pixels `left <= x < right`, `top <= y < bottom` of a picture."""

    left: float
    top: float
    right: float
    bottom: float


class Cell(NamedTuple):
    """One image token: its first frame, its row and column among the tokens of the picture.

    In a clip the token also covers frame `frame + 1`.
    """

    frame: int
    row: int
    col: int


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """One image or clip, ready for the tower.

    `patches_PQ` `[p, channels * patch^2]` are normalised pixels, channel-major, 2 x 2 merge
    blocks together: (t, h/2, w/2, 2, 2). `frames` `[t, height, width, 3]` is what they were cut
    from, after resizing and, for clips, after the timestamps were drawn. `original_size` is
    (height, width) before that. `timestamps` are seconds, one for each frame of a clip.
    """

    kind: Kind
    patches_PQ: Float[Tensor, "p q"] = field(repr=False)
    grid: Grid
    frames: Pixels = field(repr=False)
    original_size: tuple[int, int]
    timestamps: tuple[float, ...] = ()
    source: str = "picture"

    def cells(self) -> Iterator[Cell]:
        """Every token, in the order in which the model reads them."""
        pairs, rows, cols = self.grid.merged
        step = 1 if self.grid.t == 1 else TEMPORAL_MERGE
        for pair in range(pairs):
            for row in range(rows):
                for col in range(cols):
                    yield Cell(pair * step, row, col)

    def box(self, cell: Cell) -> Box:
        """The pixels of `frames` that a token covers."""
        _, rows, cols = self.grid.merged
        height, width = self.frames.shape[1] / rows, self.frames.shape[2] / cols
        return Box(
            cell.col * width, cell.row * height, (cell.col + 1) * width, (cell.row + 1) * height
        )

    def original_box(self, cell: Cell) -> Box:
        """The same region in the picture as it was given, before resizing."""
        height, width = self.original_size
        down, across = height / self.frames.shape[1], width / self.frames.shape[2]
        left, top, right, bottom = self.box(cell)
        return Box(left * across, top * down, right * across, bottom * down)
