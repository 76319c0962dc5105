"""A redrawn router that is as balanced as the learned one: its correction bias, fitted."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.targets import in_bank, sibling
from ernie_lab.interventions.values import Values, kept_paths
from ernie_lab.model.losses import updated_correction_bias
from ernie_lab.model.router import Router
from ernie_lab.trace.trace import Trace

# Within this of the learned router's MaxVio, as in `organisms/redraw.py`.
TOLERANCE = 0.05
MAX_UPDATES = 2000
# States to fit on: with 16 experts and 4 slots, loads are then known to about 1.5 %.
N_FITTED = 16_384


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
    TOLERANCE more, on the same states: the training rule, in shrinking steps."""
    states_ND = states_ND[:: -(-len(states_ND) // N_FITTED)]
    k, n_experts = learned.config.n_chosen, len(weight_ED)
    gates = (learned.weight_ED.detach().float().cpu(), weight_ED.float().cpu())
    theirs_NE, probs_NE = ((states_ND @ gate_ED.T).softmax(-1) for gate_ED in gates)
    target = _max_violation(theirs_NE, learned.correction_bias_E.detach().float().cpu(), k)
    bias_E = torch.zeros(n_experts)
    for update in range(MAX_UPDATES):
        if _max_violation(probs_NE, bias_E, k) <= target + TOLERANCE:
            return bias_E.to(learned.correction_bias_E)
        counts_E = _counts(probs_NE, bias_E, k)
        bias_E = updated_correction_bias(bias_E, counts_E, 5e-3 / (1 + update / 50))
    raise EditError(
        f"a redrawn router did not reach the learned MaxVio of {target:.2f} on {len(states_ND)} "
        "states; take a longer reference or another seed"
    )


def _counts(probs_NE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    ids_NK = (probs_NE + bias_E).topk(k, dim=-1).indices
    return torch.bincount(ids_NK.flatten(), minlength=len(bias_E))


def _max_violation(probs_NE: Tensor, bias_E: Tensor, k: int) -> float:
    counts_E = _counts(probs_NE, bias_E, k).float()
    return float(counts_E.max() / counts_E.mean() - 1)
