"""One picture of any common form, upright and RGB; and what the model reads of it."""

from __future__ import annotations

import io
import struct
import warnings
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ernie_lab.inputs.errors import ImageError
from ernie_lab.inputs.media import Media
from ernie_lab.inputs.pixels import patchify, resize, smart_resize
from ernie_lab.inputs.preprocessor import Preprocessor
from ernie_lab.inputs.sources import Source, describe, resolve

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]
ImageLike: TypeAlias = str | Path | bytes | Image.Image | Array | Tensor

# What Pillow's decoders raise on damaged files, besides its own errors.
_DAMAGED = (OSError, ValueError, SyntaxError, EOFError, TypeError, struct.error)
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
# Formats whose further frames are other pictures; a phone's MPO holds a preview or a depth map.
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")


def prepare_image(
    image: ImageLike, how: Preprocessor, *, allow_url: bool = False, source: str | None = None
) -> Media:
    """Read, resize, normalise and cut one picture. `source` names it in messages and plots.

    Raises:
        ImageError: what is wrong with the picture, and what to do.
    """
    name = source or describe(image)
    picture = read_image(image, allow_url=allow_url, name=name)
    size = smart_resize(
        picture.height,
        picture.width,
        factor=how.factor,
        min_pixels=how.min_pixels,
        max_pixels=how.max_pixels,
        name=name,
    )
    frames = resize(picture, size)[None]
    patches_PQ, grid = patchify(frames, how)
    original = (picture.height, picture.width)
    return Media("image", patches_PQ, grid, frames, original, source=name)


def read_image(
    image: ImageLike, *, allow_url: bool = False, name: str | None = None
) -> Image.Image:
    """An upright RGB picture.

    - EXIF orientation is applied, also to a Pillow picture that still carries it. (transformers
      applies it to files only, Baidu's processor never.)
    - Transparency is laid on white, as transformers does; Baidu's processor agrees to one level.
    - 16-bit grey is divided by 256, as Baidu's processor does; transformers clips it to white.
    - Arrays: uint8 `[h, w]`, `[h, w, 1 | 3 | 4]`, or floats from 0 to 1, rounded to 256 levels
      (transformers truncates); tensors also `[1 | 3 | 4, h, w]`.

    Raises:
        ImageError: unreadable, damaged, too large, empty, animated, or of an unknown layout.
    """
    name = name or describe(image)
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        return _from_array(
            (image.float() if image.is_floating_point() else image).numpy(), name, True
        )
    if isinstance(image, np.ndarray):
        return _from_array(image, name, False)
    if isinstance(image, Image.Image):
        return _finished(image, name)
    if not isinstance(image, str | Path | bytes | bytearray):
        raise ImageError(
            f"{name} is a {type(image).__name__}, expected a path, URL, bytes, Pillow picture, "
            "array or tensor."
        )
    return _decoded(image, name, allow_url)


def _decoded(source: Source, name: str, allow_url: bool) -> Image.Image:
    content = resolve(source, name, ImageError, allow_url=allow_url)
    if content == b"":
        raise ImageError(f"{name}: there is nothing in it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(content) if isinstance(content, bytes) else content)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as problem:
        raise ImageError(
            f"{name} may be a decompression bomb: {problem} If you trust it, make it smaller, or "
            "raise PIL.Image.MAX_IMAGE_PIXELS and pass the opened picture."
        ) from problem
    except UnidentifiedImageError as problem:
        raise ImageError(
            f"{name} is not a picture in a format that Pillow reads. Is it a video, or a web "
            "page in place of one? Otherwise save it as PNG or JPEG."
        ) from problem
    except _DAMAGED as problem:
        raise _damaged(name, problem) from problem
    with opened:
        return _finished(opened, name, from_file=True)


def _damaged(name: str, problem: Exception) -> ImageError:
    return ImageError(f"{name} is damaged or cut short: {problem}. Download or save it again.")


def _finished(picture: Image.Image, name: str, *, from_file: bool = False) -> Image.Image:
    """Upright, then RGB."""
    if 0 in picture.size:
        raise ImageError(f"{name} is {picture.height} x {picture.width}: there is nothing in it.")
    try:
        n_frames = getattr(picture, "n_frames", 1) if picture.format in _ANIMATED else 1
        if from_file and n_frames > 1:
            raise ImageError(
                f"{name} holds {n_frames} pictures, expected one. Pass it as a video, or open it "
                "with Pillow and `seek` the one you mean."
            )
        # Orienting makes a copy, which forgets the format.
        kind, upright = picture.format, ImageOps.exif_transpose(picture)
        return _rgb(upright, kind, name)
    except ImageError:
        raise
    except _DAMAGED as problem:
        raise _damaged(name, problem) from problem


def _rgb(picture: Image.Image, kind: str | None, name: str) -> Image.Image:
    # Older Pillow opens 16-bit PNG as 32-bit integers.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PNG"):
        levels = np.asarray(picture).astype(np.int64) >> 8
        return Image.fromarray(levels.clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("F", "I"):
        return _from_array(np.asarray(picture), name, False)
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in _ALPHA or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, picture).convert("RGB")
    try:
        return picture.convert("RGB")
    except ValueError as problem:
        raise ImageError(
            f"{name} has colour mode {picture.mode}, which Pillow cannot turn into RGB. Convert it "
            "first, for example with PIL.ImageCms."
        ) from problem


def _from_array(array: Array, name: str, channels_may_lead: bool) -> Image.Image:
    if 0 in array.shape:
        raise ImageError(f"{name} has shape {array.shape}: there is nothing in it.")
    array = _channels_last(array, name, channels_may_lead)
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):
            raise ImageError(
                f"{name} holds {array.dtype} from {low:.4g} to {high:.4g}; floats must lie in "
                "0..1. Undo any normalisation, or pass uint8 from 0 to 255."
            )
        array = np.rint(array * 255.0).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ImageError(
            f"{name} holds {array.dtype} from {array.min()} to {array.max()}, expected uint8, or "
            "floats in 0..1. Scale it yourself: for 16 bits, (array // 256).astype('uint8')."
        )
    return _rgb(Image.fromarray(np.ascontiguousarray(array)), None, name)


def _channels_last(array: Array, name: str, channels_may_lead: bool) -> Array:
    counts = (1, 3, 4)
    last = array.ndim == 3 and array.shape[2] in counts
    first = array.ndim == 3 and array.shape[0] in counts and channels_may_lead
    if array.ndim == 3 and first != last:
        array = np.moveaxis(array, 0, 2) if first else array
        return array[..., 0] if array.shape[2] == 1 else array
    if array.ndim == 2:
        return array
    accepted = "[h, w], [h, w, 3] or [h, w, 4]" + (" or [3, h, w]" * channels_may_lead)
    why = " could be either layout" if first and last else f"; expected {accepted}"
    raise ImageError(
        f"{name} has shape {array.shape}{why}. Transpose it, or pass a Pillow picture."
    )
