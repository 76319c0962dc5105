"""Linear CKA: the formula by hand, what it ignores, and that chance gives 0."""

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from ernie_lab.analysis.cka import centred, layer_cka, linear_cka, paired_cka


def by_hand(k, m):
    """HSIC_1 as Song et al. 2012 print it, equation 5."""
    n = len(k)
    k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    total = np.trace(k @ m) + (ones @ k @ ones) * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * ones @ k @ m @ ones) / (n * (n - 3))


def labelled(values, documents=None):
    coords = {"layer": [2 * i + 1 for i in range(len(values))]}
    if documents is not None:
        coords["sequence"] = ("token", documents)
    return xr.DataArray(values, dims=("layer", "token", "width"), coords=coords)


def test_against_the_printed_formula():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(7, 3)), rng.normal(size=(7, 5))
    k, m = x @ x.T, y @ y.T
    expected = by_hand(k, m) / np.sqrt(by_hand(k, k) * by_hand(m, m))
    assert linear_cka(x, y) == pytest.approx(expected)
    hsic = (centred(k) * centred(m)).sum() / (7 * 4)
    assert hsic == pytest.approx(by_hand(k, m))


def test_the_biased_one_by_hand():
    """||Y'X||^2 / (||X'X|| ||Y'Y||) of centred sets (Kornblith et al. 2019, equation 5)."""
    x, y = np.array([[1.0], [2.0], [3.0]]), np.array([[1.0], [-1.0], [0.0]])
    # Centred: (-1, 0, 1) and (1, -1, 0); their product is -1, its square 1, over 2 * 2.
    assert linear_cka(x, y, debiased=False) == pytest.approx(0.25)


def test_unrelated_wide_sets_are_not_alike():
    """The reason for debiasing: 20 rows in 128 dimensions."""
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(20, 128)), rng.normal(size=(20, 128))) for _ in range(100)]
    assert np.mean([linear_cka(*pair, debiased=False) for pair in pairs]) > 0.8
    assert abs(np.mean([linear_cka(*pair) for pair in pairs])) < 0.02


@given(st.integers(0, 10**6))
def test_axes_scale_and_place_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 3))
    turned = x @ np.linalg.qr(rng.normal(size=(4, 4)))[0] * rng.uniform(0.1, 10) + rng.normal(
        size=4
    )
    assert linear_cka(turned, y) == pytest.approx(linear_cka(x, y))
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))
    assert linear_cka(x, turned) == pytest.approx(1)


def test_centred_rows_sum_to_zero():
    gram = np.random.default_rng(0).normal(size=(2, 6, 6))
    gram = gram + gram.swapaxes(1, 2)
    out = centred(gram)
    np.testing.assert_allclose(out.sum(-1), 0, atol=1e-12)
    assert (np.diagonal(out, axis1=1, axis2=2) == 0).all()


def test_between_layers():
    rng = np.random.default_rng(0)
    first = rng.normal(size=(60, 8))
    states = labelled([first, 2 * first[:, ::-1], rng.normal(size=(60, 8))], np.arange(60) // 5)
    found = layer_cka(states)
    assert found.value["layer"].values.tolist() == [1, 3, 5]
    assert found.n_rows == 60 and found.n_documents == 12
    assert float(found.value.sel(layer=1, other=3)) == pytest.approx(1)
    unlike = {"layer": 1, "other": 5}
    assert abs(float(found.value.sel(unlike))) < 0.1
    assert float(found.low.sel(unlike)) < 0 < float(found.high.sel(unlike))
    assert 0 < found.null_p95 < 0.1
    assert layer_cka(states, max_rows=40).n_rows == 40


def test_pairs_are_found_and_shuffled_ones_are_not():
    rng = np.random.default_rng(0)
    meaning = rng.normal(size=(40, 3))
    first = labelled([rng.normal(size=(40, 3)), meaning], np.arange(40))
    second = labelled([rng.normal(size=(40, 4)), meaning @ rng.normal(size=(3, 4))])
    table = paired_cka(first, second)
    assert table.index.tolist() == [1, 3]
    assert table.loc[3, "low"] > 0.3 > table.loc[3, "null_p95"]
    assert table.loc[1, "low"] < 0 < table.loc[1, "high"]
    np.testing.assert_allclose(table["null_mean"], 0, atol=0.03)


def test_no_interval_of_two_documents():
    states = labelled(np.random.default_rng(0).normal(size=(1, 10, 3)), [0] * 5 + [1] * 5)
    assert np.isnan(layer_cka(states).low).all()


def test_what_cannot_be_compared():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="rows must be paired"):
        linear_cka(np.ones((5, 2)), np.ones((4, 2)))
    with pytest.raises(ValueError, match="needs at least 4"):
        linear_cka(np.ones((3, 2)), np.ones((3, 2)))
    assert np.isnan(linear_cka(np.ones((5, 2)), rng.normal(size=(5, 2))))
    with pytest.raises(ValueError, match=r"expected \(layer, token, width\)"):
        layer_cka(xr.DataArray(np.ones((3, 4)), dims=("token", "width")))
    with pytest.raises(ValueError, match="must be paired, in the same layers"):
        paired_cka(labelled(np.ones((1, 5, 2))), labelled(np.ones((2, 5, 2))))
    with pytest.raises(ValueError, match="max_rows=2"):
        layer_cka(labelled(np.ones((1, 5, 2))), max_rows=2)
