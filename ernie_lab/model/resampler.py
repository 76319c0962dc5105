"""The resampler: patches of the tower to tokens of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from ernie_lab.checkpoint.config import ConfigError, VLConfig
from ernie_lab.inputs.media import SPATIAL_MERGE, TEMPORAL_MERGE, Grid
from ernie_lab.model.linear import Linear
from ernie_lab.model.norm import NormSites, RMSNorm
from ernie_lab.model.vision import LayerNorm
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class ResamplerSites:
    spatial: Site
    temporal: Site
    mlp: Site
    norm: NormSites
    out: Site


class MergeMLP(nn.Module):
    """norm(down(gelu(up x))), with the exact GELU."""

    def __init__(self, n_in: int, n_out: int, eps: float) -> None:
        super().__init__()
        self.up = Linear(n_in, n_out)
        self.down = Linear(n_out, n_out)
        self.norm = LayerNorm(n_out, eps)

    def forward(self, x: Tensor) -> Tensor:
        merged: Tensor = self.norm(self.down(gelu(self.up(x))))
        return merged


class Resampler(nn.Module):
    """2 x 2 patches of a frame become one block; two frames' blocks become one token.

    An image is its own pair: its blocks are joined with themselves. Source: ernie-facts 3.6.
    """

    def __init__(self, config: VLConfig) -> None:
        super().__init__()
        vision, text = config.vision, config.text
        merges = (vision.merge_size, vision.temporal_merge_size)
        if merges != (SPATIAL_MERGE, TEMPORAL_MERGE):
            raise ConfigError(
                f"spatial and temporal merge sizes {merges} are not supported: only "
                f"{(SPATIAL_MERGE, TEMPORAL_MERGE)} are, on which tokens and positions are counted"
            )
        self.merge, self.temporal_merge = vision.merge_size, vision.temporal_merge_size
        width = vision.width * vision.merge_size**2
        self.spatial = MergeMLP(width, width, vision.norm_eps)
        self.temporal = MergeMLP(width * vision.temporal_merge_size, width, vision.norm_eps)
        self.project = Linear(width, text.width)
        self.norm = RMSNorm(text.width, text.norm_eps)
        self.sites = ResamplerSites(
            spatial=Site("resampler.spatial", "o x", "2 x 2 patches merged, each frame apart"),
            temporal=Site("resampler.temporal", "m x", "pairs of frames merged"),
            mlp=Site("resampler.mlp", "m d", "projected to the decoder's width, before the norm"),
            norm=NormSites(
                scale=Site("resampler.norm.scale", "m", "1 / rms of the input", dtype="float32"),
                normalized=Site("resampler.norm.normalized", "m d", "input x scale"),
            ),
            out=Site("resampler.out", "m d", "the embeddings of the image tokens"),
        )

    def forward(
        self, vision_PW: Float[Tensor, "p w"], grids: Sequence[Grid], tap: Tap = idle
    ) -> Float[Tensor, "m d"]:
        at = self.sites
        # Patches of a merge block stand together, so joining them is a matter of shape.
        blocks_OX = rearrange(vision_PW, "(o merged) w -> o (merged w)", merged=self.merge**2)
        blocks_OX = tap(at.spatial, self.spatial(blocks_OX))
        tokens_MX = tap(at.temporal, self.temporal(self._pairs(blocks_OX, grids)))
        tokens_MD = tap(at.mlp, self.project(tokens_MX))
        return tap(at.out, self.norm(tokens_MD, at.norm, tap))

    def _pairs(self, blocks_OX: Tensor, grids: Sequence[Grid]) -> Tensor:
        """`[m 2x]`: each block beside the same block of the next frame."""
        sizes = [grid.n_patches // self.merge**2 for grid in grids]
        pairs = []
        for grid, mine_OX in zip(grids, blocks_OX.split(sizes), strict=True):
            if grid.t == 1:
                pairs.append(repeat(mine_OX, "o x -> o (frames x)", frames=self.temporal_merge))
                continue
            if grid.t % self.temporal_merge:
                raise ValueError(
                    f"a clip of {grid.t} frames cannot be cut into pairs; repeat its last frame"
                )
            pattern = "(t frames o) x -> (t o) (frames x)"
            pairs.append(rearrange(mine_OX, pattern, frames=self.temporal_merge, t=grid.t // 2))
        return torch.cat(pairs)
