"""Boards: 4 x 4 cells on a shaded background, each with a glyph or none, and their pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ernie_lab.inputs.media import Box
from ernie_lab.organisms.boards.glyphs import GLYPH, MASKS, PALETTE
from ernie_lab.organisms.boards.words import COLOURS, SHAPES

SIDE, N_CELLS = 4, 16
CELL = 28  # pixels: 2 x 2 patches of 14, one token
SIZE = SIDE * CELL
NONE = -1
MARGIN, JITTER = (CELL - GLYPH) // 2, 2
FEWEST = 10  # mostly filled boards leave no big class of identical empty cells for two experts


@dataclass(frozen=True, slots=True)
class Board:
    """What is on a board, cell by cell in reading order; NONE where a cell is empty.

    No two glyphs of a board share a colour, so that a colour word names one glyph.
    `offset_C2` is where each glyph's upper left corner stands in its cell, (row, column).
    """

    shape_C: np.ndarray
    colour_C: np.ndarray
    offset_C2: np.ndarray

    def filled(self) -> np.ndarray:
        return np.flatnonzero(self.shape_C != NONE)

    def words(self, cell: int) -> str:
        """`red cross`"""
        return f"{COLOURS[self.colour_C[cell]]} {SHAPES[self.shape_C[cell]]}"

    def box(self, cell: int) -> Box:
        """Pixels of the glyph in this cell."""
        top, left = corner(cell, self.offset_C2[cell])
        return Box(left, top, left + GLYPH, top + GLYPH)


def corner(cell: int, offset: np.ndarray) -> tuple[int, int]:
    """(top, left) of the glyph in pixels."""
    return cell // SIDE * CELL + int(offset[0]), cell % SIDE * CELL + int(offset[1])


def draw_board(rng: np.random.Generator, most: int = N_CELLS) -> Board:
    """Ten or more glyphs in random cells: shapes may repeat, colours do not."""
    n = int(rng.integers(FEWEST, most + 1))
    cells = rng.permutation(N_CELLS)[:n]
    shape_C, colour_C = np.full(N_CELLS, NONE), np.full(N_CELLS, NONE)
    shape_C[cells] = rng.integers(0, len(SHAPES), n)
    colour_C[cells] = rng.permutation(len(COLOURS))[:n]
    offset_C2 = MARGIN + rng.integers(-JITTER, JITTER + 1, (N_CELLS, 2))
    return Board(shape_C, colour_C, offset_C2)


def background(rng: np.random.Generator) -> np.ndarray:
    """`[112 112 3]`: a grey that brightens or darkens towards one side."""
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] - SIZE / 2
    slope = rng.uniform(-0.25, 0.25, 2)
    grey = rng.uniform(60, 110) + slope[0] * rows + slope[1] * columns
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.float32)


def paint(board: Board, ground: np.ndarray, brightness_C: np.ndarray) -> np.ndarray:
    """The board's glyphs on a copy of the background."""
    picture = ground.copy()
    for cell in board.filled():
        top, left = corner(cell, board.offset_C2[cell])
        ink = PALETTE[board.colour_C[cell]] * brightness_C[board.colour_C[cell]]
        picture[top : top + GLYPH, left : left + GLYPH][MASKS[board.shape_C[cell]]] = ink
    return picture


def brightness(rng: np.random.Generator) -> np.ndarray:
    """One for each colour, so that a glyph keeps it over a clip."""
    return rng.uniform(0.92, 1.05, len(COLOURS)).astype(np.float32)


def noisy(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    """uint8, with a pixel noise of deviation 4."""
    grain = rng.standard_normal(picture.shape, dtype=np.float32) * 4
    return np.clip(np.rint(picture + grain), 0, 255).astype(np.uint8)


def photograph(rng: np.random.Generator, board: Board) -> np.ndarray:
    """The picture of a board, `[112 112 3]` uint8."""
    return noisy(rng, paint(board, background(rng), brightness(rng)))
