"""Small labs, prompts with pictures, and every ready-made edit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from support.labs import small_lab
from support.models import small_model, small_vl_model

from ernie_lab.inputs.media import Grid, Media
from ernie_lab.interventions import catalogue as edits
from ernie_lab.interventions import experts, routing, shared
from ernie_lab.lab import Lab

PROMPTS = ["hello there, how are you?", "no"]
TEXT_REFERENCE = [
    *("moe.shared_out", "moe.expert_out", "routing", "attn.z", "blocks.*.resid_mid", "moe.in"),
]


def lab(seed: int = 0, **overrides: Any) -> Lab:
    found = small_lab(**overrides)
    return found if seed == 0 else replace(found, model=small_model(seed, **overrides))


def vl_lab() -> Lab:
    return Lab(model=small_vl_model(), model_id="small-vl")


def image(h: int, w: int, seed: int) -> Media:
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(1, h, w)
    pixels = torch.randn((grid.n_patches, 12), generator=generator)
    frames = np.zeros((1, 2 * h, 2 * w, 3), dtype=np.uint8)
    return Media(
        "image", pixels, grid, frames, original_size=(h, w), timestamps=(), source="random"
    )


# 4 x 4 patches make 4 tokens. 52 and 53 are delimiters.
VL_IDS = [[7, 52, 50, 50, 50, 50, 53, 8, 9, 10], [11, 12, 13]]
VL_PROMPT: dict[str, Any] = {"prompt": VL_IDS, "images": [[image(4, 4, 1)], []]}
VL_REFERENCE = [
    "moe.shared_out",
    "moe.text.expert_out",
    "moe.vision.expert_out",
    "routing",
    "attn.z",
    "blocks.*.resid_mid",
]


def text_edits(mine: Lab) -> dict[str, Any]:
    """One of every kind, that changes something, on the small text model."""
    trace = mine.run("another Reference", keep=TEXT_REFERENCE).trace
    own = mine.run(PROMPTS, keep=["routing", "attn.z"]).trace
    chosen = int(own.expert_ids.sel(layer=1).values[3, 0])
    seen = int(trace.expert_ids.sel(layer=2).values[0, 0])
    direction = torch.linspace(-1, 1, 32)
    return {
        "zero": edits.zero("attn.z", layers=1, heads=[0, 2]),
        "scale": edits.scale("blocks.*.resid_mid", 1.5, layers=[0, -1]),
        "mean": edits.mean("attn.z", trace, heads=1),
        "resample": edits.resample("blocks.1.resid_mid", trace, seed=3),
        "patch": edits.patch("attn.z", trace, missing="keep", positions=range(4)),
        "add": edits.add("blocks.1.resid_mid", direction, 2.0),
        "knockout": edits.knockout(
            edits.tokens(positions=slice(3, None)), edits.tokens(positions=[0, 1])
        ),
        "shared.zero": shared.zero(1),
        "shared.scale": shared.scale(0.5),
        "shared.mean": shared.mean(trace),
        "shared.resample": shared.resample(trace, 1, layers=2),
        "shared.swap": shared.swap(1, 2),
        "shared.swap matched": shared.swap(1, -1, norm_matched=True),
        "shared.transplant": shared.transplant(lab(5), 1),
        "shared.permute_neurons": shared.permute_neurons(0),
        "shared.random_direction": shared.random_direction(1),
        "shared.random_direction layer": shared.random_direction(1, [2], per="layer"),
        "experts.off": experts.off(1, chosen),
        "experts.off renormalise": experts.off([1, 2], [chosen, 0], "renormalise"),
        "experts.off next_best": experts.off(1, chosen, "next_best"),
        "experts.off mean": experts.off(2, seen, "mean", trace=trace),
        "experts.off resample": experts.off(2, seen, "resample", trace=trace, seed=4),
        "experts.off bank": experts.off(None),
        "experts.swap": experts.swap(1, chosen, (chosen + 1) % 8),
        "routing.forbid": routing.forbid(1, [chosen]),
        "routing.force": routing.force(2, 3),
        "routing.force displaced": routing.force(2, [3, 1], "displaced"),
        "routing.force number": routing.force(None, 3, 0.25),
        "routing.steer": routing.steer(1, 3, 2.0),
        "routing.steer selection": routing.steer(1, [3], 0.5, on="selection"),
        "routing.top_k": routing.top_k(3),
        "routing.temperature": routing.temperature(2.0),
        "routing.without_correction_bias": routing.without_correction_bias(),
        "routing.random": routing.random(1),
        "routing.random bias": routing.random(1, keep_bias=True),
        "routing.random fitted": routing.random(1, 1, trace=trace),
        "routing.uniform": routing.uniform(2),
        "routing.replay": routing.replay(
            mine.run(PROMPTS, keep="routing", edits=routing.uniform(1)).trace
        ),
    }


def vl_edits(mine: Lab) -> dict[str, Any]:
    """The same on the small vision-language model."""
    trace = mine.run(**VL_PROMPT, keep=VL_REFERENCE).trace
    seen = int(trace.routing("vision").expert_ids.sel(layer=2).values[0, 0])
    return {
        "zero": edits.zero("blocks.1.attn.z", where="image"),
        "mean": edits.mean("moe.shared_out", trace, where=["text", "delimiter"]),
        "knockout": edits.knockout("text", ["image", "delimiter"], layers=[1, 2]),
        "shared.swap": shared.swap(1, 2),
        "experts.off": experts.off(2, seen, bank="vision"),
        "experts.off renormalise": experts.off(None, [0, 1, 2, 3], "renormalise", bank="text"),
        "experts.off next_best": experts.off(2, seen, "next_best", bank="vision"),
        "experts.off mean": experts.off(2, seen, "mean", bank="vision", trace=trace),
        "experts.off bank": experts.off(None, bank="vision"),
        "experts.swap": experts.swap(2, seen, (seen + 1) % 8, bank="vision"),
        "routing.forbid": routing.forbid(2, seen, bank="vision"),
        "routing.force": routing.force([1, 2], 3, "displaced", bank="text"),
        "routing.steer": routing.steer(1, 3, 2.0, bank="vision"),
        "routing.top_k": routing.top_k(1, bank="vision"),
        "routing.temperature": routing.temperature(0.5, bank="text"),
        "routing.without_correction_bias": routing.without_correction_bias(bank="vision"),
        "routing.random": routing.random(1, bank="vision"),
        "routing.uniform": routing.uniform(2, bank="text"),
        "routing.cross_bank text": routing.cross_bank("text"),
        "routing.cross_bank vision": routing.cross_bank("vision", layers=[2]),
        "routing.share_router": routing.share_router("text"),
    }
