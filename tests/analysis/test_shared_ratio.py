"""The shared block beside the routed experts: sizes, shares and intervals by hand."""

import numpy as np
import pytest
import xarray as xr

from ernie_lab.analysis.shared_ratio import shared_to_routed

SHARED = np.array([[3.0, 4.0], [0.0, 1.0], [6.0, 8.0], [1.0, 1.0]])
ROUTED = np.array([[0.0, 5.0], [2.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
KINDS = ["text", "text", "image", "image"]


def test_of_one_layer_by_hand():
    table = shared_to_routed(SHARED, ROUTED, KINDS)
    assert table.index.tolist() == ["text", "image"]
    assert table["median"].tolist() == pytest.approx([0.75, 10.0])
    assert table["n_tokens"].tolist() == [2, 2]
    assert table["undefined"].tolist() == [0, 1]
    # Token 0: (25 + 20) / (9 + 81); token 1: 1 / 5. Tokens 2, 3: (100 + 8) / (36 + 81), all.
    assert table["share"].tolist() == pytest.approx([(0.5 + 0.2) / 2, (108 / 117 + 1) / 2])
    assert table["cosine"].tolist() == pytest.approx([(0.8 + 0) / 2, 0.8])
    assert table["low"].isna().all()


def test_one_label_for_each_token():
    with pytest.raises(ValueError, match="one row and one label for each token"):
        shared_to_routed(SHARED, ROUTED, ["text"])
    with pytest.raises(ValueError, match="one row and one label for each token"):
        shared_to_routed(SHARED[None], np.stack([ROUTED, ROUTED]), KINDS)


def test_layers_and_intervals_over_documents():
    """Two documents: draws hold one of them twice, or both."""
    shared = np.ones((2, 4, 2)) * np.array([1.0, 1.0, 3.0, 3.0])[None, :, None]
    routed = np.ones((2, 4, 2)) * np.array([1.0, 2.0])[:, None, None]
    coords = {"layer": [3, 7], "sequence": ("token", [4, 4, 9, 9])}
    given = [
        xr.DataArray(x, dims=("layer", "token", "width"), coords=coords) for x in (shared, routed)
    ]
    table = shared_to_routed(*given, ["text"] * 4, n_draws=100)
    assert table.index.tolist() == [(3, "text"), (7, "text")]
    assert table["median"].tolist() == pytest.approx([2.0, 1.0])
    assert table["low"].tolist() == pytest.approx([1.0, 0.5])
    assert table["high"].tolist() == pytest.approx([3.0, 1.5])
    # Parallel: the share is s / (s + r).
    assert table.loc[(7, "text"), "share"] == pytest.approx((1 / 3 + 3 / 5) / 2)
    assert table.loc[(7, "text"), ["share_low", "share_high"]].tolist() == pytest.approx(
        [1 / 3, 3 / 5]
    )


def test_shares_of_the_two_sum_to_one():
    rng = np.random.default_rng(0)
    shared, routed = rng.normal(size=(2, 3, 20, 5))
    there = shared_to_routed(shared, routed, ["text"] * 20)["share"]
    back = shared_to_routed(routed, shared, ["text"] * 20)["share"]
    np.testing.assert_allclose(there + back, 1)
