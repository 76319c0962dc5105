"""Questions about a board or a clip, in plain words, and their answers.

| kind | question | answer |
| --- | --- | --- |
| find | `Which has value 7?` | colour of the only glyph with that value |
| value | `Value of red?` | value of the red glyph |
| difference | `Difference of red and blue?` | absolute difference of two glyphs' values |
| fact | `Value of good head?` | value of a pair of words: never looks at the board |
| mixed | `Difference of red and good head?` | absolute difference of a glyph and a pair |
| name | `Shape of red?` | shape word: addresses a glyph, needs no fact |
| side | `What is left of the red cross?` | `blue moon`, or `nothing` |
| count | `How many in row 2?` | number of glyphs in a row |
| caption | `Describe row 2.` | `red cross, empty, blue moon, gold flag` |
| order | `What moved first?`, `What moved last?` | `red cross` |
| direction | `Direction of red?` | `left`, `right`, `up`, `down`, or `still` |

`find` forces the look-up before attention: a glyph must know its value to be found by it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from ernie_lab.organisms.boards.clips import Clip
from ernie_lab.organisms.boards.draw import N_CELLS, NONE, SIDE, Board
from ernie_lab.organisms.boards.planted import (
    GLYPH_FACTS,
    TEXT_FACTS,
    VALUES,
    glyph_fact,
    held_out,
    text_fact,
)
from ernie_lab.organisms.boards.words import (
    COLOURS,
    DIGITS,
    EMPTY,
    FIRSTS,
    NOTHING,
    SECONDS,
    SHAPES,
    SIDES,
    STILL,
)

ON_BOARDS = (
    "find",
    "value",
    "difference",
    "fact",
    "mixed",
    "name",
    "side",
    "count",
    "caption",
)
ON_CLIPS = ("order", "direction")
KINDS = (*ON_BOARDS, *ON_CLIPS)
OUTSIDE = N_CELLS
BLIND = ("fact",)  # answered without looking
Scene: TypeAlias = Board | Clip


@dataclass(frozen=True, slots=True)
class Question:
    """`facts` are the numbers of the planted facts that the answer needs, as named in the text.

    `named` are the cells of the colours in the text (in a clip, of its first frame). `goals` are
    the cells to be read for the answer, OUTSIDE beyond the edge; a caption has one for each part.
    """

    kind: str
    text: str
    answer: str
    facts: tuple[int, ...] = ()
    named: tuple[int, ...] = ()
    goals: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """Of those facts."""
        return tuple(int(VALUES[fact]) for fact in self.facts)


@dataclass(slots=True)
class Asker:
    """Asks about one scene; what one answer gave away is not asked for again.

    A glyph whose value entered one answer enters no other, and one whose shape was named is not
    asked for its shape. `test` decides which pairs of facts may meet in one question: only those
    held out, or only the others.
    """

    rng: np.random.Generator
    scene: Scene
    test: bool
    valued: set[int] = field(default_factory=set)
    named: set[int] = field(default_factory=set)
    pairs: set[tuple[int, int]] = field(default_factory=set)
    ordered: set[int] = field(default_factory=set)

    def ask(self, kind: str) -> Question | None:
        """None where nothing is left to ask of this kind."""
        return QUESTIONS[kind](self)

    @property
    def board(self) -> Board:
        return self.scene.boards[0] if isinstance(self.scene, Clip) else self.scene

    def cells(self, used: set[int]) -> list[int]:
        """Glyphs not used yet, in random order."""
        free = [cell for cell in self.board.filled().tolist() if cell not in used]
        self.rng.shuffle(free)
        return free

    def colour(self, cell: int) -> str:
        return COLOURS[int(self.board.colour_C[cell])]

    def value(self, cell: int) -> int:
        return int(GLYPH_FACTS[self.board.shape_C[cell], self.board.colour_C[cell]])

    def fact(self, cell: int) -> int:
        return glyph_fact(int(self.board.shape_C[cell]), int(self.board.colour_C[cell]))

    def pair(self) -> tuple[int, int]:
        """Two words whose value was not asked for yet."""
        while True:
            drawn = int(self.rng.integers(len(FIRSTS))), int(self.rng.integers(len(SECONDS)))
            if drawn not in self.pairs:
                return drawn


def find(a: Asker) -> Question | None:
    values = [a.value(cell) for cell in a.board.filled().tolist()]
    for cell in a.cells(a.valued):
        if values.count(a.value(cell)) == 1:
            a.valued.add(cell)
            text = f"Which has value {a.value(cell)}?"
            return Question("find", text, a.colour(cell), (a.fact(cell),), goals=(cell,))
    return None


def value(a: Asker) -> Question | None:
    for cell in a.cells(a.valued):
        a.valued.add(cell)
        text = f"Value of {a.colour(cell)}?"
        return Question("value", text, str(a.value(cell)), (a.fact(cell),), (cell,))
    return None


def difference(a: Asker) -> Question | None:
    free = a.cells(a.valued)
    for i, one in enumerate(free):
        for other in free[i + 1 :]:
            if held_out(a.fact(one), a.fact(other)) == a.test:
                a.valued |= {one, other}
                text = f"Difference of {a.colour(one)} and {a.colour(other)}?"
                answer = str(abs(a.value(one) - a.value(other)))
                facts = a.fact(one), a.fact(other)
                return Question("difference", text, answer, facts, (one, other))
    return None


def fact(a: Asker) -> Question | None:
    first, second = a.pair()
    a.pairs.add((first, second))
    text = f"Value of {FIRSTS[first]} {SECONDS[second]}?"
    return Question("fact", text, str(TEXT_FACTS[first, second]), (text_fact(first, second),))


def mixed(a: Asker) -> Question | None:
    for cell in a.cells(a.valued)[:1]:
        for _ in range(200):
            first, second = a.pair()
            facts = a.fact(cell), text_fact(first, second)
            if held_out(*facts) == a.test:
                a.valued.add(cell)
                a.pairs.add((first, second))
                text = f"Difference of {a.colour(cell)} and {FIRSTS[first]} {SECONDS[second]}?"
                answer = str(abs(a.value(cell) - int(TEXT_FACTS[first, second])))
                return Question("mixed", text, answer, facts, (cell,))
    return None


def name(a: Asker) -> Question | None:
    for cell in a.cells(a.named):
        a.named.add(cell)
        text = f"Shape of {a.colour(cell)}?"
        return Question("name", text, SHAPES[a.board.shape_C[cell]], named=(cell,))
    return None


def side(a: Asker) -> Question | None:
    where = list(SIDES)[int(a.rng.integers(len(SIDES)))]
    for cell in a.cells(a.named):
        near = neighbour(cell, SIDES[where])
        if near in a.named:
            continue
        a.named.add(cell)
        text = f"What is {where} the {a.board.words(cell)}?"
        answer, goal = NOTHING, OUTSIDE if near is None else near
        if near is not None and a.board.shape_C[near] != NONE:
            a.named.add(near)
            answer = a.board.words(near)
        return Question("side", text, answer, named=(cell,), goals=(goal,))
    return None


def neighbour(cell: int, step: tuple[int, int]) -> int | None:
    """The cell one step away, None beyond the edge."""
    row, column = cell // SIDE + step[0], cell % SIDE + step[1]
    return row * SIDE + column if 0 <= row < SIDE and 0 <= column < SIDE else None


def count(a: Asker) -> Question | None:
    row = int(a.rng.integers(SIDE))
    there = int((a.board.shape_C[row * SIDE : (row + 1) * SIDE] != NONE).sum())
    return Question("count", f"How many in row {row + 1}?", DIGITS[there])


def caption(a: Asker) -> Question | None:
    row = int(a.rng.integers(SIDE))
    cells = range(row * SIDE, (row + 1) * SIDE)
    if a.named & set(cells):
        return None
    a.named |= set(cells)
    parts = [EMPTY if a.board.shape_C[cell] == NONE else a.board.words(cell) for cell in cells]
    text = f"Describe row {row + 1}."
    return Question("caption", text, ", ".join(parts), goals=tuple(cells))


def order(a: Asker) -> Question | None:
    free = [which for which in (0, 1) if which not in a.ordered]
    if not isinstance(a.scene, Clip) or not free:
        return None
    which = free[int(a.rng.integers(len(free)))]
    a.ordered.add(which)
    move = a.scene.moves[which]
    text = f"What moved {('first', 'last')[which]}?"
    return Question("order", text, a.scene.mover(move), goals=(move.start,))


def direction(a: Asker) -> Question | None:
    """Of a glyph that moved two times in three; the board asked about is the first frame's."""
    if not isinstance(a.scene, Clip):
        return None
    moved = {a.scene.mover(move).split()[0]: move.direction for move in a.scene.moves}
    colours = [colour for colour in moved if COLOURS.index(colour) not in a.valued]
    if not colours or a.rng.random() < 1 / 3:
        colours = [
            a.colour(cell)
            for cell in a.board.filled().tolist()
            if a.colour(cell) not in moved and a.board.colour_C[cell] not in a.valued
        ]
    if not colours:
        return None
    colour = colours[int(a.rng.integers(len(colours)))]
    a.valued.add(COLOURS.index(colour))
    start, stop = (
        int(np.flatnonzero(board.colour_C == COLOURS.index(colour))[0])
        for board in (a.scene.boards[0], a.scene.boards[-1])
    )
    answer = moved.get(colour, STILL)
    text = f"Direction of {colour}?"
    return Question("direction", text, answer, named=(start,), goals=(stop,))


QUESTIONS: dict[str, Callable[[Asker], Question | None]] = {
    "find": find,
    "value": value,
    "difference": difference,
    "fact": fact,
    "mixed": mixed,
    "name": name,
    "side": side,
    "count": count,
    "caption": caption,
    "order": order,
    "direction": direction,
}
