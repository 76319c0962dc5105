"""A bank without a token: every analysis says so, in the same words."""

from types import SimpleNamespace

import pytest
from analysis.routings import random_probs, routing

from ernie_lab import analysis

ASKED = {
    "balance_by": lambda one: analysis.balance_by(one, n_experts=8),
    "bias_ledger": analysis.bias_ledger,
    "router_losses": analysis.router_losses,
    "margin_table": analysis.margin_table,
    "flips_by_margin": lambda one: analysis.flips_by_margin(one, one),
    "expert_information": lambda one: analysis.expert_information(one, "id"),
    "domain_specialisation": lambda one: analysis.domain_specialisation(one, "phase"),
    "router_saturation": lambda one: analysis.router_saturation(one, one),
    "routing_diff": lambda one: analysis.routing_diff(one, one),
    "coactivation": analysis.coactivation,
    "path_counts": analysis.path_counts,
    "context_overlap": analysis.context_overlap,
    "find": lambda one: analysis.find(one, layer=1, expert=0),
}


@pytest.mark.parametrize("name", ASKED)
def test_an_empty_bank_is_named(name):
    whole = vars(routing(random_probs(), 2))
    none = {key: x[:, :0] if "token" in x.dims else x for key, x in whole.items()}
    empty = SimpleNamespace(**none)
    with pytest.raises(ValueError, match="this routing has no token: no prompt brought any"):
        ASKED[name](empty)
