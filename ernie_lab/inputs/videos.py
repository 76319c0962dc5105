"""A clip, from a file or a list of frames, and what the model reads of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from ernie_lab.inputs.errors import VideoError
from ernie_lab.inputs.frame_sampling import choose_frames
from ernie_lab.inputs.images import Array, ImageLike, read_image
from ernie_lab.inputs.media import TEMPORAL_MERGE, Media
from ernie_lab.inputs.pixels import patchify, resize, smart_resize
from ernie_lab.inputs.preprocessor import Preprocessor, SamplingRule, VideoRules
from ernie_lab.inputs.sources import describe, resolve
from ernie_lab.inputs.timestamps import draw_timestamp
from ernie_lab.inputs.video_files import Clip, open_clip

VideoLike: TypeAlias = str | Path | bytes | Array | Tensor | Sequence[ImageLike]


def prepare_video(
    video: VideoLike,
    how: Preprocessor,
    *,
    rule: SamplingRule | None = None,
    fps: float | None = None,
    timestamps: bool | None = None,
    allow_url: bool = False,
    source: str | None = None,
) -> Media:
    """Sample, stamp, resize, normalise and cut one clip.

    A file is sampled by `rule` ("baidu" or "transformers") at `fps` frames per second. The frames
    of a list (or of an array `[t, h, w, 3]`) are all taken; `fps` then says how fast they pass,
    and without it they carry no times. (transformers would assume 24 and draw them.) An odd
    number of frames is made even by repeating the last. `timestamps` overrides whether times are
    drawn; `rule` and `fps` take the place of `how.video`'s.

    Time of a frame: index * duration / number of frames, as in the reference, also where frames
    pass at a varying rate. Frames are resized by Pillow, as in Baidu's processor; transformers
    resizes clips by torch: two levels of 256 at most, in under 2 % of values of the clips tried.

    Raises:
        VideoError: what is wrong with the clip, and what to do.
        ImageError: the same of one of its frames.
    """
    name = source or describe(video)
    rules = _rules(how.video, rule, fps, timestamps, name)
    if isinstance(video, str | Path | bytes | bytearray):
        content = resolve(video, name, VideoError, allow_url=allow_url)
        pixels, original, seconds = _from_file(open_clip(content, name), how, rules)
    else:
        pictures, seconds = _from_list(video, fps, allow_url, name)
        if timestamps and not seconds:
            raise VideoError(
                f"{name}: the times of a list of frames are not known. Say how fast they pass with "
                "fps=, or leave timestamps out."
            )
        rules = replace(rules, draw_timestamps=rules.draw_timestamps and bool(seconds))
        pixels, original = _resized(pictures, seconds, how, rules, name)
    if len(pixels) % TEMPORAL_MERGE:
        pixels, seconds = [*pixels, pixels[-1]], [*seconds, *seconds[-1:]]
    frames = np.stack(pixels)
    patches_PQ, grid = patchify(frames, how)
    return Media("video", patches_PQ, grid, frames, original, tuple(seconds), name)


def _rules(
    rules: VideoRules,
    rule: SamplingRule | None,
    fps: float | None,
    timestamps: bool | None,
    name: str,
) -> VideoRules:
    if rule not in (None, "baidu", "transformers"):
        raise VideoError(f'{name}: rule={rule!r} must be "baidu" or "transformers".')
    if fps is not None and not (fps > 0 and isfinite(fps)):
        raise VideoError(f"{name}: fps={fps} must be a positive number of frames per second.")
    return replace(
        rules,
        rule=rule or rules.rule,
        fps=rules.fps if fps is None else fps,
        draw_timestamps=rules.draw_timestamps if timestamps is None else timestamps,
    )


def _from_file(
    clip: Clip, how: Preprocessor, rules: VideoRules
) -> tuple[list[Array], tuple[int, int], list[float]]:
    indices = choose_frames(clip.n_frames, clip.rate, rules)
    seconds = [index / clip.rate for index in indices]
    pixels, original = _resized(clip.frames(indices), seconds, how, rules, clip.name)
    if len(pixels) < len(indices):
        # The header counted frames that are not there, so every index was wrong.
        return _from_file(clip.recounted(), how, rules)
    return pixels, original, seconds


def _from_list(
    video: VideoLike, fps: float | None, allow_url: bool, name: str
) -> tuple[Iterator[Image.Image], list[float]]:
    if not isinstance(video, list | tuple | np.ndarray | Tensor) or getattr(video, "ndim", 4) != 4:
        # A list of frames, given where a list of clips is expected, arrives here frame by frame.
        single = " One clip as a list of frames needs a list around it: videos=[frames]."
        raise VideoError(
            f"{name} is of type {type(video).__name__}, expected a path, URL, bytes, a list of "
            f"frames, or an array [t, h, w, 3].{single if _is_picture(video) else ''}"
        )
    frames: list[ImageLike] = [*video]
    if not frames:
        raise VideoError(f"{name} has no frames, expected at least one.")
    pictures = (
        read_image(frame, allow_url=allow_url, name=f"frame {index} of {name}")
        for index, frame in enumerate(frames)
    )
    return pictures, [index / fps for index in range(len(frames))] if fps else []


def _is_picture(video: object) -> bool:
    return isinstance(video, Image.Image | np.ndarray | Tensor)


def _resized(
    pictures: Iterable[Image.Image],
    seconds: Sequence[float],
    how: Preprocessor,
    rules: VideoRules,
    name: str,
) -> tuple[list[Array], tuple[int, int]]:
    """Frames stamped, then resized, one by one; and their height and width before."""
    pixels: list[Array] = []
    original = size = (0, 0)
    for index, picture in enumerate(pictures):
        found = (picture.height, picture.width)
        if index == 0:
            original, size = (
                found,
                smart_resize(
                    *found,
                    factor=how.factor,
                    min_pixels=rules.min_pixels,
                    max_pixels=rules.max_pixels,
                    name=name,
                ),
            )
        if found != original:
            raise VideoError(
                f"frame {index} of {name} is {found[0]} x {found[1]} pixels, frame 0 is "
                f"{original[0]} x {original[1]}. All frames must have one size: resize them first."
            )
        if rules.draw_timestamps:
            picture = draw_timestamp(picture, seconds[index], rules.font)
        pixels.append(resize(picture, size))
    return pixels, original
