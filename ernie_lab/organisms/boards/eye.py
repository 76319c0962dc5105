"""The trained eye as a file: `python -m ernie_lab.organisms.boards.eye EYE.pt`.

One eye serves all seeds and the twin, so that they differ in what their decoders learned alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ernie_lab.model.vl import VLModel, eye
from ernie_lab.organisms.boards.recipe import NARROW, EyeRecipe, config
from ernie_lab.organisms.boards.seeing import train_eye


def open_eye(path: Path, recipe: EyeRecipe) -> Mapping[str, Tensor]:
    """The weights of the eye; trains it where there is none yet."""
    if not path.exists():
        model = VLModel(config(NARROW))
        accuracy = train_eye(model, recipe)
        weights = {name: parameter.detach().clone() for name, parameter in eye(model)}
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"eye": weights, "accuracy": accuracy, "recipe": asdict(recipe)}, path)
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    found: dict[str, Tensor] = loaded["eye"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the eye of the glyph-board models.")
    parser.add_argument("path", type=Path, help="file to write; kept where it exists")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    open_eye(args.path, EyeRecipe())


if __name__ == "__main__":
    main()
