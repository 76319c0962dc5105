"""Balance statistics against cases worked out by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import xarray as xr

from ernie_lab.analysis import balance

UNEVEN = [4, 2, 1, 1]  # of 8 slots: shares 1/2, 1/4, 1/8, 1/8


def test_load_counts_slots_and_sums_to_one():
    ids = [[0, 1], [0, 2], [0, 1], [0, 3]]
    assert balance.counts(ids, 5).tolist() == [4, 2, 1, 1, 0]
    assert balance.load(ids, 5).tolist() == [0.5, 0.25, 0.125, 0.125, 0.0]


def test_unrouted_rows_are_left_out():
    assert balance.load([[0, 1], [-1, -1]], 2).tolist() == [0.5, 0.5]
    assert balance.load([[0.0, 1.0], [np.nan, np.nan]], 2).tolist() == [0.5, 0.5]


def test_statistics_of_a_hand_case():
    # max share 1/2 against 1/4; variance of 4, 2, 1, 1 about 2 is (4 + 0 + 1 + 1) / 4 = 1.5
    assert balance.max_violation(UNEVEN) == pytest.approx(1.0)
    assert balance.cv(UNEVEN) == pytest.approx(np.sqrt(1.5) / 2)
    # 1/2 * 1 + 1/4 * 2 + 2 * 1/8 * 3 = 1.75 bits of log2(4) = 2
    assert balance.entropy(UNEVEN) == pytest.approx(1.75 / 2)
    # sorted 1, 1, 2, 4: (-3 - 1 + 2 + 12) / (4 * 8)
    assert balance.gini(UNEVEN) == pytest.approx(10 / 32)


def test_statistics_at_balance_and_at_the_worst():
    even, one = np.ones(8), np.eye(8)[0]
    for statistic, best, worst in (
        (balance.max_violation, 0, 7),
        (balance.cv, 0, np.sqrt(7)),
        (balance.entropy, 1, 0),
        (balance.gini, 0, 7 / 8),
    ):
        assert statistic(even) == pytest.approx(best)
        assert statistic(one) == pytest.approx(worst)
        assert statistic(np.stack([even, one])) == pytest.approx([best, worst])


def test_dead_is_undefined_for_few_tokens_and_says_why():
    few = balance.dead([0, 998, 0, 1000])
    assert few.experts is None and np.isnan(few.n)
    assert "500" in few.reason and "more tokens" in few.reason
    # 2000 slots, 4 experts, 500 due: 1 % of it is 5, and 5 is not below it.
    assert balance.dead([4, 5, 991, 1000]).experts == (0,)
    assert balance.dead([500, 500, 500, 500]).n == 0


def test_reference_gives_the_known_figures():
    """design.md: uniform routing, E=64, k=6, gives MaxVio 1.47 at 30 tokens and 0.83 at 100."""
    assert balance.multinomial_reference(30, 64, 6).mean == pytest.approx(1.47, abs=0.1)
    assert balance.multinomial_reference(100, 64, 6).mean == pytest.approx(0.83, abs=0.06)


def test_reference_against_a_slow_simulation():
    rng = np.random.default_rng(1)
    slow = [
        balance.cv(balance.counts([rng.choice(8, 3, replace=False) for _ in range(20)], 8))
        for _ in range(400)
    ]
    fast = balance.multinomial_reference(20, 8, 3, "cv")
    assert fast.mean == pytest.approx(np.mean(slow), rel=0.05)
    assert fast.p95 == pytest.approx(np.percentile(slow, 95), rel=0.08)


@pytest.mark.parametrize("k", [1, 5, 8])
def test_uniform_counts_have_every_token_once_per_slot(k):
    counts = balance._uniform_counts(50, 8, k, 20, 0)
    assert (counts.sum(axis=1) == 50 * k).all() and counts.max() <= 50


def test_normal_limit_meets_the_exact_simulation(monkeypatch):
    exact = balance.multinomial_reference(4000, 16, 4, n_random=1000)
    monkeypatch.setattr(balance, "_EXACT_ROWS", 0)
    limit = balance.multinomial_reference(4000, 16, 4, n_random=1000, seed=1)
    assert limit.mean == pytest.approx(exact.mean, rel=0.05)


def test_reference_is_reproducible_and_refuses_nonsense():
    assert balance.multinomial_reference(40, 8, 2) == balance.multinomial_reference(40, 8, 2)
    with pytest.raises(ValueError, match="k=9"):
        balance.multinomial_reference(40, 8, 9)
    with pytest.raises(ValueError, match="known: max_violation"):
        balance.multinomial_reference(40, 8, 2, "median")
    with pytest.raises(ValueError, match="expert id 8"):
        balance.counts([[8]], 8)
    with pytest.raises(ValueError, match="no token"):
        balance.load([], 8)


def test_table_has_true_layers_and_a_reference_beside_each_statistic():
    rng = np.random.default_rng(0)
    ids = np.stack([[rng.choice(16, 4, replace=False) for _ in range(60)] for _ in range(2)])
    ids[1, :, 0] = 0
    array = xr.DataArray(ids, dims=("layer", "token", "slot"), coords={"layer": [3, 7]})
    table = balance.balance_table(SimpleNamespace(expert_ids=array, n_experts=16))
    assert table.index.tolist() == [3, 7] and table.index.name == "layer"
    assert table["n_tokens"].tolist() == [60, 60] and table["k"].tolist() == [4, 4]
    assert table.loc[3, "max_violation"] < 2 * table.loc[3, "max_violation_uniform_p95"]
    assert table.loc[7, "max_violation"] > table.loc[7, "max_violation_uniform_p95"]
    assert table.loc[7, "busiest"] == 0
    assert table["dead"].isna().all()
    plain = balance.balance_table(ids, n_experts=16, layers=[3, 7])
    assert plain.equals(table)


def test_table_reads_the_number_of_experts_or_asks_for_it():
    ids = np.zeros((1, 5, 1), dtype=int)
    logits = SimpleNamespace(sizes={"expert": 8})
    trace = SimpleNamespace(expert_ids=ids, router_logits=logits)
    assert balance.balance_table(trace)["n_experts"].tolist() == [8]
    with pytest.raises(ValueError, match="n_experts="):
        balance.balance_table(ids)
    with pytest.raises(ValueError, match=r"\(layer, token, slot\)"):
        balance.balance_table(ids[0], n_experts=8)
