"""Padding: where the tokens are, what the positions are, what is refused; pictures by sequence."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.inputs import BatchError, pad_batch
from ernie_lab.inputs.batch import Batch, Side, visual_columns
from ernie_lab.inputs.media import Grid, Kind, Media
from ernie_lab.inputs.visual_layout import visual_layout

IDS = VisualIds(image=90, video=91, image_start=92, image_end=93, video_start=94, video_end=95)


def media_of(kind: Kind, *grid: int) -> Media:
    size = Grid(*grid)
    frames = np.zeros((size.t, 14 * size.h, 14 * size.w, 3), np.uint8)
    return Media(kind, torch.rand(size.n_patches, 6), size, frames, (14, 14))


IMAGE, WIDE = media_of("image", 1, 2, 2), media_of("image", 1, 2, 4)
CLIP = media_of("video", 4, 4, 2)
ROWS = [[1, 92, 90, 93, 94, *[91] * 4, 95, 2], [92, 90, 90, 93], [3, 4]]


def visual_batch(side: Side = "left", **options: Any) -> Batch:
    media = ((IMAGE, CLIP), (WIDE,), ())
    return pad_batch(ROWS, pad_id=0, side=side, media=media, ids=IDS, **options)


def test_left_padding_by_hand() -> None:
    batch = pad_batch([[5, 6, 7], [8]], pad_id=0, texts=["abc", None])
    assert batch.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.mask.tolist() == [[True, True, True], [False, False, True]]
    assert batch.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert batch.texts == ("abc", None)
    assert batch.lengths == (3, 1)
    assert (batch.input_ids.dtype, batch.mask.dtype) == (torch.int64, torch.bool)
    assert batch.positions.dtype == torch.int64


def test_right_padding_by_hand() -> None:
    batch = pad_batch([[8, 9], [5, 6, 7]], pad_id=1, side="right")
    assert batch.input_ids.tolist() == [[8, 9, 1], [5, 6, 7]]
    assert batch.mask.tolist() == [[True, True, False], [True, True, True]]
    assert batch.positions.tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch.texts == (None, None)


@settings(max_examples=100, deadline=None)
@given(
    sequences=st.lists(
        st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=5
    ),
    side=st.sampled_from(["left", "right"]),
)
def test_nothing_is_lost_and_positions_count(sequences: list[list[int]], side: Side) -> None:
    batch = pad_batch(sequences, pad_id=0, vocab_size=100, side=side)
    for row, sequence in enumerate(sequences):
        real = batch.mask[row]
        assert batch.input_ids[row][real].tolist() == sequence
        assert batch.positions[row][real].tolist() == list(range(len(sequence)))
        assert not batch.positions[row][~real].any() and not batch.input_ids[row][~real].any()


@pytest.mark.parametrize(
    ("sequences", "options", "complaint"),
    [
        ([], {}, "the batch has no sequence"),
        ([[1], []], {}, "sequence 1 has no token"),
        ([[1], [2, 100]], {}, r"sequence 1, position 1: token id 100 must be in 0..99 .*of 100"),
        ([[-1]], {}, "sequence 0, position 0: token id -1"),
        ([[1]], {"pad_id": 100}, "pad_id: token id 100"),
        ([[1]], {"side": "middle"}, "side='middle'"),
        ([[1]], {"texts": ["a", "b"]}, "2 texts for 1 sequences"),
    ],
)
def test_what_is_refused(
    sequences: list[list[int]], options: dict[str, object], complaint: str
) -> None:
    arguments = {"pad_id": 0, "vocab_size": 100, **options}
    with pytest.raises(BatchError, match=complaint):
        pad_batch(sequences, **arguments)  # type: ignore[arg-type]


def test_where_a_text_goes_on() -> None:
    for side in ("left", "right"):
        batch = pad_batch([[5, 6, 7], [8]], pad_id=0, side=side)  # type: ignore[arg-type]
        assert batch.next_positions_B.tolist() == [3, 1]
        assert batch.visual is None


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rule", ["reference", "transformers"])
def test_pictures_of_a_batch(side: Side, rule: Any) -> None:
    batch = visual_batch(side, positions=rule)
    assert batch.visual is not None
    layout = batch.visual.layout
    assert batch.positions is layout.positions_BSR and batch.positions.shape == (3, 11, 3)
    assert batch.next_positions_B is layout.next_position_B
    for row, (tokens, images, clips) in enumerate(
        zip(ROWS, [[IMAGE], [WIDE], []], [[CLIP], [], []], strict=True)
    ):
        alone = visual_layout(
            torch.tensor([tokens]),
            IDS,
            [m.grid for m in images],
            [m.grid for m in clips],
            positions=rule,
        )
        real = batch.mask[row]
        assert torch.equal(batch.positions[row, real], alone.positions_BSR[0])
        assert torch.equal(layout.bank_BS[row, real], alone.bank_BS[0])
        assert torch.equal(layout.modality_BS[row, real], alone.modality_BS[0])
        assert batch.next_positions_B[row] == alone.next_position_B[0]
        assert not batch.positions[row, ~real].any() and not layout.bank_BS[row, ~real].any()


def test_patches_are_joined_by_kind() -> None:
    visual = visual_batch().visual
    assert visual is not None and visual.media == (IMAGE, CLIP, WIDE)
    assert visual.images_PQ is not None and visual.videos_PQ is not None
    assert torch.equal(visual.images_PQ, torch.cat([IMAGE.patches_PQ, WIDE.patches_PQ]))
    assert torch.equal(visual.videos_PQ, CLIP.patches_PQ)
    assert visual.image_grids == ((1, 2, 2), (1, 2, 4)) and visual.video_grids == ((4, 4, 2),)


def test_text_for_a_visual_model() -> None:
    batch = pad_batch([[5, 6], [7]], pad_id=90, ids=IDS)
    assert batch.visual is not None and batch.visual.media == ()
    assert batch.visual.images_PQ is None and batch.visual.videos_PQ is None
    assert batch.positions.tolist() == [[[0] * 3, [1] * 3], [[0] * 3, [0] * 3]]
    assert batch.next_positions_B.tolist() == [2, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_by_hand(side: Side) -> None:
    columns = visual_columns(visual_batch(side))
    none = [None]
    assert columns == {
        "content": [
            ["text", "delimiter", "image", "delimiter", "delimiter"]
            + ["video"] * 4
            + ["delimiter", "text"],
            ["delimiter", "image", "image", "delimiter"],
            ["text", "text"],
        ],
        "bank": [["text"] + ["vision"] * 9 + ["text"], ["vision"] * 4, ["text"] * 2],
        "modality": [
            ["text"] * 2 + ["image"] + ["text"] * 2 + ["video"] * 4 + ["text"] * 2,
            ["text", "image", "image", "text"],
            ["text"] * 2,
        ],
        "image": [[*none * 2, 0, *none * 2, *[1] * 4, *none * 2], [None, 2, 2, None], none * 2],
        "frame": [
            [*none * 2, 0, *none * 2, 0, 0, 2, 2, *none * 2],
            [None, 0, 0, None],
            none * 2,
        ],
        "row": [[*none * 2, 0, *none * 2, 0, 1, 0, 1, *none * 2], [None, 0, 0, None], none * 2],
        "col": [[*none * 2, 0, *none * 2, *[0] * 4, *none * 2], [None, 0, 1, None], none * 2],
    }


def test_columns_of_a_text_model() -> None:
    columns = visual_columns(pad_batch([[5, 6], [7]], pad_id=0))
    for name in ("content", "bank", "modality"):
        assert columns[name] == [["text"] * 2, ["text"]]
    for name in ("image", "frame", "row", "col"):
        assert columns[name] == [[None] * 2, [None]]


@pytest.mark.parametrize(
    ("media", "ids", "complaint"),
    [
        (((IMAGE, CLIP), (WIDE,)), IDS, "media of 2 sequences for 3 sequences"),
        (((IMAGE, CLIP), (WIDE,), ()), None, "pictures for a text model"),
        (((IMAGE, CLIP), (), (WIDE,)), IDS, "picture 2 .* image of sequence 2, .* in sequence 1"),
        (((CLIP, IMAGE), (WIDE,), ()), IDS, "picture 0 .* given as video of sequence 0, but"),
        (((IMAGE,), (WIDE,), ()), IDS, "has 4 video placeholders, but 0 videos were given"),
        (((WIDE, CLIP), (IMAGE,), ()), IDS, "image 0 makes 2 tokens, but the run"),
        (None, IDS, "has 3 image placeholders, but 0 images were given"),
    ],
)
def test_pictures_that_do_not_match(media: Any, ids: VisualIds | None, complaint: str) -> None:
    with pytest.raises(BatchError, match=complaint):
        pad_batch(ROWS, pad_id=0, media=media, ids=ids)
