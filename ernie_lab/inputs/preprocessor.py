"""How pictures and clips become patches, as the files beside a checkpoint say."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from ernie_lab.checkpoint.config import ConfigError
from ernie_lab.inputs.media import SPATIAL_MERGE, TEMPORAL_MERGE

SamplingRule: TypeAlias = Literal["baidu", "transformers"]

# CLIP's, per channel (ernie-facts 4.1).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoRules:
    """`fps` None is the rule's own: 2 for "baidu", every frame for "transformers".

    Pixels are of one frame. `font` None is the bundled Roboto (`inputs.timestamps`).
    """

    min_pixels: int = 299 * 28 * 28
    max_pixels: int = 1196 * 28 * 28
    rule: SamplingRule = "baidu"
    fps: float | None = None
    min_frames: int = 16
    max_frames: int = 180
    draw_timestamps: bool = True
    font: Path | None = None

    def __post_init__(self) -> None:
        _in_order("video min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        _in_order("min_frames", self.min_frames, "max_frames", self.max_frames)
        if self.rule not in get_args(SamplingRule):
            raise ConfigError(f"rule={self.rule!r} must be one of {get_args(SamplingRule)}.")
        if self.fps is not None and not (self.fps > 0 and isfinite(self.fps)):
            raise ConfigError(f"fps={self.fps} must be a positive number of frames per second.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessor:
    """A pixel value x in 0..255 becomes (x * rescale - mean) / std.

    Two default maxima are in circulation: 28 * 28 * 6177, of transformers' code and Baidu's
    processor, and 28 * 28 * 6144, of the released preprocessor_config.json files.
    """

    patch_size: int = 14
    merge_size: int = SPATIAL_MERGE
    temporal_merge_size: int = TEMPORAL_MERGE
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 6177
    image_mean: tuple[float, float, float] = CLIP_MEAN
    image_std: tuple[float, float, float] = CLIP_STD
    rescale: float = 1 / 255
    video: VideoRules = field(default_factory=VideoRules)

    def __post_init__(self) -> None:
        _in_order("min_pixels", self.min_pixels, "max_pixels", self.max_pixels)
        if self.patch_size < 1:
            raise ConfigError(f"patch_size={self.patch_size} must be at least 1.")
        if self.merge_size != SPATIAL_MERGE or self.temporal_merge_size != TEMPORAL_MERGE:
            raise ConfigError(
                f"merge_size={self.merge_size} and temporal_merge_size={self.temporal_merge_size}: "
                f"the model joins {SPATIAL_MERGE} x {SPATIAL_MERGE} patches of "
                f"{TEMPORAL_MERGE} frames, and nothing else is supported."
            )
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(isfinite(value) for value in values):
                raise ConfigError(f"{name}={values} must be three numbers, for red, green, blue.")
        if min(self.image_std) <= 0 or not (self.rescale > 0 and isfinite(self.rescale)):
            raise ConfigError(f"image_std={self.image_std}, rescale={self.rescale}: not positive.")

    @property
    def factor(self) -> int:
        """Sides of resized pictures are multiples of this: one token's width in pixels."""
        return self.patch_size * self.merge_size


def _in_order(low_name: str, low: int, high_name: str, high: int) -> None:
    if not 1 <= low <= high:
        raise ConfigError(f"{low_name}={low}, {high_name}={high}: expected 1 <= {low} <= {high}.")
