"""Co-activation against counts by hand, and its chance against all subsets written out."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.routings import by_lot, routing

from ernie_lab.analysis import coactivated_pairs, coactivation, coactivation_counts, pair_chance

# Two experts a token: 0 and 1 together twice, 0 and 2 once, 2 and 3 once.
IDS = [[[0, 1], [1, 0], [0, 2], [3, 2]]]


def test_counts_and_measures_by_hand():
    made = routing(IDS, layers=[7])
    counts = coactivation_counts(made)
    assert counts.sel(layer=7).values.tolist() == [
        [3, 2, 1, 0],
        [2, 2, 0, 0],
        [1, 0, 2, 1],
        [0, 0, 1, 1],
    ]
    share = coactivation(made, "share").sel(layer=7)
    assert share.sel(expert=0, other=1) == pytest.approx(2 / 3)
    assert share.sel(expert=1, other=0) == 1  # of expert 1's tokens, all went to 0 too
    assert np.isnan(share.values.diagonal()).all()
    assert coactivation(made, "jaccard").sel(layer=7, expert=0, other=2) == pytest.approx(1 / 4)
    assert share.attrs["n_tokens"] == 4 and share.attrs["k"] == 2


def test_lift_at_even_load_is_known():
    """All 6 pairs of 4 experts once each: every pair is where chance would have it."""
    made = routing([list(combinations(range(4), 2))])
    lift = coactivation(made, "lift").values[0]
    assert np.allclose(lift[~np.eye(4, dtype=bool)], 1)
    share = coactivation(made, "share").values[0]
    assert np.allclose(share[~np.eye(4, dtype=bool)], 1 / 3)  # (k - 1) / (E - 1)


def test_counts_alone_give_the_same():
    made = by_lot(2, 300, 6, 3)
    counts = coactivation_counts(made)
    for measure in ("share", "jaccard", "lift"):
        assert coactivation(counts, measure).equals(coactivation(made, measure))
        alone = coactivation(counts.values[0], measure)
        assert np.array_equal(alone.values, coactivation(made, measure).values[0], equal_nan=True)
    doubled = coactivation(counts + counts, "lift")
    assert np.allclose(doubled, coactivation(counts, "lift"), equal_nan=True, rtol=1e-6)


def law(odds, k):
    """Inclusion of each, and of each pair, under P(S) ~ product of odds, written out."""
    one, two = np.zeros(len(odds)), np.zeros((len(odds), len(odds)))
    total = 0.0
    for subset in combinations(range(len(odds)), k):
        weight = np.prod(np.array(odds)[list(subset)])
        total += weight
        for i in subset:
            one[i] += weight
            for j in subset:
                two[i, j] += weight
    return one / total, two / total


@given(
    st.lists(st.floats(0.05, 20), min_size=3, max_size=6).flatmap(
        lambda odds: st.tuples(st.just(odds), st.integers(1, len(odds) - 1))
    )
)
def test_pair_chance_is_the_law_of_those_loads(case):
    odds, k = case
    one, two = law(odds, k)
    assert np.allclose(pair_chance(one), two, atol=1e-7)


def test_pair_chance_of_experts_always_or_never_chosen():
    pairs = pair_chance([1.0, 0.0, 0.5, 0.5])  # k = 2: the first always, and one of two
    assert pairs[0].tolist() == [1, 0, 0.5, 0.5] and pairs[2, 3] == 0
    uniform = pair_chance(np.full(64, 6 / 64))
    assert uniform[0, 1] == pytest.approx(6 * 5 / (64 * 63))
    with pytest.raises(ValueError, match="sum to k"):
        pair_chance([0.4, 0.4])


def test_pairs_find_what_was_planted_and_nothing_else():
    made = by_lot(2, 800, 8, 2, n_documents=10)
    ids = made.expert_ids.values.copy()
    ids[1, ::4] = [5, 2]  # a quarter of all tokens of the second layer
    planted = routing(ids, sequence=made.expert_ids.sequence.values, layers=[3, 9])
    table = coactivated_pairs(planted, 1, measure="jaccard", n_draws=200)
    chance, found = table.iloc[0], table.iloc[1]
    assert (found.layer, found.expert, found.other) == (9, 2, 5)
    assert found.low > found.chance_p95 and found.lift > 1.5 and found.n_both > found.expected
    assert chance.layer == 3 and chance.lift < 1.5  # picked as largest, yet not so on the others
    assert found.n_tokens == 400  # half of the documents
    share = coactivated_pairs(planted, 1, measure="share", layer=9, n_draws=50).iloc[0]
    assert {share.expert, share.other} == {2, 5} and share.low <= share.share <= share.high


def test_chance_bound_holds_for_lots():
    table = coactivated_pairs(by_lot(1, 2000, 6, 2), 15, n_draws=20)
    assert (table.lift > table.chance_p95).mean() < 0.35  # 5 % each, 15 pairs that hang together


def test_one_document_in_a_half_gives_no_interval():
    row = coactivated_pairs(by_lot(1, 200, 4, 2, n_documents=2), 1).iloc[0]
    assert np.isnan(row.low) and np.isnan(row.high) and row.n_tokens == 100


def test_errors_name_the_next_step():
    with pytest.raises(ValueError, match="run several texts"):
        coactivated_pairs(routing(IDS))
    with pytest.raises(ValueError, match="every token has one expert"):
        coactivation(routing([[[0], [1]]]))
    with pytest.raises(ValueError, match="measure='cosine'"):
        coactivation(routing(IDS), "cosine")
    with pytest.raises(ValueError, match="coactivation_counts"):
        coactivation(np.array([[3, 1], [1, 2]]))
    with pytest.raises(TypeError, match="two banks"):
        coactivation_counts(np.zeros((1, 2, 2)))
    few = routing(IDS * 1, sequence=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="more texts"):
        coactivated_pairs(few)
