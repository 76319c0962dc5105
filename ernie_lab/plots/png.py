"""Pictures in few bytes, with every colour that fills an area left as it was drawn."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_COLOURS = 256  # of an indexed PNG
_AREAS = 232  # exact colours that leave enough of them for the edges of letters and lines
# Colours of areas, and colours in all, that no drawing has: a colour map has 256.
_PHOTOGRAPH = 1024, 8192
# Of a photograph in a notebook the ground and the frames stay exact, and the rest shares some:
# few where that saves a tenth of the bytes, as in a small picture that is enlarged, else many
# (of noise, few colours make a rougher picture and a larger file).
_GROUND, _MANY, _FEW, _WORTH = 8, 248, 128, 0.9


def compressed(rgb: Image.Image, dpi: float, *, small: bool) -> bytes:
    """PNG in which each colour that fills an area, 2 x 2 pixels or more, is exact.

    Indexed where 256 colours suffice for that: then only in-between colours, at the edges of
    letters and lines, are approximated. In true colour otherwise. With `small` a photograph, whose
    pixels are thousands of areas, is indexed too: it and the veils over it are approximated.
    """
    rgb_YXC = np.asarray(rgb).astype(np.int64)
    colour_YX = rgb_YXC[..., 0] << 16 | rgb_YXC[..., 1] << 8 | rgb_YXC[..., 2]
    distinct = np.unique(colour_YX)
    exact = distinct if len(distinct) <= _COLOURS else _areas(colour_YX)
    photograph = len(exact) > _PHOTOGRAPH[0] or len(distinct) > _PHOTOGRAPH[1]
    if small and photograph:
        ground = exact[:_GROUND]
        many, few = (_indexed(rgb, colour_YX, ground, n, dpi) for n in (_MANY, _FEW))
        return few if len(few) < _WORTH * len(many) else many
    if photograph or (len(distinct) > _COLOURS and len(exact) > _AREAS):
        return _written(rgb, dpi, 6)  # ten times faster than 9 here, for 3 % more bytes
    return _indexed(rgb, colour_YX, exact, _COLOURS - len(exact), dpi)


def _areas(colour_YX: NDArray[np.int64]) -> NDArray[np.int64]:
    """Colours of squares of 2 x 2 equal pixels, the most frequent first."""
    corner_YX = colour_YX[:-1, :-1]
    filled_YX = (
        (corner_YX == colour_YX[1:, :-1])
        & (corner_YX == colour_YX[:-1, 1:])
        & (corner_YX == colour_YX[1:, 1:])
    )
    colours, counts = np.unique(corner_YX[filled_YX], return_counts=True)
    return colours[np.argsort(-counts, kind="stable")]


def _indexed(
    rgb: Image.Image, colour_YX: NDArray[np.int64], exact: NDArray[np.int64], shared: int,
    dpi: float,
) -> bytes:  # fmt: skip
    """The `exact` colours as they are; all others by the nearest of `shared` more."""
    known = np.sort(exact)
    found_YX = np.searchsorted(known, colour_YX)
    rest_YX = np.append(known, -1)[found_YX] != colour_YX
    index_YX = np.where(rest_YX, 0, found_YX).astype(np.uint8)
    palette = np.stack([known >> 16, known >> 8 & 255, known & 255], axis=1).astype(np.uint8)
    if rest_YX.any():
        rest = Image.fromarray(np.asarray(rgb)[rest_YX][None])
        few = rest.quantize(shared, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        index_YX[rest_YX] = len(known) + np.asarray(few)[0]
        more = np.array(few.getpalette(), dtype=np.uint8).reshape(-1, 3)
        palette = np.concatenate([palette, more])[:_COLOURS]
    image = Image.fromarray(index_YX)
    image.putpalette(palette.tobytes())
    return _written(image, dpi, 9)


def _written(image: Image.Image, dpi: float, level: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=level, dpi=(dpi, dpi))
    return buffer.getvalue()
