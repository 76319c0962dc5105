"""Frames of a video file, decoded one by one by PyAV (the extra `video`)."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from ernie_lab.inputs.errors import VideoError

# A header may count a few frames that an edit list hides; fewer than this is a damaged file.
_LEAST_DECODED = 0.9
_TURNS = {
    0: None,
    1: Image.Transpose.ROTATE_90,
    2: Image.Transpose.ROTATE_180,
    3: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, slots=True)
class Clip:
    """A video file: its frames, and how many of them pass in a second."""

    content: Path | bytes = field(repr=False)
    n_frames: int
    rate: float
    name: str

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames at increasing `indices`, upright. Stops early where the file does.

        Rotation stated in the file is applied, as players do; transformers leaves it out.
        """
        wanted = Counter(indices)
        with _stream(self.content, self.name) as (container, stream):
            for index, frame in enumerate(container.decode(stream)):
                if index in wanted:
                    picture = self._upright(frame)
                    for _ in range(wanted[index]):
                        yield picture
                if index >= indices[-1]:
                    return

    def _upright(self, frame: Any) -> Image.Image:
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
        turns, rest = divmod(frame.rotation, 90)
        if rest:
            raise VideoError(
                f"{self.name} asks to be turned by {frame.rotation} degrees; only multiples of 90 "
                "are supported. Re-encode it upright."
            )
        turn = _TURNS[int(turns) % 4]
        return picture if turn is None else picture.transpose(turn)

    def recounted(self) -> Clip:
        """The same clip with the number of frames that can really be decoded."""
        with _stream(self.content, self.name) as (container, stream):
            decoded = sum(1 for _ in container.decode(stream))
        if decoded == 0:
            raise VideoError(f"{self.name} holds no frame that can be decoded. Re-encode it.")
        if decoded < _LEAST_DECODED * self.n_frames:
            raise VideoError(
                f"{self.name} says it has {self.n_frames} frames, but only {decoded} can be "
                "decoded; it is cut short. Download it again, or re-encode it."
            )
        return replace(self, n_frames=decoded)


def open_clip(content: Path | bytes, name: str) -> Clip:
    """Read the header; count the frames only if it does not say how many there are.

    Raises:
        VideoError: PyAV is missing, or this is not a video it can decode.
    """
    with _stream(content, name) as (container, stream):
        # FFmpeg plays a picture as a clip of one frame, at an invented rate.
        if container.format.name.endswith("_pipe"):
            raise VideoError(
                f"{name} is a still picture, expected a clip. Pass it with images=, or the frames "
                "of a clip as a list."
            )
        declared = stream.frames
        rate = float(stream.average_rate or stream.guessed_rate or 0)
    if not rate:
        raise VideoError(
            f"{name} does not say how many frames it shows in a second. Re-encode it, or pass its "
            "frames as a list with fps=."
        )
    clip = Clip(content, declared, rate, name)
    return clip if declared else clip.recounted()


@contextmanager
def _stream(content: Path | bytes, name: str) -> Iterator[tuple[Any, Any]]:
    """An open container and its first video stream; errors of FFmpeg become ours."""
    try:
        import av
    except ImportError as problem:
        raise VideoError(
            'videos need PyAV: pip install "ernie-lab[video]". A list of frames needs nothing.'
        ) from problem
    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else str(content)
        # Titles in another encoding are no reason to refuse the pictures.
        opened = av.open(file, metadata_errors="replace")
        with opened as container:
            if not container.streams.video:
                raise VideoError(f"{name} has no video in it, only sound or text.")
            yield container, container.streams.video[0]
    except av.FFmpegError as problem:
        raise VideoError(
            f"{name} is damaged, cut short, or not a video that FFmpeg can decode: {problem}. "
            "Download it again, or re-encode it."
        ) from problem
