"""The instruments of the gates, on cases whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ernie_lab.analysis.information import mutual_information
from ernie_lab.model.redraw import VARIANTS, OtherRouter, choose, max_violation, redraw
from ernie_lab.model.text import TextModel
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
from ernie_lab.organisms.bench import half
from ernie_lab.organisms.corpus import Tokens
from ernie_lab.organisms.gates import owner
from ernie_lab.organisms.initial import initialise
from ernie_lab.organisms.mixtures import mixtures
from ernie_lab.organisms.recipe import N_CHOSEN, N_EXPERTS, TINY_TEXT
from ernie_lab.sites import Tap

IDS = torch.arange(60).reshape(2, 30) * 7 % 2048


@pytest.fixture(scope="module")
def model() -> TextModel:
    built = TextModel(TINY_TEXT)
    initialise(built, seed=3, std=0.1)
    return built.eval()


@torch.no_grad()
def observed(model: TextModel, quantity: str, tap: Tap | None = None) -> dict[int, Tensor]:
    """What a tap leaves of one quantity, by layer."""
    where = paths(model, quantity)
    keep = Keep(frozenset(where.values()))
    model(input_ids=IDS, tap=keep if tap is None else Then(tap, keep))
    return {layer: keep.all(path) for layer, path in where.items()}


class Then:
    """One tap after another."""

    def __init__(self, first: Tap, second: Tap) -> None:
        self.first, self.second = first, second

    def wants(self, site):
        return self.first.wants(site) or self.second.wants(site)

    def __call__(self, site, x):
        return self.second(site, self.first(site, x))


def test_off_zeroes_every_layer(model: TextModel) -> None:
    assert all(
        (x == 0).all() for x in observed(model, "shared_out", off(model, "shared_out")).values()
    )


def test_each_layer_has_a_mean_of_its_own(model: TextModel) -> None:
    means_D = {layer: x.mean(0) for layer, x in observed(model, "routed_out").items()}
    assert not torch.equal(means_D[1], means_D[2])
    found = observed(model, "routed_out", at_mean(model, means_D, "routed_out"))
    for layer, x in found.items():
        torch.testing.assert_close(x, means_D[layer].expand_as(x))


def test_silencing_one_expert_leaves_the_others_weights_alone(model: TextModel) -> None:
    ids, before = observed(model, "expert_ids")[2], observed(model, "expert_weights")[2]
    after = observed(model, "expert_weights", SilenceExpert(2, 5))[2]
    assert (ids == 5).any()
    assert (after[ids == 5] == 0).all()
    assert torch.equal(after[ids != 5], before[ids != 5])


def test_random_choice_is_uniform_distinct_and_repeats_with_its_seed(model: TextModel) -> None:
    first, again = (observed(model, "expert_ids", random_choice(model, 0))[1] for _ in range(2))
    assert torch.equal(first, again)
    assert all(len(set(row.tolist())) == N_CHOSEN for row in first)
    assert torch.bincount(first.flatten(), minlength=N_EXPERTS).min() > 0


def test_rerouting_with_the_learned_routers_changes_nothing(model: TextModel) -> None:
    same = reroute(model, learned_routers(model))
    torch.testing.assert_close(observed(model, "moe_out", same), observed(model, "moe_out"))


def test_rerouting_follows_the_other_gate_and_bias(model: TextModel) -> None:
    other = OtherRouter(-learned_routers(model)[1].weight_ED, torch.linspace(0, 1, N_EXPERTS))
    states = observed(model, "in")[1]
    ids = observed(model, "expert_ids", reroute(model, {1: other}))[1]
    assert torch.equal(ids, choose(states, other, N_CHOSEN))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_redrawn_router_has_the_learned_size_and_balance(variant) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2000, 16, generator=generator) + torch.arange(16) / 8
    learned = OtherRouter(torch.randn(8, 16, generator=generator), torch.zeros(8))
    drawn = redraw(learned, states, 2, seed=1, variant=variant)
    if variant == "norm":
        torch.testing.assert_close(drawn.weight_ED.norm(dim=1), learned.weight_ED.norm(dim=1))
    else:
        wanted, found = ((states @ r.weight_ED.T).std(0) for r in (learned, drawn))
        torch.testing.assert_close(found, wanted)
    target = max_violation(choose(states, learned, 2), 8)
    assert max_violation(choose(states, drawn, 2), 8) <= target + 0.05


def test_mutual_information_by_hand() -> None:
    """Two labels, two experts, one slot, 4 tokens each: all told, or nothing."""
    labels = np.repeat([0, 1], 4)
    # Plug-in 1 bit; Miller-Madow adds (1 + 1 - 1) / (2 x 8) nats.
    told = mutual_information(labels, labels[:, None], 2)
    assert told == pytest.approx(1 + 1 / 16 / math.log(2))
    nothing = mutual_information(labels, np.array([0, 1] * 4)[:, None], 2)
    assert nothing == pytest.approx((1 + 1 - 3) / 16 / math.log(2))


def test_an_owner_is_one_domain_harmed_and_none_beside() -> None:
    assert owner({"sums": 0.3, "code": 0.01, "prose": -0.2}) == "sums"
    assert owner({"sums": 0.3, "code": 0.03}) is None
    assert owner({"sums": 0.05, "code": 0.0}) is None


def test_the_two_halves_share_no_token() -> None:
    ids = np.arange(10)
    tokens = Tokens(ids, ids > 4, np.array([0, 3, 6, 8]))
    first, second = (half({"code": tokens}, which)["code"] for which in (0, 1))
    assert first.ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert second.ids.tolist() == [6, 7, 8, 9]
    assert second.starts.tolist() == [0, 2]


def test_every_mixture_layer_is_found(model: TextModel) -> None:
    assert TINY_TEXT.moe is not None
    assert tuple(mixtures(model)) == TINY_TEXT.moe.layers
