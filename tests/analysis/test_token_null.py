"""The null model that knows a token's id and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from analysis.test_saturation import chosen

from ernie_lab.analysis.olmoe import vocabulary_specialisation
from ernie_lab.analysis.token_null import predicted_experts, token_id_null


def test_the_most_frequent_experts_of_an_id_are_predicted() -> None:
    fitted = np.array([[0, 1], [0, 2], [0, 2], [3, 1]])
    found = predicted_experts(np.array([7, 7, 7, 9]), fitted, np.array([7, 9, 8]), 5)
    # 7: experts 0 (three times), 2 (twice). 9: 1 and 3, the more used first. 8 was never seen:
    # the most used overall, 0, and of 1 and 2 the lower number.
    assert found.tolist() == [[0, 2], [1, 3], [0, 1]]


def test_share_right_by_hand() -> None:
    """Documents 0 and 2 are fitted, 1 and 3 measured."""
    ids = [[0], [1], [0], [2], [0], [1], [0], [3]]
    token = [5, 6, 5, 6, 5, 6, 5, 4]
    routing = chosen(ids, sequence=np.repeat([0, 1, 2, 3], 2), token=token)
    row = token_id_null(routing, [0] * 8, n_draws=200).loc[3]
    # Predicted 0 for id 5, 1 for id 6, and 0, the most used, for 4: right, wrong, right, wrong.
    assert row["token_id"] == 0.5
    assert row["context_free"] == 0.5  # always expert 0 (0 and 1 are equally used)
    assert row["uniform"] == 0.25 and row["gain"] == 0
    assert row["seen"] == 0.75 and row["token_id_seen"] == pytest.approx(2 / 3)
    assert (row["n_tokens"], row["n_fitted"]) == (4, 4)
    assert (row["low"], row["high"]) == (0.5, 0.5)


def test_routing_by_token_is_predicted_and_routing_by_context_is_not() -> None:
    rng = np.random.default_rng(0)
    token, sequence = rng.integers(0, 20, 2000), np.repeat(np.arange(20), 100)
    by_token = chosen(token[:, None] % 8, sequence=sequence, token=token, n_experts=8)
    assert token_id_null(by_token).loc[3, "token_id"] == 1
    by_lot = chosen(rng.integers(0, 8, (2000, 1)), sequence=sequence, token=token, n_experts=8)
    row = token_id_null(by_lot).loc[3]
    assert row["token_id"] == pytest.approx(1 / 8, abs=0.03)
    assert row["gain_low"] < 0.02 and row["low"] < row["token_id"] < row["high"]


def test_texts_that_take_turns_by_domain_are_in_both_halves() -> None:
    """Two domains with ids of their own: fitted on the one alone, nothing is known of the other."""
    rng = np.random.default_rng(0)
    sequence = np.repeat(np.arange(20), 50)
    domain = sequence % 2
    token = rng.integers(0, 10, 1000) + 10 * domain
    routing = chosen(token[:, None] % 7, sequence=sequence, token=token, n_experts=8)
    for labels in (domain, None):
        assert token_id_null(routing, labels).loc[3, "token_id"] == 1, labels
    for labels in (domain, None):
        words = vocabulary_specialisation(routing, labels, k=1)
        assert len(words) == 20 and (words["share_other"] == 1).all(), labels
    lone = np.where(sequence == 3, "poem", "prose")
    with pytest.warns(UserWarning, match=r"1 of 2 labels .* one half only \('poem'\)"):
        token_id_null(routing, lone)


def test_one_document_is_refused() -> None:
    with pytest.raises(ValueError, match="this is one: run several texts"):
        token_id_null(chosen([[0], [1]]))
