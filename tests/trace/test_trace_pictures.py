"""What users read from a trace of pictures: banks, patches on their picture, pixels, slices."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from support.models import small_vl_model
from vl_driver import CLIP, MIXED, NEW, SMALL, TEXT_ALONE, WIDE, medium, record

from ernie_lab.interventions.edits import edit
from ernie_lab.model.frames import patch_positions
from ernie_lab.sites import SiteError, all_sites
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.pictures import block_cells, patch_cells, with_media
from ernie_lab.trace.trace import Trace

KEPT = ["all", "vision.*", "attention", "blocks.*.moe.*"]
MEDIA = [one for each in MIXED for one in each.media]


@pytest.fixture(scope="module")
def vl():
    return small_vl_model()


@pytest.fixture(scope="module")
def mixed(vl):
    return record(vl, MIXED, KEPT, new=NEW)


def test_banks_are_asked_for_by_name(mixed):
    assert mixed.banks == ("text", "vision")
    assert (mixed.n_experts, mixed.n_chosen) == (8, 2)
    ledger = mixed.routing("vision")
    assert ledger.expert_ids.dims == ("layer", "token", "slot")
    assert ledger.router_logits.equals(mixed["moe.vision.router_logits"])
    assert mixed["router_logits", 2, "vision"].equals(mixed["blocks.2.moe.vision.router_logits"])
    for name in ("router_logits", "router_probs", "selection_scores", "expert_ids",
                 "expert_weights", "correction_bias"):  # fmt: skip
        wanted = rf"t\.routing\('text'\)\.{name} or t\.routing\('vision'\)\.{name}"
        with pytest.raises(ValueError, match=wanted):
            getattr(mixed, name)
    with pytest.raises(ValueError, match=r"t\.routing\('text'\) or t\.routing\('vision'\)"):
        mixed.routing()
    with pytest.raises(ValueError, match="bank='images': this model has banks text and vision"):
        mixed.routing("images")


def test_the_correction_bias_is_the_bank_s_own(vl, mixed):
    for bank, layers in vl.routers().items():
        bias = mixed.routing(bank).correction_bias
        for layer, router in layers.items():
            assert np.array_equal(bias.sel(layer=layer), router.correction_bias_E.numpy())


def test_derived_equals_recorded(vl, mixed):
    few = record(vl, MIXED, "routing", new=NEW)
    for bank in mixed.banks:
        for name in ("router_probs", "selection_scores"):
            a, b = (getattr(t.routing(bank), name) for t in (few, mixed))
            assert np.abs(a - b).max() <= 1e-6
        assert few.to_frame(bank).equals(mixed.to_frame(bank))


def test_to_frame_never_mixes_banks(mixed):
    frame = mixed.to_frame()
    assert len(frame) == len(mixed) * 2 * 2
    assert (frame.bank == frame.expected_bank).all()
    assert frame.groupby("bank", sort=False).size().index.tolist() == ["text", "vision"]
    for bank in mixed.banks:
        ids, mine = mixed.routing(bank).expert_ids, frame[frame.bank == bank]
        assert mine.expert.tolist() == ids.values.flatten().tolist()
        assert mine.id[mine.layer == 1].tolist() == np.repeat(ids.id.values, 2).tolist()
        assert mine.groupby(["layer", "sequence", "pos"]).weight.sum().to_numpy() == pytest.approx(
            1
        )
    assert set(frame[frame.content == "delimiter"].bank) == {"vision"}


@pytest.mark.parametrize("name", ["blocks.1.moe.router_logits", "blocks.1.mlp.gate.hook_out"])
def test_the_bare_name_of_what_is_in_banks_names_both(vl, mixed, name):
    both = r"two banks.*blocks\.1\.moe\.text\.router_logits or blocks\.1\.moe\.vision"
    for ask in (
        lambda: mixed[name],
        lambda: Keep.of(name, all_sites(vl)),
        lambda: edit(name, torch.neg).select(all_sites(vl)),
    ):
        with pytest.raises(SiteError, match=both):
            ask()
    with pytest.raises(SiteError, match=r"moe\.text\.router_logits or moe\.vision\.router_logits"):
        edit("moe.router_logits", torch.neg).select(all_sites(vl))
    with pytest.raises(SiteError, match=r"blocks\.\*\.moe\.text\.expert_ids or"):
        Keep.of("blocks.*.moe.expert_ids", all_sites(vl))
    for key in (("router_logits", 1), "router_logits", ("router_logits", 1, "moe")):
        with pytest.raises(SiteError, match=r"ambiguous.*moe\.text\.router.*moe\.vision\.router"):
            _ = mixed[key]


def test_patches_have_the_positions_that_the_tower_uses():
    assert patch_cells([])["row"].shape == block_cells([])["row"].shape == (0,)
    grids = (SMALL, WIDE, CLIP)
    cells = patch_cells(grids)
    expected = patch_positions(grids).numpy()
    assert np.array_equal(np.stack([cells["row"], cells["col"]], -1), expected)
    assert cells["image"].tolist() == [0] * 16 + [1] * 24 + [2] * 32
    assert cells["frame"].tolist() == [0] * 40 + [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    blocks = block_cells(grids)
    assert np.array_equal(blocks["row"], cells["row"][::4] // 2)
    assert np.array_equal(blocks["col"], cells["col"][::4] // 2)
    assert np.array_equal(blocks["frame"], cells["frame"][::4])


def test_arrays_of_patches(mixed):
    z = mixed["vision.blocks.0.attn.z"]
    assert z.dims == ("patch", "head", "head_width")
    assert z.row.values[:8].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert z.col.values[:8].tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert mixed["vision.out"].dims == ("patch", "vision_width")
    assert mixed["resampler.spatial"].dims == ("block", "resampler_width")
    assert mixed["resampler.spatial"].image.values.tolist() == [0] * 4 + [1] * 6 + [2] * 8
    out = mixed["resampler.out"]
    assert out.dims == ("image_token", "width")
    tokens = mixed.tokens.dropna(subset=["image"])
    for name in ("sequence", "pos", "image", "frame", "row", "col"):
        assert out[name].values.tolist() == tokens[name].tolist()


def test_vision_patterns_are_of_one_frame(vl, mixed):
    for image, frame, n in ((0, 0, 16), (1, 0, 24), (2, 3, 8)):
        pattern = mixed.vision_pattern(1, image, frame)
        assert pattern.shape == (2, n, n)
        assert pattern.sum("key").values == pytest.approx(1, abs=1e-5)
        assert np.isfinite(mixed.vision_scores(1, image, frame)).all()
        cells = mixed["vision.out"]
        mine = cells[(cells.image == image).values & (cells["frame"] == frame).values]
        for axis in ("query", "key"):
            assert pattern[f"{axis}_row"].values.tolist() == mine["row"].values.tolist()
        assert pattern.key_col.values.tolist() == mine["col"].values.tolist()
    path = "vision.blocks.0.attn.pattern"
    assert np.array_equal(mixed.tensor(path, image=2, frame=1), mixed.vision_pattern(0, 2, 1))
    for options in ({"sequence": 0}, {}):
        with pytest.raises(ValueError, match="one map per frame"):
            mixed.tensor(path, **options)
    with pytest.raises(ValueError, match="has no map per frame"):
        mixed.tensor("vision.out", image=0)
    assert mixed.vision_pattern(-1).equals(mixed.vision_pattern(1))
    one = record(vl, MIXED[:1], "vision.blocks.1.attn.pattern").sel(position=0)
    for wrong, message in [
        ((2, 0, 0), "no layer 2 in the vision tower, which has 2"),
        ((0, 3, 0), "no picture 3; the trace has 3"),
        ((0, 1, 1), "no frame 1 in picture 1, which has 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixed.vision_pattern(*wrong)
    with pytest.raises(ValueError, match=r"one map per frame, here 2; take t\.vision_pattern"):
        _ = one["vision.blocks.1.attn.pattern"]
    with pytest.raises(NotKept, match=r"vision\.blocks\.0\.attn\.pattern exists but was not kept"):
        one.vision_pattern(0)
    single = record(vl, [MIXED[2], *MIXED[:1]], "vision.blocks.1.attn.pattern")
    alone = record(vl, TEXT_ALONE, "vision.out")
    assert single.media[0].sequence == 1
    with pytest.raises(NotKept, match="no pictures"):
        alone.vision_pattern(0)


def test_folding_puts_rows_where_they_lie(mixed):
    for image, grid in enumerate((SMALL, WIDE, CLIP)):
        flat = mixed["vision.out"]
        folded = mixed.folded("vision.out", image)
        assert folded.dims == ("frame", "row", "col", "vision_width")
        assert folded.shape[:3] == tuple(grid)
        for patch in (flat.image == image).values.nonzero()[0]:
            one = flat[patch]
            there = folded.sel(frame=int(one["frame"]), row=int(one.row), col=int(one["col"]))
            assert np.array_equal(one, there)
        assert mixed.folded("resampler.spatial", image).shape[:3] == (grid.t, *grid.merged[1:])
        tokens = mixed.folded(mixed["resampler.out"], image)
        assert tokens.shape[:3] == tuple(grid.merged)
        assert tokens["frame"].values.tolist() == ([0, 2] if grid.t == 4 else [0])
        ids = mixed.folded(mixed.routing("vision").expert_ids, image)
        assert ids.dims == ("layer", "frame", "row", "col", "slot")
        frame = mixed.to_frame("vision")
        mine = frame[(frame.image == image) & (frame.layer == 2) & (frame.slot == 1)]
        for row in mine.itertuples():
            cell = {"frame": row.frame, "row": row.row, "col": row.col}
            assert int(ids.sel(cell | {"layer": 2, "slot": 1})) == row.expert
    assert mixed.folded("blocks.0.resid_pre", 1).equals(mixed.folded("embed_in", 1))


def test_folding_refuses_what_is_not_whole(vl, mixed):
    with pytest.raises(ValueError, match="no picture 3"):
        mixed.folded("vision.out", 3)
    with pytest.raises(ValueError, match="0 of the 4 rows of picture 0"):
        mixed.folded(mixed.routing("text").expert_ids)
    with pytest.raises(ValueError, match="2 of the 4 rows of picture 0"):
        mixed.sel(position=[2, 3]).folded("resampler.out")
    with pytest.raises(ValueError, match="no patch, block, image_token, token to fold"):
        mixed.folded(mixed.routing("text").correction_bias)


def test_media_and_boxes(vl, mixed):
    assert [(one.sequence, one.start, one.kind) for one in mixed.media] == [
        (0, 2, "image"),
        (0, 9, "image"),
        (1, 2, "video"),
    ]
    for mine, given in zip(mixed.media, MEDIA, strict=True):
        assert np.array_equal(mine.frames, given.frames) and not mine.frames.flags.writeable
        assert mine.original_size == given.original_size and mine.source == given.source
        assert mine.timestamps == given.timestamps and mine.grid == given.grid
    boxes = mixed.boxes()
    tokens = mixed.tokens.dropna(subset=["image"])
    assert boxes[["sequence", "pos", "row"]].to_numpy().tolist() == (
        tokens[["sequence", "pos", "row"]].to_numpy().tolist()
    )
    last = boxes[boxes.image == 1].iloc[-1]
    sides = ["left", "top", "right", "bottom"]
    # 4 x 6 patches of 2 pixels: 2 x 3 tokens of 4 pixels; the original was 24 x 24.
    assert last[sides].tolist() == [8, 4, 12, 8]
    assert last[[f"original_{side}" for side in sides]].tolist() == [16, 12, 24, 24]
    blind = record(vl, MIXED, "vision.out", with_media=False)
    assert blind.media[2].frames is None and blind.folded("vision.out", 2).shape[0] == 4
    with pytest.raises(ValueError, match=r"pixels of this image are not in the trace"):
        blind.boxes()
    with pytest.raises(ValueError, match=r"but the model read .*in reading order"):
        with_media(mixed.media, [medium("image", WIDE, 1), *MEDIA[1:]])


def test_slices(mixed):
    images = mixed.sel(content="image")
    assert set(images.tokens.id) == {50} and images.media == mixed.media
    assert images.routing("vision").expert_ids.sizes["token"] == 10
    assert images.routing("text").expert_ids.sizes["token"] == 0
    assert mixed.sel(modality="video").tokens.image.tolist() == [2] * 4
    both = mixed.sel(content=["image", "delimiter"], sequence=0)
    assert set(both.tokens.id) == {50, 52, 53}
    assert mixed.sel(bank="vision").tokens.content.isin(["image", "video", "delimiter"]).all()
    second = mixed.sel(sequence=1)
    assert second["vision.out"].image.values.tolist() == [2] * 32
    assert second["vision.out"].patch.values.tolist() == list(range(40, 72))
    assert second.vision_pattern(0, 2, 1).equals(mixed.vision_pattern(0, 2, 1))
    assert second.folded("vision.out", 2).equals(mixed.folded("vision.out", 2))
    assert second.folded("resampler.out", 2).equals(mixed.folded("resampler.out", 2))
    with pytest.raises(ValueError, match="picture 0 belongs to sequence 0, which is not in this"):
        second.vision_pattern(0, 0)
    assert mixed.sel(sequence=2)["vision.out"].shape == (0, 24)
    assert mixed.sel(position=0)["vision.out"].equals(mixed["vision.out"])
    for wrong, message in [
        ({"content": "audio"}, r"content=\['audio'\].*it has \['delimiter', 'image'"),
        ({"bank": "vision", "phase": "decode"}, "no token has phase='decode' and bank='vision'"),
    ]:
        with pytest.raises(ValueError, match=message):
            mixed.sel(**wrong)


def test_saving(vl, mixed, tmp_path):
    loaded = Trace.load(mixed.save(tmp_path / "run"))
    for other in (loaded, pickle.loads(pickle.dumps(mixed)), copy.deepcopy(mixed)):
        assert other.tokens.equals(mixed.tokens)
        assert other.to_frame().equals(mixed.to_frame())
        assert other.boxes().equals(mixed.boxes())
        assert other.banks == mixed.banks and other.sites == mixed.sites
        for site in mixed.values.values():
            for key, part in site.parts.items():
                assert torch.equal(other.values[site.site.path].parts[key].values, part.values)
        assert other.vision_pattern(0, 2, 3).identical(mixed.vision_pattern(0, 2, 3))
        assert other["vision.out"].identical(mixed["vision.out"])
        for a, b in zip(other.media, mixed.media, strict=True):
            assert np.array_equal(a.frames, b.frames)
            assert (a.sequence, a.start, a.kind, a.grid) == (b.sequence, b.start, b.kind, b.grid)
            assert (a.original_size, a.timestamps) == (b.original_size, b.timestamps)
    assert not any(one.frames.flags.writeable for one in loaded.media)
    part = mixed.sel(sequence=1, content="video")
    again = Trace.load(part.save(tmp_path / "part"))
    assert again.folded("vision.out", 2).identical(part.folded("vision.out", 2))
    blind = record(vl, MIXED, "vision.out", with_media=False)
    assert Trace.load(blind.save(tmp_path / "blind")).media[0].frames is None
    header = json.loads((tmp_path / "run" / "trace.json").read_text())
    assert header["schema"] == 3 and set(header["routers"]) == {"text", "vision"}


def test_reprs(mixed):
    text, page = repr(mixed), mixed._repr_html_()
    for part in (
        "3 pictures: 0: image of 4 x 4 patches, 1: image of 4 x 6 patches, 2: video of 4 x 4 x 2",
        "tokens by bank of experts: text 15, vision 20; t.routing(bank)",
    ):
        assert part in text and part in page
    assert "image 1: 6 tokens" in page and page.count("image 1: 6 tokens") == 1
    assert "vision.blocks.*.attn.q" in text
