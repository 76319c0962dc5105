"""The time drawn on every frame of a clip; the model was trained to read it.

Text, size, place and stroke are Baidu's (ernie-facts 4.2). The reference draws them in
Roboto-Regular, from a file that its code downloads; transformers expects that file beside the
checkpoint. Here it is taken from beside the checkpoint if there, else from this package, which
bundles Roboto-Regular 2.138 (2017, Apache-2.0). With equal files frames are equal to
transformers' (tests/inputs/test_videos.py). What may differ: the revision of Roboto in Baidu's
download could not be compared, and FreeType's antialiasing varies a little between releases.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ernie_lab.inputs.errors import VideoError

if TYPE_CHECKING:
    from PIL import Image, ImageFont

FONT_NAME = "Roboto-Regular.ttf"
BUNDLED_FONT = Path(__file__).parent / "fonts" / FONT_NAME

# Of the shorter side of the frame; the stroke, of the font size.
_FONT_SHARE, _STROKE_SHARE = 0.1, 0.1
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


def timestamp_text(seconds: float) -> str:
    """`time: HH:MM:SS.ss`. As in the reference, 59.996 s reads 60.00."""
    minutes, rest = seconds % 3600 // 60, seconds % 3600 % 60
    return f"time: {int(seconds // 3600):02d}:{int(minutes):02d}:{rest:05.2f}"


def draw_timestamp(picture: Image.Image, seconds: float, font: Path | None = None) -> Image.Image:
    """A copy with the time in its top left corner, black with a white stroke."""
    from PIL import ImageDraw

    size = int(min(picture.size) * _FONT_SHARE)
    if size < 1:
        raise VideoError(
            f"frames of {picture.height} x {picture.width} pixels are too small to draw the time "
            "on; 10 pixels are the least. Pass timestamps=False."
        )
    stamped = picture.copy()
    ImageDraw.Draw(stamped).text(
        (0, 0),
        timestamp_text(seconds),
        font=_load(font or BUNDLED_FONT, size),
        fill=_BLACK,
        stroke_width=int(size * _STROKE_SHARE),
        stroke_fill=_WHITE,
    )
    return stamped


@lru_cache(maxsize=8)
def _load(path: Path, size: int) -> ImageFont.FreeTypeFont:
    from PIL import ImageFont

    try:
        return ImageFont.truetype(path, size)
    except OSError as problem:
        raise VideoError(
            f"{path} is not a font that FreeType can read ({problem}). Give the path of a .ttf or "
            ".otf file, or none for the bundled one."
        ) from problem
