"""Rotary positions: frequencies by scaling rule, and the rotation itself.

ERNIE rotates neighbouring pairs (2i, 2i+1), in fp32, and casts back (ernie-facts 3.2). The
scaling rules are those transformers defines for this model (`modeling_rope_utils`); each is
checked against it in tests/parity/test_rope.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ernie_lab.checkpoint.config import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    YarnScaling,
)


class Rotation(NamedTuple):
    """Cosine and sine of every angle, fp32, `[b s a/2]`: one angle per pair."""

    cos_BSC: Tensor
    sin_BSC: Tensor


def rotation_3d(config: RopeConfig, head_dim: int, positions_BSR: Int[Tensor, "b s 3"]) -> Rotation:
    """The rotation of (time, height, width) positions, one axis for each pair (ernie-facts 3.3).

    With `sections` (h, w, t), height and width take turns over the first h + w frequencies and
    time has the last t, the slowest. Equal positions on all axes give the plain rotation.
    """
    assert config.sections is not None
    height, width, time = config.sections
    axis_C = torch.tensor([1, 2] * ((height + width) // 2) + [0] * time)
    frequencies_C = _plain(config.theta, head_dim).to(positions_BSR.device)
    angles_BSC = positions_BSR[..., axis_C.to(positions_BSR.device)].float() * frequencies_C
    return Rotation(angles_BSC.cos(), angles_BSC.sin())


def rotation(config: RopeConfig, head_dim: int, positions_BS: Int[Tensor, "b s"]) -> Rotation:
    """The rotation of each position.

    Under `dynamic` and `longrope` it depends on the length of the sequence: of each its own.
    transformers takes the longest of the batch, and under `dynamic` the longest it has seen
    so far, as state; here a sequence depends on its own tokens alone.
    """
    if isinstance(config.scaling, DynamicScaling | LongRopeScaling):
        lengths = (positions_BS.amax(-1) + 1).tolist()
    else:
        lengths = [config.max_positions]
    by_length = [frequencies(config, head_dim, length) for length in lengths]
    magnitude = by_length[0][1]
    frequencies_BC = torch.stack([each for each, _ in by_length]).to(positions_BS.device)
    angles_BSC = positions_BS.float().unsqueeze(-1) * frequencies_BC.unsqueeze(1)
    return Rotation(angles_BSC.cos() * magnitude, angles_BSC.sin() * magnitude)


def rotate(x_BSHA: Float[Tensor, "b s h a"], by: Rotation) -> Float[Tensor, "b s h a"]:
    """(x, y) -> (x cos - y sin, y cos + x sin) for each neighbouring pair of a head's axis."""
    even_BSHC, odd_BSHC = rearrange(x_BSHA.float(), "b s h (c two) -> two b s h c", two=2)
    cos_BSHC = rearrange(by.cos_BSC, "b s c -> b s 1 c")
    sin_BSHC = rearrange(by.sin_BSC, "b s c -> b s 1 c")
    rotated = torch.stack(
        (
            even_BSHC * cos_BSHC - odd_BSHC * sin_BSHC,
            odd_BSHC * cos_BSHC + even_BSHC * sin_BSHC,
        ),
        dim=-1,
    )
    return rearrange(rotated, "b s h c two -> b s h (c two)").to(x_BSHA.dtype)


def frequencies(config: RopeConfig, head_dim: int, length: int) -> tuple[Tensor, float]:
    """Radians per position of each pair, `[a/2]` fp32, and the factor on cosine and sine."""
    base_C = _plain(config.theta, head_dim)
    match config.scaling:
        case None:
            return base_C, 1.0
        case LinearScaling(factor=factor):
            return base_C / factor, 1.0
        case DynamicScaling(factor=factor):
            stretch = factor * max(length, config.max_positions) / config.max_positions
            theta = config.theta * (stretch - (factor - 1)) ** (head_dim / (head_dim - 2))
            return _plain(theta, head_dim), 1.0
        case YarnScaling() as yarn:
            return _yarn(yarn, config.theta, head_dim, base_C)
        case LongRopeScaling() as long:
            return _longrope(long, config.max_positions, length, base_C)
        case Llama3Scaling() as llama3:
            return _llama3(llama3, base_C), 1.0


def _plain(theta: float, head_dim: int) -> Tensor:
    """theta^(-2i/a)"""
    return 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def _yarn(yarn: YarnScaling, theta: float, head_dim: int, base_C: Tensor) -> tuple[Tensor, float]:
    def pair_turning(n_turns: float) -> float:
        """Which pair turns `n_turns` times over the original context (a real number)."""
        turns = yarn.original_max_positions / (n_turns * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = pair_turning(yarn.beta_fast), pair_turning(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low or 0.001
    # 0 for fast pairs, which keep their frequency; 1 for slow ones, which are interpolated.
    ramp_C = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    blended_C = base_C / yarn.factor * ramp_C + base_C * (1 - ramp_C)
    return blended_C, _yarn_magnitude(yarn)


def _yarn_magnitude(yarn: YarnScaling) -> float:
    """0.1 m log(factor) + 1, or the quotient of two such where both m are given."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor

    def term(m: float) -> float:
        return 0.1 * m * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0

    if yarn.mscale and yarn.mscale_all_dim:
        return term(yarn.mscale) / term(yarn.mscale_all_dim)
    return term(1.0)


def _longrope(
    long: LongRopeScaling, max_positions: int, length: int, base_C: Tensor
) -> tuple[Tensor, float]:
    is_long = length > long.original_max_positions
    divisor_C = torch.tensor(long.long_factor if is_long else long.short_factor)
    factor = long.factor or max_positions / long.original_max_positions
    magnitude = long.attention_factor
    if magnitude is None:
        gain = math.log(factor) / math.log(long.original_max_positions) if factor > 1 else 0.0
        magnitude = math.sqrt(1 + gain)
    return base_C / divisor_C, magnitude


def _llama3(llama3: Llama3Scaling, base_C: Tensor) -> Tensor:
    wavelength_C = 2 * math.pi / base_C
    turns_C = llama3.original_max_positions / wavelength_C
    low, high = llama3.low_freq_factor, llama3.high_freq_factor
    # 1 keeps the frequency (short waves), 0 divides it by `factor` (long waves).
    keep_C = ((turns_C - low) / (high - low)).clamp(0, 1)
    return keep_C * base_C + (1 - keep_C) * base_C / llama3.factor
