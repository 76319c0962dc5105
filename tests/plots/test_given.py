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
