"""The shipped glyph-board models: whole, openable by transformers, and as their cards say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import Ernie4_5_VLMoeForConditionalGeneration

import ernie_lab as el
from ernie_lab.organisms.boards import samples
from ernie_lab.organisms.boards.bench import mean
from ernie_lab.organisms.boards.check import open_model, read_gates, shipped_card
from ernie_lab.organisms.boards.measure import answers, batches, unseen_rows
from ernie_lab.organisms.boards.pixels import CLIP_GRID, IMAGE_GRID, patches
from ernie_lab.organisms.boards.recipe import ID, NARROW, WIDE, config
from ernie_lab.organisms.boards.rows import Encoder, encode_rows
from ernie_lab.organisms.boards.seeing import draw_clips, draw_images, look
from ernie_lab.organisms.boards.taps import off, through_text_bank
from ernie_lab.organisms.boards.tokens import train_tokenizer
from ernie_lab.organisms.builtin import WEIGHTS, builtin_path

NAMES = ("tiny-vl", "tiny-vl-idle")


@pytest.fixture(scope="module", params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    return builtin_path(request.param)


@pytest.fixture(scope="module")
def lab() -> el.Lab:
    return el.load("tiny-vl", device="cpu")


def encoder(folder: Path) -> Encoder:
    return Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))


def test_the_folder_is_small(folder: Path) -> None:
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6


def test_weights_are_bf16_and_gates_fp32(folder: Path) -> None:
    with safe_open(folder / WEIGHTS, "pt") as weights:
        for key in weights.keys():  # noqa: SIM118 - not a dict
            decides = key.endswith(("mlp.gate.weight", "mlp.gate.weight_1", "correction_bias"))
            assert weights.get_tensor(key).dtype == (
                torch.float32 if decides else torch.bfloat16
            ), key


def test_config_and_tokenizer_are_the_recipes(folder: Path) -> None:
    dense = WIDE if folder.name.endswith("idle") else NARROW
    assert open_model(folder).config == config(dense)
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert stored == json.loads(train_tokenizer().to_str())


@torch.no_grad()
@pytest.mark.parametrize("medium", ["image", "video"])
def test_transformers_gives_the_same_logits(folder: Path, medium: str) -> None:
    theirs = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    ours = open_model(folder)
    is_image = medium == "image"
    _, frames = (draw_images if is_image else draw_clips)(np.random.default_rng(0), 1)
    grid = IMAGE_GRID if is_image else CLIP_GRID
    seen = {medium: look(ours, medium, 1, 0)}
    batch = encode_rows(unseen_rows(encoder(folder), seen, (0,), {medium: 1}), encoder(folder))
    names = (
        ("pixel_values", "image_grid_thw")
        if is_image
        else ("pixel_values_videos", "video_grid_thw")
    )
    pictures = dict(zip(names, (patches(frames), torch.tensor([grid])), strict=True))
    types = (batch.ids_BS == ID["<|IMAGE_PLACEHOLDER|>"]).long() * (1 if is_image else 2)
    found = ours(input_ids=batch.ids_BS, **pictures).logits
    wanted = theirs.eval()(
        input_ids=batch.ids_BS,
        mm_token_type_ids=types,
        moe_mm_token_type_ids=batch.bank_BS,
        **pictures,
    ).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_sample_questions_are_answered(lab: el.Lab) -> None:
    right = [
        lab.generate(asked.text, images=[board.picture], max_new_tokens=16).text == asked.answer
        for board in samples.boards()[:2]
        for asked in board.questions
    ]
    assert sum(right) >= len(right) - 1
    clip = samples.clip()
    told = [
        lab.generate(asked.text, videos=[list(clip.frames)], max_new_tokens=16).text == asked.answer
        for asked in clip.questions
    ]
    assert sum(told) >= len(told) - 1


def test_the_question_of_the_readme(lab: el.Lab) -> None:
    board = samples.boards()[0]
    question, answer = "What is left of the red cross?", board.questions[0].answer
    assert lab.generate(question, images=[board.picture], max_new_tokens=8).text == answer
    # A larger picture is scaled down to the board's size.
    larger = board.picture.resize((336, 336), Image.Resampling.NEAREST)
    assert lab.generate(question, images=[larger], max_new_tokens=8).text == answer


@torch.no_grad()
def test_vision_experts_matter_in_the_one_and_not_in_the_twin(folder: Path) -> None:
    model, write = open_model(folder), encoder(folder)
    unseen = {"image": look(model, "image", 60, 401)}
    parts = batches(unseen_rows(write, unseen, (5,), {"image": 60}), write)
    intact = answers(model, parts, unseen).share()
    assert mean(intact) > 90
    for tap in (off(model, "vision.routed_out"), through_text_bank(model)):
        edited = answers(model, parts, unseen, tap).share()
        assert intact["fact"] == edited["fact"]
        if folder.name.endswith("idle"):
            assert mean(intact) - mean(edited) < 20
        else:
            assert mean(intact) - mean(edited) > 20


def test_the_card_is_made_of_the_measured_gates(folder: Path) -> None:
    gates = read_gates(folder / "gates.json")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == shipped_card(folder)
    for gate in gates:
        assert gate.measured in text
