"""OLMoE's measures and router saturation, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from ernie_lab.analysis.olmoe import domain_specialisation, vocabulary_specialisation
from ernie_lab.analysis.saturation import router_saturation, set_agreement


def chosen(ids, *, sequence=None, token=None, layers=(3,), n_experts=4):
    """A routing with the same ids `[n k]` in every layer."""
    ids = np.asarray(ids)
    sequence = np.zeros(len(ids), int) if sequence is None else np.asarray(sequence)
    token = np.arange(len(ids)) if token is None else np.asarray(token)
    coords = {
        "layer": list(layers), "sequence": ("token", sequence),
        "pos": ("token", np.arange(len(ids))), "id": ("token", token),
        "text": ("token", np.array([f"t{i}" for i in token], dtype=object)),
    }  # fmt: skip
    array = xr.DataArray(
        np.stack([ids] * len(layers)), dims=("layer", "token", "slot"), coords=coords
    )
    return SimpleNamespace(expert_ids=array, n_experts=n_experts)


def test_a_domain_goes_to_its_experts_so_often() -> None:
    ids = [[0, 1], [0, 2], [0, 1], [3, 1], [2, 3]]
    found = domain_specialisation(chosen(ids), ["prose", "prose", "prose", "prose", "code"])
    prose = found.share.sel(layer=3, label="prose").values
    assert prose.tolist() == [3 / 4, 3 / 4, 1 / 4, 1 / 4]
    assert found.share.sel(layer=3, label="code").values.tolist() == [0, 0, 1, 1]
    assert found.n_tokens.values.tolist() == [4, 1]
    assert found.attrs["fair_share"] == 0.5
    assert np.allclose(found.share.sum("expert"), 2)
    first = domain_specialisation(chosen(ids), ["a"] * 5, k=1)
    assert first.share.sel(layer=3, label="a").values.tolist() == [3 / 5, 0, 1 / 5, 1 / 5]
    assert np.isnan(found.low).all(), "one document has no interval"


def test_shares_have_intervals_over_documents() -> None:
    """Two documents of a, one all expert 0 and one all expert 1: a draw has 0, 1/2 or all."""
    ids, sequence = [[0], [0], [1], [1], [2], [2]], [0, 0, 1, 1, 2, 3]
    found = domain_specialisation(chosen(ids, sequence=sequence), list("aaaabb"), n_draws=400)
    a = found.sel(layer=3, expert=0, label="a")
    assert (float(a.share), float(a.low), float(a.high)) == (0.5, 0, 1)
    b = found.sel(layer=3, expert=2, label="b")
    assert (float(b.share), float(b.low), float(b.high)) == (1, 1, 1)
    without = domain_specialisation(chosen(ids, sequence=sequence), ["a"] * 4 + [None] * 2)
    assert without.label.values.tolist() == ["a"]


def test_a_token_goes_to_its_experts_so_often() -> None:
    """Id 7 in documents 0 and 1 (picked, other); id 8 once."""
    ids = [[0], [0], [0], [1], [2]]
    routing = chosen(ids, sequence=[0, 0, 1, 1, 1], token=[7, 7, 7, 7, 8])
    table = vocabulary_specialisation(routing, min_count=4, min_share=0.3)
    assert table.iloc[0].to_dict() == {
        "layer": 3, "expert": 0, "id": 7, "text": "t7", "n": 4, "share": 0.75,
        "share_picked": 1.0, "share_other": 0.5, "n_other": 2,
    }  # fmt: skip
    assert len(table) == 1
    both = vocabulary_specialisation(routing, min_count=1, min_share=0.2)
    assert both[["id", "expert", "share"]].values.tolist() == [
        [8, 2, 1],
        [7, 0, 0.75],
        [7, 1, 0.25],
    ]
    # Always expert 0 where it is picked, never in the rest: below half of all, and yet a row.
    routing = chosen([[0], [1], [1]], sequence=[0, 1, 1], token=[7, 7, 7])
    table = vocabulary_specialisation(routing, min_count=1).set_index("expert")
    assert table.loc[0, ["share_picked", "share_other"]].tolist() == [1, 0]
    with pytest.raises(ValueError, match="no token id occurs 10 times"):
        vocabulary_specialisation(routing)


def test_agreement_is_of_sets() -> None:
    one, other = [[0, 1], [2, 3], [0, 3]], [[1, 0], [2, 0], [1, 2]]
    assert set_agreement(one, other).tolist() == [1, 0.5, 0]


def test_saturation_by_hand() -> None:
    one = chosen([[0, 1], [2, 3], [0, 3]], layers=(2, 5))
    other = chosen([[1, 0], [2, 0], [1, 2]], layers=(2, 5))
    table = router_saturation(one, other)
    assert table.index.tolist() == [2, 5]
    row = table.loc[5]
    assert row["saturation"] == 0.5 and row["uniform"] == 0.5 and row["n_tokens"] == 3
    # Loads in tokens: 2 1 1 2 of 3 and 2 2 2 0 of 3; their product is (4 + 2 + 2) / 9, over k.
    assert row["independent"] == pytest.approx(8 / 9 / 2)
    assert router_saturation(one, other, k=1).loc[2, "saturation"] == pytest.approx(1 / 3)
    assert (router_saturation(one, one)["saturation"] == 1).all()


def test_saturation_has_an_interval_over_documents() -> None:
    one = chosen([[0], [0], [1], [1]], sequence=[0, 0, 1, 1])
    other = chosen([[0], [0], [0], [0]], sequence=[0, 0, 1, 1])
    row = router_saturation(one, other).loc[3]
    assert (row["saturation"], row["low"], row["high"]) == (0.5, 0, 1)


def test_only_the_same_tokens_can_be_compared() -> None:
    one = chosen([[0], [1]])
    with pytest.raises(ValueError, match=r"are \(1, 2\) and \(1, 3\)"):
        router_saturation(one, chosen([[0], [1], [2]]))
    with pytest.raises(ValueError, match="has id 1 in the one and 5 in the other"):
        router_saturation(one, chosen([[0], [1]], token=[0, 5]))
    with pytest.raises(ValueError, match="layers"):
        router_saturation(one, chosen([[0], [1]], layers=(4,)))
    with pytest.raises(ValueError, match="k=2 of 1 chosen"):
        router_saturation(one, one, k=2)
    with pytest.raises(ValueError, match="not routed in every layer"):
        router_saturation(one, chosen([[0], [-1]]))
