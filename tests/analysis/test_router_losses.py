"""The router's training terms on a trace, against cases worked out by hand."""

import numpy as np
import pytest
import torch
from analysis.routings import random_probs, routing

from ernie_lab.analysis.router_losses import router_losses
from ernie_lab.model.losses import switch_loss, z_loss


def test_switch_by_hand_with_and_without_the_bias():
    # Two tokens prefer expert 0; the bias sends the second to expert 1.
    probs = [[[0.9, 0.1], [0.6, 0.4]]]
    one = routing(probs, 1, scores=[[[0.9, 0.1], [0.4, 0.6]]])
    table = router_losses(one)
    # f = (1/2, 1/2): 2 (0.5 * 0.75 + 0.5 * 0.25) = 1; blind f = (1, 0): 2 * 0.75
    assert table.loc[1, "switch"] == pytest.approx(1.0)
    assert table.loc[1, "switch_bias_blind"] == pytest.approx(1.5)
    assert np.isnan(table.loc[1, "switch_low"]) and "orthogonal" not in table


def test_z_and_orthogonal_by_hand():
    one = routing([[[0.5, 0.5], [0.5, 0.5]]], 1)
    one.router_logits = one.router_logits * 0 + 1
    gates = {1: torch.tensor([[2.0, 0.0], [3.0, 3.0]])}
    table = router_losses(one, gates)
    assert table.loc[1, "z"] == pytest.approx((1 + np.log(2)) ** 2)
    assert table.loc[1, "orthogonal"] == pytest.approx(0.25)


def test_layers_agree_with_the_losses_of_training():
    one = routing(random_probs(3), 2, layers=[2, 5, 9], sequence=np.arange(60) // 6)
    table = router_losses(one, n_draws=200)
    assert table.index.tolist() == [2, 5, 9]
    for i, layer in enumerate([2, 5, 9]):
        probs = torch.from_numpy(one.router_probs.values[i]).float()
        ids = torch.from_numpy(one.expert_ids.values[i].copy())
        logits = torch.from_numpy(one.router_logits.values[i]).float()
        assert table.loc[layer, "switch"] == pytest.approx(float(switch_loss(probs, ids)), rel=1e-5)
        assert table.loc[layer, "z"] == pytest.approx(float(z_loss(logits)), abs=1e-5)
        assert table.loc[layer, "switch_low"] < table.loc[layer, "switch_high"]
        assert table.loc[layer, "z_low"] <= table.loc[layer, "z"] <= table.loc[layer, "z_high"]


def test_gates_of_every_layer_are_needed():
    with pytest.raises(ValueError, match=r"layers \[7\], but not \[1, 2\]"):
        router_losses(routing(random_probs(), 2), {7: torch.eye(8)})
