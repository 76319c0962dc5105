"""Margins, the noise of scores, and flips against margins."""

import numpy as np
import pytest
from analysis.routings import random_probs, routing

import ernie_lab as el
from ernie_lab.analysis.margins import flips_by_margin, margin_table, score_noise, set_flips


def test_set_flips_ignore_order():
    assert set_flips([[0, 1], [0, 1], [0, 1]], [[1, 0], [1, 2], [2, 3]]).tolist() == [0, 0.5, 1]
    with pytest.raises(ValueError, match="shapes"):
        set_flips([[0, 1]], [[0]])


def test_quantiles_and_the_share_within_noise():
    # k = 1 of 2: margins 0.0, 0.1, ..., 1.0 in layer 1, all 0.5 in layer 2.
    gaps = np.linspace(0, 1, 11)
    probs = np.stack([np.stack([0.5 + gaps / 2, 0.5 - gaps / 2], -1), [[0.75, 0.25]] * 11])
    one = routing(np.clip(probs, 1e-12, None), 1, sequence=np.arange(11) // 4)
    table = margin_table(one, noise=0.2501)
    assert table.loc[1, "p50"] == pytest.approx(0.5) and table.loc[1, "p05"] == pytest.approx(0.05)
    assert table.loc[2, ["p05", "p95"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.loc[1, "within_noise"] == pytest.approx(3 / 11) and table.loc[2, "n_tokens"] == 11
    assert table.loc[1, "within_noise_low"] <= 3 / 11 <= table.loc[1, "within_noise_high"]
    assert table.loc[2, "within_noise"] == 0 and "noise" not in margin_table(one)


def shifted(one, by):
    """The same choices asked of scores that moved by `by` on expert 0."""
    scores = one.selection_scores.values.copy()
    scores[..., 0] += by
    return routing(one.router_probs.values, one.expert_ids.shape[-1], scores=scores)


def test_noise_is_the_percentile_of_the_same_metric():
    one = routing([[[0.7, 0.3], [0.45, 0.55]]], 1)
    runs = [shifted(one, by) for by in (0, 0, 0, 0, 0, 0, 0, 0.2)]
    noise = score_noise(one, runs)
    # |changes| of scores: 32 numbers, of which 2 are 0.2; of margins: 16, of which 2.
    assert noise.loc[1, "score"] == pytest.approx(np.percentile([0] * 30 + [0.2] * 2, 95))
    assert noise.loc[1, "margin"] == pytest.approx(0.2)
    assert noise.loc[1, "flips"] == pytest.approx(0.5 / 8) and noise.loc[1, "n_runs"] == 8
    table = margin_table(one, noise=noise)
    assert table.loc[1, "noise"] == pytest.approx(0.2)
    assert table.loc[1, "within_noise"] == 0.5


def test_no_flip_where_the_margin_is_beyond_twice_the_change():
    one = routing(random_probs(1, 400), 2, sequence=np.arange(400) // 10)
    by = np.random.default_rng(1).uniform(-0.02, 0.02, one.selection_scores.shape)
    scores = one.selection_scores.values + by
    other = routing(one.router_probs.values, 2, scores=scores, sequence=np.arange(400) // 10)
    table = flips_by_margin(one, other, edges=[0, 0.01, 0.04, 1])
    assert table["n_tokens"].sum() == 400
    assert table.loc[(1, 0), "flips"] > table.loc[(1, 1), "flips"] > 0
    assert table.loc[(1, 2), "flips"] == 0
    assert table.loc[(1, 0), "low"] < table.loc[(1, 0), "flips"] < table.loc[(1, 0), "high"]
    tenths = flips_by_margin(one, other)
    assert tenths.loc[1, "n_tokens"].tolist() == [40] * 10


def test_what_they_refuse():
    one = routing(random_probs(), 2)
    with pytest.raises(ValueError, match="7 equivalent runs"):
        score_noise(one, [one] * 7)
    with pytest.raises(ValueError, match="there is no margin"):
        margin_table(routing(random_probs(), 8))
    with pytest.raises(ValueError, match="there is no margin"):
        score_noise(routing(random_probs(), 8), [routing(random_probs(), 8)] * 8)
    with pytest.raises(ValueError, match="must rise"):
        flips_by_margin(one, one, edges=[0, 0])
    every = routing(random_probs(), 8)
    with pytest.raises(ValueError, match="there is no margin"):
        flips_by_margin(every, every)
    with pytest.raises(ValueError, match=r"but not \[2\]"):
        margin_table(one, noise=score_noise(one, [one] * 8).loc[[1]])


def test_a_real_trace_has_margins_and_no_noise_against_itself():
    lab = el.load("tiny-text")
    trace = lab.run(["And God said", "Let there be"], keep="routing").trace
    noise = score_noise(trace, [trace] * 8)
    assert (noise[["score", "margin", "flips"]] == 0).all(axis=None)
    table = margin_table(trace, noise=noise)
    assert table.index.tolist() == [1, 2, 3, 4, 5] and (table["p50"] > 0).all()
    assert flips_by_margin(trace, trace)["flips"].max() == 0
