"""The same inputs through both banks, against the model's own parts; routers beside chance."""

import numpy as np
import pytest
import torch
from support.models import small_model, small_vl_config, small_vl_model
from vl_driver import MIXED, TEXT_ALONE, record

from ernie_lab.analysis.counterfactual import (
    _MEASURES,
    _compared,
    cross_bank_counterfactual,
    cross_bank_sites,
)
from ernie_lab.analysis.isolation import router_cosines
from ernie_lab.analysis.router_alignment import router_alignment
from ernie_lab.interventions import routing
from ernie_lab.trace.keys import NotKept

KEEP = ("routing", "moe.in", "moe.routed_out", "moe.shared_out", "moe.text.routed_out")


@pytest.fixture(scope="module")
def model():
    return small_vl_model()


@pytest.fixture(scope="module")
def trace(model):
    return record(model, MIXED, KEEP)


def test_sites(model):
    assert cross_bank_sites(model) == ["blocks.1.moe.in", "blocks.2.moe.in"]


@pytest.mark.parametrize("tokens", ["text", "vision"])
def test_against_the_layer_itself(model, trace, tokens):
    table = cross_bank_counterfactual(trace, model, tokens)
    assert table.index.tolist() == [1, 2]
    mine = (trace.tokens["bank"] == tokens).to_numpy(copy=True)
    assert table["n_tokens"].tolist() == [mine.sum()] * 2
    moe, other = model.blocks[2].moe, "vision" if tokens == "text" else "text"
    x = trace.tensor("blocks.2.moe.in")[mine]
    with torch.no_grad():
        theirs, routed = getattr(moe, other)(x)
    own = trace.tensor("blocks.2.moe.routed_out")[mine]
    whole = own + trace.tensor("blocks.2.moe.shared_out")[mine]
    row = table.loc[2]
    cosine = torch.cosine_similarity(own, theirs).mean()
    assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    size = (theirs.norm(dim=1) / own.norm(dim=1)).log2().mean()
    assert row["size"] == pytest.approx(float(size), abs=1e-4)
    change = ((theirs - own).norm(dim=1) / whole.norm(dim=1)).mean()
    assert row["change"] == pytest.approx(float(change), abs=1e-4)
    chosen = trace.routing(tokens).expert_ids.sel(layer=2).values
    agree = [
        len(set(a) & set(b)) / 2 for a, b in zip(chosen, routed.expert_ids_NK.tolist(), strict=True)
    ]
    assert row["same_numbers"] == pytest.approx(np.mean(agree))
    assert row["chance"] == 2 / 8
    assert row["low"] <= row["cosine"] <= row["high"]


def test_another_token_is_never_the_same_one(model, trace):
    moe, x = model.blocks[2].moe, trace.tensor("blocks.2.moe.in")[:2]
    with torch.no_grad():
        own, other = moe.text(x)[0], moe.vision(x)[0]
        apart = torch.cosine_similarity(own, other.flip(0)).sort().values
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            found = list(_compared(moe, x, "text", generator))[_MEASURES.index("shuffled_cosine")]
            assert found.sort().values.tolist() == pytest.approx(apart.tolist(), abs=1e-5)
        alone = list(_compared(moe, x[:1], "text", torch.Generator()))
    assert alone[_MEASURES.index("shuffled_cosine")].isnan().all()


def test_a_copied_bank_changes_nothing():
    """Where both banks hold the same weights, crossing is no change, and lots are one."""
    config = small_vl_config(vision_expert_hidden=16)
    model = small_vl_model(vision_expert_hidden=config.text.moe.expert_hidden)
    with torch.no_grad():
        for block in list(model.blocks)[1:]:
            block.moe.vision.load_state_dict(block.moe.text.state_dict())
    table = cross_bank_counterfactual(record(model, MIXED, KEEP), model, "vision")
    np.testing.assert_allclose(table["cosine"], 1, atol=1e-5)
    np.testing.assert_allclose(table[["size", "change"]], 0, atol=1e-5)
    assert (table["same_numbers"] == 1).all()
    assert (table["by_lot_cosine"] < 0.9).all() and (table["by_lot_change"] > 0.1).all()
    assert (table["shuffled_cosine"] < 0.9).all()
    aligned = router_alignment(model)
    np.testing.assert_allclose(aligned["same_number"], 1)
    assert (aligned["same_number"] > aligned["same_number_high"]).all()
    assert (aligned["largest"] > aligned["largest_high"]).all()


def test_what_is_refused(model, trace):
    with pytest.raises(ValueError, match="this model has one"):
        cross_bank_counterfactual(trace, small_model(), "text")
    with pytest.raises(ValueError, match='must be "text" or "vision"'):
        cross_bank_counterfactual(trace, model, "image")
    with pytest.raises(ValueError, match=r"layers \[0\] have no banks; those that do: \[1, 2\]"):
        cross_bank_counterfactual(trace, model, "text", layers=[0])
    with pytest.raises(ValueError, match="no token of this trace went to the vision bank"):
        cross_bank_counterfactual(record(model, TEXT_ALONE, KEEP), model, "vision")
    with pytest.raises(NotKept, match="cross_bank_sites"):
        cross_bank_counterfactual(record(model, MIXED, ("routing",)), model, "text")
    moved = record(model, MIXED, KEEP, edits=[routing.cross_bank("vision", 1)])
    with pytest.raises(ValueError, match=r"blocks.1.moe.bank moved tokens"):
        cross_bank_counterfactual(moved, model, "text")


def test_a_part_of_the_tokens(model, trace):
    """Rows are found by sequence and position, not by their place in the trace."""
    part = trace.sel(sequence=[1])
    whole = cross_bank_counterfactual(part, model, "text")
    assert (whole["n_tokens"] == (part.tokens["bank"] == "text").sum()).all()
    assert whole["low"].isna().all()


def test_router_rows_beside_chance(model):
    table = router_alignment(model, n_permuted=50)
    assert table.index.tolist() == [1, 2]
    routers = [model.routers()[bank][1].weight_ED for bank in ("text", "vision")]
    cosines = router_cosines(*routers)
    row = table.loc[1]
    assert row["size"] == pytest.approx(np.sqrt((cosines**2).mean()))
    assert row["largest"] == pytest.approx(abs(cosines).max())
    assert row["same_number"] == pytest.approx(np.diag(cosines).mean())
    assert row["size_random"] == pytest.approx(1 / np.sqrt(32))
    assert row["size_low"] < row["size_random"] < row["size_high"]
    assert row["same_number_low"] <= row["same_number"] <= row["same_number_high"]
    with pytest.raises(ValueError, match="one router in a layer"):
        router_alignment(small_model())


def test_a_common_direction_is_no_likeness_once_centred(model):
    """A vector added to all rows of both routers: it chooses nothing."""
    changed = small_vl_model()
    with torch.no_grad():
        for routers in changed.routers().values():
            for router in routers.values():
                router.weight_ED += 5
    assert (router_alignment(changed)["size"] > 0.9).all()
    columns = ["size", "largest", "same_number", "within_text"]
    before, after = (router_alignment(one, centred=True)[columns] for one in (model, changed))
    np.testing.assert_allclose(before, after, atol=1e-5)
