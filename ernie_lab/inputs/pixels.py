"""From a picture to patches: the size the model wants, bicubic, normalised, cut and ordered.

Source: Baidu's processor and transformers' `Ernie4_5_VLMoeImageProcessorPil` (ernie-facts 4.1);
equal to the latter to 1e-6 (tests/inputs/test_pixels.py).
"""

from __future__ import annotations

from math import ceil, floor, sqrt

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ernie_lab.inputs.errors import ImageError
from ernie_lab.inputs.media import Grid, Pixels
from ernie_lab.inputs.preprocessor import Preprocessor

# transformers refuses longer pictures; vLLM and FastDeploy squeeze them to this ratio instead.
MAX_ASPECT = 200


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int, name: str = "picture"
) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, with an area in range and nearly the same aspect.

    Sides are rounded to the nearest multiple, halves to even. A side is never less than one
    `factor`, as in vLLM and FastDeploy. transformers rounds sides of up to `factor / 2` to zero,
    finds the area too small and shrinks the *other* side: 14 x 1000 becomes 28 x 476 there and
    28 x 1008 here. It agrees whenever both sides are longer than that, and for small pictures
    that are enlarged in any case. At extreme aspects the area may exceed `max_pixels`, as there.

    Raises:
        ImageError: the longer side is more than 200 times the shorter, or one is zero.
    """
    if min(height, width) < 1:
        raise ImageError(f"{name} is {height} x {width} pixels: there is nothing in it.")
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ImageError(
            f"{name} is {height} x {width} pixels, an aspect of "
            f"{max(height, width) / min(height, width):.4g}; the model takes at most {MAX_ASPECT}. "
            "Crop it, or cut it into several pictures."
        )
    rows = max(factor, round(height / factor) * factor)
    cols = max(factor, round(width / factor) * factor)
    if rows * cols > max_pixels:
        shrink = sqrt(height * width / max_pixels)
        rows = max(factor, floor(height / shrink / factor) * factor)
        cols = max(factor, floor(width / shrink / factor) * factor)
    elif rows * cols < min_pixels:
        grow = sqrt(min_pixels / (height * width))
        rows = ceil(height * grow / factor) * factor
        cols = ceil(width * grow / factor) * factor
    return rows, cols


def resize(picture: Image.Image, size: tuple[int, int]) -> Pixels:
    """`[height, width, 3]`, by Pillow's antialiased bicubic filter."""
    height, width = size
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def patchify(frames: Pixels, how: Preprocessor) -> tuple[Float[Tensor, "p q"], Grid]:
    """Patches of normalised pixels `(value * rescale - mean) / std`, and their grid.

    Patches of one token stand together: (t, h / merge, w / merge, merge, merge); inside a
    patch: (channel, row, column).
    """
    size, merge = how.patch_size, how.merge_size
    cut = rearrange(
        frames,
        "t (h i y) (w j x) c -> (t h w i j) c (y x)",
        i=merge,
        j=merge,
        y=size,
        x=size,
    )
    grid = Grid(frames.shape[0], frames.shape[1] // size, frames.shape[2] // size)
    # 256 levels and 3 channels: a table, rounded to fp32 where transformers rounds.
    levels = (np.arange(256) * how.rescale).astype(np.float32)
    patches = np.empty(cut.shape, dtype=np.float32)
    for channel, (mean, std) in enumerate(zip(how.image_mean, how.image_std, strict=True)):
        table = (levels - np.float32(mean)) / np.float32(std)
        np.take(table, cut[:, channel], out=patches[:, channel])
    return torch.from_numpy(rearrange(patches, "p c n -> p (c n)")), grid
