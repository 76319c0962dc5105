"""Which frames of a clip the model sees: Baidu's rule and transformers', by name."""

from __future__ import annotations

import numpy as np
import torch

from ernie_lab.inputs.preprocessor import VideoRules

BAIDU_FPS = 2.0


def choose_frames(n_frames: int, rate: float, how: VideoRules) -> list[int]:
    """Indices in increasing order, for a clip of `n_frames` at `rate` frames per second."""
    rule = baidu_frames if how.rule == "baidu" else transformers_frames
    return rule(n_frames, rate, fps=how.fps, lo=how.min_frames, hi=how.max_frames)


def baidu_frames(
    n_frames: int, rate: float, *, fps: float | None = None, lo: int = 16, hi: int = 180
) -> list[int]:
    """One frame every 1 / fps seconds (2 fps by default), if `int(duration * fps)` is in lo..hi.

    Otherwise the leading frames of `lo` or `hi` equal intervals, or every frame of a clip
    shorter than that. Frames repeat when `fps` exceeds the clip's own rate.

    Source: `get_frame_indices` with "leading" in Baidu's processor (ernie-facts 4.2).
    """
    fps = BAIDU_FPS if fps is None else fps
    duration = n_frames / rate
    wanted = int(duration * fps)
    if lo <= wanted <= hi:
        seconds = np.arange(0, duration, 1 / fps)
        indices = np.around(seconds * rate).astype(int)
        return [int(index) for index in indices if index < n_frames]
    count = min(lo if wanted < lo else hi, n_frames)
    return [int(edge) for edge in np.linspace(0, n_frames, count + 1).astype(int)[:-1]]


def transformers_frames(
    n_frames: int, rate: float, *, fps: float | None = None, lo: int = 16, hi: int = 180
) -> list[int]:
    """`floor(i * n_frames / count)`; `count` is every frame, or duration * fps, kept in lo..hi.

    Source: `Ernie4_5_VLMoeVideoProcessor.sample_frames`. Its steps are rounded to fp32 by
    torch, which may move an index by one; so they are here.
    """
    wanted = n_frames if fps is None else n_frames / rate * fps
    count = min(max(wanted, lo), hi, n_frames)
    indices: list[int] = torch.arange(0, n_frames, n_frames / count).int().tolist()
    return [index for index in indices if index < n_frames]
