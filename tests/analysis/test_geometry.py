"""Angles by hand, neurons shuffled and found again, and routers that nobody taught."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.models import small_model, small_vl_model

import ernie_lab as el
from ernie_lab.analysis import (
    expert_output_similarity,
    input_alignment,
    matched_neurons,
    router_geometry,
    router_similarity,
)
from ernie_lab.analysis.geometry import mixture


@pytest.fixture
def text():
    return small_model()


def layer_of(model):
    return next(iter(model.routers()))


def test_cosines_by_hand(text):
    layer = layer_of(text)
    weight_ED = text.routers()[layer].weight_ED.data
    weight_ED[0] = 0
    weight_ED[0, 0] = 2.0
    weight_ED[1] = 0
    weight_ED[1, :2] = torch.tensor([3.0, 3.0])
    found = router_similarity(text)
    assert found.sel(layer=layer, expert=0, other=1) == pytest.approx(0.5**0.5)
    assert np.allclose(found.values, found.values.transpose(0, 2, 1))
    assert found.attrs["chance_spread"] == pytest.approx(weight_ED.shape[1] ** -0.5)


def test_the_table_of_routers_beside_random_rows():
    model = small_vl_model()
    table = router_geometry(model, n_random=20)
    assert set(table.bank) == {"text", "vision"}
    row = table[table.bank == "vision"].iloc[0]
    values = router_similarity(model, "vision").sel(layer=row.layer).values
    pairs = values[np.triu_indices(len(values), 1)]
    assert row["mean"] == pytest.approx(pairs.mean())
    assert row.largest == values[row.expert, row.other] and row.expert < row.other
    assert abs(row.largest) == pytest.approx(np.abs(pairs).max())
    # The mean size of the cosine of random rows is about sqrt(2 / pi) of its deviation.
    assert row.random_mean_size == pytest.approx(0.8 * row.random_sd, rel=0.15)
    assert row.random_largest_p95 > 2 * row.random_sd
    assert "bank" not in router_geometry(small_model(), n_random=2)
    assert router_similarity(model, "text/vision").shape == (len(model.routers()["text"]),
                                                             *values.shape)  # fmt: skip


def test_neurons_are_matched_whatever_their_order_and_signs(text):
    layer = layer_of(text)
    _, bank = mixture(text, layer)
    hidden = bank.down_EDF.shape[2]
    order, signs = torch.randperm(hidden), torch.sign(torch.randn(hidden))
    with torch.no_grad():
        bank.gate_up_E2FD[1, 0] = bank.gate_up_E2FD[0, 0][order]
        bank.gate_up_E2FD[1, 1] = 3 * signs[:, None] * bank.gate_up_E2FD[0, 1][order]
        bank.down_EDF[1] = signs * bank.down_EDF[0][:, order]
    found = matched_neurons(text, layer, experts=[0, 1, 2])
    assert found.sel(expert=0, other=1) == pytest.approx(1, abs=1e-5)
    assert found.sel(expert=2, other=2) == 1
    assert found.sel(expert=0, other=2) == pytest.approx(found.attrs["chance"], abs=0.1)
    assert 0 < found.attrs["chance"] <= found.attrs["chance_most"] < 0.8
    width = bank.down_EDF.shape[1]
    outs = expert_output_similarity(text, np.random.default_rng(0).normal(size=(50, width)), layer)
    assert outs.sel(expert=0, other=1) == pytest.approx(1, abs=1e-5)
    assert outs.sel(expert=0, other=2) < 0.9 and outs.attrs["n_tokens"] == 50


@pytest.fixture(scope="module")
def recorded():
    lab = el.load("tiny-text")
    prompts = ["12+34=046\n", "the cat has a hat", '{"a": 3, "b": 4}', "有六里路，我走了十里"] * 3
    return lab, lab.run(prompts, keep=["routing", "blocks.3.moe.in"]).trace


def test_alignment_by_hand(recorded):
    lab, trace = recorded
    table = input_alignment(trace, lab, 3, n_redrawn=2, n_draws=50)
    weight_E = lab.model.routers()[3].weight_ED.detach().double().numpy()
    states = trace["blocks.3.moe.in"].values.astype(float)
    sent = (trace.expert_ids.sel(layer=3).values == 5).any(1)
    row = table.set_index("expert").loc[5]

    def cosine(x):
        return x @ weight_E[5] / np.linalg.norm(x) / np.linalg.norm(weight_E[5])

    assert row.n_sent == sent.sum()
    assert row.sent == pytest.approx(cosine(states[sent].mean(0)))
    assert row.not_sent == pytest.approx(cosine(states[~sent].mean(0)))
    assert row.apart == pytest.approx(cosine(states[sent].mean(0) - states[~sent].mean(0)))
    assert row.low < row.high and 0 < row.redrawn < row.redrawn_p95 < 1
    assert (table.apart > table.random_sd).mean() > 0.9  # as in any router


def test_errors_name_the_bank_and_the_layer(recorded, text):
    lab, trace = recorded
    model = small_vl_model()
    layer = next(iter(model.routers()["text"]))
    with pytest.raises(ValueError, match="bank='text' or bank='vision'"):
        mixture(model, layer)
    with pytest.raises(ValueError, match="leave it out"):
        mixture(text, layer_of(text), "text")
    with pytest.raises(ValueError, match="layer 99 has no experts; the mixture layers are"):
        mixture(SimpleNamespace(model=text), 99)
    with pytest.raises(ValueError, match="one of 'text', 'vision', 'text/vision'"):
        router_similarity(model)
    with pytest.raises(ValueError, match="two or more different"):
        matched_neurons(text, layer_of(text), experts=[0, 0])
    with pytest.raises(ValueError, match="keep 'blocks"):
        expert_output_similarity(text, np.zeros((3, 2)), layer_of(text))
    with pytest.raises(KeyError):
        input_alignment(trace, lab, 2)
