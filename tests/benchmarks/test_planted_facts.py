"""The benchmark's metrics on cases known by hand, and the whole of it on a few boards."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.planted.methods import Sizes
from benchmarks.planted.scoring import METRICS, auroc, precision, spearman
from benchmarks.planted.taps import EXPERTS
from benchmarks.planted_facts import benchmark

TRUTH = np.array([[5.0, 0.0, 3.0, 1.0]])


def test_the_truth_itself_is_found_and_its_reverse_is_not() -> None:
    assert spearman(TRUTH, TRUTH) == pytest.approx(1)
    assert spearman(-TRUTH, TRUTH) == pytest.approx(-1)
    assert precision(TRUTH, TRUTH, 2) == 1 and precision(-TRUTH, TRUTH, 2) == 0
    assert auroc(TRUTH, TRUTH >= 3) == 1 and auroc(-TRUTH, TRUTH >= 3) == 0


def test_level_scores_know_nothing() -> None:
    level = np.zeros_like(TRUTH)
    assert spearman(level, TRUTH) == 0
    assert auroc(level, TRUTH >= 3) == 0.5
    assert np.isnan(auroc(TRUTH, TRUTH > 9)[0])


def test_by_hand() -> None:
    scores = np.array([[2.0, 3.0, 1.0, 0.0]])
    # Ranks 3 4 2 1 against 4 1 3 2: 1 - 6 (1 + 9 + 1 + 1) / (4 x 15).
    assert spearman(scores, TRUTH) == pytest.approx(-0.2)
    assert precision(scores, TRUTH, 1) == 0 and precision(scores, TRUTH, 2) == 0.5
    assert auroc(scores, TRUTH >= 3) == 0.5


def test_a_small_run_has_every_figure() -> None:
    found = benchmark(Sizes(truth=4, methods=4, integrated=4, steps=1, pooled_draws=5))
    assert found["truth"]["holders"]["layer 1"] > 0
    for among, table in found["tables"].items():
        wanted = {"spearman", "auroc"} if among == "chosen" else set(METRICS)
        assert all(set(row) == wanted for row in table.values())
        assert table["zero ablation (the truth again)"]["auroc"]["mean"] > 0.7
    assert len(EXPERTS) == 24
