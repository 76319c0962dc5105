"""Patching over a grid and along a path, against the same computed step by step."""

import edit_cases as cases
import numpy as np
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions import catalogue as edits
from ernie_lab.interventions import shared

LAB, VL = cases.lab(), cases.vl_lab()
CLEAN, OTHER = "hello you", "hullo you"  # they differ at position 1


def metric(run):
    return float(run.logits[0, -1, 5] - run.logits[0, -1, 6])


@pytest.fixture(scope="module")
def source():
    return LAB.run(OTHER, keep=["blocks.*.resid_pre", "attn.z", "moe.shared_out"]).trace


def test_a_grid(source):
    grid = edits.patch_grid(LAB, CLEAN, source, metric, progress=False)
    assert grid.dims == ("layer", "position")
    assert grid.layer.values.tolist() == [0, 1, 2]
    base = metric(LAB.run(CLEAN))
    assert grid.attrs["base"] == base
    # What enters the first block differs at one position: there it becomes the other prompt.
    assert float(grid.sel(layer=0, position=1)) == pytest.approx(metric(LAB.run(OTHER)), abs=1e-5)
    rest = [pos for pos in range(9) if pos != 1]
    np.testing.assert_array_equal(grid.sel(layer=0, position=rest), base)
    np.testing.assert_allclose(grid.sel(position=0), base, atol=1e-5)
    cell = edits.patch("blocks.2.resid_pre", source, positions=4)
    assert float(grid.sel(layer=2, position=4)) == metric(LAB.run(CLEAN, edits=cell))


def test_a_grid_of_heads(source):
    grid = edits.patch_grid(
        LAB, CLEAN, source, metric, site="attn.z", by="head", layers=[1, -1], progress=False
    )
    assert grid.dims == ("layer", "head")
    assert grid.shape == (2, 4)
    cell = edits.patch("blocks.1.attn.z", source, heads=3)
    assert float(grid.sel(layer=1, head=3)) == metric(LAB.run(CLEAN, edits=cell))


def test_a_grid_on_pictures():
    source = VL.run(cases.VL_IDS[0], images=[cases.image(4, 4, 9)], keep="blocks.*.resid_pre").trace
    grid = edits.patch_grid(
        VL,
        cases.VL_IDS[0],
        source,
        metric,
        layers=[0, 2],
        positions=[0, 3],
        progress=False,
        images=[cases.image(4, 4, 1)],
    )
    assert float(grid.sel(layer=0, position=0)) == grid.attrs["base"]
    assert float(grid.sel(layer=0, position=3)) != grid.attrs["base"]


def test_a_path_to_the_router(source):
    """By hand: the router of layer 2 reads the base stream plus what the sender changed."""
    sender, receiver = "blocks.1.moe.shared_out", "blocks.2.moe.router_logits"
    path = edits.path_patch(LAB, CLEAN, source, sender, receiver)
    assert path.frozen == ("blocks.2.attn.attn_out",)
    base = LAB.run(CLEAN, keep=["blocks.2.resid_mid", sender]).trace
    stream = base.tensor("blocks.2.resid_mid") + source.tensor(sender) - base.tensor(sender)
    block = LAB.model.blocks[2]
    with torch.no_grad():
        logits = block.moe.router(block.norm2(stream, block.sites.norm2), block.moe.sites.router)
    received = path.receiver.tensor(receiver)
    torch.testing.assert_close(received.softmax(-1), logits.probs_NE, atol=1e-5, rtol=1e-4)
    by_hand = LAB.run(CLEAN, edits=edits.patch(receiver, path.receiver))
    assert torch.equal(path.patched.logits, by_hand.logits)
    assert torch.equal(path.base.logits, LAB.run(CLEAN).logits)


def test_a_path_from_a_head(source):
    path = edits.path_patch(
        LAB, CLEAN, source, "blocks.0.attn.z", "blocks.2.attn.q", sender_heads=1, receiver_heads=0
    )
    assert path.frozen == (
        "blocks.0.mlp.mlp_out",
        "blocks.1.attn.attn_out",
        "blocks.1.moe.moe_out",
    )
    assert not torch.equal(path.patched.logits, path.base.logits)


def test_refused(source):
    with pytest.raises(el.EditError, match="does not come after"):
        edits.path_patch(LAB, CLEAN, source, "blocks.2.resid_pre", "blocks.1.attn.q")
    with pytest.raises(el.EditError, match="takes one prompt, not 2"):
        edits.patch_grid(LAB, [CLEAN, CLEAN], source, metric, progress=False)
    with pytest.raises(el.EditError, match="needs a site with heads"):
        edits.patch_grid(LAB, CLEAN, source, metric, by="head", progress=False)
    with pytest.raises(el.EditError, match="other prompts"):
        LAB.run("a longer prompt", edits=edits.patch("moe.shared_out", source))
    with pytest.raises(el.EditError, match=r"blocks.0.attn.q .* record it"):
        edits.patch("attn.q", source)
    assert shared.zero() == shared.zero()
