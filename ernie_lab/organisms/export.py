"""Write a finished run as a folder in the released layout: `… ernie_lab.organisms.export RUN`.

Weights go out in bf16, gates and correction biases in fp32, as in the released models: what
decides who is chosen must not be rounded.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.names import stays_float32
from ernie_lab.checkpoint.save import LayoutName, save_model
from ernie_lab.model.text import TextModel
from ernie_lab.organisms import builtin
from ernie_lab.organisms.recipe import TINY_TEXT

TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<unk>",
    "add_bos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": TINY_TEXT.rope.max_positions,
}
GENERATION_CONFIG = {
    "bos_token_id": TINY_TEXT.ids.bos,
    "eos_token_id": TINY_TEXT.ids.eos[0],
    "pad_token_id": TINY_TEXT.ids.pad,
    "do_sample": True,
    "temperature": 0.8,
    "top_p": 0.8,
}


def export(
    model: nn.Module,
    config: ModelConfig,
    tokenizer: Path,
    small_files: Mapping[str, Mapping[str, Any]],
    folder: Path,
    layout: LayoutName = "released",
) -> str:
    """Replace config, weights and tokenizer files in `folder`; returns the weights' SHA-256.

    The model's own weights are rounded in place. `small_files` are JSON, by file name.
    """
    for name, parameter in model.named_parameters():
        if not stays_float32(name):
            parameter.data = parameter.data.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        saved = save_model(model, config, Path(aside) / "model", layout=layout)
        for path in saved.iterdir():
            shutil.copyfile(path, folder / path.name)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    for name, content in small_files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return hashlib.sha256((folder / builtin.WEIGHTS).read_bytes()).hexdigest()


def enter_digest(name: str, digest: str) -> None:
    """Put a shipped model's SHA-256 into the table that is checked at load."""
    table = Path(builtin.__file__)
    known = builtin.BUILTIN[name].sha256
    text = table.read_text(encoding="utf-8")
    table.write_text(re.sub(known, digest, text), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a run as a folder that `load` opens.")
    parser.add_argument("run", type=Path, help="folder that `train` wrote")
    parser.add_argument("--weights", default="final.pt", help="a file of the run")
    parser.add_argument("--folder", type=Path, help="where to; RUN/model if absent")
    parser.add_argument("--ship", action="store_true", help="replace the model in the package")
    args = parser.parse_args()
    model = TextModel(TINY_TEXT)
    model.load_state_dict(torch.load(args.run / args.weights, weights_only=True))
    folder = args.folder or args.run / "model"
    if args.ship:
        folder = builtin.HERE / builtin.BUILTIN["tiny-text"].folder
    small: dict[str, dict[str, Any]] = {
        "tokenizer_config.json": TOKENIZER_CONFIG,
        "generation_config.json": GENERATION_CONFIG,
    }
    digest = export(model, TINY_TEXT, args.run / "tokenizer.json", small, folder)
    if args.ship:
        enter_digest("tiny-text", digest)
    print(f"{folder}: SHA-256 of the weights {digest}")


if __name__ == "__main__":
    main()
