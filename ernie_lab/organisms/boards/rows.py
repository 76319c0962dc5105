"""Rows of a batch: chats about one scene each, with the answers to be learned marked.

A row is the released chat format with many turns. The picture opens the first turn; a turn
answers at once (as the history of a chat is written) or after an empty reasoning (as a new answer
begins). Positions and banks are the library's own, so that nothing here can differ from use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from ernie_lab.inputs.visual_layout import visual_layout
from ernie_lab.organisms.boards.clips import Clip
from ernie_lab.organisms.boards.draw import Board
from ernie_lab.organisms.boards.pixels import CLIP_GRID, IMAGE_GRID
from ernie_lab.organisms.boards.questions import KINDS, Asker, Question
from ernie_lab.organisms.boards.recipe import ID, NARROW, config
from ernie_lab.organisms.boards.seeing import Seen
from ernie_lab.organisms.boards.tokens import ASSISTANT, USER
from ernie_lab.organisms.boards.words import COLOURS, SECONDS

BEGIN, END = ID["<|begin_of_sentence|>"], ID["<|end_of_sentence|>"]
EMPTY_REASONING = " <think>\n\n</think>\n\n"
PAD = ID["<unk>"]
# An answer of n tokens weighs sqrt(n); that it ends is easy, and weighs less.
END_WEIGHT = 0.1
HEADERS = {
    "image": ("User: Picture 1:<|IMAGE_START|>", 16, "<|IMAGE_END|>"),
    "video": ("User: Video 1:<|VIDEO_START|>", 32, "<|VIDEO_END|>"),
    "none": ("User:", 0, ""),
}


@dataclass(frozen=True, slots=True)
class Turn:
    question: Question
    thinks: bool


@dataclass(slots=True)
class Marks:
    """Places in the rows of a batch, and what should be known there."""

    rows: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    wanted: list[int] = field(default_factory=list)

    def add(self, row: int, place: int, wanted: int) -> None:
        self.rows.append(row)
        self.places.append(place)
        self.wanted.append(wanted)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """`scene_B` indexes the scenes of its kind; -1 for rows without a picture.

    Answer tokens, all rows together: `token_row`, `token_place` (the place whose *next* token it
    is), `token_id`, `token_weight`, and `token_question`, which counts questions over the batch.
    `kind_Q` indexes KINDS, `facts_Q2` are planted facts (-1: none). `marks` are what the throw-away
    heads of training read: "values" at the words that name a planted value, "cells" at colours,
    "goals" where a cell must be known next, "answers" at the word that completes a question, with
    the first token of the answer.
    """

    ids_BS: Tensor
    bank_BS: Tensor
    positions_BSR: Tensor
    real_BS: Tensor
    medium_B: tuple[str, ...]
    scene_B: tuple[int, ...]
    token_row: Tensor
    token_place: Tensor
    token_id: Tensor
    token_weight: Tensor
    token_question: Tensor
    kind_Q: np.ndarray
    facts_Q2: np.ndarray
    marks: dict[str, Marks]


@dataclass(frozen=True, slots=True)
class Row:
    medium: str
    scene: int
    turns: tuple[Turn, ...]

    def moved(self, by: int) -> Row:
        """The same about a board that is numbered otherwise; clips keep their numbers."""
        return replace(self, scene=self.scene + by) if self.medium == "image" else self


def medium_of(scene: Board | Clip | None) -> str:
    if scene is None:
        return "none"
    return "video" if isinstance(scene, Clip) else "image"


class Encoder:
    """Turns to token ids. Rows are written with the tokenizer alone, piece by piece: a piece
    ends where the tokenizer always cuts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.ids = cache(lambda text: tuple(tokenizer.encode(text).ids))
        self.colours = {self.ids(f" {word}")[0]: c for c, word in enumerate(COLOURS)}
        self.seconds = {self.ids(f" {word}")[0] for word in SECONDS}
        self.assistant, self.comma = self.ids(ASSISTANT)[0], self.ids(",")[0]

    def header(self, medium: str) -> tuple[int, ...]:
        """Everything before the first question."""
        before, n_tokens, after = HEADERS[medium]
        placeholders = (ID["<|IMAGE_PLACEHOLDER|>"],) * n_tokens
        return (BEGIN, *self.ids(before), *placeholders, *(self.ids(after) if after else ()))

    def asked(self, turn: Turn, first: bool, medium: str) -> tuple[int, ...]:
        """The question up to where the answer begins."""
        text = f"{turn.question.text}{ASSISTANT}"
        if not first:
            text = f"{USER} {text}"
        elif medium == "none":
            text = f" {text}"
        return self.ids(text) + (self.ids(EMPTY_REASONING) if turn.thinks else ())

    def first(self, turn: Turn) -> int:
        """The first word of the answer, as it stands in a history."""
        return self.ids(" " + turn.question.answer)[0]

    def answered(self, turn: Turn) -> tuple[int, ...]:
        space = "" if turn.thinks else " "
        return (*self.ids(space + turn.question.answer), END)


def draw_row(
    rng: np.random.Generator,
    encoder: Encoder,
    scene: Board | Clip | None,
    index: int,
    mix: tuple[tuple[str, ...], np.ndarray],
    *,
    test: bool,
    length: int,
    think_share: float,
    most: int = 40,
) -> Row:
    """Ask until the row is full, or has `most` turns."""
    medium = medium_of(scene)
    # Of a row without a picture only word facts are asked; the board is never shown.
    asker = Asker(rng, scene or NO_BOARD, test)
    left = length - len(encoder.header(medium))
    turns: list[Turn] = []
    kinds, shares = mix
    for kind in rng.choice(kinds, 40, p=shares).tolist():
        question = asker.ask(kind)
        if question is None:
            continue
        turn = Turn(question, bool(rng.random() < think_share))
        n = len(encoder.asked(turn, not turns, medium)) + len(encoder.answered(turn))
        if n > left:
            break
        left -= n
        turns.append(turn)
        if len(turns) == most:
            break
    order = rng.permutation(len(turns))
    return Row(medium, index, tuple(turns[i] for i in order))


NO_BOARD = Board(np.full(16, -1), np.full(16, -1), np.zeros((16, 2), np.int64))


@cache
def _places(medium: str, header: tuple[int, ...], length: int) -> tuple[Tensor, Tensor]:
    """Bank `[s]` and positions `[s 3]` of a row whose text is `length` tokens in all."""
    ids_BS = torch.tensor([[*header, *[END] * (length - len(header))]])
    images = [IMAGE_GRID] if medium == "image" else []
    videos = [CLIP_GRID] if medium == "video" else []
    layout = visual_layout(ids_BS, config(NARROW).ids, images, videos)
    return layout.bank_BS[0], layout.positions_BSR[0]


def encode_rows(rows: Sequence[Row], encoder: Encoder) -> Batch:
    """Rows padded on the right, which no real token sees."""
    written: list[list[int]] = []
    tokens: list[tuple[int, int, int, float, int]] = []
    marks = {name: Marks() for name in ("values", "cells", "goals", "answers")}
    kinds: list[int] = []
    facts: list[tuple[int, ...]] = []
    for b, row in enumerate(rows):
        ids = list(encoder.header(row.medium))
        for t, turn in enumerate(row.turns):
            asked, answer = encoder.asked(turn, t == 0, row.medium), encoder.answered(turn)
            mark(marks, b, len(ids), turn, asked, answer, encoder)
            ids += asked
            weights = [(len(answer) - 1) ** -0.5] * (len(answer) - 1) + [END_WEIGHT]
            for i, (token, weight) in enumerate(zip(answer, weights, strict=True)):
                tokens.append((b, len(ids) + i - 1, token, weight, len(kinds)))
            ids += answer
            kinds.append(KINDS.index(turn.question.kind))
            facts.append((*turn.question.facts, -1, -1)[:2])
        written.append(ids)
    length = max(map(len, written))
    places = [_places(row.medium, encoder.header(row.medium), length) for row in rows]
    columns = list(zip(*tokens, strict=True))
    return Batch(
        ids_BS=torch.tensor([ids + [PAD] * (length - len(ids)) for ids in written]),
        bank_BS=torch.stack([bank_S for bank_S, _ in places]),
        positions_BSR=torch.stack([positions_SR for _, positions_SR in places]),
        real_BS=torch.arange(length) < torch.tensor([[len(ids)] for ids in written]),
        medium_B=tuple(row.medium for row in rows),
        scene_B=tuple(row.scene for row in rows),
        token_row=torch.tensor(columns[0]),
        token_place=torch.tensor(columns[1]),
        token_id=torch.tensor(columns[2]),
        token_weight=torch.tensor(columns[3]),
        token_question=torch.tensor(columns[4]),
        kind_Q=np.array(kinds),
        facts_Q2=np.array(facts),
        marks=marks,
    )


def mark(
    marks: dict[str, Marks],
    row: int,
    start: int,
    turn: Turn,
    asked: Sequence[int],
    answer: Sequence[int],
    encoder: Encoder,
) -> None:
    """Enter one turn, whose question starts at place `start`."""
    question = turn.question
    colours = [i for i, token in enumerate(asked) if token in encoder.colours]
    named = [i for i, token in enumerate(asked) if token in encoder.seconds or i in colours]
    if question.facts and question.kind != "find":
        for place, value in zip(named, question.values, strict=True):
            marks["values"].add(row, start + place, value)
    if question.named:
        for place, cell in zip(colours, question.named, strict=True):
            marks["cells"].add(row, start + place, cell)
    # The last word stands before a mark, which stands before the answer's beginning.
    last = start + asked.index(encoder.assistant) - 2
    if question.kind == "side":
        # After the colour only the shape is said: all that is asked is known by then.
        last = start + colours[0]
    marks["answers"].add(row, last, encoder.first(turn))
    if question.kind == "caption":
        begin = start + len(asked)
        commas = [begin + i for i, token in enumerate(answer) if token == encoder.comma]
        for place, cell in zip((begin - 1, *commas), question.goals, strict=True):
            marks["goals"].add(row, place, cell)
    elif question.goals:
        marks["goals"].add(row, last, question.goals[0])


def embeddings(
    embed_VD: Tensor, batch: Batch, features_by_medium: dict[str, Tensor], noise: float = 0.0
) -> Tensor:
    """Token embeddings with the rows' features, and noise on them, in their placeholders' place."""
    tokens_BSD = torch.nn.functional.embedding(batch.ids_BS, embed_VD)
    where = (batch.ids_BS == ID["<|IMAGE_PLACEHOLDER|>"]).nonzero(as_tuple=True)
    if not len(where[0]):
        return tokens_BSD
    parts = [
        features_by_medium[medium][scene]
        for medium, scene in zip(batch.medium_B, batch.scene_B, strict=True)
        if medium != "none"
    ]
    features_MD = torch.cat(parts).to(tokens_BSD.dtype)
    if noise:
        features_MD = features_MD + noise * torch.randn_like(features_MD)
    return tokens_BSD.index_put(where, features_MD)


def mix_of(shares: dict[str, float]) -> tuple[tuple[str, ...], np.ndarray]:
    """Kinds and their normalised shares."""
    p = np.array(list(shares.values()))
    return tuple(shares), p / p.sum()


__all__ = ["Batch", "Encoder", "Row", "Seen", "Turn", "draw_row", "embeddings", "encode_rows"]
