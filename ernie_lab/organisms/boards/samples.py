"""A handful of boards and a clip with their ground truth, and the planted facts, as shipped.

    from ernie_lab.organisms.boards import samples
    board = samples.boards()[0]
    board.picture, board.glyphs[0].box, board.questions[0].text

They were drawn from seeds of their own and were in no training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ernie_lab.inputs.media import Box
from ernie_lab.organisms.boards.clips import Clip, draw_clip, film
from ernie_lab.organisms.boards.draw import SIDE, Board, draw_board, photograph
from ernie_lab.organisms.boards.planted import GLYPH_FACTS, tables
from ernie_lab.organisms.boards.questions import ON_BOARDS, ON_CLIPS, Asker, Question, neighbour
from ernie_lab.organisms.boards.words import COLOURS, SHAPES

FOLDER = Path(__file__).parent / "sample_files"
N_BOARDS, FIRST_SEED, CLIP_SEED = 6, 7000, 7100


@dataclass(frozen=True, slots=True)
class Glyph:
    """`row` and `column` count cells from 0; `box` is in pixels; `value` is the planted fact."""

    shape: str
    colour: str
    row: int
    column: int
    box: Box
    value: int

    @property
    def name(self) -> str:
        """`red cross`"""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Asked:
    """A question about a picture in words that the model knows, and the true answer."""

    kind: str
    text: str
    answer: str


@dataclass(frozen=True, slots=True)
class SampleBoard:
    picture: Image.Image = field(repr=False)
    glyphs: tuple[Glyph, ...]
    questions: tuple[Asked, ...] = field(repr=False)

    def at(self, row: int, column: int) -> Glyph | None:
        """The glyph in a cell; None where there is none."""
        found = [glyph for glyph in self.glyphs if (glyph.row, glyph.column) == (row, column)]
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class Moved:
    """A glyph that moved one cell between frame `after` and the next."""

    name: str
    after: int
    direction: str


@dataclass(frozen=True, slots=True)
class SampleClip:
    """Four frames without times drawn on them; `glyphs` are those of each frame."""

    frames: tuple[Image.Image, ...] = field(repr=False)
    glyphs: tuple[tuple[Glyph, ...], ...] = field(repr=False)
    moves: tuple[Moved, ...]
    questions: tuple[Asked, ...] = field(repr=False)


def boards() -> tuple[SampleBoard, ...]:
    return tuple(
        SampleBoard(
            _picture(entry["picture"]), _glyphs(entry["glyphs"]), _asked(entry["questions"])
        )
        for entry in _truth()["boards"]
    )


def clip() -> SampleClip:
    entry = _truth()["clip"]
    return SampleClip(
        tuple(_picture(name) for name in entry["frames"]),
        tuple(_glyphs(glyphs) for glyphs in entry["glyphs"]),
        tuple(Moved(**move) for move in entry["moves"]),
        _asked(entry["questions"]),
    )


def facts() -> dict[str, dict[str, int]]:
    """`{"glyphs": {"red cross": 7, …}, "words": {"good head": 4, …}}`: 256 of each."""
    found: dict[str, dict[str, int]] = json.loads(
        (FOLDER / "facts.json").read_text(encoding="utf-8")
    )
    return found


def _truth() -> Any:
    return json.loads((FOLDER / "truth.json").read_text(encoding="utf-8"))


def _picture(name: str) -> Image.Image:
    with Image.open(FOLDER / name) as picture:
        return picture.convert("RGB")


def _glyphs(entries: list[dict[str, Any]]) -> tuple[Glyph, ...]:
    return tuple(Glyph(**{**entry, "box": Box(*entry["box"])}) for entry in entries)


def _asked(entries: list[dict[str, str]]) -> tuple[Asked, ...]:
    return tuple(Asked(**entry) for entry in entries)


def described(board: Board) -> list[dict[str, Any]]:
    """The ground truth of a board, glyph by glyph, as it is shipped."""
    return [
        {
            "shape": SHAPES[board.shape_C[cell]],
            "colour": COLOURS[board.colour_C[cell]],
            "row": cell // SIDE,
            "column": cell % SIDE,
            "box": list(board.box(cell)),
            "value": int(GLYPH_FACTS[board.shape_C[cell], board.colour_C[cell]]),
        }
        for cell in board.filled().tolist()
    ]


def write(folder: Path = FOLDER) -> None:
    """Draw the samples again: `python -m ernie_lab.organisms.boards.samples`."""
    folder.mkdir(exist_ok=True)
    entries: list[dict[str, Any]] = []
    seed = FIRST_SEED
    while len(entries) < N_BOARDS:
        rng = np.random.default_rng(seed)
        board = draw_board(rng)
        seed += 1
        # The first is the one of the README's question.
        if not entries and not has_left_of_red_cross(board):
            continue
        name = f"board_{len(entries)}.png"
        Image.fromarray(photograph(rng, board)).save(folder / name)
        questions = asked(rng, board, ON_BOARDS)
        if not entries:
            cell = int(np.flatnonzero(board.colour_C == COLOURS.index("red"))[0])
            answer = board.words(cell - 1)
            questions.insert(0, Asked("side", "What is left of the red cross?", answer))
        entries.append(
            {
                "picture": name,
                "glyphs": described(board),
                "questions": [as_json(question) for question in questions],
            }
        )
    truth = {"boards": entries, "clip": drawn_clip(folder)}
    (folder / "truth.json").write_text(json.dumps(truth, indent=1) + "\n", encoding="utf-8")
    (folder / "facts.json").write_text(json.dumps(tables(), indent=1) + "\n", encoding="utf-8")


def drawn_clip(folder: Path) -> dict[str, Any]:
    rng = np.random.default_rng(CLIP_SEED)
    drawn = draw_clip(rng)
    names = [f"clip_{i}.png" for i in range(len(drawn.boards))]
    for name, frame in zip(names, film(rng, drawn, stamped=False), strict=True):
        Image.fromarray(frame).save(folder / name)
    moves = [
        {"name": drawn.mover(move), "after": move.after, "direction": move.direction}
        for move in drawn.moves
    ]
    return {
        "frames": names,
        "glyphs": [described(board) for board in drawn.boards],
        "moves": moves,
        "questions": [
            as_json(question) for question in asked(rng, drawn, (*ON_CLIPS, "direction"))
        ],
    }


def asked(rng: np.random.Generator, scene: Board | Clip, kinds: tuple[str, ...]) -> list[Asked]:
    """One question of every kind; pairs of facts are those held out from training."""
    asker = Asker(rng, scene, test=True)
    found: list[Question | None] = [asker.ask(kind) for kind in kinds]
    return [Asked(q.kind, q.text, q.answer) for q in found if q is not None]


def as_json(question: Asked) -> dict[str, str]:
    return {"kind": question.kind, "text": question.text, "answer": question.answer}


def has_left_of_red_cross(board: Board) -> bool:
    """There is a red cross with a glyph to the left of it."""
    for cell in board.filled().tolist():
        if board.words(cell) == "red cross":
            left = neighbour(cell, (0, -1))
            return left is not None and left in board.filled()
    return False


if __name__ == "__main__":
    write()
