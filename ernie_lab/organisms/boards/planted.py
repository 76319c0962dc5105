"""The planted facts: drawn after the eye is trained and frozen, so that it cannot know them.

256 glyph facts, (shape, colour) -> digit, and 256 text facts, (first word, second word) -> digit.
Each table is a balanced random permutation: no rule over rows or columns predicts a value, and a
tied embedding cannot store one.
"""

from __future__ import annotations

import numpy as np

from ernie_lab.organisms.boards.words import COLOURS, FIRSTS, SECONDS, SHAPES

SEED = 2026
_rng = np.random.default_rng(SEED)


def _table(n_rows: int, n_columns: int) -> np.ndarray:
    return (_rng.permutation(n_rows * n_columns) % 10).reshape(n_rows, n_columns)


GLYPH_FACTS = _table(len(SHAPES), len(COLOURS))
TEXT_FACTS = _table(len(FIRSTS), len(SECONDS))
# By the number of the fact, glyphs first.
VALUES = np.concatenate([GLYPH_FACTS.ravel(), TEXT_FACTS.ravel()])


def glyph_fact(shape: int, colour: int) -> int:
    """Its number, 0-255."""
    return shape * len(COLOURS) + colour


def text_fact(first: int, second: int) -> int:
    """Its number, 256-511."""
    return GLYPH_FACTS.size + first * len(SECONDS) + second


def held_out(one: int, other: int) -> bool:
    """An eighth of all unordered pairs of facts, never met in one question in training."""
    low, high = min(one, other), max(one, other)
    return (low * 7919 + high * 104729) // 13 % 8 == 0


def tables() -> dict[str, dict[str, int]]:
    """Both tables in words, as they are shipped: `{"glyphs": {"red cross": 7, …}, "words": …}`."""
    glyphs = {
        f"{colour} {shape}": int(GLYPH_FACTS[s, c])
        for s, shape in enumerate(SHAPES)
        for c, colour in enumerate(COLOURS)
    }
    pairs = {
        f"{first} {second}": int(TEXT_FACTS[a, b])
        for a, first in enumerate(FIRSTS)
        for b, second in enumerate(SECONDS)
    }
    return {"glyphs": glyphs, "words": pairs}
