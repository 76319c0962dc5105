"""Redrawn routers: what routing would look like had the gate been random on the very same states.

A random gate already tells kinds of tokens apart, because their hidden states differ. Only what
the learned gate tells beyond this is learned. Two ways to draw: rows with the learned rows'
norms, and rows whose logits have the learned logits' variance on real states. Its correction
bias is then fitted, so that the draw is as balanced as the learned router: else the load would
be a second difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ernie_lab.model.losses import updated_correction_bias

Variant: TypeAlias = Literal["norm", "variance"]
VARIANTS: tuple[Variant, ...] = ("norm", "variance")
TOLERANCE = 0.05
MAX_UPDATES = 2000
# States to fit a bias on: with 16 experts and 4 slots, loads are then known to about 1.5 %.
N_FITTED = 16_384
_STEPS = (5e-3, 2e-2, 8e-2)


class NotBalanced(RuntimeError):
    """No correction bias was found under which a gate has the load that was asked for."""


@dataclass(frozen=True, slots=True)
class OtherRouter:
    """A gate, `[e d]`, and its correction bias, `[e]`: a router that no module need hold."""

    weight_ED: Tensor
    bias_E: Tensor


def choose(states_ND: Tensor, router: OtherRouter, k: int) -> Tensor:
    """`[n k]`: the model's rule, top-k of softmax plus bias."""
    return chosen(router_probs(states_ND, router.weight_ED), router.bias_E, k)


def router_probs(states_ND: Tensor, weight_ED: Tensor) -> Tensor:
    """`[n e]`, softmax of the gate's logits."""
    return (states_ND @ weight_ED.T).softmax(-1)


def chosen(probs_NE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """`[n k]`: top-k of probabilities plus correction bias."""
    return (probs_NE + bias_E).topk(k, dim=-1).indices


def max_violation(ids_NK: Tensor, n_experts: int) -> float:
    """max load * E - 1 over the whole sample."""
    counts_E = torch.bincount(ids_NK.flatten(), minlength=n_experts).float()
    return (counts_E.max() / counts_E.mean() - 1).item()


def redraw(
    learned: OtherRouter, states_ND: Tensor, k: int, seed: int, variant: Variant
) -> OtherRouter:
    """A Gaussian gate, its bias fitted on the states until it is balanced like the learned one.

    Raises:
        NotBalanced: its MaxVio stays above the learned one's.
    """
    states_ND = thinned(states_ND)
    weight_ED = gaussian_gate(learned.weight_ED, seed, variant, states_ND)
    target = max_violation(choose(states_ND, learned, k), len(weight_ED))
    return OtherRouter(weight_ED, balanced_bias(router_probs(states_ND, weight_ED), k, target))


def thinned(states_ND: Tensor) -> Tensor:
    """Evenly spaced rows, N_FITTED at most: what a bias is fitted on."""
    return states_ND[:: -(-len(states_ND) // N_FITTED)]


def seed_of(*numbers: int) -> int:
    """A seed of its own for each of these tuples of one length: the caller's seed, a layer, a draw.

    `seed + draw` is none: neighbouring seeds would have all but one of their draws in common.
    """
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def gaussian_gate(
    learned_ED: Tensor, seed: int, variant: Variant = "norm", states_ND: Tensor | None = None
) -> Tensor:
    """`[e d]`: Gaussian rows of the learned rows' norms, or of equal variance of w . h on
    `states_ND`."""
    generator = torch.Generator().manual_seed(seed)
    drawn_ED = torch.randn(learned_ED.shape, generator=generator).to(learned_ED)
    wanted_E, found_E = (_size(w_ED, states_ND, variant) for w_ED in (learned_ED, drawn_ED))
    return drawn_ED * (wanted_E / found_E).unsqueeze(-1)


def _size(weight_ED: Tensor, states_ND: Tensor | None, variant: Variant) -> Tensor:
    """What the redrawn rows share with the learned ones, `[e]`."""
    if variant == "norm":
        return weight_ED.square().sum(-1).sqrt()
    if states_ND is None:
        raise ValueError("rows of equal variance need states_ND, on which it is equal")
    return (states_ND @ weight_ED.T).std(0)


def balanced_bias(probs_NE: Tensor, k: int, target: float, step: float = 5e-3) -> Tensor:
    """The training rule, in shrinking steps, until MaxVio is at most TOLERANCE above the target.

    A gate that is more balanced than the target stays so; see `matched_bias`.

    Raises:
        NotBalanced: not within MAX_UPDATES steps.
    """
    bias_E = probs_NE.new_zeros(probs_NE.shape[-1])
    for update in range(MAX_UPDATES):
        ids_NK = chosen(probs_NE, bias_E, k)
        if max_violation(ids_NK, len(bias_E)) <= target + TOLERANCE:
            return bias_E
        counts_E = torch.bincount(ids_NK.flatten(), minlength=len(bias_E))
        bias_E = updated_correction_bias(bias_E, counts_E, step / (1 + update / 50))
    raise NotBalanced(
        f"a redrawn router did not reach MaxVio {target:.2f} on {len(probs_NE)} states in "
        f"{MAX_UPDATES} steps; take more states or another seed"
    )


def matched_bias(probs_NE: Tensor, k: int, target: float) -> Tensor:
    """`balanced_bias`, and no more balanced than the target less TOLERANCE either.

    Where it is, the bias moves along its own loads, the busy made busier, to the target (by
    bisection; MaxVio moves in steps of one token, so a small sample may not meet it exactly).
    Probabilities near 0 and 1 need a bias that small steps do not reach: then larger ones are
    tried.
    """
    for step in _STEPS:
        try:
            bias_E = balanced_bias(probs_NE, k, target, step)
            break
        except NotBalanced:
            if step == _STEPS[-1]:
                raise
    ids_NK = chosen(probs_NE, bias_E, k)
    if max_violation(ids_NK, len(bias_E)) >= target - TOLERANCE:
        return bias_E
    counts_E = torch.bincount(ids_NK.flatten(), minlength=len(bias_E)).float()
    along_E = (counts_E / counts_E.mean() - 1) / len(bias_E)

    def violation(far: float) -> float:
        return max_violation(chosen(probs_NE, bias_E + far * along_E, k), len(bias_E))

    near, far = 0.0, 1e-3
    while violation(far) < target and far < 1e3:
        near, far = far, 2 * far
    for _ in range(30):
        middle = (near + far) / 2
        near, far = (near, middle) if violation(middle) >= target else (middle, far)
    return bias_E + far * along_E
