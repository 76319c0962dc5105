"""The tower and the resampler: frames keep to themselves, and both ways of computing agree."""

import pytest
import torch
from einops import einsum, repeat
from support.models import small_vl_config, small_vl_model
from support.taps import Collect, Replace, cheap
from torch import Tensor

from ernie_lab.checkpoint.config import ConfigError, VisionConfig
from ernie_lab.inputs.media import Grid
from ernie_lab.model.frames import Frames, patch_positions
from ernie_lab.model.resampler import Resampler
from ernie_lab.model.vl import VLModel

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
N_PIXELS = 12
# Frames of three sizes, of which neighbours are alike and unlike.
GRIDS = (Grid(1, 4, 6), Grid(2, 2, 4), Grid(1, 2, 4), Grid(4, 4, 2))


@pytest.fixture(scope="module")
def model() -> VLModel:
    return small_vl_model()


def pixels(*grids: Grid, seed: int = 0) -> Tensor:
    n = sum(grid.n_patches for grid in grids)
    return torch.randn(n, N_PIXELS, generator=torch.Generator().manual_seed(seed))


def features(model: VLModel, patches: Tensor, *grids: Grid) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = model.features(patches, grids)
    return out.split([grid.n_tokens for grid in grids])


def test_swapping_two_images_swaps_their_features(model: VLModel) -> None:
    first, second = Grid(1, 4, 6), Grid(1, 2, 4)
    a, b = pixels(first), pixels(second, seed=1)
    a_then_b = features(model, torch.cat([a, b]), first, second)
    b_then_a = features(model, torch.cat([b, a]), second, first)
    for one, other in zip(a_then_b, reversed(b_then_a), strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


def test_packed_pictures_equal_single_ones(model: VLModel) -> None:
    patches = pixels(*GRIDS)
    together = features(model, patches, *GRIDS)
    for grid, mine, own in zip(
        GRIDS, together, patches.split([grid.n_patches for grid in GRIDS]), strict=True
    ):
        torch.testing.assert_close(features(model, own, grid)[0], mine, **CLOSE)


def test_a_frame_reaches_its_own_pair_alone(model: VLModel) -> None:
    """Attention stays within a frame, and the resampler joins frames in twos."""
    clip = Grid(4, 4, 2)
    patches = pixels(clip)
    changed = patches.clone()
    changed[8 * 2 + 3] += 1.0
    tower, other = Collect(), Collect()
    with torch.no_grad():
        before = model.features(patches, [clip], tower)
        after = model.features(changed, [clip], other)
    differs_P = (tower["vision.out"] != other["vision.out"]).any(-1)
    assert differs_P.tolist() == [False] * 16 + [True] * 8 + [False] * 8
    differs_M = (before != after).any(-1)
    assert differs_M.tolist() == [False, False, True, True]


def test_patches_of_a_merge_block_make_one_token(model: VLModel) -> None:
    """Row, column and order of the resampler's blocks, from the positions that the tower uses."""
    grid = Grid(1, 4, 6)
    places = [tuple(place) for place in patch_positions([grid]).tolist()]
    assert sorted(places) == [(row, col) for row in range(4) for col in range(6)]
    tokens = [(row, col) for row in range(2) for col in range(3)]
    for i, (row, col) in enumerate(tokens):
        block = places[4 * i : 4 * i + 4]
        assert block == [(2 * row + y, 2 * col + x) for y in (0, 1) for x in (0, 1)]
    tap = Collect()
    with torch.no_grad():
        model.features(pixels(grid), [grid], tap)
        by_hand = model.resampler.spatial(tap["vision.out"].reshape(6, -1))
    assert torch.equal(by_hand, tap["resampler.spatial"])


def test_an_image_is_its_own_pair(model: VLModel) -> None:
    image, still = Grid(1, 2, 4), Grid(2, 2, 4)
    patches = pixels(image)
    (once,) = features(model, patches, image)
    (twice,) = features(model, repeat(patches, "p q -> (t p) q", t=2), still)
    torch.testing.assert_close(once, twice, **CLOSE)


def test_pattern(model: VLModel) -> None:
    """Rows of patches that exist sum to 1; nothing is read, and nothing reads, beyond a frame."""
    tap, present = Collect(), Frames.of(GRIDS).present(torch.device("cpu"))
    assert present.shape == (1 + 2 + 1 + 4, 24)
    with torch.no_grad():
        model.features(pixels(*GRIDS), GRIDS, tap)
    for layer in range(2):
        at = f"vision.blocks.{layer}.attn"
        pattern, scores = tap[f"{at}.pattern"], tap[f"{at}.scores"]
        assert pattern.shape == scores.shape == (8, 2, 24, 24)
        sums = pattern.sum(-1).movedim(1, 2)
        torch.testing.assert_close(sums[present], torch.ones(int(present.sum()), 2))
        assert not sums[~present].any()
        read = pattern.movedim(-1, 1)
        assert not read[~present].any()
        assert torch.isneginf(scores.movedim(-1, 1)[~present]).all()
        assert not pattern.isnan().any()
        frames = tap[f"{at}.v"].split(Frames.of(GRIDS).lengths)
        z = [
            einsum(pattern[i, :, : len(v), : len(v)], v, "h p u, u h a -> p h a")
            for i, v in enumerate(frames)
        ]
        torch.testing.assert_close(torch.cat(z), tap[f"{at}.z"], **CLOSE)


@pytest.mark.parametrize("site", ["scores", "pattern"])
def test_the_explicit_path_equals_the_fused_one(model: VLModel, site: str) -> None:
    patches = pixels(*GRIDS)
    with torch.no_grad():
        fused = model.features(patches, GRIDS)
        for layer in range(2):
            path = f"vision.blocks.{layer}.attn.{site}"
            explicit = model.features(patches, GRIDS, Replace(path, torch.clone, Collect(cheap)))
            torch.testing.assert_close(explicit, fused, **CLOSE)
            assert torch.equal(model.features(patches, GRIDS, Replace(path, lambda x: x)), fused)


def test_an_edited_pattern_is_what_flows(model: VLModel) -> None:
    patches, path = pixels(*GRIDS), "vision.blocks.0.attn.pattern"
    edit = Replace(path, torch.zeros_like)
    with torch.no_grad():
        model.features(patches, GRIDS, edit)
        plain = model.features(patches, GRIDS)
        muted = model.features(patches, GRIDS, Replace(path, torch.zeros_like, Collect(cheap)))
    assert not edit.then["vision.blocks.0.attn.z"].any()
    assert (muted - plain).abs().max() > 0.1


def test_gradients_flow_through_a_recorded_pattern(model: VLModel) -> None:
    tap, patches = Collect(), pixels(*GRIDS).requires_grad_()
    loss = model.features(patches, GRIDS, tap).square().mul(torch.arange(32.0)).sum()
    for path in ("scores", "pattern"):
        (gradient,) = torch.autograd.grad(
            loss, tap[f"vision.blocks.1.attn.{path}"], retain_graph=True
        )
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0
    (through_pixels,) = torch.autograd.grad(loss, patches)
    assert through_pixels.isfinite().all()
    assert through_pixels.any(-1).all()


def test_runs_of_equal_frames() -> None:
    frames = Frames.of(GRIDS)
    assert frames.lengths == (24, 8, 8, 8, 8, 8, 8, 8)
    assert list(frames.runs()) == [(0, 1, 24), (24, 7, 8)]
    assert frames.n_patches == sum(grid.n_patches for grid in GRIDS)


def test_wrong_pixels_and_grids(model: VLModel) -> None:
    with pytest.raises(ValueError, match=r"24 patches for grids \[\(1, 4, 4\)\]"):
        model.features(pixels(Grid(1, 4, 6)), [Grid(1, 4, 4)])
    with pytest.raises(ValueError, match="clip of 3 frames cannot be cut into pairs"):
        model.features(pixels(Grid(3, 2, 2)), [Grid(3, 2, 2)])


def test_other_merge_sizes_are_refused() -> None:
    """Tokens and positions are counted on 2 x 2 patches and 2 frames."""
    fields = {"depth": 1, "width": 24, "hidden": 8, "n_heads": 2, "patch_size": 2}
    for merge, temporal in ((1, 2), (3, 2), (2, 1), (2, 4)):
        vision = VisionConfig(merge_size=merge, temporal_merge_size=temporal, **fields)
        with pytest.raises(ConfigError, match="merge sizes"):
            Resampler(small_vl_config(vision=vision))
