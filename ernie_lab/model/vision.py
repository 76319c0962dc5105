"""The vision tower: patches of all frames, packed; attention stays within a frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import layer_norm, scaled_dot_product_attention

from ernie_lab.checkpoint.config import VisionConfig
from ernie_lab.inputs.media import Grid
from ernie_lab.model.frames import Frames, patch_positions
from ernie_lab.model.linear import Linear
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class VisionAttentionSites:
    q: Site
    k: Site
    v: Site
    q_rot: Site
    k_rot: Site
    scores: Site
    pattern: Site
    z: Site
    attn_out: Site

    @classmethod
    def under(cls, path: str) -> VisionAttentionSites:
        def heads(name: str, meaning: str) -> Site:
            return Site(f"{path}.{name}", "p h a", meaning)

        return cls(
            q=heads("q", "queries, before rotation"),
            k=heads("k", "keys, before rotation"),
            v=heads("v", "values"),
            q_rot=heads("q_rot", "queries, rotated"),
            k_rot=heads("k_rot", "keys, rotated"),
            scores=Site(
                f"{path}.scores",
                "i h p u",
                "scaled, before softmax; -inf beyond a frame's patches",
                dtype="float32",
                on_demand=True,
            ),
            pattern=Site(
                f"{path}.pattern",
                "i h p u",
                "attention weights within each frame; rows sum to 1, 0 beyond its patches",
                on_demand=True,
            ),
            z=heads("z", "head outputs, before the output projection"),
            attn_out=Site(f"{path}.attn_out", "p w", "what attention writes to the stream"),
        )


@dataclass(frozen=True, slots=True)
class VisionMLPSites:
    up: Site
    act: Site
    mlp_out: Site

    @classmethod
    def under(cls, path: str) -> VisionMLPSites:
        return cls(
            up=Site(f"{path}.up", "p f", "neurons, before quick-GELU"),
            act=Site(f"{path}.act", "p f", "neurons, after it"),
            mlp_out=Site(f"{path}.mlp_out", "p w", "what the MLP writes to the stream"),
        )


@dataclass(frozen=True, slots=True)
class VisionBlockSites:
    resid_pre: Site
    attn: VisionAttentionSites
    resid_mid: Site
    mlp: VisionMLPSites
    resid_post: Site


@dataclass(frozen=True, slots=True)
class VisionSites:
    patch_embed: Site
    blocks: tuple[VisionBlockSites, ...]
    out: Site


@dataclass(frozen=True, slots=True, eq=False)
class PatchRotation:
    """Cosine and sine for every patch, fp32, `[p a/2]`: half of the pairs turn with the row,
    half with the column."""

    cos_PC: Tensor
    sin_PC: Tensor


def patch_rotation(theta: float, head_dim: int, positions_P2: Int[Tensor, "p 2"]) -> PatchRotation:
    """theta^(-2i / (a/2)) radians a row, and the same again a column (ernie-facts 3.5)."""
    axis = head_dim // 2
    device = positions_P2.device
    exponents_C = torch.arange(0, axis, 2, dtype=torch.float32, device=device) / axis
    angles_P2C = positions_P2[..., None].float() * (1.0 / theta**exponents_C)
    angles_PC = rearrange(angles_P2C, "p hw c -> p (hw c)")
    return PatchRotation(angles_PC.cos(), angles_PC.sin())


def rotate_halves(x_PHA: Float[Tensor, "p h a"], by: PatchRotation) -> Float[Tensor, "p h a"]:
    """Pairs are (i, i + a/2), unlike the decoder's neighbours; fp32, cast back."""
    first_PHC, second_PHC = rearrange(x_PHA.float(), "p h (two c) -> two p h c", two=2)
    cos_PHC, sin_PHC = by.cos_PC.unsqueeze(1), by.sin_PC.unsqueeze(1)
    rotated = (
        first_PHC * cos_PHC - second_PHC * sin_PHC,
        second_PHC * cos_PHC + first_PHC * sin_PHC,
    )
    return torch.cat(rotated, dim=-1).to(x_PHA.dtype)


class LayerNorm(nn.Module):
    """weight * (x - mean) / sqrt(var + eps) + bias. One fused kernel, so without sites."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class VisionAttention(nn.Module):
    """softmax(q k^T / sqrt(a)) v within each frame; all patches of a frame see each other.

    As in the decoder, the fused kernel gives the output, and `scores` and `pattern` are computed
    beside it when someone wants them, replacing it when they were changed or under gradients.
    transformers records the module's *output* under the name of its attention map.
    """

    def __init__(self, config: VisionConfig, path: str) -> None:
        super().__init__()
        self.n_heads, self.head_dim = config.n_heads, config.width // config.n_heads
        self.qkv = Linear(config.width, 3 * config.width)
        self.o = Linear(config.width, config.width)
        self.sites = VisionAttentionSites.under(path)

    def forward(
        self, x_PW: Tensor, rotation: PatchRotation, frames: Frames, tap: Tap = idle
    ) -> Tensor:
        at = self.sites
        q_PHA, k_PHA, v_PHA = rearrange(
            self.qkv(x_PW), "p (three h a) -> three p h a", three=3, h=self.n_heads
        )
        q_PHA, k_PHA, v_PHA = tap(at.q, q_PHA), tap(at.k, k_PHA), tap(at.v, v_PHA)
        q_PHA = tap(at.q_rot, rotate_halves(q_PHA, rotation))
        k_PHA = tap(at.k_rot, rotate_halves(k_PHA, rotation))
        z_PHA = tap(at.z, self._mix(q_PHA, k_PHA, v_PHA, frames, tap))
        return tap(at.attn_out, self.o(rearrange(z_PHA, "p h a -> p (h a)")))

    def _mix(self, q_PHA: Tensor, k_PHA: Tensor, v_PHA: Tensor, frames: Frames, tap: Tap) -> Tensor:
        at = self.sites
        if not (tap.wants(at.scores) or tap.wants(at.pattern)):
            return attention_by_frame(q_PHA, k_PHA, v_PHA, frames)
        present_IP = frames.present(q_PHA.device)
        query_I1P1, both_I1PU = rearrange(present_IP, "i p -> i 1 p 1"), _both(present_IP)
        q_IPHA, k_IUHA, v_IUHA = (_by_frame(x, present_IP) for x in (q_PHA, k_PHA, v_PHA))
        scores_IHPU = einsum(q_IPHA, k_IUHA, "i p h a, i u h a -> i h p u").float()
        scores_IHPU = scores_IHPU / math.sqrt(self.head_dim)
        scores_IHPU = scores_IHPU.masked_fill(~both_I1PU, -math.inf)
        shown_IHPU = tap(at.scores, scores_IHPU) if tap.wants(at.scores) else scores_IHPU
        # A row of padding has no key: its softmax would be NaN, and so would be its gradient.
        pattern_IHPU = shown_IHPU.masked_fill(~query_I1P1, 0.0).softmax(-1)
        pattern_IHPU = pattern_IHPU.masked_fill(~both_I1PU, 0.0).to(v_PHA.dtype)
        used_IHPU = tap(at.pattern, pattern_IHPU) if tap.wants(at.pattern) else pattern_IHPU
        unchanged = shown_IHPU is scores_IHPU and used_IHPU is pattern_IHPU
        if unchanged and not used_IHPU.requires_grad:
            return attention_by_frame(q_PHA, k_PHA, v_PHA, frames)
        z_IPHA = einsum(used_IHPU, v_IUHA, "i h p u, i u h a -> i p h a")
        z_PHA: Tensor = z_IPHA[present_IP]
        return z_PHA


def _by_frame(x_PHA: Tensor, present_IP: Tensor) -> Tensor:
    """Packed rows as `[i p h a]`, zeros where a frame has fewer patches than the largest."""
    x_IPHA = x_PHA.new_zeros(*present_IP.shape, *x_PHA.shape[1:])
    return x_IPHA.index_put(present_IP.nonzero(as_tuple=True), x_PHA)


def _both(present_IP: Tensor) -> Tensor:
    """`[i 1 p u]`: query patch and key patch both exist."""
    return rearrange(present_IP, "i p -> i 1 p 1") & rearrange(present_IP, "i u -> i 1 1 u")


def attention_by_frame(
    q_PHA: Float[Tensor, "p h a"],
    k_PHA: Float[Tensor, "p h a"],
    v_PHA: Float[Tensor, "p h a"],
    frames: Frames,
) -> Float[Tensor, "p h a"]:
    """Fused attention, one call for each run of frames of equal size."""
    mixed = []
    for start, n_frames, length in frames.runs():
        q, k, v = (
            rearrange(x[start : start + n_frames * length], "(i p) h a -> i h p a", i=n_frames)
            for x in (q_PHA, k_PHA, v_PHA)
        )
        mixed.append(rearrange(scaled_dot_product_attention(q, k, v), "i h p a -> (i p) h a"))
    return torch.cat(mixed)


class VisionMLP(nn.Module):
    """down(quick_gelu(up x)), quick_gelu(x) = x * sigmoid(1.702 x)."""

    def __init__(self, width: int, hidden: int, path: str) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)
        self.sites = VisionMLPSites.under(path)

    def forward(self, x_PW: Tensor, tap: Tap = idle) -> Tensor:
        at = self.sites
        up_PF = tap(at.up, self.up(x_PW))
        act_PF = tap(at.act, up_PF * torch.sigmoid(1.702 * up_PF))
        return tap(at.mlp_out, self.down(act_PF))


class VisionBlock(nn.Module):
    """resid_mid = resid_pre + attn(norm1(resid_pre)); resid_post = resid_mid + mlp(norm2(...))."""

    def __init__(self, config: VisionConfig, layer: int) -> None:
        super().__init__()
        path = f"vision.blocks.{layer}"
        self.norm1 = LayerNorm(config.width, config.norm_eps)
        self.attn = VisionAttention(config, f"{path}.attn")
        self.norm2 = LayerNorm(config.width, config.norm_eps)
        self.mlp = VisionMLP(config.width, config.hidden, f"{path}.mlp")
        self.sites = VisionBlockSites(
            resid_pre=Site(f"{path}.resid_pre", "p w", "patches, before attention"),
            attn=self.attn.sites,
            resid_mid=Site(f"{path}.resid_mid", "p w", "patches, after attention"),
            mlp=self.mlp.sites,
            resid_post=Site(f"{path}.resid_post", "p w", "patches, after the MLP"),
        )

    def forward(
        self, resid_PW: Tensor, rotation: PatchRotation, frames: Frames, tap: Tap
    ) -> Tensor:
        at = self.sites
        resid_PW = tap(at.resid_pre, resid_PW)
        mixed_PW = self.attn(self.norm1(resid_PW), rotation, frames, tap)
        resid_PW = tap(at.resid_mid, resid_PW + mixed_PW)
        return tap(at.resid_post, resid_PW + self.mlp(self.norm2(resid_PW), tap))


class VisionTower(nn.Module):
    """Patches `[p q]` of any number of images and clips to features `[p w]`.

    Source: ernie-facts 3.5.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        n_pixels = config.in_channels * config.patch_size**2
        self.patch_embed = Linear(n_pixels, config.width, bias=False)
        blocks = [VisionBlock(config, layer) for layer in range(config.depth)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = LayerNorm(config.width, config.norm_eps)
        self.sites = VisionSites(
            patch_embed=Site("vision.patch_embed", "p w", "patches, embedded"),
            blocks=tuple(block.sites for block in blocks),
            out=Site("vision.out", "p w", "what the tower hands to the resampler"),
        )

    def forward(
        self, patches_PQ: Float[Tensor, "p q"], grids: Sequence[Grid], tap: Tap = idle
    ) -> Float[Tensor, "p w"]:
        """`grids` are the images and clips whose patches stand one behind the other.

        Raises:
            ValueError: another number of patches than the grids have, or of pixels in each.
        """
        frames = Frames.of(grids)
        if len(patches_PQ) != frames.n_patches:
            raise ValueError(
                f"{len(patches_PQ)} patches for grids {[tuple(grid) for grid in grids]} (frames, "
                f"rows, columns), which have {frames.n_patches}; pass the grids that the image "
                "processor returned with these pixels"
            )
        n_pixels = self.patch_embed.in_features
        if patches_PQ.shape[1:] != (n_pixels,):
            raise ValueError(
                f"patches of shape {list(patches_PQ.shape)}, expected [p, {n_pixels}], "
                f"{self.config.in_channels} channels of {self.config.patch_size} x "
                f"{self.config.patch_size} pixels; were these pictures prepared for another model?"
            )
        positions_P2 = patch_positions(grids).to(patches_PQ.device)
        head_dim = self.config.width // self.config.n_heads
        rotation = patch_rotation(self.config.rope_theta, head_dim, positions_P2)
        resid_PW = self.patch_embed(patches_PQ.to(self.patch_embed.weight.dtype))
        resid_PW = tap(self.sites.patch_embed, resid_PW)
        for block in self.blocks:
            resid_PW = block(resid_PW, rotation, frames, tap)
        return tap(self.sites.out, self.final_norm(resid_PW))
