"""A redrawn router that is as balanced as the learned one: its correction bias, fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.targets import in_bank, sibling
from ernie_lab.interventions.values import Values, kept_paths
from ernie_lab.model.redraw import (
    NotBalanced,
    OtherRouter,
    balanced_bias,
    choose,
    max_violation,
    router_probs,
    thinned,
)
from ernie_lab.model.router import Router
from ernie_lab.trace.trace import Trace


def states_of(trace: Trace, layers: tuple[int, ...] | None, bank: str | None) -> Values:
    """What each router read in a trace, `[n d]`, by the path of its logits."""
    states = {}
    for site in in_bank("router_logits", layers, bank, trace.known_sites):
        read, ids = f"blocks.{site.layer}.moe.in", sibling(site, "expert_ids")
        kept_paths(trace, [read, ids], every=True)
        inputs, chosen = trace.values[read].parts[None], trace.values[ids].parts[None]
        mine = torch.isin(inputs.rows_N, chosen.rows_N)
        if not bool(mine.any()):
            raise EditError(f"no token of the trace is at {site.path}; take a longer reference")
        states[site.path] = inputs.values[mine].detach().float().cpu()
    return Values(states, f"states of {len(trace)} tokens")


def fitted_bias(weight_ED: Tensor, learned: Router, states_ND: Tensor) -> Tensor:
    """The bias `[e]` under which this gate's MaxVio is that of the learned router, at most
    0.05 more, on the same states. See `model/redraw.py`."""
    states_ND, k = thinned(states_ND), learned.config.n_chosen
    theirs = OtherRouter(
        learned.weight_ED.detach().float().cpu(), learned.correction_bias_E.detach().float().cpu()
    )
    target = max_violation(choose(states_ND, theirs, k), len(weight_ED))
    probs_NE = router_probs(states_ND, weight_ED.float().cpu())
    try:
        return balanced_bias(probs_NE, k, target).to(learned.correction_bias_E)
    except NotBalanced as error:
        raise EditError(f"{error}, or a longer reference") from error
