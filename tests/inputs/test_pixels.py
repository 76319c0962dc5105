"""Resizing, normalising and cutting: transformers' PIL processor is the oracle."""

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    smart_resize as reference_resize,
)

from ernie_lab.inputs.errors import ImageError
from ernie_lab.inputs.images import prepare_image
from ernie_lab.inputs.media import Media
from ernie_lab.inputs.pixels import smart_resize
from ernie_lab.inputs.preprocessor import Preprocessor

SIDES = st.integers(1, 5000)
DEFAULTS = {"factor": 28, "min_pixels": 3136, "max_pixels": 28 * 28 * 6177}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def worst(picture: np.ndarray, how: Preprocessor) -> float:
    """The largest difference from transformers, whose grid must be ours."""
    size = {"shortest_edge": how.min_pixels, "longest_edge": how.max_pixels}
    wanted = Ernie4_5_VLMoeImageProcessorPil(size=size)(images=[picture], return_tensors="pt")
    media = prepare_image(picture, how)
    assert wanted["image_grid_thw"].tolist() == [list(media.grid)]
    assert media.patches_PQ.shape == (media.grid.n_patches, 3 * 14 * 14)
    return float((media.patches_PQ - wanted["pixel_values"]).abs().max())


@given(SIDES, SIDES, st.integers(1, 40), st.integers(40, 6177))
@example(42, 70, 4, 6177)  # Halves round to even.
@example(4000, 20, 4, 100)  # Shrunk to one factor.
def test_sizes_equal_transformers(height: int, width: int, least: int, most: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    limits = {"factor": 28, "min_pixels": least * 784, "max_pixels": most * 784}
    ours = smart_resize(height, width, **limits)
    assert ours[0] % 28 == ours[1] % 28 == 0 and min(ours) >= 28
    if min(height, width) > 14:
        assert ours == reference_resize(height, width, **limits)


@pytest.mark.parametrize(
    "given_size, ours, theirs",
    [
        ((14, 1000), (28, 1008), (28, 476)),
        ((1000, 5), (1008, 28), (812, 28)),
        ((10, 10), (56, 56), (56, 56)),
        ((1, 1), (56, 56), (56, 56)),
    ],
)
def test_tiny_sides_are_never_rounded_to_nothing(given_size, ours, theirs) -> None:
    """vLLM and FastDeploy guard this; transformers does not, and shrinks the other side."""
    assert smart_resize(*given_size, **DEFAULTS) == ours
    assert reference_resize(*given_size, **DEFAULTS) == theirs


def test_aspect_ratio() -> None:
    assert smart_resize(2000, 10, **DEFAULTS) == (1988, 28)
    with pytest.raises(ImageError, match=r"strip is 2010 x 10 pixels.* 201; .*at most 200"):
        smart_resize(2010, 10, name="strip", **DEFAULTS)
    with pytest.raises(ImageError, match="0 x 10 pixels: there is nothing"):
        smart_resize(0, 10, **DEFAULTS)


@given(st.integers(15, 400), st.integers(15, 400), st.integers(0, 9))
def test_patches_equal_transformers(height: int, width: int, seed: int) -> None:
    assume(max(height, width) <= 200 * min(height, width))
    how = Preprocessor(min_pixels=56 * 56, max_pixels=50_000)
    assert worst(noise(height, width, seed), how) <= 1e-6


@pytest.mark.parametrize("size", [(2300, 2300), (30, 6000), (28, 28)])
def test_patches_equal_transformers_with_default_limits(size: tuple[int, int]) -> None:
    assert worst(noise(*size), Preprocessor()) <= 1e-6


def test_other_normalisation() -> None:
    how = Preprocessor(image_mean=(0, 0, 0), image_std=(1, 1, 1), rescale=1, max_pixels=3136)
    media = prepare_image(noise(56, 56), how)
    assert media.patches_PQ.sum() == media.frames.sum(dtype=np.int64)


def test_patch_order() -> None:
    """Merge blocks in rows; four patches in each; channel before row before column."""
    picture = np.zeros((56, 84, 3), np.uint8)
    for row in range(4):
        for col in range(6):
            picture[14 * row : 14 * row + 14, 14 * col : 14 * col + 14] = 10 * row + col
    picture[0, 1, 2] = 77
    how = Preprocessor(image_mean=(0, 0, 0), image_std=(1, 1, 1), rescale=1)
    patches = prepare_image(picture, how).patches_PQ
    order = [0, 1, 10, 11, 2, 3, 12, 13, 4, 5, 14, 15, 20, 21, 30, 31, 22, 23, 32, 33]
    assert patches[:, 0].tolist() == [*order, 24, 25, 34, 35]
    assert patches[0].nonzero().tolist() == [[2 * 196 + 1]]


def pixels_of(media: Media, token: int, how: Preprocessor) -> np.ndarray:
    """A token's four patches, put together again: `[28, 28, 3]` levels."""
    patches = media.patches_PQ[4 * token : 4 * token + 4].view(2, 2, 3, 14, 14).numpy()
    square = patches.transpose(0, 3, 1, 4, 2).reshape(28, 28, 3)
    return np.rint((square * how.image_std + how.image_mean) / how.rescale)


def test_every_token_knows_its_pixels() -> None:
    how = Preprocessor()
    media = prepare_image(noise(120, 200), how, source="noise")
    assert media.source == "noise" and media.original_size == (120, 200)
    cells = list(media.cells())
    assert len(cells) == media.grid.n_tokens
    for token, cell in enumerate(cells):
        left, top, right, bottom = (round(edge) for edge in media.box(cell))
        shown = media.frames[cell.frame, top:bottom, left:right]
        assert np.array_equal(pixels_of(media, token, how), shown)


def test_boxes_before_resizing() -> None:
    """A red square that fills one token of the original lies in that token's box."""
    picture = np.zeros((300, 200, 3), np.uint8)
    media = prepare_image(picture, Preprocessor())
    cell = list(media.cells())[-3]
    left, top, right, bottom = (round(edge) for edge in media.original_box(cell))
    picture[top:bottom, left:right] = (255, 0, 0)
    red = prepare_image(picture, Preprocessor())
    middle = (14, 14)
    for token, other in enumerate(red.cells()):
        is_red = pixels_of(red, token, Preprocessor())[middle][0] > 128
        assert is_red == (other == cell)
    last = media.original_box(list(media.cells())[-1])
    assert (round(last.right), round(last.bottom)) == (200, 300)


def test_frames_are_what_pillow_resizes() -> None:
    picture = noise(100, 150)
    wanted = Image.fromarray(picture).resize((140, 112), Image.Resampling.BICUBIC)
    assert np.array_equal(prepare_image(picture, Preprocessor()).frames[0], np.asarray(wanted))
