"""Questions about planted facts, and what the model answers.

A fact is the value of a (shape, colour) glyph of a board; its question is `Value of red?`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.draw import Board
from ernie_lab.organisms.boards.planted import GLYPH_FACTS, glyph_fact
from ernie_lab.organisms.boards.questions import Question
from ernie_lab.organisms.boards.rows import Batch, Encoder, Row, Turn, embeddings, encode_rows
from ernie_lab.organisms.boards.seeing import Seen
from ernie_lab.organisms.boards.words import COLOURS
from ernie_lab.sites import Tap, idle

N_FACTS = GLYPH_FACTS.size
# Turns that fit, after the picture, into the 88 tokens of a training row.
TURNS = 7
ROWS_AT_ONCE = 100


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """Value questions about every glyph of some boards, ready to run.

    For each question Q: the fact, the glyph's cell, the board's number. `digit_Q` is the token of
    the answer; `digits_V` those of all ten values.
    """

    batches: list[Batch]
    seen: Seen
    fact_Q: np.ndarray
    cell_Q: np.ndarray
    board_Q: np.ndarray
    digit_Q: Tensor
    digits_V: Tensor

    @property
    def features(self) -> dict[str, Tensor]:
        return {"image": self.seen.features_NMD}


def ask(encoder: Encoder, seen: Seen, turns_per_row: int, seed: int) -> Asked:
    """One question about every glyph, in random order, `turns_per_row` in each chat."""
    rng = np.random.default_rng(seed)
    rows, facts, cells, boards = [], [], [], []
    for number, board in enumerate(seen.scenes):
        assert isinstance(board, Board)
        order = rng.permutation(board.filled())
        for start in range(0, len(order), turns_per_row):
            chosen = order[start : start + turns_per_row].tolist()
            rows.append(Row("image", number, tuple(turn(board, cell) for cell in chosen)))
            facts += [glyph_fact(board.shape_C[cell], board.colour_C[cell]) for cell in chosen]
            cells += chosen
            boards += [number] * len(chosen)
    batches = [
        encode_rows(rows[i : i + ROWS_AT_ONCE], encoder) for i in range(0, len(rows), ROWS_AT_ONCE)
    ]
    digits = torch.cat([batch.token_id[first_tokens(batch)] for batch in batches])
    known = torch.tensor([encoder.ids(f" {value}")[0] for value in range(10)])
    return Asked(batches, seen, np.array(facts), np.array(cells), np.array(boards), digits, known)


def turn(board: Board, cell: int) -> Turn:
    shape, colour = board.shape_C[cell], board.colour_C[cell]
    text, value = f"Value of {COLOURS[colour]}?", str(GLYPH_FACTS[shape, colour])
    return Turn(Question("value", text, value, (glyph_fact(shape, colour),), (cell,)), False)


def first_tokens(batch: Batch) -> Tensor:
    """Which of the batch's answer tokens are the digits; the others end their answers."""
    return torch.from_numpy(np.unique(batch.token_question.numpy(), return_index=True)[1])


def logits_of(model: VLModel, asked: Asked, batch: Batch, tap: Tap = idle) -> Tensor:
    """`[q v]`, where each answer is to be given."""
    hidden = model.trunk(
        inputs_embeds=embeddings(model.embed_VD, batch, asked.features),
        position_ids=batch.positions_BSR,
        bank=batch.bank_BS,
        tap=tap,
    )
    first = first_tokens(batch)
    return model.unembed(hidden.normed_BSD[batch.token_row[first], batch.token_place[first]])


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    logp_Q: np.ndarray
    right_Q: np.ndarray


@torch.no_grad()
def outcome(model: VLModel, asked: Asked, tap: Tap = idle) -> Outcome:
    logits_QV = torch.cat([logits_of(model, asked, batch, tap) for batch in asked.batches])
    logp_QV = logits_QV.log_softmax(-1)
    logp_Q = logp_QV.gather(1, asked.digit_Q[:, None])[:, 0]
    return Outcome(logp_Q.numpy(), (logits_QV.argmax(-1) == asked.digit_Q).numpy())


def per_fact(values_QE: np.ndarray, asked: Asked, these_Q: np.ndarray | None = None) -> np.ndarray:
    """`[fact expert]`: means over the questions about each fact; NaN where there are none."""
    use_Q = np.ones(len(asked.fact_Q), bool) if these_Q is None else these_Q
    fact_Q, sums = asked.fact_Q[use_Q], np.zeros((N_FACTS, values_QE.shape[1]))
    np.add.at(sums, fact_Q, values_QE[use_Q])
    n = np.bincount(fact_Q, minlength=N_FACTS)[:, None]
    return np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0)
