"""Prompts with pictures, as padded batches, made without the code under test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ernie_lab.checkpoint.config import VisualIds, VLConfig
from ernie_lab.inputs.media import Grid, Kind


@dataclass(frozen=True)
class Picture:
    """A picture in a prompt, between its delimiters unless `bare`."""

    kind: Kind
    grid: Grid
    bare: bool = False


def image(h: int, w: int, bare: bool = False) -> Picture:
    return Picture("image", Grid(1, h, w), bare)


def video(t: int, h: int, w: int, bare: bool = False) -> Picture:
    return Picture("video", Grid(t, h, w), bare)


Prompt = Sequence[int | Picture]


@dataclass(frozen=True)
class Inputs:
    """A padded batch. `kinds_BS`: 0 text, 1 image, 2 video; `bank_BS`: the delimiters too are 1.

    Both are written down while the prompt is built, so they owe nothing to `visual_layout`.
    `pixels` holds the packed patches of each kind, images first as transformers runs them.
    """

    prompts: tuple[Prompt, ...]
    ids_BS: Tensor
    mask_BS: Tensor
    kinds_BS: Tensor
    bank_BS: Tensor
    pixels: dict[Kind, Tensor]

    @classmethod
    def of(cls, *prompts: Prompt, config: VLConfig, side: str = "left", seed: int = 0) -> Inputs:
        rows = [_tokens(prompt, config.ids) for prompt in prompts]
        longest = max(map(len, rows))

        def grid(column: int) -> Tensor:
            padded = []
            for row in rows:
                values, pad = [token[column] for token in row], [0] * (longest - len(row))
                padded.append(pad + values if side == "left" else values + pad)
            return torch.tensor(padded)

        generator = torch.Generator().manual_seed(seed)
        n_pixels = config.vision.in_channels * config.vision.patch_size**2
        pixels: dict[Kind, Tensor] = {}
        for kind in ("image", "video"):
            n = sum(p.grid.n_patches for p in _pictures(prompts) if p.kind == kind)
            if n:
                pixels[kind] = torch.randn(n, n_pixels, generator=generator)
        return cls(tuple(prompts), grid(0), grid(1), grid(2), grid(3), pixels)

    @property
    def pictures(self) -> list[Picture]:
        """In reading order."""
        return _pictures(self.prompts)

    def grids(self, kind: Kind) -> list[Grid]:
        return [picture.grid for picture in self.pictures if picture.kind == kind]

    def visual(self) -> dict[str, Tensor]:
        given = {}
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if kind in self.pixels:
                given[name] = self.pixels[kind]
                given[f"{kind}_grid_thw"] = torch.tensor(self.grids(kind))
        return given

    def given(self) -> dict[str, Any]:
        """The arguments of `VLModel`."""
        return {"input_ids": self.ids_BS, "attention_mask": self.mask_BS, **self.visual()}

    def alone(self, i: int, config: VLConfig) -> Inputs:
        """One prompt of the batch, without padding, with its own pixels."""
        one, own = Inputs.of(self.prompts[i], config=config), {}
        for kind, x in one.pixels.items():
            before = sum(p.grid.n_patches for p in _pictures(self.prompts[:i]) if p.kind == kind)
            own[kind] = self.pixels[kind][before : before + len(x)]
        return replace(one, pixels=own)

    def in_reading_order(self, by_kind: dict[Kind, Tensor], rows: Callable[[Grid], int]) -> Tensor:
        """Rows of all images and of all clips, merged as their pictures follow each other."""
        parts = {
            kind: list(x.split([rows(grid) for grid in self.grids(kind)]))
            for kind, x in by_kind.items()
        }
        return torch.cat([parts[picture.kind].pop(0) for picture in self.pictures])


def _pictures(prompts: Sequence[Prompt]) -> list[Picture]:
    return [part for prompt in prompts for part in prompt if isinstance(part, Picture)]


def _tokens(prompt: Prompt, ids: VisualIds) -> list[tuple[int, int, int, int]]:
    """(id, 1, kind, bank) of each token."""
    out = []
    for part in prompt:
        if not isinstance(part, Picture):
            out.append((part, 1, 0, 0))
            continue
        first, last = (ids.image_start, ids.image_end)
        token = (ids.image, 1, 1, 1)
        if part.kind == "video":
            first, last = ids.video_start, ids.video_end
            token = (ids.video, 1, 2, 1)
        opening = [] if part.bare else [(first, 1, 0, 1)]
        closing = [] if part.bare else [(last, 1, 0, 1)]
        out += opening + [token] * part.grid.n_tokens + closing
    return out
