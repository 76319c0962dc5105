"""Pictures to patches, exactly as the released preprocessing does it for pictures of this size."""

from __future__ import annotations

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ernie_lab.inputs.media import Grid
from ernie_lab.organisms.boards.clips import N_FRAMES
from ernie_lab.organisms.boards.draw import SIZE

PATCH, MERGE = 14, 2
# CLIP's, as in the released models (ernie-facts 4.1).
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
IMAGE_GRID = Grid(1, SIZE // PATCH, SIZE // PATCH)
CLIP_GRID = Grid(N_FRAMES, SIZE // PATCH, SIZE // PATCH)


def patches(frames: np.ndarray) -> Tensor:
    """uint8 `[t height width 3]` to `[p q]`: 2 x 2 merge blocks together, channel-major."""
    normal = (frames.astype(np.float32) / 255 - MEAN) / STD
    cut = rearrange(
        normal,
        "t (gh mh y) (gw mw x) c -> (t gh gw mh mw) (c y x)",
        mh=MERGE,
        mw=MERGE,
        y=PATCH,
        x=PATCH,
    )
    return torch.from_numpy(np.ascontiguousarray(cut))
