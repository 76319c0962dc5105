"""Bits between experts and labels: cases with known answers, and what small samples do to them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie_lab.analysis.information import (
    Rows,
    codes_of,
    information_of_counts,
    mutual_information,
    null_p95,
)
from ernie_lab.interventions.bootstrap import draws_of

NATS = 1 / math.log(2)


def once(n_documents: int) -> np.ndarray:
    return np.ones((1, n_documents), dtype=np.int64)


def test_all_told_and_nothing_told() -> None:
    labels = np.repeat(["prose", "code"], 4)
    told = (labels == "code").astype(int)[:, None]
    # Plug-in 1 bit; Miller-Madow adds (1 + 1 - 1) / (2 x 8) nats.
    assert mutual_information(labels, told, 2) == pytest.approx(1 + NATS / 16)
    nothing = np.array([0, 1] * 4)[:, None]
    assert mutual_information(labels, nothing, 2) == pytest.approx((1 + 1 - 3) / 16 * NATS)


def test_two_slots_by_hand() -> None:
    """Label a: experts 0 and 1 for both tokens; b: 0 and 2. The shared expert tells nothing."""
    ids = np.array([[0, 1], [0, 1], [0, 2], [0, 2]])
    # H(expert) = 1.5 bits, H(expert | label) = 1; (2 - 1 + 3 - 1 - 4 + 1) / 16 = 0 nats added.
    assert mutual_information(["a", "a", "b", "b"], ids, 3) == pytest.approx(0.5)


def test_counts_of_a_corpus_give_the_same() -> None:
    rng = np.random.default_rng(0)
    label, ids = rng.integers(0, 5, 300), rng.integers(0, 7, (300, 2))
    counts = np.zeros((5, 7))
    np.add.at(counts, (np.repeat(label, 2), ids.ravel()), 1)
    assert information_of_counts(counts) == pytest.approx(mutual_information(label, ids, 7))
    assert information_of_counts([[4, 0], [0, 4]]) == pytest.approx(1 + NATS / 16)
    with pytest.raises(ValueError, match="nothing was counted"):
        information_of_counts([[0, 0]])
    with pytest.raises(ValueError, match=r"a table \[label expert\]"):
        information_of_counts([1, 2])


def test_rows_count_by_their_weight_if_asked() -> None:
    """Same tokens; the shared expert has three quarters of the weight, so half as much is told."""
    ids = np.array([[0, 1], [0, 1], [0, 2], [0, 2]])
    weights = np.array([[0.75, 0.25]] * 4)
    found = mutual_information(["a", "a", "b", "b"], ids, 3, weights=weights)
    assert found == pytest.approx(0.25)
    equal = mutual_information(["a", "a", "b", "b"], ids, 3, weights=np.full((4, 2), 0.5))
    assert equal == pytest.approx(0.5)


def test_given_the_token_only_what_the_label_adds_is_left() -> None:
    """The expert is the token's: a bit without condition, nothing with it."""
    token = np.array([5, 5, 9, 9] * 10)
    label = np.array(["x", "x", "y", "y"] * 10)
    ids = (token == 9).astype(int)[:, None]
    assert mutual_information(label, ids, 2) == pytest.approx(1, abs=0.03)
    # Every distribution but the conditions' is the condition's: 2 + 2 - 2 - 2 cells.
    assert mutual_information(label, ids, 2, given=token) == pytest.approx(0)
    # And the other way: experts that follow the label within each token tell their bit.
    label = np.array(["x", "y"] * 20)
    ids = (label == "y").astype(int)[:, None]
    # (4 + 4 - 4 - 2) / 80 nats are added.
    expected = 1 + 2 / 80 * NATS
    assert mutual_information(label, ids, 2, given=token) == pytest.approx(expected)


def test_tokens_without_label_and_slots_without_expert_are_left_out() -> None:
    labels = np.array(["a", "a", None, "b", np.nan, "b"], dtype=object)
    ids = np.array([[0, -1], [0, -1], [1, 1], [1, -1], [0, 0], [1, -1]])
    assert codes_of(labels).tolist() == [0, 0, -1, 1, -1, 1]
    expected = mutual_information(["a", "a", "b", "b"], [[0], [0], [1], [1]], 2)
    assert mutual_information(labels, ids, 2) == pytest.approx(expected)
    with pytest.raises(ValueError, match="nothing can be told"):
        mutual_information([None, None], [[0], [1]], 2)
    with pytest.raises(ValueError, match="expert id 2 with n_experts=2"):
        mutual_information(["a", "b"], [[0], [2]], 2)
    with pytest.raises(ValueError, match=r"expected \(3, k\)"):
        mutual_information(["a", "b", "b"], [[0], [1]], 2)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 3))
def test_names_of_labels_and_experts_do_not_matter(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    label, ids = rng.integers(0, 4, 60), rng.integers(0, 6, (60, k))
    swap = rng.permutation(6)
    renamed = np.array(["prose", "code", "sums", "json"])[rng.permutation(4)][label]
    found = mutual_information(label, ids, 6)
    assert mutual_information(renamed, swap[ids], 6) == pytest.approx(found)
    entropy = mutual_information(label, np.repeat(label[:, None], k, 1), 6)
    plug_in_excess = 6 * NATS / (2 * 60 * k) * 4
    assert found <= entropy + plug_in_excess


def test_the_correction_removes_most_of_the_bias_of_independent_labels() -> None:
    rng = np.random.default_rng(0)
    found = [
        mutual_information(rng.integers(0, 8, 400), rng.integers(0, 16, (400, 1)), 16)
        for _ in range(40)
    ]
    # Uncorrected: (8 - 1) (16 - 1) / (2 x 400) nats = 0.19 bits.
    assert abs(np.mean(found)) < 0.04


def test_conditional_information_of_rare_tokens_is_biased_and_permuting_shows_it() -> None:
    """Experts follow the token alone, so nothing is told beyond it; each id occurs six times.

    What labels permuted among equal ids give is the same bias: the difference is the estimate.
    """
    rng = np.random.default_rng(0)
    token = np.repeat(np.arange(300), 6)
    favourite = rng.integers(0, 16, 300)[token]
    ids = np.where(rng.random(1800) < 0.5, favourite, rng.integers(0, 16, 1800))[:, None]
    label = rng.integers(0, 8, 1800)
    found = mutual_information(label, ids, 16, given=token)
    order = np.lexsort((rng.random(1800), token))
    permuted = np.empty_like(label)
    permuted[np.arange(1800)] = label[order]  # rows are sorted by token: shuffled within each
    null = mutual_information(permuted, ids, 16, given=token)
    assert found > 0.2, "not to be read alone"
    assert abs(found - null) < 0.05


def test_an_interval_lies_around_what_was_found() -> None:
    """Twenty documents of two labels, experts by label with noise; drawn documents repeat."""
    rng = np.random.default_rng(1)
    document = np.repeat(np.arange(20), 30)
    label = document % 2
    ids = np.where(rng.random(600) < 0.8, label, rng.integers(0, 4, 600))[:, None]
    rows = Rows.of(label, ids, document, 4)
    assert (rows.n_tokens, rows.n_documents, rows.n_labels) == (600, 20, 2)
    found, low, high = rows.interval(draws_of(20, 400, 0))
    assert found == pytest.approx(mutual_information(label, ids, 4))
    assert low < found < high < found + 0.2
    assert rows.label_bits() == pytest.approx(1 + NATS / 1200)
    assert rows.bits(once(20))[0] == pytest.approx(found)
    alone = Rows.of(label, ids, np.zeros(600, dtype=int), 4)
    assert np.isnan(alone.interval(draws_of(1, 10, 0))[1:]).all()


def test_a_draw_counts_documents_as_often_as_they_were_drawn() -> None:
    label, ids = np.array([0, 1, 0]), np.array([[0], [1], [1]])
    rows = Rows.of(label, ids, np.arange(3), 2)
    twice = Rows.of(label[[0, 0, 1]], ids[[0, 0, 1]], np.arange(3), 2)
    assert rows.bits(np.array([[2, 1, 0]]))[0] == pytest.approx(twice.bits(once(3))[0])


def test_a_null_is_exceeded_in_at_most_five_percent_of_cases() -> None:
    """By rank: of draws of one kind the last is above the percentile of the others in k / (n + 1)
    of all orders, k the places above it."""
    for n in (19, 20, 21, 39, 40, 99, 100, 1000):
        above = (np.arange(n) > null_p95(np.random.default_rng(0).permutation(n))).sum()
        assert (above + 1) / (n + 1) <= 0.05 < (above + 2) / (n + 1)
    assert null_p95([3.0, 1.0]) == 3.0
    rng = np.random.default_rng(0)
    drawn = rng.normal(size=(4000, 21))
    assert np.mean([row[0] > null_p95(row[1:]) for row in drawn]) == pytest.approx(1 / 21, abs=0.01)
