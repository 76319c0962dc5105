"""Reading pictures: every source, every mode, every orientation, everything that can be wrong."""

import base64
import io
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from ernie_lab.inputs import sources
from ernie_lab.inputs.errors import ImageError
from ernie_lab.inputs.images import prepare_image, read_image
from ernie_lab.inputs.preprocessor import Preprocessor

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (30, 20, 3), dtype=np.uint8)
ORIENTATION = 0x0112


def encoded(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


PNG = encoded(Image.fromarray(PIXELS))


def pixels(image, **options) -> np.ndarray:
    picture = read_image(image, **options)
    assert picture.mode == "RGB"
    return np.asarray(picture)


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        places = {"/ftp": "ftp://localhost/x.png", "/file": "file:///etc/passwd", "/on": "/x.png"}
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
            return
        found = self.path == "/x.png"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(PNG if found else b"nothing here")

    def log_message(self, *args) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = HTTPServer(("localhost", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_sources_agree(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    uri = "data:image/png;base64," + base64.b64encode(PNG).decode()
    opened = Image.open(path)
    arrays = (PIXELS, torch.from_numpy(PIXELS), torch.from_numpy(PIXELS).permute(2, 0, 1))
    for image in (path, str(path), PNG, bytearray(PNG), uri, opened, *arrays):
        assert np.array_equal(pixels(image), PIXELS)
    assert prepare_image(path, Preprocessor()).source == str(path)


def test_floats_and_grey_arrays() -> None:
    assert np.array_equal(pixels(PIXELS / 255), PIXELS)
    assert np.array_equal(pixels(torch.from_numpy(PIXELS / 255).float()), PIXELS)
    assert np.abs(pixels(torch.from_numpy(PIXELS / 255).bfloat16()).astype(int) - PIXELS).max() <= 1
    grey = np.repeat(PIXELS[..., :1], 3, axis=-1)
    assert np.array_equal(pixels(PIXELS[..., 0]), grey)
    assert np.array_equal(pixels(PIXELS[..., :1]), grey)
    assert np.array_equal(pixels(torch.from_numpy(PIXELS[..., 0])), grey)


@pytest.mark.parametrize(
    "array, said",
    [
        (PIXELS.astype(np.float32), r"float32 from 0 to 255; floats must lie in 0\.\.1"),
        (PIXELS / 255 - 0.5, r"floats must lie in 0\.\.1. Undo any normalisation"),
        (np.full((4, 4, 3), np.nan), "from nan to nan"),
        (PIXELS.astype(np.int64), "int64 from 0 to 255, expected uint8"),
        (PIXELS.astype(np.uint16), r"uint16 .* \(array // 256\)"),
        (PIXELS[..., 0] > 9, "holds bool"),
        (PIXELS[None], r"shape \(1, 30, 20, 3\); expected \[h, w\]"),
        (PIXELS[..., :2], r"shape \(30, 20, 2\)"),
        (PIXELS.transpose(2, 0, 1), r"shape \(3, 30, 20\); expected .*Transpose"),
        (torch.zeros(3, 20, 3, dtype=torch.uint8), "could be either layout"),
        (torch.zeros(2, 20, 20), r"or \[3, h, w\]"),
        (PIXELS[:0], "there is nothing in it"),
        (PIXELS[0, 0], r"shape \(3,\)"),
    ],
)
def test_arrays_that_are_refused(array, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        read_image(array)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("orientation", TURNS)
def test_orientations(orientation: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(Image.fromarray(PIXELS), exif=exif)
    wanted = TURNS[orientation](PIXELS)
    assert np.array_equal(pixels(content), wanted)
    # A Pillow picture still carries its tag, and a picture once turned is not turned again.
    assert np.array_equal(pixels(Image.open(io.BytesIO(content))), wanted)
    assert np.array_equal(pixels(read_image(content)), wanted)
    assert prepare_image(content, Preprocessor()).original_size == wanted.shape[:2]


def test_orientation_of_16_bit_grey() -> None:
    grey = RNG.integers(0, 65536, (6, 4), dtype=np.uint16)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    found = pixels(encoded(Image.fromarray(grey), exif=exif))
    assert np.array_equal(found[..., 0], np.rot90(grey, -1) >> 8)


def with_transparency(mode: str, value) -> Image.Image:
    picture = Image.fromarray(PIXELS).convert(mode)
    picture.info["transparency"] = value
    return picture


ALPHA = Image.fromarray(RNG.integers(0, 256, (30, 20, 4), dtype=np.uint8))
LIKE_TRANSFORMERS = {
    **{m: Image.fromarray(PIXELS).convert(m) for m in ("1", "L", "P", "RGB", "RGBX")},
    **{m: Image.fromarray(PIXELS).convert(m) for m in ("CMYK", "YCbCr", "HSV")},
    **{m: ALPHA.convert(m) for m in ("RGBA", "LA", "PA", "RGBa")},
    "P, one colour transparent": with_transparency("P", 3),
    "P, alpha by colour": with_transparency("P", bytes(range(256))),
    "L, one level transparent": with_transparency("L", 100),
    "RGB, one colour transparent": with_transparency("RGB", tuple(PIXELS[0, 0].tolist())),
}


@pytest.mark.parametrize("mode", LIKE_TRANSFORMERS)
def test_modes_equal_transformers(mode: str) -> None:
    picture = LIKE_TRANSFORMERS[mode]
    if mode == "RGBa":  # It does not see this spelling of alpha.
        wanted = convert_to_rgb(picture.convert("RGBA"), return_numpy=True)
    else:
        wanted = convert_to_rgb(picture, return_numpy=True)
    assert np.array_equal(pixels(picture), wanted)


def test_transparency_lies_on_white() -> None:
    clear = np.zeros((2, 2, 4), np.uint8)
    clear[0, 0] = (10, 20, 30, 255)
    found = pixels(clear)
    assert found[0, 0].tolist() == [10, 20, 30] and (found[1] == 255).all()
    half = Image.new("La", (1, 1), (0, 128))
    assert pixels(half).tolist() == [[[127, 127, 127]]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(kind: str) -> None:
    """Pillow and transformers turn all above 255 white."""
    grey = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    found = pixels(encoded(Image.fromarray(grey), kind))
    assert np.array_equal(found, np.repeat((grey >> 8)[..., None], 3, axis=-1))
    older = Image.fromarray(grey.astype(np.int32))
    older.format = "PNG"
    assert np.array_equal(pixels(older), found)


def test_wide_integers_and_floats_in_pillow() -> None:
    with pytest.raises(ImageError, match="int32 from 0 to 70000"):
        read_image(Image.fromarray(np.array([[0, 70000]], np.int32)))
    assert pixels(Image.fromarray(np.float32([[0, 1]]))).tolist() == [[[0] * 3, [255] * 3]]
    with pytest.raises(ImageError, match=r"floats must lie in 0\.\.1"):
        read_image(Image.fromarray(np.float32([[0, 2]])))


def test_colour_modes_without_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """LAB is one, in older versions of Pillow."""

    def convert(self, mode: str) -> Image.Image:
        raise ValueError("conversion from LAB to RGB not supported")

    monkeypatch.setattr(Image.Image, "convert", convert)
    with pytest.raises(ImageError, match=r"colour mode LAB.*ImageCms"):
        read_image(Image.new("LAB", (4, 4)))


def test_cmyk_jpeg() -> None:
    content = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert np.abs(pixels(content).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_truncated(kind: str) -> None:
    content = encoded(Image.fromarray(np.tile(PIXELS, (9, 9, 1))), kind)
    with pytest.raises(ImageError, match=r"bytes (is damaged or cut short|is not a picture)"):
        read_image(content[: len(content) // 2])


@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF"]), st.data())
def test_damaged_bytes_never_surprise(kind: str, data: st.DataObject) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    content = bytearray(encoded(Image.fromarray(PIXELS), kind, exif=exif))
    for _ in range(3):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of corrupt EXIF.
        try:
            picture = read_image(bytes(content))
        except ImageError:
            return
    assert picture.mode == "RGB"


def test_what_is_not_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="not a picture in a format that Pillow reads"):
        read_image(b"<html>moved</html>")
    with pytest.raises(ImageError, match="0 bytes: there is nothing in it"):
        read_image(b"")
    with pytest.raises(ImageError, match=r"missing\.png: no such file"):
        read_image("missing.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match=r"… \(9000 characters\): not a path.*data:"):
        read_image("A" * 9000)
    with pytest.raises(ImageError, match="no such file"):
        read_image("nul\0byte")
    with pytest.raises(ImageError, match="is a int, expected a path"):
        read_image(3)
    with pytest.raises(ImageError, match="cat: no such file"):
        prepare_image("missing.png", Preprocessor(), source="cat")
    with pytest.raises(ImageError, match="not valid base64"):
        read_image("data:image/png;base64,%%%")
    with pytest.raises(ImageError, match="there is nothing in it"):
        read_image(Image.new("RGB", (0, 3)))


@pytest.mark.parametrize("width", [15, 30])  # Pillow warns of the first, and refuses the second.
def test_decompression_bombs(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    content = encoded(Image.new("L", (width, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match=rf"bomb: .*{width}0 pixels.* limit of \d00 pixels"):
        read_image(content)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animations(kind: str) -> None:
    frames = [Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"holds 2 pictures, expected one\. Pass it as a video"):
        read_image(content)
    opened = Image.open(io.BytesIO(content))
    opened.seek(1)
    assert read_image(opened).size == (20, 30)


def test_phone_pictures_with_a_preview() -> None:
    frames = [Image.fromarray(PIXELS), Image.new("RGB", (4, 4))]
    content = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert read_image(content).size == (20, 30)


def test_urls_only_if_allowed(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with pytest.raises(ImageError, match=r"x\.png: nothing is downloaded.*allow_url=True"):
        read_image(f"{site}/x.png")
    for page in ("x.png", "on"):
        assert np.array_equal(pixels(f"{site}/{page}", allow_url=True), PIXELS)
    for page in ("missing", "ftp", "file"):
        with pytest.raises(ImageError, match="the download failed"):
            read_image(f"{site}/{page}", allow_url=True)
    monkeypatch.setattr(sources, "MAX_DOWNLOAD", 100)
    with pytest.raises(ImageError, match="larger than 100 bytes"):
        read_image(f"{site}/x.png", allow_url=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://localhost/x.png", "s3://b/x.png"])
def test_other_schemes(url: str) -> None:
    with pytest.raises(ImageError, match=r"is not supported\. Pass the path"):
        read_image(url, allow_url=True)
