"""Differences of two routings by hand, and the numbering under which they agree."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import xarray as xr
from support.labs import picture, small_lab, small_vl_lab

import ernie_lab as el
from ernie_lab.analysis.expert_matching import match_experts
from ernie_lab.analysis.margins import flips_by_margin
from ernie_lab.analysis.routing_diff import routing_diff

LAYERS = [3, 4]
PROMPTS = ["hello there, how are you?", "no", "what is this thing here"]


@dataclass
class Routing:
    """As a RoutingLedger."""

    expert_ids: xr.DataArray
    expert_weights: xr.DataArray
    margin: Any = None
    n_experts: int = 4


def routing(ids: Any, weights: Any, sequence: Any = (0, 0, 1), **more: Any) -> Routing:
    coords = {
        "layer": LAYERS[: len(ids)],
        "sequence": ("token", list(sequence)),
        "pos": ("token", list(range(len(sequence)))),
    }
    dims = ("layer", "token", "slot")
    arrays = (xr.DataArray(np.array(x), dims=dims, coords=coords) for x in (ids, weights))
    return Routing(*arrays, **more)


def pair() -> tuple[Routing, Routing]:
    """Layer 3: the second token gets expert 2 for 1. Layer 4: the order, then both experts."""
    a = routing(
        [[[0, 1], [0, 1], [2, 3]], [[0, 1], [0, 1], [2, 3]]],
        [[[0.6, 0.4]] * 3, [[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]],
        margin=xr.DataArray([[0.5, 0.1, 0.3], [0.4, 0.2, 0.0]], dims=("layer", "token")),
    )
    b = routing(
        [[[0, 1], [0, 2], [2, 3]], [[1, 0], [2, 3], [2, 3]]],
        [[[0.6, 0.4], [0.7, 0.3], [0.6, 0.4]], [[0.5, 0.5]] * 3],
    )
    return a, b


def test_by_hand() -> None:
    diff = routing_diff(*pair(), n_draws=50)
    np.testing.assert_allclose(diff.flips, [[0, 0.5, 0], [0, 1, 0]])
    # Token 1, layer 3: |0.6 - 0.7| + 0.4 + 0.3 over two.
    np.testing.assert_allclose(diff.weight_change, [[0, 0.4, 0], [0, 1, 0.4]])
    np.testing.assert_array_equal(diff.first_layer, [np.nan, 3, np.nan])
    table = diff.by_layer
    assert table["changed"].tolist() == pytest.approx([1 / 3, 1 / 3])
    assert table["flips"].tolist() == pytest.approx([1 / 6, 1 / 3])
    # One of three in common, then none.
    assert table["jaccard"].tolist() == pytest.approx([(1 + 1 / 3 + 1) / 3, 2 / 3])
    assert table["first"].tolist() == pytest.approx([1 / 3, 0])
    assert table["still"].tolist() == pytest.approx([1 / 3, 0])
    assert table.index.tolist() == LAYERS
    assert (diff.k, diff.n_experts, diff.n_documents, diff.by_lot) == (2, 4, 2, 0.5)
    assert not diff.same
    assert list(diff.flips.coords["sequence"].values) == [0, 0, 1]
    assert diff.by_layer["flips_floor"].isna().all()


def test_intervals_are_over_documents() -> None:
    """Only document 0 differs: draws of it alone and of the other alone bound the interval."""
    table = routing_diff(*pair(), n_draws=2000).by_layer
    assert table.loc[4, "flips_low"] == 0
    assert table.loc[4, "flips_high"] == 0.5
    one = routing_diff(*pair(), documents=[0, 0, 0]).by_layer
    assert np.isnan(one.loc[4, "flips_low"]) and one.loc[4, "flips"] == pytest.approx(1 / 3)


def test_flips_by_margin_of_the_first() -> None:
    diff = routing_diff(*pair(), edges=[0, 0.15, 0.25, 0.5])
    # 0.0 and 0.1 | 0.2 | 0.3, 0.4, 0.5
    assert diff.by_margin["n"].tolist() == [2, 1, 3]
    assert diff.by_margin["flips"].tolist() == pytest.approx([0.25, 1, 0])
    with pytest.raises(ValueError, match="must rise"):
        routing_diff(*pair(), edges=[0.5, 0.1])
    a, b = pair()
    a.margin = None
    assert routing_diff(a, b).by_margin.empty


def test_of_real_traces_beside_the_noise() -> None:
    lab = small_lab()
    a = lab.run(PROMPTS, keep="routing").trace
    b = lab.run(PROMPTS, keep="routing", edits=el.shared.zero(1)).trace
    # In other company: the same tokens, with other padding.
    others = [
        lab.run([*PROMPTS, "x" * (30 + i)], keep="routing").trace.sel(sequence=[0, 1, 2])
        for i in range(8)
    ]
    diff = routing_diff(a, b, equivalent=others)
    assert (diff.by_layer["flips_floor"] < 0.01).all()
    assert (diff.by_layer["jaccard_floor"] > 0.99).all()
    assert diff.by_layer.loc[1, "flips"] == 0  # nothing before layer 1 has changed
    assert diff.by_layer.loc[2, "flips"] > diff.by_layer.loc[2, "flips_floor"]
    assert set(diff.first_layer.values[np.isfinite(diff.first_layer.values)]) == {2.0}
    by_layer = flips_by_margin(a, b).groupby(level="layer")
    pooled = sum(
        (part["flips"] * part["n_tokens"]).sum() / part["n_tokens"].sum() for _, part in by_layer
    )
    assert pooled == pytest.approx(diff.by_layer["flips"].sum())
    mine = diff.by_margin
    assert (mine["flips"] * mine["n"]).sum() == pytest.approx(diff.flips.sum())
    assert "flips_floor" in repr(diff) and "<table" in diff._repr_html_()
    assert routing_diff(a, a).same and "0 % of tokens diverge" in repr(routing_diff(a, a))
    with pytest.raises(ValueError, match="at least 8"):
        routing_diff(a, b, equivalent=others[:3])


def test_banks_apart() -> None:
    lab = small_vl_lab()
    given = {"images": [picture(1)], "keep": "routing"}
    a = lab.run("what?", **given).trace
    used = int(a.routing("vision").expert_ids.sel(layer=1)[0, 0])
    b = lab.run("what?", **given, edits=el.routing.forbid(1, used, bank="vision")).trace
    vision = routing_diff(a.routing("vision"), b.routing("vision"))
    assert vision.flips.sel(layer=1).max() > 0
    text = routing_diff(a.routing("text"), b.routing("text"))
    assert text.flips.sel(layer=1).max() == 0
    with pytest.raises(ValueError, match="two banks"):
        routing_diff(a, b)


def test_what_is_refused() -> None:
    a, b = pair()
    with pytest.raises(ValueError, match="2 experts per token in a, 1 in b"):
        routing_diff(a, Routing(b.expert_ids[..., :1], b.expert_weights[..., :1]))
    b.n_experts = 5
    with pytest.raises(ValueError, match="among 4 experts, b among 5"):
        routing_diff(a, b)
    shorter = routing([[[0, 1]]], [[[0.5, 0.5]]], [0])
    with pytest.raises(ValueError, match="run the same prompts"):
        routing_diff(a, shorter)
    with pytest.raises(ValueError, match="one: run several texts"):
        match_experts(*pair(), documents=[0, 0, 0])


def drawn(n: int = 400, n_experts: int = 8, k: int = 2, seed: int = 0) -> Routing:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((2, n, n_experts)), -1)[..., :k]
    sequence = np.arange(n) // 20
    return routing(ids, np.full(ids.shape, 1 / k), sequence, n_experts=n_experts)


def renumbered(one: Routing, to: np.ndarray) -> Routing:
    ids = xr.apply_ufunc(lambda x: to[x], one.expert_ids)
    return Routing(ids, one.expert_weights, one.margin, one.n_experts)


def test_another_numbering_is_found() -> None:
    a = drawn()
    to = np.array([3, 0, 1, 2, 4, 7, 6, 5])
    b = renumbered(a, to)
    found = match_experts(a, b)
    np.testing.assert_array_equal(found.to_a.values[0], np.argsort(to))
    row = found.table.loc[3]
    assert row["matched"] == 1 and row["moved"] == 6
    assert row["as_numbered"] < 0.5 and row["gain"] == pytest.approx(1 - row["as_numbered"])
    assert row["matched_low"] == row["matched_high"] == 1
    assert routing_diff(a, b).flips.mean() > 0.5
    assert routing_diff(a, b, matching=found).same
    assert "not found on" in repr(found)


def test_chance_is_what_unrelated_routings_give() -> None:
    """The best of 8! numberings gains on the documents it was found on, not on others."""
    found = match_experts(drawn(), drawn(seed=1), seed=3).table
    assert (found["matched"] < found["chance_p95"] + 0.03).all()
    assert ((found["chance_mean"] - 0.25).abs() < 0.02).all()
    assert (found["by_lot"] == 0.25).all()
    # Skewed loads alone raise the chance: everybody meets the busy experts.
    a, b = drawn(), drawn(seed=1)
    for one in (a, b):
        one.expert_ids[:] = np.where(np.arange(2) == 0, 0, one.expert_ids.values % 7 + 1)
    skewed = match_experts(a, b).table
    assert (skewed["chance_p95"] > 0.5).all()


def test_equal_routings_keep_their_numbers() -> None:
    a = drawn()
    found = match_experts(a, a)
    assert (found.table["moved"] == 0).all() and (found.table["gain"] == 0).all()
    with pytest.raises(ValueError, match="at least 20"):
        match_experts(a, a, n_permuted=3)
    part = Routing(a.expert_ids.assign_coords(layer=[7, 8]), a.expert_weights, None, 8)
    with pytest.raises(ValueError, match="layer 7 is not in it"):
        routing_diff(part, part, matching=found)
