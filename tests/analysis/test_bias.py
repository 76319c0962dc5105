"""The bias ledger: sets by hand, local beside global, and what it refuses."""

import numpy as np
import pytest
from analysis.routings import random_probs, routing

import ernie_lab as el
from ernie_lab.analysis.bias import bias_ledger

# Four experts, two chosen. Token 0: 0, 1 by probability; the bias on 3 displaces 1. Token 1: 0, 2
# either way. Token 2: 0, 1; the bias displaces 1 for 3.
PROBS = [[[0.5, 0.3, 0.0, 0.2], [0.6, 0.05, 0.3, 0.05], [0.4, 0.35, 0.0, 0.25]]]
BIAS = [[1.0, 1.0, 1.0, 1.2]]


@pytest.fixture
def by_hand():
    probs = np.clip(PROBS, 1e-9, None)
    return routing(probs, 2, BIAS, layers=[4], sequence=[0, 0, 1])


def test_sets_and_shares_by_hand(by_hand):
    found = bias_ledger(by_hand)
    experts = found.experts.loc[4]
    assert experts["bias"].tolist() == pytest.approx([-0.05, -0.05, -0.05, 0.15])
    assert experts["added"].tolist() == pytest.approx([0, 0, 0, 2 / 3])
    assert experts["displaced"].tolist() == pytest.approx([0, 2 / 3, 0, 0])
    # Slots: with 0 3 | 0 2 | 0 3, without 0 1 | 0 2 | 0 1; fair is 1.5 of 6.
    assert experts["load"].tolist() == pytest.approx([2, 0, 2 / 3, 4 / 3])
    assert experts["local_load"].tolist() == pytest.approx([2, 4 / 3, 2 / 3, 0])
    layer = found.layers.loc[4]
    assert layer["local_slots"] == pytest.approx(2 / 6)
    assert layer["local_tokens"] == pytest.approx(2 / 3)
    # Token 0: (5/7, 2/7) on 0, 3 against (5/8, 3/8) on 0, 1: 3/8 leave expert 1.
    # Token 2: (0.4, 0.25)/0.65 against (0.4, 0.35)/0.75: 35/75 leave expert 1.
    assert layer["local_weight"] == pytest.approx((3 / 8 + 0 + 35 / 75) / 3)
    assert layer["max_violation"] == pytest.approx(1) == layer["local_max_violation"]
    assert layer["local_max_violation_change"] == pytest.approx(0)
    assert layer["bias_range"] == pytest.approx(0.2)
    # bias ~ (-1, -1, -1, 3), unbiased slots (3, 2, 1, 0): r = -6 / sqrt(12 * 5)
    assert layer["correlation"] == pytest.approx(-6 / np.sqrt(60))
    assert not found.has_global and "same states" in repr(found)


def test_what_is_added_is_displaced_and_the_loads_differ_by_both():
    rng = np.random.default_rng(0)
    one = routing(random_probs(), 3, rng.normal(0, 0.05, (2, 8)), sequence=np.arange(60) // 6)
    found = bias_ledger(one, n_draws=200)
    sums = found.experts.groupby("layer")[["added", "displaced"]].sum()
    assert sums["added"].tolist() == pytest.approx(sums["displaced"].tolist())
    assert found.layers["local_slots"].tolist() == pytest.approx((sums["added"] / 3).tolist())
    moved = (found.experts["added"] - found.experts["displaced"]) * 8 / 3
    change = found.experts["load"] - found.experts["local_load"]
    assert moved.tolist() == pytest.approx(change.tolist())
    layers = found.layers
    assert (layers["local_slots_low"] < layers["local_slots_high"]).all()
    assert (layers["correlation_low"] <= layers["correlation_high"]).all()


def test_a_constant_bias_does_nothing_and_correlates_with_nothing():
    found = bias_ledger(routing(random_probs(1), 2, np.full((1, 8), 0.3)))
    assert found.layers.loc[1, "local_slots"] == 0
    assert np.isnan(found.layers.loc[1, "correlation"])


def test_global_is_a_second_run(by_hand):
    probs = np.clip(PROBS, 1e-9, None)
    probs[0, 1] = [0.05, 0.6, 0.3, 0.05]  # a later layer would see other states
    without = routing(probs, 2, layers=[4], sequence=[0, 0, 1])
    found = bias_ledger(by_hand, without)
    layer = found.layers.loc[4]
    assert layer["global_slots"] == pytest.approx(3 / 6) and layer["local_slots"] == 2 / 6
    assert found.has_global and "Taken away in all layers" in repr(found)
    assert found.experts.loc[4, "global_load"].tolist() == pytest.approx([4 / 3, 2, 2 / 3, 0])


def test_it_refuses_other_choices_other_tokens_and_a_biased_second_run(by_hand):
    edited = routing(np.clip(PROBS, 1e-9, None), 2, BIAS, ids=[[[2, 1], [0, 2], [0, 3]]])
    with pytest.raises(ValueError, match="do not follow from logits and correction bias"):
        bias_ledger(edited)
    with pytest.raises(ValueError, match="with its correction bias; run the same prompts"):
        bias_ledger(by_hand, by_hand)
    other = routing(np.clip(PROBS, 1e-9, None), 2, layers=[4], sequence=[0, 1, 1])
    with pytest.raises(ValueError, match="has sequence 0 in the one and 1"):
        bias_ledger(by_hand, other)


def test_on_a_real_model_the_first_layer_is_local_and_global_alike():
    lab = el.load("tiny-text")
    prompts = ["And God said, Let there be light", '{"city": "paris", "active": true}']
    base = lab.run(prompts, keep="routing").trace
    off = lab.run(prompts, keep="routing", edits=el.routing.without_correction_bias()).trace
    found = bias_ledger(base, off, n_draws=50)
    assert found.layers.index.tolist() == [1, 2, 3, 4, 5]
    assert found.layers.loc[1, "global_slots"] == found.layers.loc[1, "local_slots"] > 0
    ledger = base.routing()
    local = 1 - ledger.without_bias.mean(("token", "slot"))
    assert found.layers["local_slots"].tolist() == pytest.approx(local.values.tolist())
    with pytest.raises(ValueError, match="with its correction bias"):
        bias_ledger(base, base)
