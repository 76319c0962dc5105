"""Gradients against differences, sums against changes, estimates against true patches."""

import numpy as np
import pytest
import torch
from support.labs import picture, small_lab, small_vl_lab

import ernie_lab as el
from ernie_lab.analysis.gradients import TOP_K_CAVEAT, activation_gradient, gradient_attribution
from ernie_lab.lab import Lab
from ernie_lab.trace.keys import NotKept

LAST, MIDDLE = "blocks.2.resid_post", "blocks.1.resid_mid"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def contrast(run) -> torch.Tensor:
    return run.logits[0, -1, 5] - run.logits[0, -1, 9]


def test_activation_gradient_by_hand(lab: Lab) -> None:
    """At the logits themselves the contrast is linear: the product is the contrast."""
    run = lab.run("hello", keep="logits", grad=True)
    table = activation_gradient(run.trace, contrast(run), "logits")
    assert table["value"].tolist()[:4] == [0.0] * 4
    assert table["value"][4] == pytest.approx(float(contrast(run).detach()), rel=1e-6)
    # An RMS norm does not see the length of its input, so x . gradient is 0 before it.
    run = lab.run("hello", keep=LAST, grad=True)
    table = activation_gradient(run.trace, contrast(run), LAST)
    assert abs(table["value"]).max() < 1e-4


def test_heads_stay_apart(lab: Lab) -> None:
    run = lab.run(["hello", "no"], keep=["blocks.1.attn.z", "blocks.1.attn.result"], grad=True)
    table = activation_gradient(run.trace, run.loss, ["blocks.1.attn.z", "blocks.1.attn.result"])
    by_site = {site: part["value"].to_numpy() for site, part in table.groupby("site", sort=False)}
    assert len(by_site["blocks.1.attn.z"]) == 7 * 4
    # W_O is linear, so a head's share is the same before and after it.
    z, result = by_site["blocks.1.attn.z"], by_site["blocks.1.attn.result"]
    np.testing.assert_allclose(z, result, atol=1e-6)
    assert abs(z).max() > 1e-3


def test_a_baseline_moves_the_origin(lab: Lab) -> None:
    other = lab.run("jelly", keep="logits").trace
    run = lab.run("hello", keep="logits", grad=True)
    table = activation_gradient(run.trace, contrast(run), "logits", baseline=other)
    logits = torch.from_numpy(other["logits"].values[-1].copy())
    expected = float(contrast(run).detach()) - float(logits[5] - logits[9])
    assert table["value"][4] == pytest.approx(expected, rel=1e-5)


def test_a_linear_site_is_estimated_exactly(lab: Lab) -> None:
    """From the logits on nothing bends and nothing routes: all three methods agree."""
    found = gradient_attribution(lab, "hello", contrast, "logits", steps=2, check=5)
    table = found.table
    np.testing.assert_allclose(table["true"], table["activation_gradient"], atol=1e-5)
    np.testing.assert_allclose(table["true"], table["integrated"], atol=1e-5)
    assert found.correlation["pearson"].tolist() == pytest.approx([1, 1])
    assert found.completeness["gap"][0] < 1e-4
    assert found.completeness["flips"][0] == 0


def test_true_patches_are_true(lab: Lab) -> None:
    other = lab.run("jelly", keep=MIDDLE).trace
    found = gradient_attribution(lab, "hello", contrast, MIDDLE, baseline=other, steps=0, check=100)
    rows = torch.from_numpy(other[MIDDLE].values.copy())
    plain = float(contrast(lab.run("hello")))

    def put(x):
        x[0, 1] = rows[1]
        return x

    by_hand = float(contrast(lab.run("hello", edits=[el.edit(MIDDLE, put)]))) - plain
    assert found.table["true"][1] == pytest.approx(by_hand, abs=1e-5)
    assert found.table["integrated"].isna().all()
    assert found.correlation["n"].tolist() == [5]
    assert found.completeness.empty


def test_integrated_gradients_sum_to_the_change_where_nothing_flips(lab: Lab) -> None:
    """The dense part after the last router: the norm and the head alone."""
    other = lab.run("jelly", keep=LAST).trace
    found = gradient_attribution(lab, "hello", contrast, LAST, baseline=other, steps=40, check=5)
    (row,) = found.completeness.to_dict("records")
    assert row["flips"] == 0
    assert row["gap"] < 0.01
    everything = lab.run("hello", edits=[el.edit(LAST, lambda x: _rows(other, x))])
    change = float(contrast(everything)) - float(contrast(lab.run("hello")))
    assert row["change"] == pytest.approx(change, abs=1e-4)
    # The integral at the one token that matters is its true patch; one gradient is not.
    final = found.table.iloc[-1]
    assert final["integrated"] == pytest.approx(final["true"], rel=0.02)
    assert abs(final["activation_gradient"] - final["true"]) > 10 * abs(
        final["integrated"] - final["true"]
    )


def _rows(trace, x):
    return torch.from_numpy(trace[LAST].values.copy())[None].to(x)


Z, SLOTS = "blocks.2.attn.z", "blocks.2.moe.slot_out"


def test_heads_are_patched_one_by_one(lab: Lab) -> None:
    found = gradient_attribution(lab, "hello", contrast, Z, steps=3, check=1000)
    assert found.table["index"].tolist() == [0, 1, 2, 3] * 5
    row = found.table.query("pos == 2 and index == 3").iloc[0]
    edit = el.edits.zero(Z, heads=3, positions=[2])
    by_hand = float(contrast(lab.run("hello", edits=edit))) - float(contrast(lab.run("hello")))
    assert row["true"] == pytest.approx(by_hand, abs=1e-6)
    run = lab.run("hello", keep=Z, grad=True)
    plain = activation_gradient(run.trace, contrast(run), Z)["value"]
    np.testing.assert_allclose(found.table["activation_gradient"], -plain, atol=1e-6)


def test_slots_of_the_last_layer_close(lab: Lab) -> None:
    """Behind the last router stand a sum, the norm and the head: nothing can flip."""
    found = gradient_attribution(lab, "hello", contrast, SLOTS, steps=40, check=4)
    k = lab.config.decoder.moe.router.n_chosen
    assert found.table["index"].tolist() == list(range(k)) * 5
    (row,) = found.completeness.to_dict("records")
    assert row["flips"] == 0 and row["gap"] < 0.01
    silent = lab.run("hello", edits=el.edits.zero(SLOTS))
    assert row["change"] == pytest.approx(
        float(contrast(silent)) - float(contrast(lab.run("hello"))), abs=1e-5
    )


def test_router_logits_in_a_model_with_two_banks() -> None:
    """Rows of a bank: only its tokens, told by their own positions."""
    vl = small_vl_lab()
    given = {"images": [picture(1)]}
    path = "blocks.2.moe.vision.router_logits"
    found = gradient_attribution(vl, "what?", lambda run: run.loss, path, steps=2, check=3, **given)
    trace = vl.run("what?", keep=path, **given).trace
    tokens = trace.tokens.query("bank == 'vision'")
    assert found.table["pos"].tolist() == tokens["pos"].tolist()
    assert found.table["true"].notna().sum() == 3
    row = found.table.dropna(subset="true").iloc[0]
    edit = el.edits.zero(path, positions=[row["pos"]])
    by_hand = vl.run("what?", edits=edit, **given).loss - vl.run("what?", **given).loss
    assert row["true"] == pytest.approx(float(by_hand), abs=1e-6)


def test_an_equal_baseline_has_no_effect(lab: Lab) -> None:
    own = lab.run("hello", keep=MIDDLE).trace
    found = gradient_attribution(lab, "hello", contrast, MIDDLE, baseline=own, steps=0, check=2)
    assert (found.table["activation_gradient"] == 0).all()
    assert (found.table["true"].dropna() == 0).all()


def test_the_caveat_stands_in_the_result(lab: Lab) -> None:
    found = gradient_attribution(
        lab,
        ["hello", "no"],
        lambda run: run.loss,
        ["blocks.0.resid_post", MIDDLE],
        check=6,
        steps=4,
    )
    assert TOP_K_CAVEAT in repr(found) and found.caveat == TOP_K_CAVEAT
    assert "top-k" in found._repr_html_()
    assert "top-k" in gradient_attribution.__doc__ and "top-k" in activation_gradient.__doc__
    assert len(found.table) == 14
    assert found.table["true"].notna().sum() == 6
    assert (found.completeness["flips"] > 0).all()
    assert found.correlation["pearson"].between(-1, 1).all()


def test_what_is_refused(lab: Lab) -> None:
    with pytest.raises(ValueError, match="one number"):
        gradient_attribution(lab, "hello", lambda run: run.logits, MIDDLE)
    with pytest.raises(ValueError, match="no vector per token"):
        gradient_attribution(lab, "hello", contrast, "blocks.1.attn.pattern")
    for site, why in {
        "blocks.1.attn.pattern": "attention map",
        "blocks.1.norm1.scale": r"one number per token \(b s\)",
        "blocks.1.moe.expert_ids": "integers",
    }.items():
        with pytest.raises(ValueError, match=why):
            gradient_attribution(lab, "hello", contrast, site)
    with pytest.raises(ValueError, match="patches and no tokens"):
        gradient_attribution(small_vl_lab(), "what?", contrast, "vision.out")
    longer = lab.run("hello there", keep=MIDDLE).trace
    with pytest.raises(ValueError, match="equal length"):
        gradient_attribution(lab, "hello", contrast, MIDDLE, baseline=longer)
    run = lab.run("hello", keep="logits", grad=True)
    number = contrast(run)
    with pytest.raises(NotKept, match=r"blocks\.1\.resid_mid"):
        activation_gradient(run.trace, number, MIDDLE)
