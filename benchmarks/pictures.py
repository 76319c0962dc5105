"""A prompt with a picture beside transformers; CPU, random weights.

    python -m benchmarks.pictures

One image of 448 x 448 (1,024 patches, 256 tokens) and 64 text tokens through a tower of 8 layers
and the decoder of `benchmarks/shapes.py`, with a bank for vision. The same weights in both; the
ratio is a median over pairs run in turn in one process; below 1 ours is faster.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

import ernie_lab as el
from benchmarks.shapes import CPU_SHAPE
from benchmarks.timing import THREADS, conditions, paired, store, table

IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "image_start_token_id": 92,
    "image_end_token_id": 93,
    "video_start_token_id": 94,
    "video_end_token_id": 95,
}
TOWER = {"depth": 8, "hidden_size": 512, "intermediate_size": 2048, "num_heads": 8}
SIDE, PATCH, N_TEXT = 448, 14, 64


def both(dtype: str, quick: bool) -> tuple[el.Lab, Any]:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    torch.manual_seed(0)
    text = {name: value for name, value in CPU_SHAPE.items() if "layer_start" not in name}
    text["moe_intermediate_size"] = [text["moe_intermediate_size"]] * 2
    if quick:
        text |= {"num_hidden_layers": 2, "moe_num_experts": 8}
    text["mlp_layer_types"] = ["dense"] + ["sparse"] * (text["num_hidden_layers"] - 1)
    rope = {"rope_type": "default", "rope_theta": 500000.0, "mrope_section": [11, 11, 10]}
    config = Ernie4_5_VLMoeConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**TOWER, "patch_size": PATCH} | ({"depth": 1} if quick else {}),
        tie_word_embeddings=True,
        **IDS,
    )
    theirs = Ernie4_5_VLMoeForConditionalGeneration(config).to(getattr(torch, dtype)).eval()
    theirs.set_experts_implementation("grouped_mm")
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder), save_original_format=True)
        ours = el.load(folder, device="cpu", dtype=dtype, progress=False)
    return ours, theirs


def prompt(dtype: torch.dtype, quick: bool) -> dict[str, torch.Tensor]:
    """What our model takes; transformers needs two kinds of token types besides."""
    side = (SIDE // 4 if quick else SIDE) // PATCH
    n_image = (side // 2) ** 2
    image = [IDS["image_start_token_id"], *[IDS["image_token_id"]] * n_image]
    row = [*range(3, 35), *image, IDS["image_end_token_id"], *range(35, 3 + N_TEXT)]
    return {
        "input_ids": torch.tensor([row]),
        "pixel_values": torch.randn(side * side, 3 * PATCH * PATCH).to(dtype),
        "image_grid_thw": torch.tensor([[1, side, side]]),
    }


@torch.no_grad()
def run_ours(lab: el.Lab, given: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = lab.model(**given, use_cache=True, logits_to_keep=1).logits
    return out


@torch.no_grad()
def run_theirs(theirs: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    ids_BS = given["input_ids"]
    is_image_BS = ids_BS == IDS["image_token_id"]
    delimiters_BS = (ids_BS == IDS["image_start_token_id"]) | (ids_BS == IDS["image_end_token_id"])
    theirs.model.rope_deltas = None
    out: torch.Tensor = theirs(
        **given,
        mm_token_type_ids=is_image_BS.long(),
        moe_mm_token_type_ids=(is_image_BS | delimiters_BS).long(),
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--pairs", type=int, default=25)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    under, rows = conditions(), []
    for dtype in ("float32", "bfloat16"):
        ours, theirs = both(dtype, options.quick)
        given = prompt(getattr(torch, dtype), options.quick)
        mine, other = run_ours(ours, given), run_theirs(theirs, given)
        difference = (mine.float() - other.float()).abs().max().item()
        found = paired(
            partial(run_ours, ours, given),
            partial(run_theirs, theirs, given),
            2 if options.quick else options.pairs,
        )
        rows.append({"what": f"{dtype}: one image and {N_TEXT} tokens"} | found.row())
        rows[-1]["largest_difference_of_logits"] = round(difference, 6)
    print(table(rows))
    if not options.quick:
        print(store("pictures", {"rows": rows, "conditions": under}))


if __name__ == "__main__":
    main()
