"""The same token in different contexts: hand cases, and routers that read one thing only."""

import numpy as np
import pytest
from support.routings import routing

from ernie_lab.analysis import context_overlap, label_overlap


def overlaps(made, **how):
    table = context_overlap(made, n_draws=100, **how)
    return table.set_index(["layer", "kind"])


def test_by_hand():
    """Two documents, tokens a b | a b: sets {0,1} {2,3} | {0,2} {2,3}."""
    made = routing(
        [[[0, 1], [2, 3], [0, 2], [2, 3]]], sequence=[0, 0, 1, 1], id=[7, 8, 7, 8], layers=[4]
    )
    found = overlaps(made)
    # a with a: 1 of 3; b with b: 1. Each token counts once.
    assert found.loc[(4, "token"), "jaccard"] == pytest.approx((1 / 3 + 1) / 2)
    # Both a b pairs of one document: 0 and 1/3.
    assert found.loc[(4, "document"), "jaccard"] == pytest.approx(1 / 6)
    # a of the first with b of the second 0, b of the first with a of the second 1/3.
    assert found.loc[(4, "neither"), "jaccard"] == pytest.approx(1 / 6)
    # b follows a in both.
    assert found.loc[(4, "token and previous"), "jaccard"] == 1
    assert found.loc[(4, "token"), "above"] == pytest.approx(2 / 3 - 1 / 6)
    assert found.loc[(4, "token"), ["n_pairs", "n_labels"]].tolist() == [2, 2]
    assert (4, "token and previous") in found.index


def text(n_documents=6, n=40, n_ids=5, seed=0):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, n_ids, n_documents * n)
    return ids, np.repeat(np.arange(n_documents), n), rng


def test_routers_that_read_the_token_the_document_or_nothing():
    ids, sequence, rng = text()
    by_token = np.stack([ids, ids + 5], -1)
    by_document = np.stack([sequence, sequence + 6], -1)
    by_lot = rng.random((len(ids), 12)).argsort(-1)[:, :2]
    found = overlaps(routing([by_token, by_document, by_lot], sequence=sequence, id=ids))
    assert found.loc[(1, "token"), "jaccard"] == 1 and found.loc[(1, "document"), "jaccard"] == 0
    assert found.loc[(2, "document"), "jaccard"] == 1 and found.loc[(2, "token"), "jaccard"] == 0
    for kind in ("token", "document"):
        row = found.loc[(3, kind)]
        assert row.above_low < 0.02 and row.above_high > -0.02


def test_labels_of_ones_own_and_tokens_left_out():
    ids, sequence, _ = text()
    made = routing([np.stack([ids, ids + 5], -1)], sequence=sequence)
    labels = [None if one == 0 else f"glyph {one}" for one in ids]
    found = overlaps(made, by=labels)
    assert found.loc[(1, "token"), "n_labels"] == 4
    table = label_overlap(made, 1, by=labels, n=2, n_draws=50)
    assert len(table) == 2 and (table.jaccard == 1).all() and (table.usual_share == 1).all()
    assert table.label[0].startswith("glyph") and table.n_documents[0] == 6


def test_label_overlap_sorts_by_what_the_label_decides():
    ids = np.array([0, 1] * 20)
    sequence = np.repeat(np.arange(10), 4)
    sets = np.stack([np.where(ids == 0, 0, sequence), np.full(40, 10)], -1)
    made = routing([sets], sequence=sequence, text=[["same", "varies"][i] for i in ids])
    table = label_overlap(made, 1, n_draws=50)
    assert table.label.tolist() == ["same", "varies"]
    assert table.usual[0] == "0 10" and table.jaccard[1] == pytest.approx(1 / 3)


def test_occurrences_are_capped_by_chance_with_a_seed():
    ids, sequence, rng = text(n=100)
    by_lot = rng.random((len(ids), 12)).argsort(-1)[:, :2]
    made = routing([by_lot], sequence=sequence, id=ids)
    few = overlaps(made, per_label=4)
    assert few.loc[(1, "token"), "n_pairs"] <= 5 * 6
    assert few.equals(overlaps(made, per_label=4))
    assert not few.equals(overlaps(made, per_label=4, seed=1))


def test_a_bank_without_the_token_before_has_no_previous():
    made = routing([[[0, 1]] * 4], sequence=[0, 0, 1, 1], id=[1, 2, 1, 2])
    apart = made.expert_ids.assign_coords(pos=("token", [0, 5, 0, 5]))
    made.expert_ids = apart
    assert "token and previous" not in overlaps(made).index.get_level_values("kind")


def test_errors():
    made = routing([[[0, 1], [1, 2]]], sequence=[0, 1], id=[1, 2])
    with pytest.raises(ValueError, match="two contexts"):
        context_overlap(made)
    pictures = routing([[[0, 1], [1, 2]]], sequence=[0, 1], id=[1, 1], modality=["image", "image"])
    with pytest.raises(ValueError, match="2 tokens are pieces of pictures"):
        context_overlap(pictures)
    assert len(context_overlap(pictures, by=["a", "a"], n_draws=10)) == 1
    with pytest.raises(ValueError, match="layer 3 has no routing"):
        label_overlap(made, 3)
