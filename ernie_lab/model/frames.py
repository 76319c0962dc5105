"""Packed patches and the frames they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from ernie_lab.inputs.media import SPATIAL_MERGE, Grid


@dataclass(frozen=True, slots=True)
class Frames:
    """How many packed patches each frame has: images and clips cut into frames, in order."""

    lengths: tuple[int, ...]

    @classmethod
    def of(cls, grids: Sequence[Grid]) -> Frames:
        return cls(tuple(grid.h * grid.w for grid in grids for _ in range(grid.t)))

    @property
    def n_patches(self) -> int:
        return sum(self.lengths)

    def runs(self) -> Iterator[tuple[int, int, int]]:
        """Neighbouring frames of equal size: first patch, number of frames, patches in each."""
        start = 0
        for length, group in groupby(self.lengths):
            n_frames = len(list(group))
            yield start, n_frames, length
            start += n_frames * length

    def present(self, device: torch.device) -> Bool[Tensor, "i p"]:
        """True where frame i has a patch p; the others are padding to the largest frame."""
        place_P = torch.arange(max(self.lengths), device=device)
        return place_P < torch.tensor(self.lengths, device=device)[:, None]


def patch_positions(grids: Sequence[Grid]) -> Int[Tensor, "p 2"]:
    """(row, column) of every packed patch in its frame, 2 x 2 merge blocks together."""
    return torch.cat([_frame_positions(grid.h, grid.w).repeat(grid.t, 1) for grid in grids])


def _frame_positions(height: int, width: int) -> Tensor:
    rows_HW, cols_HW = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    m = SPATIAL_MERGE
    blocks = "(y m1) (x m2) two -> (y x m1 m2) two"
    return rearrange(torch.stack([rows_HW, cols_HW], -1), blocks, m1=m, m2=m)
