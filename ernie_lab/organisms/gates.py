"""The gates of `tiny-text`: what a model must show before its routing is worth looking at.

Each function asks one question and returns its gates. Costs are nats above the intact model,
averaged over the eight domains unless one is named; sums and facts count their answers alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ernie_lab.analysis.balance import multinomial_reference
from ernie_lab.analysis.information import mutual_information
from ernie_lab.model.redraw import VARIANTS, Variant, choose, redraw
from ernie_lab.organisms.ablations import (
    Keep,
    SilenceExpert,
    at_mean,
    learned_routers,
    off,
    paths,
    random_choice,
    reroute,
)
from ernie_lab.organisms.bench import Bench, mean
from ernie_lab.organisms.domains import NAMES
from ernie_lab.organisms.measure import second_copy, token_losses
from ernie_lab.organisms.recipe import N_CHOSEN, N_EXPERTS
from ernie_lab.organisms.rows import Rows
from ernie_lab.sites import Tap

N_REDRAWN, N_DRAWS = 20, 3
OWN_COST, OTHER_COST = 0.1, 0.02


@dataclass(frozen=True, slots=True)
class Gate:
    """One requirement: what was asked, what was found, whether it holds."""

    name: str
    target: str
    measured: str
    passed: bool


def at_least(name: str, costs: dict[str, float], target: float) -> Gate:
    """A mean cost that must be reached, with the domains it is made of."""
    parts = ", ".join(f"{domain} {nats:.2f}" for domain, nats in costs.items())
    nats = mean(costs)
    return Gate(name, f">= {target} nats", f"{nats:.2f} ({parts})", nats >= target)


def loss_gates(on: Bench) -> list[Gate]:
    found, rows = on.confirm.intact, on.confirm.rows
    copied = second_copy(token_losses(on.model, rows), rows)
    return [
        *(
            Gate(
                f"loss, {name}",
                "at least 1 nat below unigram",
                f"{found[name]:.2f} against {on.unigram[name]:.2f}",
                on.unigram[name] - found[name] >= 1,
            )
            for name in NAMES
        ),
        Gate("loss, second copy in copy lines", "< 1.0 nats", f"{copied:.2f}", copied < 1),
    ]


def balance_gates(on: Bench) -> list[Gate]:
    kept = observe(on, on.mixture, "expert_ids")
    counts = torch.stack([torch.bincount(i.flatten(), minlength=N_EXPERTS) for i in kept.values()])
    load_LE = counts / counts.float().mean(1, keepdim=True)
    worst = ", ".join(f"{violation:.2f}" for violation in load_LE.amax(1) - 1)
    least = float(load_LE.min())
    n_tokens = on.mixture.ids_BS.size
    chance = multinomial_reference(n_tokens, N_EXPERTS, N_CHOSEN)
    return [
        Gate(
            f"MaxVio over {n_tokens:,} tokens",
            "< 0.3",
            f"{worst} (layers {min(kept)} to {max(kept)}; uniform routing of as many tokens "
            f"stays below {chance.p95:.3f} in 95 % of draws)",
            bool(load_LE.max() < 1.3),
        ),
        Gate("least loaded expert", ">= 0.5 of its fair share", f"{least:.2f}", least >= 0.5),
    ]


def observe(on: Bench, rows: Rows, quantity: str) -> dict[int, Tensor]:
    """One quantity of every mixture layer, a row per token."""
    where = paths(on.model, quantity)
    keep = Keep(frozenset(where.values()))
    token_losses(on.model, rows, keep)
    return {layer: keep.all(path) for layer, path in where.items()}


def ablation_gates(on: Bench) -> list[Gate]:
    """`mean` puts each layer's mean output over the `pick` rows in the place of its output."""

    def zero(quantity: str) -> dict[str, float]:
        return on.costs(on.confirm, off(on.model, quantity))

    def constant(quantity: str) -> dict[str, float]:
        means_D = {layer: x.mean(0) for layer, x in observe(on, on.pick.rows, quantity).items()}
        return on.costs(on.confirm, at_mean(on.model, means_D, quantity))

    return [
        at_least("all routed experts off, zero", zero("routed_out"), 0.6),
        at_least("all routed experts off, mean", constant("routed_out"), 0.3),
        at_least("all shared experts off, zero", zero("shared_out"), 0.15),
    ]


def routing_gates(on: Bench) -> list[Gate]:
    """The same experts, chosen otherwise. Of each kind the least costly of three draws counts."""
    states, learned = observe(on, on.mixture, "in"), learned_routers(on.model)

    def least(taps: Iterable[Tap]) -> dict[str, float]:
        return min((on.costs(on.confirm, tap) for tap in taps), key=mean)

    def redrawn(variant: Variant, draw: int) -> Tap:
        routers = {
            layer: redraw(learned[layer], states[layer], N_CHOSEN, 100 * draw + layer, variant)
            for layer in states
        }
        return reroute(on.model, routers)

    uniform = least(random_choice(on.model, seed) for seed in range(N_DRAWS))
    return [
        at_least("experts chosen uniformly at random", uniform, 0.15),
        *(
            at_least(
                f"experts chosen by redrawn routers, equal {variant}",
                least(redrawn(variant, draw) for draw in range(N_DRAWS)),
                0.1,
            )
            for variant in VARIANTS
        ),
    ]


def expert_gates(on: Bench) -> list[Gate]:
    """Experts that one domain alone needs: picked on one split, confirmed on another."""
    picked = {
        (layer, expert): own
        for layer in paths(on.model, "in")
        for expert in range(N_EXPERTS)
        if (own := owner(on.costs(on.pick, SilenceExpert(layer, expert)))) is not None
    }
    confirmed = []
    for (layer, expert), own in picked.items():
        cost = on.costs(on.confirm, SilenceExpert(layer, expert))
        if owner(cost) == own:
            others = max(nats for name, nats in cost.items() if name != own)
            confirmed.append(
                f"layer {layer} expert {expert}: {own} {cost[own]:+.2f}, others <= {others:+.3f}"
            )
    return [
        Gate(
            "single experts that one domain alone needs",
            f"at least 2: >= {OWN_COST} nats there, <= {OTHER_COST} in every other domain",
            f"{len(confirmed)} of {len(picked)} picked. " + "; ".join(confirmed),
            len(confirmed) >= 2,
        )
    ]


def owner(cost: dict[str, float]) -> str | None:
    """The one domain that an ablation harms, if there is one."""
    own = max(cost, key=lambda name: cost[name])
    others = max(nats for name, nats in cost.items() if name != own)
    return own if cost[own] >= OWN_COST and others <= OTHER_COST else None


def information_gates(on: Bench) -> list[Gate]:
    """Biases of the redrawn routers are fitted on every other row; the rest is measured."""
    states, learned = observe(on, on.mixture, "in"), learned_routers(on.model)
    n_rows, length = on.mixture.ids_BS.shape
    fitted = torch.arange(n_rows * length) // length % 2 == 0
    labels = on.mixture.domain_BS.ravel()[~fitted.numpy()]

    def bits(ids_NK: Tensor) -> float:
        return mutual_information(labels, ids_NK.numpy(), N_EXPERTS)

    gates = []
    for layer, states_ND in states.items():
        found = bits(choose(states_ND[~fitted], learned[layer], N_CHOSEN))
        for variant in VARIANTS:
            routers = [
                redraw(learned[layer], states_ND[fitted], N_CHOSEN, seed, variant)
                for seed in range(N_REDRAWN)
            ]
            null = [bits(choose(states_ND[~fitted], router, N_CHOSEN)) for router in routers]
            bound = float(np.quantile(null, 0.95))
            gates.append(
                Gate(
                    f"information with domain, layer {layer}, redrawn at equal {variant}",
                    f"above the 95th percentile of {N_REDRAWN} redrawn routers",
                    f"{found:.3f} bits against {bound:.3f} (median {np.median(null):.3f})",
                    found > bound,
                )
            )
    return gates


def measure(on: Bench) -> list[Gate]:
    questions = (
        loss_gates,
        balance_gates,
        ablation_gates,
        routing_gates,
        expert_gates,
        information_gates,
    )
    return [gate for ask in questions for gate in ask(on)]
