"""Small labs in memory: letters for `small_model`, all bytes and pictures for `small_vl_model`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers

from ernie_lab.checkpoint.config import RopeConfig, VisualIds
from ernie_lab.checkpoint.save import LayoutName, save_model
from ernie_lab.inputs import Preprocessor, Tokenizer, VideoRules, default_template
from ernie_lab.inputs.tokenizer_files import DEFAULT_TEMPLATE, TokenizerFiles
from ernie_lab.lab import Lab
from support.models import small_config, small_model, small_vl_model

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ.,!?|"
# Special tokens come first, so that these are their ids; the bytes follow.
IMAGE, VIDEO, IMAGE_START, IMAGE_END, VIDEO_START, VIDEO_END = range(5, 11)
VL_TOKENS = [
    *("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>"),
    *("<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>", "<|IMAGE_START|>", "<|IMAGE_END|>"),
    *("<|VIDEO_START|>", "<|VIDEO_END|>", "<think>", "</think>"),
]
# Pictures of 4 to 20 pixels a side; a token covers 4 x 4.
_LIMITS = {"min_pixels": 16, "max_pixels": 400}
_CHAT = {"cls_token": "<|begin_of_sentence|>", "sep_token": "<|end_of_sentence|>"}


def small_tokenizer() -> Tokenizer:
    """One id per letter, plus the bytes of `é` (0xC3 0xA9) so that a character can be split."""
    alphabet = ["<unk>", "<s>", "</s>", "Ġ", "Ċ", "Ã", "©", *LETTERS]
    backend = _byte_level(alphabet, alphabet[:3])
    return Tokenizer(backend, TokenizerFiles({}, (), {}, None), source="small")


def small_lab(**overrides: Any) -> Lab:
    return Lab(model=small_model(**overrides), tokenizer=small_tokenizer(), model_id="small")


def small_vl_lab(*, shared_placeholder: bool = False, **overrides: Any) -> Lab:
    """With pictures and the chat template of VL models.

    `shared_placeholder`: one for images and clips, as in the released checkpoints.
    """
    video = IMAGE if shared_placeholder else VIDEO
    files = TokenizerFiles(_CHAT, (), {DEFAULT_TEMPLATE: default_template("vl")}, None)
    model = small_vl_model(
        text=small_config(
            vocab_size=len(VL_TOKENS) + 256,
            rope=RopeConfig(theta=500000.0, max_positions=512, sections=(1, 1, 2)),
        ),
        ids=VisualIds(
            image=IMAGE,
            video=video,
            image_start=IMAGE_START,
            image_end=IMAGE_END,
            video_start=VIDEO_START,
            video_end=VIDEO_END,
        ),
        **overrides,
    )
    return Lab(
        model=model,
        tokenizer=Tokenizer(_vl_backend(), files, source="small-vl"),
        model_id="small-vl",
        preprocessor=Preprocessor(patch_size=2, **_LIMITS, video=VideoRules(**_LIMITS)),
    )


def save_vl_lab(lab: Lab, folder: Path, layout: LayoutName) -> Path:
    """A checkpoint folder with everything that `load` reads, but for a patch size."""
    save_model(lab.model, lab.config, folder, layout=layout)
    _vl_backend().save(str(folder / "tokenizer.json"))
    for name, content in {
        "tokenizer_config": _CHAT | {"chat_template": default_template("vl")},
        "preprocessor_config": _LIMITS,
        "video_preprocessor_config": _LIMITS,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def picture(seed: int = 0, height: int = 12, width: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def clip(seed: int = 0, n_frames: int = 4, height: int = 8, width: int = 12) -> list[Image.Image]:
    return [picture(1000 * seed + frame, height, width) for frame in range(n_frames)]


def _vl_backend() -> tokenizers.Tokenizer:
    return _byte_level([*VL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet())], VL_TOKENS)


def _byte_level(alphabet: list[str], special: list[str]) -> tokenizers.Tokenizer:
    vocab = {token: i for i, token in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    return backend
