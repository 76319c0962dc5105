"""Clips of four frames in which two glyphs move, one cell each, one after the other.

The model joins frames in pairs, so a move may happen within a pair (frames 0-1, 2-3) or between
the pairs (1-2).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from ernie_lab.inputs.timestamps import draw_timestamp
from ernie_lab.organisms.boards.draw import (
    NONE,
    SIDE,
    Board,
    background,
    brightness,
    draw_board,
    noisy,
    paint,
)

N_FRAMES = 4
MOST = 14  # at least two empty cells, to move to
STEPS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}


@dataclass(frozen=True, slots=True)
class Move:
    """`after` is the frame before the move: 0, 1 or 2. Cells are before and after it."""

    after: int
    start: int
    stop: int
    direction: str


@dataclass(frozen=True, slots=True)
class Clip:
    """One board per frame, and the moves in their order."""

    boards: tuple[Board, ...]
    moves: tuple[Move, Move]

    def mover(self, move: Move) -> str:
        """`red cross`"""
        return self.boards[move.after].words(move.start)


def draw_clip(rng: np.random.Generator) -> Clip:
    """Draws boards until two different glyphs can move."""
    while True:
        clip = attempt(rng)
        if clip is not None:
            return clip


def attempt(rng: np.random.Generator) -> Clip | None:
    boards, moves, moved = [draw_board(rng, MOST)], [], set[int]()
    times = sorted(rng.permutation(N_FRAMES - 1)[:2].tolist())
    for frame in range(N_FRAMES - 1):
        board = boards[-1]
        if frame in times:
            options = [move for move in moves_on(board, frame) if move.start not in moved]
            if not options:
                return None
            move = options[int(rng.integers(len(options)))]
            moves.append(move)
            moved.add(move.stop)
            board = moved_board(board, move)
        boards.append(board)
    return Clip(tuple(boards), (moves[0], moves[1]))


def moves_on(board: Board, frame: int) -> list[Move]:
    """Every step of a glyph into an empty neighbouring cell."""
    found = []
    for cell in board.filled().tolist():
        for direction, (down, right) in STEPS.items():
            row, column = cell // SIDE + down, cell % SIDE + right
            target = row * SIDE + column
            inside = 0 <= row < SIDE and 0 <= column < SIDE
            if inside and board.shape_C[target] == NONE:
                found.append(Move(frame, cell, target, direction))
    return found


def moved_board(board: Board, move: Move) -> Board:
    shape_C, colour_C, offset_C2 = (
        values.copy() for values in (board.shape_C, board.colour_C, board.offset_C2)
    )
    for values in (shape_C, colour_C):
        values[move.stop], values[move.start] = values[move.start], NONE
    offset_C2[move.stop] = offset_C2[move.start]
    return replace(board, shape_C=shape_C, colour_C=colour_C, offset_C2=offset_C2)


def film(rng: np.random.Generator, clip: Clip, stamped: bool) -> np.ndarray:
    """`[4 112 112 3]` uint8: one background, fresh noise in every frame.

    `stamped` draws the time on every frame, as the released models' preprocessing does.
    """
    ground, shine = background(rng), brightness(rng)
    frames = [noisy(rng, paint(board, ground, shine)) for board in clip.boards]
    if stamped:
        pace = rng.uniform(0.1, 2.0)
        frames = [
            np.asarray(draw_timestamp(Image.fromarray(frame), pace * i))
            for i, frame in enumerate(frames)
        ]
    return np.stack(frames)
