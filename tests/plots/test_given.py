"""A figure that is given the trace, or another table, says what it draws and what returns it."""

import numpy as np
import pandas as pd
import pytest

import ernie_lab as el

RESULTS = {
    "plot_attention_statistics": "attention_statistics",
    "plot_attribution": "direct_logit_attribution",
    "plot_balance": "balance_by",
    "plot_contexts": "context_overlap",
    "plot_correction_bias": "bias_ledger",
    "plot_counterfactual": "cross_bank_counterfactual",
    "plot_domain_load": "domain_specialisation",
    "plot_effects": "el.compare",
    "plot_expert_shift": "bias_ledger",
    "plot_isolation": "modality_isolation",
    "plot_margin_flips": "flips_by_margin",
    "plot_margins": "margin_table",
    "plot_mediation": "el.effects",
    "plot_paired_cka": "paired_cka",
    "plot_residual_geometry": "residual_geometry",
    "plot_routing_diff": "routing_diff",
    "plot_routing_drift": "el.compare",
    "plot_saturation": "router_saturation",
    "plot_shared_ratio": "shared_to_routed",
    "plot_specialisation": "specialisation",
    "plot_token_null": "token_id_null",
}
TABLES = ("plot_margin_flips", "plot_margins", "plot_paired_cka", "plot_token_null")


class Trace:
    """Something with none of what a figure draws."""


@pytest.mark.parametrize("name", RESULTS)
def test_a_trace_in_the_place_of_a_result(name):
    with pytest.raises(TypeError, match=f"{name} draws the .*{RESULTS[name]}.*; this is a Trace"):
        getattr(el.plots, name)(Trace())


@pytest.mark.parametrize("name", TABLES)
def test_another_table(name):
    with pytest.raises(ValueError, match=r"has no column .*; it has \['a'\]"):
        getattr(el.plots, name)(pd.DataFrame({"a": [1]}))


class Run:
    trace = None


def test_a_run_in_the_place_of_its_trace():
    with pytest.raises(TypeError, match=r"not a Run: pass its \.trace"):
        el.plots.plot_expert_map(Run())
    for analysis in (el.analysis.balance_by, el.analysis.bias_ledger):
        with pytest.raises(TypeError, match=r"not a Run: pass its \.trace"):
            analysis(Run())


def test_an_array_is_no_run():
    with pytest.raises(ValueError, match="n_experts= is needed"):
        el.plots.plot_expert_map(np.zeros((1, 2, 1), int))


@pytest.fixture(scope="module")
def lab():
    return el.load("tiny-text")


@pytest.fixture(scope="module")
def trace(lab):
    return lab.run("And God said", keep=["routing", "attention"]).trace


class Store:
    balance = sample = None


@pytest.mark.parametrize("takes", [el.analysis.balance_by, el.plots.plot_expert_map])
def test_what_makes_a_routing_in_the_place_of_one(lab, takes):
    with pytest.raises(TypeError, match=r"not a Lab: pass lab\.run\(prompt, keep='routing'\)"):
        takes(lab)
    with pytest.raises(TypeError, match=r"not a str: el\.Trace\.load\('run1'\) reads"):
        takes("run1")
    with pytest.raises(TypeError, match=r"not a Store: store\.balance.* store\.sample"):
        takes(Store())


def test_a_map_of_one_banks_routing_is_that_of_its_trace(trace):
    ledger = trace.routing()
    whole, one = el.plots.plot_expert_map(trace), el.plots.plot_expert_map(ledger)
    n_experts = trace.n_experts
    assert ledger.n_experts == n_experts == 16
    assert one.alt == whole.alt.replace(" of tiny-text", "")
    with pytest.raises(ValueError, match="bank='vision': this is the routing of the only bank"):
        el.plots.plot_expert_map(ledger, bank="vision")


def test_a_number_in_the_place_of_layers(trace):
    with pytest.raises(TypeError, match=r"layers=3 numbers the rows.*only_layers=\[3\]"):
        el.plots.plot_expert_map(trace, layers=3)
    with pytest.raises(TypeError, match=r"must be a list: only_layers=\[3\]"):
        el.plots.plot_expert_map(trace, only_layers=3)


def test_a_trace_or_all_heads_in_the_place_of_a_pattern(trace):
    way = r"pass trace\['pattern', 2\]\.sel\(head=1\)"
    with pytest.raises(TypeError, match=rf"\[query, key\] is wanted, not a Trace: {way}"):
        el.plots.plot_attention(trace, layer=2, head=1)
    with pytest.raises(ValueError, match=rf"shape \(4, .*{way}"):
        el.plots.plot_attention(trace["pattern", 2], layer=2, head=1)
    with pytest.raises(TypeError, match=r"not a Trace: pass trace\['pattern', 2\]$"):
        el.plots.plot_attention_heads(trace, layer=2)
    el.plots.plot_attention(trace["pattern", 2].sel(head=1), layer=2, head=1)
