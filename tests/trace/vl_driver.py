"""A mixed batch for the small vision-language model: images, a clip and plain text, recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie_lab.inputs.media import Grid, Kind, Media
from ernie_lab.inputs.visual_layout import VisualLayout, visual_layout
from ernie_lab.interventions.edits import Edit, EditTap
from ernie_lab.model.vl import VLModel
from ernie_lab.sites import Step, Tap, all_sites
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.trace import Trace

IMAGE, VIDEO = 50, 51
PATCH, CHANNELS = 2, 3
NEW = [[21, 22, 23], [24, -1, 25]]
# What `moe.bank` is at each kind of id, so that rows can be checked against ids alone.
VISION_IDS = range(50, 56)


def medium(kind: Kind, grid: Grid, seed: int) -> Media:
    random = torch.Generator().manual_seed(seed)
    frames = np.random.default_rng(seed).integers(
        0, 256, (grid.t, grid.h * PATCH, grid.w * PATCH, 3), dtype=np.uint8
    )
    return Media(
        kind,
        torch.randn((grid.n_patches, CHANNELS * PATCH**2), generator=random),
        grid,
        frames,
        original_size=(grid.h * PATCH * 3, grid.w * PATCH * 2),
        timestamps=tuple(0.5 * i for i in range(grid.t)) if kind == "video" else (),
        source=f"{kind} {seed}",
    )


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    media: list[Media] = field(default_factory=list)


def prompt(*parts: int | Media) -> Prompt:
    """Ids and pictures in reading order; each picture gets its delimiters and placeholders."""
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif part.kind == "image":
            ids += [52, *[IMAGE] * part.grid.n_tokens, 53]
        else:
            ids += [54, *[VIDEO] * part.grid.n_tokens, 55]
    return Prompt(ids, [part for part in parts if isinstance(part, Media)])


SMALL, WIDE = Grid(1, 4, 4), Grid(1, 4, 6)
CLIP = Grid(4, 4, 2)
MIXED = (
    prompt(7, medium("image", SMALL, 1), 8, medium("image", WIDE, 2), 9, 10),
    prompt(11, medium("video", CLIP, 3), 12, 13),
    prompt(14, 15, 16),
)
TEXT_ALONE = (prompt(7, 8, 9, 10), prompt(14, 15))


@dataclass
class Inputs:
    """A left-padded batch, as the model takes it."""

    ids: Tensor
    mask: Tensor
    layout: VisualLayout
    media: list[Media]
    pixels: dict[str, Any]

    @property
    def step(self) -> Step:
        layout = self.layout
        grids = tuple(block.grid for block in layout.blocks)
        return Step(
            "prefill",
            0,
            layout.positions_BSR,
            self.mask.bool(),
            layout.modality_BS,
            layout.bank_BS,
            grids,
        )


def inputs(model: VLModel, prompts: Sequence[Prompt]) -> Inputs:
    width = max(len(one.ids) for one in prompts)
    ids = torch.tensor([[0] * (width - len(one.ids)) + one.ids for one in prompts])
    mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in prompts])
    media = [one for each in prompts for one in each.media]
    pixels: dict[str, Any] = {}
    grids: dict[str, list[Grid]] = {"image": [], "video": []}
    names = {
        "image": ("pixel_values", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    for kind, (values, thw) in names.items():
        mine = [one for one in media if one.kind == kind]
        grids[kind] = [one.grid for one in mine]
        if mine:
            pixels[values] = torch.cat([one.patches_PQ for one in mine])
            pixels[thw] = torch.tensor([list(grid) for grid in grids[kind]])
    layout = visual_layout(ids, model.config.ids, grids["image"], grids["video"], mask)
    return Inputs(ids, mask, layout, media, pixels)


def routers(model: VLModel) -> dict[str, Routers]:
    router = model.config.decoder.moe.router
    return {
        bank: Routers(
            router.n_experts,
            router.n_chosen,
            {layer: one.correction_bias_E for layer, one in layers.items()},
        )
        for bank, layers in model.routers().items()
    }


def call(model: VLModel, given: Inputs, tap: Tap, **options: Any) -> Any:
    return model(given.ids, given.mask, tap=tap, **given.pixels, **options)


def record(
    model: VLModel,
    prompts: Sequence[Prompt],
    keep: object = ("all", "vision.*", "blocks.*", "resampler.*"),
    *,
    edits: Sequence[Edit] = (),
    new: Sequence[Sequence[int]] = (),
    with_media: bool = True,
    **filters: Any,
) -> Trace:
    """A prefill, and one decoding step for each row of `new` (-1: this sequence has ended)."""
    given, sites = inputs(model, prompts), all_sites(model)
    recorder = Recorder(Keep.of(keep, sites, **filters))
    tap = EditTap.of(edits, sites, recorder)
    ids = [list(one.ids) for one in prompts]
    with torch.no_grad():
        out = call(model, given, tap.bind(given.step), use_cache=True)
        seen = given.mask
        for index, row in enumerate(new, start=1):
            alive = torch.tensor([[int(token >= 0)] for token in row])
            seen = torch.cat([seen, alive], 1)
            step = Step("decode", index, torch.zeros_like(alive), alive.bool())
            model(
                torch.tensor([[max(token, 0)] for token in row]),
                seen,
                past_key_values=out.past_key_values,
                use_cache=True,
                tap=tap.bind(step),
            )
            for sequence, token in zip(ids, row, strict=True):
                sequence.extend([token] if token >= 0 else [])
    return recorder.trace(
        ids,
        sites=sites,
        provenance=Provenance.now("small-vl"),
        routers=routers(model),
        edited=tap.by_path.keys(),
        media=given.media if with_media else (),
    )
