"""Balance by group of tokens: hand cases, intervals that hold what they should, and refusals."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from analysis.routings import random_probs, routing

from ernie_lab.analysis import balance
from ernie_lab.analysis.balance_groups import balance_by, balance_of_counts
from ernie_lab.analysis.token_groups import (
    groups_of,
    position_buckets,
    require_same_tokens,
    stratified_draws,
)
from ernie_lab.interventions.bootstrap import basic_interval, draws_of


def chosen(ids, sequence=None, layers=(3,), **coords):
    """A routing of one layer from ids `[n k]`."""
    ids = np.asarray(ids)
    labels = {"sequence": np.zeros(len(ids), int) if sequence is None else sequence} | coords
    return SimpleNamespace(
        expert_ids=xr.DataArray(
            np.stack([ids] * len(layers)),
            dims=("layer", "token", "slot"),
            coords={"layer": list(layers)} | {k: ("token", v) for k, v in labels.items()},
        ),
        n_experts=4,
    )


def test_each_group_has_its_own_load_and_reference():
    # a: slots 0 0 0 1 -> shares 3/4, 1/4, MaxVio 3/4 * 4 - 1 = 2. b: even over 4 experts.
    ids = [[0], [0], [0], [1], [0], [1], [2], [3]]
    table = balance_by(chosen(ids), list("aaaabbbb"))
    assert table.index.names == ["layer", "group"]
    assert table.index.tolist() == [(3, "a"), (3, "b")]
    a, b = table.loc[(3, "a")], table.loc[(3, "b")]
    assert a["max_violation"] == 2 and b["max_violation"] == 0
    assert a["least_loaded"] == 0 and b["least_loaded"] == 1
    assert a["busiest"] == 0 and a["idlest"] == 2 and a["unused"] == 2
    # variance of 3, 1, 0, 0 about 1 is (4 + 0 + 1 + 1) / 4
    assert a["cv"] == pytest.approx(np.sqrt(1.5))
    assert (table["n_tokens"] == 4).all() and (table["k"] == 1).all()
    reference = balance.multinomial_reference(4, 4, 1)
    assert a["max_violation_uniform_p95"] == reference.p95
    assert a["max_violation_uniform_mean"] == reference.mean
    assert np.isnan(a["dead"]) and np.isnan(a["max_violation_low"])


def test_without_groups_it_agrees_with_the_plain_table():
    one = routing(random_probs(), 2, sequence=np.arange(60) // 10)
    one.n_experts = 8
    grouped, plain = balance_by(one).droplevel("group"), balance.balance_table(one)
    shared = [column for column in plain if column in grouped]
    assert len(shared) > 10
    pd.testing.assert_frame_equal(grouped[shared], plain[shared], check_names=False)


def test_maxvio_of_documents_is_another_number():
    # Each document sends all to one expert; together they are even.
    ids = np.repeat(np.arange(4), 5)[:, None]
    row = balance_by(chosen(ids, sequence=np.repeat(np.arange(4), 5))).loc[(3, "all")]
    assert row["max_violation"] == 0 and row["document_max_violation"] == 3
    assert row["document_max_violation_low"] == row["document_max_violation_high"] == 3
    expected = balance.multinomial_reference(5, 4, 1, n_random=200).mean
    assert row["document_max_violation_uniform_mean"] == pytest.approx(expected)


def test_groups_by_coordinate_by_label_and_in_the_order_of_categories():
    one = routing(random_probs(n_tokens=12), 2, sequence=np.repeat([0, 1], 6))
    table = balance_by(one, "phase", n_draws=50)
    assert table.loc[1, "n_tokens"].to_dict() == {"prefill": 4, "decode": 8}
    some = balance_by(one, [None] * 8 + ["x"] * 4, n_draws=50)
    assert some["n_tokens"].tolist() == [4, 4]
    buckets = position_buckets(one, (0, 1, 4))
    assert list(buckets.categories) == ["0", "1-3", "4 on"]
    assert balance_by(one, buckets, n_draws=50).loc[1, "n_tokens"].to_dict() == {
        "0": 2, "1-3": 6, "4 on": 4,
    }  # fmt: skip
    reordered = pd.Categorical(["b", "a"] * 6, categories=["a", "b", "never"])
    assert groups_of(one.expert_ids, reordered).names == ("a", "b")


def test_unrouted_tokens_and_layers_without_a_group_are_left_out():
    ids = np.array([[[0], [1], [-1]], [[0], [-1], [-1]]])
    table = balance_by(xr.DataArray(ids, dims=("layer", "token", "slot")), list("aab"), n_experts=2)
    assert table.index.tolist() == [(0, "a"), (1, "a")]
    assert table["n_tokens"].tolist() == [2, 1]


def test_counts_of_a_corpus_give_the_same_numbers():
    one = routing(random_probs(), 2, sequence=np.arange(60) // 10)
    ids = one.expert_ids.values
    per_document = np.stack(
        [[balance.counts(layer[s : s + 10], 8) for layer in ids] for s in range(0, 60, 10)]
    )
    whole = balance_by(one)
    again = balance_of_counts(per_document, k=2, n_tokens=60, layers=[1, 2])
    pd.testing.assert_frame_equal(again, whole)
    summed = xr.DataArray(per_document.sum(0), dims=("layer", "expert"), coords={"layer": [1, 2]})
    plain = balance_of_counts(summed, k=2, group="news")
    assert plain.index.tolist() == [(1, "news"), (2, "news")]
    assert plain["max_violation"].tolist() == whole["max_violation"].tolist()
    assert plain["max_violation_low"].isna().all()


def test_intervals_hold_the_source_where_percentiles_do_not():
    """Documents of 300 slots over 16 slightly uneven experts, whose MaxVio is known."""
    rng = np.random.default_rng(0)
    source = 1 + 0.3 * rng.random(16)
    source /= source.sum()
    truth = float(balance.max_violation(source))
    basic = percentile = 0
    for seed in range(60):
        counts = rng.multinomial(300, source, size=30)
        drawn = balance.max_violation(draws_of(30, 200, seed) @ counts)
        low, high = basic_interval(float(balance.max_violation(counts.sum(0))), drawn, (0, np.inf))
        basic += low <= truth <= high
        percentile += np.quantile(drawn, 0.025) <= truth <= np.quantile(drawn, 0.975)
    assert basic >= 48 and basic > percentile


def test_the_same_tokens():
    one, other = (routing(random_probs(n_tokens=4), 2) for _ in range(2))
    require_same_tokens(one.expert_ids, other.expert_ids)
    other.expert_ids = other.expert_ids.assign_coords(id=("token", [10, 11, 99, 13]))
    with pytest.raises(ValueError, match="token row 2 has id 12 in the one and 99"):
        require_same_tokens(one.expert_ids, other.expert_ids)
    with pytest.raises(ValueError, match="same prompts"):
        require_same_tokens(one.expert_ids, other.expert_ids[:1])


def test_what_it_refuses():
    one = routing(random_probs(n_tokens=6), 2)
    with pytest.raises(ValueError, match="no 'domain'; they have sequence, pos, id, phase"):
        balance_by(one, "domain")
    with pytest.raises(ValueError, match="2 labels for 6 tokens"):
        balance_by(one, ["a", "b"])
    with pytest.raises(ValueError, match="2 labels for 6 tokens"):
        balance_by(one, pd.Categorical(["a", "b"]))
    with pytest.raises(ValueError, match="nothing is selected"):
        balance_by(one, [None] * 6)
    with pytest.raises(ValueError, match="without a document"):
        balance_by(one, documents=[None, *"aabbc"])
    with pytest.raises(ValueError, match="rise from 0"):
        position_buckets(one, (0, 4, 4))
    with pytest.raises(ValueError, match="two banks"):
        balance_by(SimpleNamespace(routing=lambda: _raise("two banks")))
    with pytest.raises(ValueError, match="tokens and k=2"):
        balance_of_counts([[4, 4]], k=2, n_tokens=3)
    with pytest.raises(ValueError, match="no layer may be empty"):
        balance_of_counts([[4, 4], [0, 0]], k=2)
    with pytest.raises(ValueError, match="expected whole numbers"):
        balance_of_counts([4, 4], k=2)


def _raise(words):
    raise ValueError(words)


def test_strata_hold_the_mixture_fixed():
    """Documents of two kinds, each kind on its own two experts: only the mixture can vary."""
    ids = np.array([[0], [1]] * 8 + [[2], [3]] * 8)
    kinds = np.repeat(["a", "b"], 16)
    one = chosen(ids, sequence=np.repeat(np.arange(8), 4))
    fixed = balance_by(one, strata=kinds).loc[(3, "all")]
    assert fixed["least_loaded_low"] == fixed["least_loaded"] == fixed["least_loaded_high"] == 1
    counts = np.stack([np.bincount(ids[s : s + 4, 0], minlength=4) for s in range(0, 32, 4)])
    assert np.ptp(balance.least_loaded(draws_of(8, 100, 0) @ counts)) > 0  # free, it would vary
    drawn = stratified_draws(np.array([0, 0, 1, 1, 1]), 100, seed=0)
    assert (drawn[:, :2].sum(1) == 2).all() and (drawn[:, 2:].sum(1) == 3).all()
    with pytest.raises(ValueError, match="one label for all tokens of a document"):
        balance_by(one, strata=["a", "b"] * 16)
