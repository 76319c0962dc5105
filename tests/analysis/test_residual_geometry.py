"""Norms, centroids and variance between kinds of tokens, by hand and against shuffled labels."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from ernie_lab.analysis.residual_geometry import residual_geometry

KINDS = ["text", "text", "image", "image"]


def labelled(values, kinds=KINDS, documents=(0, 1, 0, 1)):
    values = np.asarray(values, dtype=float)
    coords = {"layer": [3 * i + 2 for i in range(len(values))], "modality": ("token", list(kinds))}
    if documents is not None:
        coords["sequence"] = ("token", list(documents))
    return xr.DataArray(values, dims=("layer", "token", "width"), coords=coords)


STATES = [[[3, 0], [1, 0], [0, 3], [0, 5]], [[1, 1], [1, 1], [1, 1], [1, 1]]]


def test_by_hand():
    found = residual_geometry(labelled(STATES), n_draws=100, n_permuted=50)
    assert found.kinds == ("text", "image") and found.n_documents == 2
    assert found.norms.loc[(2, "text"), ["n_tokens", "mean", "median"]].tolist() == [2, 2, 2]
    assert found.norms.loc[(2, "image"), ["low", "high"]].tolist() == [3, 5]
    assert found.cosines.loc[(2, "text", "image"), "cosine"] == pytest.approx(0)
    # Centroids (2, 0), (0, 4), all (1, 2). Between: 2 * (1 + 4) + 2 * (1 + 4) = 20.
    # Whole: (4 + 4) + (0 + 4) + (1 + 1) + (1 + 9) = 24.
    assert found.between.loc[2, "share"] == pytest.approx(20 / 24)
    assert found.cosines.loc[(5, "text", "image"), "cosine"] == pytest.approx(1)
    assert np.isnan(found.between.loc[5, "share"])


def test_intervals_are_of_whole_documents():
    """Document 0 alone: (3, 0) and (0, 3), all of the variance between; 1 alone likewise."""
    found = residual_geometry(labelled(STATES[:1]), n_draws=200)
    row = found.between.loc[2]
    assert row["low"] == pytest.approx(20 / 24) and row["high"] == pytest.approx(1)
    alone = residual_geometry(labelled(STATES[:1], documents=None))
    assert alone.n_documents == 1
    assert np.isnan(alone.between["low"]).all() and np.isnan(alone.norms["low"]).all()


@given(st.integers(0, 10**6))
def test_a_turned_and_stretched_stream_has_the_same_geometry(seed):
    rng = np.random.default_rng(seed)
    states = rng.normal(size=(1, 12, 4)) + 1
    kinds, documents = ["a", "b", "c"] * 4, np.arange(12) // 4
    turn = np.linalg.qr(rng.normal(size=(4, 4)))[0] * 3
    few = {"n_draws": 20, "n_permuted": 5}
    one = residual_geometry(labelled(states, kinds, documents), **few)
    two = residual_geometry(labelled(states @ turn, kinds, documents), **few)
    np.testing.assert_allclose(one.cosines, two.cosines)
    np.testing.assert_allclose(one.between, two.between)
    np.testing.assert_allclose(3 * one.norms["mean"], two.norms["mean"])
    assert 0 <= one.between["share"].iloc[0] <= 1
    assert len(one.cosines) == 3


def test_shuffled_labels_are_the_null():
    rng = np.random.default_rng(0)
    kinds, documents = ["text", "image"] * 50, np.arange(100) // 10
    apart = rng.normal(size=(1, 100, 6)) + 2
    apart[0, ::2, 0] += 6
    found = residual_geometry(labelled(apart, kinds, documents))
    assert found.between.loc[2, "low"] > 10 * found.between.loc[2, "null_p95"]
    assert found.cosines.loc[(2, "text", "image"), "high"] < 0.9
    assert found.cosines.loc[(2, "text", "image"), "null_p05"] > 0.95
    alike = residual_geometry(labelled(rng.normal(size=(1, 100, 6)), kinds, documents))
    assert alike.between.loc[2, "share"] < 2 * alike.between.loc[2, "null_p95"]


def test_labels_are_shuffled_within_documents():
    """Kinds that never meet in a document cannot be told from their documents."""
    rng = np.random.default_rng(0)
    kinds, documents = ["text"] * 10 + ["image"] * 10, [0] * 10 + [1] * 10
    states = rng.normal(size=(1, 20, 3))
    states[0, 10:] += 5
    row = residual_geometry(labelled(states, kinds, documents)).between.loc[2]
    assert row["null_p95"] == pytest.approx(row["share"])


def test_labels_of_ones_own_and_errors():
    states = labelled(STATES)
    other = residual_geometry(states, ["a", "b", "a", "b"])
    assert other.kinds == ("a", "b")
    assert "lies between kinds" in repr(other)
    with pytest.raises(ValueError, match="no coordinate of the tokens"):
        residual_geometry(states, "content")
    with pytest.raises(ValueError, match="1 labels for 4 tokens"):
        residual_geometry(states, ["a"])
    with pytest.raises(ValueError, match="all 4 tokens are 'a'"):
        residual_geometry(states, ["a"] * 4)
    with pytest.raises(ValueError, match=r"expected \(layer, token, width\)"):
        residual_geometry(states.isel(layer=0))


def test_labels_of_whole_documents_are_dealt_out_to_documents():
    """Shuffled within documents of one domain each, nothing would move: the null would be the
    value itself, whatever the domains are."""
    rng = np.random.default_rng(0)
    domains = np.repeat(list("abab" * 4), 5)
    documents = np.repeat(np.arange(16), 5)
    states = rng.normal(size=(1, 80, 3)) + 3 * (domains == "a")[None, :, None]
    apart = residual_geometry(labelled(states, domains, documents), n_draws=20, n_permuted=60)
    row = apart.between.loc[2]
    assert row["share"] > 3 * row["null_p95"]
    alike = rng.normal(size=(1, 80, 3)) + rng.normal(size=(1, 16, 3)).repeat(5, axis=1)
    found = residual_geometry(labelled(alike, domains, documents), n_draws=20, n_permuted=60)
    null = found.between.loc[2, "null_p95"]
    assert found.between.loc[2, "share"] < null and null > 0.05, "documents differ by themselves"
