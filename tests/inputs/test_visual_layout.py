"""Modality, bank and 3-D positions, against transformers and by hand."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Ernie4_5_VLMoeConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeModel
from transformers.models.ernie4_5_vl_moe.processing_ernie4_5_vl_moe import Ernie4_5_VLMoeProcessor

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.inputs.errors import BatchError
from ernie_lab.inputs.media import Grid
from ernie_lab.inputs.visual_layout import VisualLayout, visual_layout

IDS = VisualIds(image=90, video=91, image_start=92, image_end=93, video_start=94, video_end=95)
SHARED = VisualIds(image=90, video=90, image_start=92, image_end=93, video_start=94, video_end=95)

Piece = int | tuple[str, Grid]

halves = st.integers(1, 4)
images = st.builds(lambda h, w: ("image", Grid(1, 2 * h, 2 * w)), halves, halves)
videos = st.builds(
    lambda t, h, w: ("video", Grid(2 * t, 2 * h, 2 * w)), st.integers(1, 6), halves, halves
)
sequences = st.lists(st.one_of(st.integers(1, 5), images, videos), min_size=1, max_size=6)


def written(pieces: list[Piece], ids: VisualIds) -> tuple[list[int], list[int]]:
    """Token ids of some text (its length) and pictures, and transformers' modality of each."""
    tokens: list[int] = []
    kinds: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += range(piece)
            kinds += [0] * piece
        else:
            kind, grid = piece
            start, end = getattr(ids, f"{kind}_start"), getattr(ids, f"{kind}_end")
            tokens += [start, *[getattr(ids, kind)] * grid.n_tokens, end]
            kinds += [0, *[1 if kind == "image" else 2] * grid.n_tokens, 0]
    return tokens, kinds


def grids_of(batch: list[list[Piece]], kind: str) -> list[Grid]:
    return [p[1] for pieces in batch for p in pieces if not isinstance(p, int) and p[0] == kind]


def laid_out(tokens: list[int], *grids: list[Grid], **options: str) -> VisualLayout:
    return visual_layout(torch.tensor([tokens]), IDS, *grids, **options)  # type: ignore[arg-type]


def transformers_positions(
    ids_BS: torch.Tensor, kinds_BS: torch.Tensor, mask_BS: torch.Tensor, batch: list[list[Piece]]
) -> tuple[torch.Tensor, torch.Tensor]:
    model = SimpleNamespace(config=Ernie4_5_VLMoeConfig())
    model.get_vision_position_ids = MethodType(Ernie4_5_VLMoeModel.get_vision_position_ids, model)
    positions_RBS, delta_B1 = Ernie4_5_VLMoeModel.get_rope_index(
        model,
        ids_BS,
        kinds_BS,
        torch.tensor(grids_of(batch, "image")).reshape(-1, 3),
        torch.tensor(grids_of(batch, "video")).reshape(-1, 3),
        mask_BS,
    )
    return positions_RBS.permute(1, 2, 0), mask_BS.sum(-1) + delta_B1[:, 0]


@settings(max_examples=60)
@given(
    batch=st.lists(sequences, min_size=1, max_size=3),
    ids=st.sampled_from([IDS, SHARED]),
    left=st.booleans(),
)
def test_same_as_transformers(batch: list[list[Piece]], ids: VisualIds, left: bool) -> None:
    rows = [written(pieces, ids) for pieces in batch]
    longest = max(len(tokens) for tokens, _ in rows)
    ids_BS = torch.full((len(rows), longest), ids.image)  # padding that looks like a picture
    kinds_BS, mask_BS = torch.zeros_like(ids_BS), torch.zeros_like(ids_BS)
    for row, (tokens, kinds) in enumerate(rows):
        real = slice(longest - len(tokens), None) if left else slice(len(tokens))
        ids_BS[row, real], kinds_BS[row, real] = torch.tensor(tokens), torch.tensor(kinds)
        mask_BS[row, real] = 1
    found = visual_layout(
        ids_BS, ids, grids_of(batch, "image"), grids_of(batch, "video"), mask_BS, "transformers"
    )
    positions_BSR, next_B = transformers_positions(ids_BS, kinds_BS, mask_BS, batch)
    assert torch.equal(found.positions_BSR, positions_BSR)
    assert torch.equal(found.next_position_B, next_B)
    assert torch.equal(found.modality_BS, kinds_BS)
    named = {
        f"{name}_token_id": getattr(ids, name)
        for name in ("image", "video", "image_start", "image_end", "video_start", "video_end")
    }
    types_N = Ernie4_5_VLMoeProcessor.create_moe_mm_token_type_ids(
        SimpleNamespace(**named), ids_BS[mask_BS.bool()].tolist()
    )
    assert (found.bank_BS[mask_BS.bool()] > 0).tolist() == [kind > 0 for kind in types_N]
    assert not found.bank_BS[~mask_BS.bool()].any()
    assert [(b.kind, b.grid) for b in found.blocks] == [
        piece for pieces in batch for piece in pieces if not isinstance(piece, int)
    ]
    for block in found.blocks:
        tokens = rows[block.sequence][0]
        assert set(tokens[block.start : block.stop]) == {getattr(ids, block.kind)}
        assert tokens[block.start - 1] == getattr(ids, f"{block.kind}_start")
        assert tokens[block.stop] == getattr(ids, f"{block.kind}_end")


@settings(max_examples=40)
@given(pieces=sequences)
def test_the_reference_goes_on_after_the_largest_position(pieces: list[Piece]) -> None:
    tokens, _ = written(pieces, IDS)
    found = laid_out(tokens, grids_of([pieces], "image"), grids_of([pieces], "video"))
    positions_SR = found.positions_BSR[0]
    for block in found.blocks:
        first = positions_SR[block.start]
        assert torch.equal(first, positions_SR[block.start - 1] + 1)
        until = positions_SR[: block.stop].max()
        assert positions_SR[block.stop].tolist() == [until + 1] * 3
    assert found.next_position_B.tolist() == [positions_SR.max() + 1]


def test_an_image_by_hand() -> None:
    """ernie-facts 3.3: a grid of (1, 6, 10) from position 2 leads to position 7."""
    for rule in ("reference", "transformers"):
        found = laid_out([1, 92, *[90] * 15, 93, 2], [Grid(1, 6, 10)], positions=rule)
        cells = [[2, 2 + row, 2 + col] for row in range(3) for col in range(5)]
        expected = [[0] * 3, [1] * 3, *cells, [7] * 3, [8] * 3]
        assert found.positions_BSR[0].tolist() == expected
        assert found.next_position_B.tolist() == [9]
        assert found.modality_BS.tolist() == [[0, 0, *[1] * 15, 0, 0]]
        assert found.bank_BS.tolist() == [[0, 1, *[1] * 15, 1, 0]]


@pytest.mark.parametrize(
    ("rule", "after", "following"), [("reference", 22, 25), ("transformers", 4, 22)]
)
def test_a_long_clip_by_hand(rule: str, after: int, following: int) -> None:
    """40 frames of 2 x 2 tokens: only Baidu's rule looks at the time axis."""
    found = laid_out([1, 94, *[91] * 80, 95, 2, 3], [], [Grid(40, 4, 4)], positions=rule)
    positions = found.positions_BSR[0].tolist()
    assert positions[2:6] == [[2, 2, 2], [2, 2, 3], [2, 3, 2], [2, 3, 3]]
    assert positions[81] == [21, 3, 3]
    assert positions[82:] == [[after + i] * 3 for i in range(3)]
    assert found.next_position_B.tolist() == [following]


def test_text_alone() -> None:
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    found = visual_layout(torch.tensor([[5, 6, 7], [8, 9, 10]]), IDS, mask_BS=mask)
    assert found.positions_BSR[..., 0].tolist() == [[0, 0, 1], [0, 1, 2]]
    assert found.next_position_B.tolist() == [2, 3] and found.blocks == ()
    assert not found.modality_BS.any() and not found.bank_BS.any()


def test_one_frame_is_its_own_pair_and_runs_may_touch() -> None:
    grid = Grid(1, 2, 4)
    found = laid_out([92, *[90] * 4, 93, 94, 91, 91, 95], [grid, grid], [grid])
    assert [(b.kind, b.start, b.media) for b in found.blocks] == [
        ("image", 1, 0),
        ("image", 3, 1),
        ("video", 7, 0),
    ]


def test_the_delimiter_before_a_shared_placeholder_decides() -> None:
    """After a clip has ended, a placeholder without delimiters is an image again, as in vLLM."""
    tokens = torch.tensor([[94, 90, 95, 90, 92, 90, 93]])
    grid = Grid(1, 2, 2)
    found = visual_layout(tokens, SHARED, [grid, grid], [Grid(2, 2, 2)])
    assert [block.kind for block in found.blocks] == ["video", "image", "image"]


@pytest.mark.parametrize(
    ("tokens", "images", "videos", "complaint"),
    [
        ([90, 90], [], [], "has 2 image placeholders, but 0 images were given, which make 0"),
        ([1], [Grid(1, 4, 4)], [], "has 0 image placeholders, but 1 images .* make 4 tokens"),
        ([90] * 3, [Grid(1, 4, 4)], [], "has 3 image placeholders, but 1 images .* make 4"),
        ([91], [Grid(1, 2, 2)], [], "has 0 image placeholders"),
        ([90, 91], [Grid(1, 2, 2)], [], "has 1 video placeholders, but 0 videos"),
        ([90, 1, 90, 90], [Grid(1, 2, 4), Grid(1, 2, 2)], [], "image 0 makes 2 tokens, but the"),
        ([90] * 2, [Grid(1, 3, 4)], [], "image 0 is 1 frames of 3 x 4 patches"),
        ([91], [], [Grid(3, 2, 2)], "video 0 is 3 frames of 2 x 2 patches"),
        ([90], [Grid(1, 0, 4), Grid(1, 2, 2)], [], "image 0 is 1 frames of 0 x 4"),
    ],
)
def test_what_does_not_match(
    tokens: list[int], images: list[Grid], videos: list[Grid], complaint: str
) -> None:
    with pytest.raises(BatchError, match=complaint):
        laid_out(tokens, images, videos)


def test_unknown_rule() -> None:
    with pytest.raises(BatchError, match="positions='vllm' must be"):
        laid_out([1], positions="vllm")
