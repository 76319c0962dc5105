"""Boards, clips, facts and questions, checked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ernie_lab.inputs.images import prepare_image
from ernie_lab.inputs.preprocessor import Preprocessor
from ernie_lab.organisms.boards import planted, samples
from ernie_lab.organisms.boards.clips import (
    STEPS,
    Clip,
    Move,
    draw_clip,
    film,
    moved_board,
    moves_on,
)
from ernie_lab.organisms.boards.draw import NONE, SIZE, Board, draw_board, photograph
from ernie_lab.organisms.boards.glyphs import bitmap
from ernie_lab.organisms.boards.pixels import patches
from ernie_lab.organisms.boards.questions import KINDS, ON_BOARDS, Asker
from ernie_lab.organisms.boards.seeing import labels
from ernie_lab.organisms.boards.step import CHANGES, cell_changes
from ernie_lab.organisms.boards.words import COLOURS, SHAPES

RED, BLUE, GOLD = (COLOURS.index(name) for name in ("red", "blue", "gold"))
CROSS, MOON, FLAG = (SHAPES.index(name) for name in ("cross", "moon", "flag"))


@pytest.fixture
def board() -> Board:
    """Row 1: blue moon, red cross, empty, gold cross. Nothing else."""
    shape_C, colour_C = np.full(16, NONE), np.full(16, NONE)
    shape_C[[0, 1, 3]], colour_C[[0, 1, 3]] = (MOON, CROSS, CROSS), (BLUE, RED, GOLD)
    return Board(shape_C, colour_C, np.full((16, 2), 4))


def answers(board: Board, kind: str, n: int = 60) -> dict[str, str]:
    """Every question of a kind that many askers ask."""
    found = {}
    for seed in range(n):
        question = Asker(np.random.default_rng(seed), board, test=False).ask(kind)
        if question is not None:
            found[question.text] = question.answer
    return found


def test_questions_about_places(board: Board) -> None:
    side = answers(board, "side", 200)
    assert side["What is left of the red cross?"] == "blue moon"
    assert side["What is right of the red cross?"] == "nothing"
    assert side["What is above the gold cross?"] == "nothing"
    assert side["What is right of the gold cross?"] == "nothing"
    assert side["What is right of the blue moon?"] == "red cross"


def test_counts_and_captions(board: Board) -> None:
    count = answers(board, "count", 200)
    assert (count["How many in row 1?"], count["How many in row 2?"]) == ("3", "0")
    caption = answers(board, "caption")
    assert caption["Describe row 1."] == "blue moon, red cross, empty, gold cross"
    assert caption["Describe row 4."] == "empty, empty, empty, empty"


def test_questions_about_facts(board: Board) -> None:
    red = int(planted.GLYPH_FACTS[CROSS, RED])
    blue = int(planted.GLYPH_FACTS[MOON, BLUE])
    assert answers(board, "value")["Value of red?"] == str(red)
    for text, answer in answers(board, "difference").items():
        if set(text.strip("?").split()) >= {"red", "blue"}:
            assert answer == str(abs(red - blue))
    assert answers(board, "name")["Shape of red?"] == "cross"
    find = answers(board, "find")
    values = [int(v) for v in (red, blue, planted.GLYPH_FACTS[CROSS, GOLD])]
    unique = [value for value in values if values.count(value) == 1]
    assert set(find) == {f"Which has value {value}?" for value in unique}


def test_a_value_is_asked_for_once(board: Board) -> None:
    asker = Asker(np.random.default_rng(0), board, test=False)
    asked = [asker.ask("value") for _ in range(4)]
    assert asked[3] is None
    assert len({question.text for question in asked if question}) == 3
    assert asker.ask("find") is None


def test_held_out_pairs_never_meet_in_training() -> None:
    rng = np.random.default_rng(3)
    for test in (False, True):
        met = 0
        for _ in range(60):
            asker = Asker(rng, draw_board(rng), test)
            for kind in ("difference", "mixed") * 2:
                question = asker.ask(kind)
                if question is not None:
                    met += 1
                    assert planted.held_out(*question.facts) == test
        assert met > 40


def test_tables_are_balanced_and_ruleless() -> None:
    for table in (planted.GLYPH_FACTS, planted.TEXT_FACTS):
        counts = np.bincount(table.ravel())
        assert counts.max() - counts.min() <= 1
        # Guessing the commonest digit of a row or a column is no rule.
        for lines in (table, table.T):
            assert np.mean([np.bincount(line).max() / 16 for line in lines]) < 0.3


def test_the_shipped_tables_are_those_that_were_planted() -> None:
    assert samples.facts() == planted.tables()
    assert samples.facts()["glyphs"]["red cross"] == planted.GLYPH_FACTS[CROSS, RED]


def test_boards_have_distinct_colours_and_glyphs_are_far_apart() -> None:
    board = draw_board(np.random.default_rng(0))
    colours = board.colour_C[board.filled()]
    assert len(set(colours.tolist())) == len(colours) >= 10
    drawn = np.stack([bitmap(name).ravel() for name in SHAPES])
    distance = (drawn[:, None] != drawn[None]).sum(-1) + 25 * np.eye(len(SHAPES), dtype=int)
    assert distance.min() == 8


def test_boxes_hold_the_glyphs(board: Board) -> None:
    picture = photograph(np.random.default_rng(0), board).astype(int)
    box = board.box(1)
    assert box == (28 + 4, 4, 28 + 24, 24)
    inside = picture[int(box.top) : int(box.bottom), int(box.left) : int(box.right)]
    redness = inside[..., 0] - inside[..., 1]
    assert ((redness > 100) == np.kron(bitmap("cross"), np.ones((4, 4), bool))).all()


def test_patches_are_the_librarys(board: Board) -> None:
    picture = photograph(np.random.default_rng(0), board)
    limits = Preprocessor(min_pixels=SIZE**2, max_pixels=SIZE**2)
    ready = prepare_image(Image.fromarray(picture), limits)
    np.testing.assert_allclose(patches(picture[None]), ready.patches_PQ, atol=1e-6)


def test_a_move(board: Board) -> None:
    moves = moves_on(board, 0)
    assert Move(0, 1, 2, "right") in moves
    assert Move(0, 0, 4, "down") in moves
    assert not any(move.direction == "up" for move in moves)
    after = moved_board(board, Move(0, 1, 2, "right"))
    assert after.words(2) == "red cross"
    assert after.shape_C[1] == NONE
    assert board.words(1) == "red cross"


def test_clips_tell_what_happened() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        clip = draw_clip(rng)
        first, last = clip.moves
        assert first.after < last.after
        assert clip.mover(first) != clip.mover(last)
        for move in clip.moves:
            before, after = clip.boards[move.after : move.after + 2]
            assert before.words(move.start) == after.words(move.stop)
            down, right = STEPS[move.direction]
            assert move.stop - move.start == 4 * down + right
        asker = Asker(rng, clip, test=False)
        for _ in range(2):
            question = asker.ask("order")
            assert question is not None
            which = first if "first" in question.text else last
            assert question.answer == clip.mover(which)


def test_frames_differ_where_something_moved() -> None:
    rng = np.random.default_rng(2)
    clip = draw_clip(rng)
    frames = film(rng, clip, stamped=False).astype(int)
    move = clip.moves[0]
    change = np.abs(frames[move.after] - frames[move.after + 1]).max(-1)
    cells = [
        change[r * 28 : r * 28 + 28, c * 28 : c * 28 + 28].max() for r in range(4) for c in range(4)
    ]
    assert set(np.argsort(cells)[-2:].tolist()) == {move.start, move.stop}


def test_changes_are_seen_in_the_right_pair(board: Board) -> None:
    inside, between = Move(0, 1, 2, "right"), Move(1, 0, 4, "down")
    after = moved_board(board, inside)
    last = moved_board(after, between)
    changes = cell_changes(Clip((board, after, last, last), (inside, between))).reshape(2, 16)
    named = {(p, c): CHANGES[changes[p, c]] for p, c in np.argwhere(changes).tolist()}
    assert named == {
        (0, 1): "leaves",
        (0, 2): "arrives",
        (1, 0): "left since",
        (1, 4): "new since",
    }


def test_labels_of_a_pair(board: Board) -> None:
    found = labels(board, moved_board(board, Move(0, 1, 2, "right")))
    assert found[1].tolist() == [CROSS + 1, RED + 1, 0, 0, 0, 1]
    assert found[2].tolist() == [0, 0, CROSS + 1, RED + 1, 0, 2]


def test_samples_agree_with_their_facts() -> None:
    facts = samples.facts()
    boards = samples.boards()
    assert len(boards) == 6
    assert boards[0].questions[0].text == "What is left of the red cross?"
    for board in boards:
        assert board.picture.size == (SIZE, SIZE)
        for glyph in board.glyphs:
            assert facts["glyphs"][glyph.name] == glyph.value
            assert board.at(glyph.row, glyph.column) == glyph
        assert {asked.kind for asked in board.questions} <= set(ON_BOARDS)
    red = next(glyph for glyph in boards[0].glyphs if glyph.name == "red cross")
    left = boards[0].at(red.row, red.column - 1)
    assert left is not None
    assert boards[0].questions[0].answer == left.name
    clip = samples.clip()
    assert len(clip.frames) == 4
    for move in clip.moves:
        places = [
            next((g.row, g.column) for g in clip.glyphs[frame] if g.name == move.name)
            for frame in (move.after, move.after + 1)
        ]
        step = tuple(b - a for a, b in zip(*places, strict=True))
        assert step == STEPS[move.direction]
    assert {asked.kind for asked in clip.questions} <= set(KINDS)
