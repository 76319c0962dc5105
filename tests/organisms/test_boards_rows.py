"""Rows are chats in the released format, and the tokenizer keeps every word whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ernie_lab.inputs.chat_templates import default_template
from ernie_lab.inputs.visual_layout import visual_layout
from ernie_lab.organisms.boards.clips import draw_clip
from ernie_lab.organisms.boards.draw import draw_board
from ernie_lab.organisms.boards.pixels import CLIP_GRID, IMAGE_GRID
from ernie_lab.organisms.boards.questions import KINDS, ON_BOARDS, ON_CLIPS, Question
from ernie_lab.organisms.boards.recipe import ID, NARROW, config
from ernie_lab.organisms.boards.rows import (
    Batch,
    Encoder,
    Row,
    Turn,
    draw_row,
    encode_rows,
    mix_of,
)
from ernie_lab.organisms.boards.tokens import VOCAB_SIZE, WORDS, train_tokenizer
from ernie_lab.organisms.tokenizer import SPECIAL_TOKENS


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer)


def test_every_word_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == VOCAB_SIZE
    for word in WORDS:
        assert len(tokenizer.encode(word).ids) == len(tokenizer.encode(f" {word}").ids) == 1
    assert [tokenizer.token_to_id(text) for text in SPECIAL_TOKENS] == list(range(14))


def test_any_text_survives(tokenizer: Tokenizer) -> None:
    text = "Naïve 棋盘 12 — User: and\nAssistant: ok\t\n\n  end"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def as_text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


def test_a_new_chat_is_written_as_the_template_writes_it(
    tokenizer: Tokenizer, encoder: Encoder
) -> None:
    from jinja2 import Environment

    question = Question("side", "What is left of the red cross?", "blue moon")
    batch = encode_rows([Row("image", 0, (Turn(question, thinks=True),))], encoder)
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    messages = [{"role": "user", "content": content}]
    asked = (
        Environment()
        .from_string(default_template("vl"))
        .render(messages=messages, add_generation_prompt=True)
    )
    whole = asked.replace("<|image@placeholder|>", "<|IMAGE_PLACEHOLDER|>" * 16)
    whole += "blue moon<|end_of_sentence|>"
    assert as_text(tokenizer, batch.ids_BS[0].tolist()) == whole
    assert batch.ids_BS[0].tolist() == tokenizer.encode(whole).ids


def test_a_history_is_written_without_reasoning(tokenizer: Tokenizer, encoder: Encoder) -> None:
    turns = (
        Turn(Question("value", "Value of red?", "7", (0,)), thinks=False),
        Turn(Question("name", "Shape of red?", "cross"), thinks=True),
    )
    batch = encode_rows([Row("none", -1, turns)], encoder)
    text = (
        "<|begin_of_sentence|>User: Value of red?\nAssistant: 7<|end_of_sentence|>"
        "User: Shape of red?\nAssistant: <think>\n\n</think>\n\ncross<|end_of_sentence|>"
    )
    assert as_text(tokenizer, batch.ids_BS[0].tolist()) == text
    assert batch.ids_BS[0].tolist() == tokenizer.encode(text).ids
    marked = [tokenizer.id_to_token(token) for token in batch.token_id.tolist()]
    assert marked == ["Ġ7", "<|end_of_sentence|>", "cross", "<|end_of_sentence|>"]
    following = batch.ids_BS[batch.token_row, batch.token_place + 1]
    assert torch.equal(following, batch.token_id)
    assert batch.kind_Q.tolist() == [KINDS.index("value"), KINDS.index("name")]


def test_positions_and_banks_are_the_librarys(encoder: Encoder) -> None:
    rng = np.random.default_rng(0)
    rows = [
        draw_row(
            rng,
            encoder,
            scene,
            0,
            mix_of(dict.fromkeys(kinds, 1.0)),
            test=False,
            length=88,
            think_share=0.3,
        )
        for scene, kinds in ((draw_board(rng), ON_BOARDS), (draw_clip(rng), ON_CLIPS))
    ]
    batch = encode_rows(rows, encoder)
    layout = visual_layout(batch.ids_BS, config(NARROW).ids, [IMAGE_GRID], [CLIP_GRID])
    assert torch.equal(batch.positions_BSR, layout.positions_BSR)
    assert torch.equal(batch.bank_BS, layout.bank_BS)
    assert (batch.ids_BS == ID["<|IMAGE_PLACEHOLDER|>"]).sum(1).tolist() == [16, 32]
    assert batch.ids_BS.shape[1] <= 88


def words_at(tokenizer: Tokenizer, batch: Batch, name: str) -> list[str]:
    marks = batch.marks[name]
    return [
        tokenizer.id_to_token(batch.ids_BS[r, p].item())
        for r, p in zip(marks.rows, marks.places, strict=True)
    ]


def test_marks_stand_at_the_words_they_are_about(tokenizer: Tokenizer, encoder: Encoder) -> None:
    mixed = Question("mixed", "Difference of red and good head?", "1", (0, 256), (3,))
    side = Question("side", "What is left of the blue moon?", "red cross", (), (5,), (4,))
    caption = Question("caption", "Describe row 1.", "red cross, empty", goals=(0, 1))
    turns = tuple(Turn(question, thinks=False) for question in (mixed, side, caption))
    batch = encode_rows([Row("none", -1, turns)], encoder)
    assert words_at(tokenizer, batch, "values") == ["Ġred", "Ġhead"]
    assert batch.marks["values"].wanted == list(mixed.values)
    assert words_at(tokenizer, batch, "cells") == ["Ġred", "Ġblue"]
    assert batch.marks["cells"].wanted == [3, 5]
    # A caption's parts are asked for where each of them begins.
    assert words_at(tokenizer, batch, "goals") == ["Ġblue", "ĊAssistant:", ","]
    assert batch.marks["goals"].wanted == [4, 0, 1]
    assert words_at(tokenizer, batch, "answers") == ["Ġhead", "Ġblue", "Ġ1"]
    firsts = [tokenizer.id_to_token(token) for token in batch.marks["answers"].wanted]
    assert firsts == ["Ġ1", "Ġred", "Ġred"]
