"""Sixteen 5 x 5 glyphs and sixteen colours.

The glyphs were chosen from 32 drawn by hand so that any two differ in at least 8 of 25 cells: a
shape that can be told at once leaves the training time for what the experts must learn.
"""

from __future__ import annotations

import numpy as np

from ernie_lab.organisms.boards.words import COLOURS, SHAPES

DRAWN = {
    "cross": "..#.. ..#.. ##### ..#.. ..#..",
    "block": "##### ##### ##### ##### #####",
    "heart": ".#.#. ##### ##### .###. ..#..",
    "house": "..#.. .###. ##### ##.## ##.##",
    "moon": ".#### ##... #.... ##... .####",
    "stairs": "#.... ##... ###.. ####. #####",
    "flag": "##### ####. ###.. #.... #....",
    "ladder": "#...# ##### #...# ##### #...#",
    "kite": "..#.. .#.#. #...# .#.#. ..#..",
    "wave": "##... .##.. ..##. .##.. ##...",
    "net": ".#.#. #.#.# .#.#. #.#.# .#.#.",
    "beam": "##### ..#.. ..#.. ..#.. #####",
    "hook": "...#. ...#. ...#. #..#. ####.",
    "bird": "#...# ##.## .###. ..#.. .....",
    "table": "##### ##### .#.#. .#.#. .#.#.",
    "lamp": ".###. ##### ..#.. ..#.. .###.",
}
RGB = {
    "red": (220, 30, 40),
    "green": (30, 170, 50),
    "blue": (40, 60, 230),
    "yellow": (240, 225, 30),
    "purple": (140, 30, 190),
    "white": (245, 245, 245),
    "orange": (255, 140, 0),
    "pink": (255, 150, 190),
    "brown": (130, 75, 30),
    "gray": (150, 150, 150),
    "cyan": (30, 220, 230),
    "lime": (160, 255, 60),
    "navy": (25, 25, 110),
    "gold": (190, 160, 60),
    "teal": (10, 120, 120),
    "rose": (240, 30, 150),
}
DOT = 4
GLYPH = 5 * DOT


def bitmap(shape: str) -> np.ndarray:
    """`[5 5]`, True where there is ink."""
    return np.array([[ink == "#" for ink in row] for row in DRAWN[shape].split()])


# `[shape 20 20]`: every dot of the bitmap is DOT pixels wide.
MASKS = np.stack([np.kron(bitmap(name), np.ones((DOT, DOT))).astype(bool) for name in SHAPES])
PALETTE = np.array([RGB[name] for name in COLOURS], np.float32)
