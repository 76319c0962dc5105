"""Write a finished run as a folder that `load` and transformers open:
`python -m ernie_lab.organisms.boards.export RUN`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ernie_lab.inputs.chat_templates import default_template
from ernie_lab.inputs.preprocessor import CLIP_MEAN, CLIP_STD
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms import builtin
from ernie_lab.organisms.boards.draw import SIZE
from ernie_lab.organisms.boards.recipe import ID, NARROW, config
from ernie_lab.organisms.export import enter_digest, export

# Any square picture becomes 112 x 112: limits on its area leave no other size.
_PICTURE: dict[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": SIZE**2, "longest_edge": SIZE**2},
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(CLIP_MEAN),
    "image_std": list(CLIP_STD),
    "do_convert_rgb": True,
}


def small_files() -> dict[str, dict[str, Any]]:
    """What stands beside config and weights."""
    rope = config(NARROW).text.rope
    return {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<unk>",
            "cls_token": "<|begin_of_sentence|>",
            "sep_token": "<|end_of_sentence|>",
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": rope.max_positions,
            "chat_template": default_template("vl"),
        },
        "generation_config.json": {
            "bos_token_id": ID["<s>"],
            # A turn ends with the second; the first is the released models' end of a text.
            "eos_token_id": [ID["</s>"], ID["<|end_of_sentence|>"]],
            "pad_token_id": ID["<unk>"],
            "do_sample": False,
        },
        "preprocessor_config.json": _PICTURE
        | {"image_processor_type": "Ernie4_5_VLMoeImageProcessor", "temporal_patch_size": None},
        "video_preprocessor_config.json": _PICTURE
        | {
            "video_processor_type": "Ernie4_5_VLMoeVideoProcessor",
            "min_frames": 4,
            "max_frames": 4,
            "draw_on_frames": True,
        },
    }


def load_run(run: Path) -> VLModel:
    """The last weights of a run: those of stage 3 if it had one."""
    weights = "last.pt" if (run / "last.pt").exists() else "final.pt"
    recipe = json.loads((run / "log.jsonl").read_text(encoding="utf-8").splitlines()[0])["recipe"]
    model = VLModel(config(recipe["dense_hidden"]))
    model.load_state_dict(torch.load(run / weights, weights_only=True))
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Export a run as a folder that `load` opens.")
    parser.add_argument("run", type=Path, help="folder that `train` wrote")
    parser.add_argument("--ship", choices=["tiny-vl", "tiny-vl-idle"], help="into the package, as")
    args = parser.parse_args()
    model = load_run(args.run)
    folder = args.run / "model"
    if args.ship:
        folder = builtin.HERE / builtin.BUILTIN[args.ship].folder
    # transformers 5 opens the released tensors with its own config, not with Baidu's.
    digest = export(
        model,
        model.config,
        args.run / "tokenizer.json",
        small_files(),
        folder,
        layout="transformers-released",
    )
    if args.ship:
        enter_digest(args.ship, digest)
    print(f"{folder}: SHA-256 of the weights {digest}")


if __name__ == "__main__":
    main()
