"""The pictures of a trace: where each patch, block and image token of them lies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import numpy as np
import torch
from einops import rearrange

from ernie_lab.inputs.media import SPATIAL_MERGE, Box, Cell, Grid, Kind, Media, Pixels

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

CELL = ("image", "frame", "row", "col")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image or clip that the model read.

    Its tokens stand in `sequence` from position `start` on. `grid` is (frames, rows, columns) of
    patches. `frames` `[t height width 3]` are the pixels as shown to the model and
    `original_size` is (height, width) before resizing; both are None where the recorder was not
    given them. `timestamps` are seconds, one for each frame of a clip.
    """

    sequence: int
    start: int
    kind: Kind
    grid: Grid
    frames: Pixels | None = field(default=None, repr=False)
    original_size: tuple[int, int] | None = None
    timestamps: tuple[float, ...] = ()
    source: str = "picture"

    def cells(self) -> Iterator[Cell]:
        """Every token, in the order in which the model reads them."""
        no_pixels = np.empty((0, 0, 0, 3), dtype=np.uint8)
        return Media(self.kind, torch.empty(0, 0), self.grid, no_pixels, (0, 0)).cells()

    def box(self, cell: Cell) -> Box:
        """The pixels of `frames` that a token covers."""
        return self._media().box(cell)

    def original_box(self, cell: Cell) -> Box:
        """The same region in the picture as it was given, before resizing."""
        return self._media().original_box(cell)

    def _media(self) -> Media:
        if self.frames is None or self.original_size is None:
            raise ValueError(
                f"the pixels of this {self.kind} are not in the trace; pass media= to the "
                "recorder, as lab.run does"
            )
        return Media(self.kind, torch.empty(0, 0), self.grid, self.frames, self.original_size)


def with_media(pictures: Sequence[Picture], media: Sequence[Media]) -> tuple[Picture, ...]:
    """The pictures with their pixels; `media` in reading order, or empty."""
    if not media:
        return tuple(pictures)
    found = [(picture.kind, tuple(picture.grid)) for picture in pictures]
    given = [(medium.kind, tuple(medium.grid)) for medium in media]
    if found != given:
        raise ValueError(
            f"media={given}, but the model read {found} (frames, rows and columns of patches); "
            "give them in reading order, images and clips as they follow each other"
        )
    return tuple(
        Picture(
            picture.sequence,
            picture.start,
            picture.kind,
            picture.grid,
            read_only(medium.frames),
            (int(medium.original_size[0]), int(medium.original_size[1])),
            tuple(float(second) for second in medium.timestamps),
            medium.source,
        )
        for picture, medium in zip(pictures, media, strict=True)
    )


def read_only(frames: Pixels) -> Pixels:
    """A copy that nobody changes."""
    mine = np.array(frames, dtype=np.uint8)
    mine.flags.writeable = False
    return mine


def patch_cells(grids: Sequence[Grid]) -> dict[str, Integers]:
    """image, frame, row and col of every packed patch: 2 x 2 merge blocks stand together."""
    return _packed(grids, SPATIAL_MERGE)


def block_cells(grids: Sequence[Grid]) -> dict[str, Integers]:
    """The same of every 2 x 2 block of patches; row and col count blocks."""
    m = SPATIAL_MERGE
    return _packed([Grid(grid.t, grid.h // m, grid.w // m) for grid in grids], 1)


def cells_of(row: str, pictures: Sequence[Picture]) -> dict[str, Integers]:
    """Of the rows of a site: patches (`p`, and `i`, frames of them) or blocks (`o`)."""
    grids = [picture.grid for picture in pictures]
    return block_cells(grids) if row == "o" else patch_cells(grids)


def _packed(grids: Sequence[Grid], merge: int) -> dict[str, Integers]:
    parts = [_of_one(number, grid, merge) for number, grid in enumerate(grids)]
    joined = np.concatenate(parts, axis=1) if parts else np.empty((len(CELL), 0), dtype=np.int64)
    return dict(zip(CELL, joined, strict=True))


def _of_one(number: int, grid: Grid, merge: int) -> Integers:
    places = rearrange(
        np.indices(tuple(grid)),
        "three t (y m1) (x m2) -> three (t y x m1 m2)",
        m1=merge,
        m2=merge,
    )
    image = np.full((1, places.shape[1]), number)
    return np.concatenate([image, places]).astype(np.int64)


def frame_number(pictures: Sequence[Picture], image: int, frame: int) -> int:
    """Which of the frames of all pictures this is; raises where there is no such frame."""
    if not 0 <= image < len(pictures):
        raise ValueError(f"no picture {image}; the trace has {len(pictures)}, counted from 0")
    if not 0 <= frame < pictures[image].grid.t:
        raise ValueError(
            f"no frame {frame} in picture {image}, which has {pictures[image].grid.t}, from 0 on"
        )
    starts = list(accumulate((picture.grid.t for picture in pictures), initial=0))
    return starts[image] + frame
