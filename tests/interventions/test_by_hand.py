"""Two experts, one chosen, weights of whole numbers: every figure computed by hand.

The mixture is run alone: MoE(x) with x = (1, 2), router rows such that logits are (2, 1), experts
that put out constants of x, and shared experts of their own.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.models import small_config

from ernie_lab.checkpoint.config import MoEConfig, RouterConfig
from ernie_lab.interventions import Edit, EditError, EditTap, edit, experts, routing, shared
from ernie_lab.interventions import catalogue as edits
from ernie_lab.model.moe import MoE
from ernie_lab.sites import Step, flatten

SILU = torch.nn.functional.silu
P0 = float(torch.tensor([2.0, 1.0]).softmax(-1)[0])  # of expert 0


def mixture(n_chosen: int = 1, bias: Sequence[float] = (0.0, 0.0)) -> MoE:
    """Expert e on x = (1, 2): silu(1) * 2 * (e + 1) in its first number, 0 in its second."""
    router = RouterConfig(width=2, n_experts=2, n_chosen=n_chosen)
    moe = MoEConfig(layers=(1,), router=router, expert_hidden=1, n_shared=1)
    layer = MoE(small_config(width=2, moe=moe), "blocks.1.moe")
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.router.weight_ED.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        layer.router.correction_bias_E.copy_(torch.tensor(bias))
        layer.experts.gate_up_E2FD[:, 0, 0, 0] = 1.0
        layer.experts.gate_up_E2FD[:, 1, 0, 1] = 1.0
        layer.experts.down_EDF[:, 0, 0] = torch.tensor([1.0, 2.0])
        layer.shared.gate.weight[0, 0] = 1.0
        layer.shared.up.weight[0, 1] = 1.0
        layer.shared.down.weight[1, 0] = 1.0
    return layer.eval()


UNIT = float(SILU(torch.tensor(1.0)) * 2)


class Shell(torch.nn.Module):
    """A model of the one layer, for edits that exchange parts."""

    def __init__(self, layer: MoE) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        self.blocks[1].moe = layer
        self.sites = layer.sites


def run(layer: MoE, given: Edit | Sequence[Edit]) -> list[float]:
    shell: Any = Shell(layer)
    tap = EditTap.of(given, tuple(flatten(layer.sites)), model=shell)
    step = Step("prefill", 0, torch.zeros(1, 1), torch.ones(1, 1, dtype=torch.bool))
    with torch.no_grad():
        out, _ = tap.model.blocks[1].moe(torch.tensor([[[1.0, 2.0]]]), tap.bind(step))
    return [float(x) for x in out[0, 0]]


def close(found: list[float], routed: float, shared_out: float) -> None:
    assert found == pytest.approx([routed * UNIT, shared_out * UNIT], abs=1e-6)


TOP1 = {
    "none": (edits.scale("moe.in", 1.0), 1, 1),
    "shared off": (shared.zero(), 1, 0),
    "shared halved": (shared.scale(0.5, 1), 1, 0.5),
    "off zero": (experts.off(1, 0), 0, 1),
    "off the other": (experts.off(1, 1), 1, 1),
    "off all": (experts.off(None), 0, 1),
    "off renormalise, nobody left": (experts.off(1, 0, "renormalise"), 0, 1),
    "off next best": (experts.off(1, 0, "next_best"), 2, 1),
    "forbid": (routing.forbid(1, 0), 2, 1),
    "swap": (experts.swap(1, 0, 1), 2, 1),
    "force": (routing.force(1, 1), 2, 1),
    "force displaced": (routing.force(1, 1, "displaced"), 2, 1),
    "force number": (routing.force(1, 1, 0.25), 0.5, 1),
    "force who is there": (routing.force(1, 0), 1, 1),
    "steer less": (routing.steer(1, 1, 0.9), 1, 1),
    "steer more": (routing.steer(1, 1, 1.1), 2, 1),
    "steer selection less": (routing.steer(1, 1, 2 * P0 - 1.01, on="selection"), 1, 1),
    "steer selection more": (routing.steer(1, 1, 2 * P0 - 0.99, on="selection"), 2, 1),
    "two chosen": (routing.top_k(2), 2 - P0, 1),
    "ids by hand": (edit("moe.expert_ids", lambda x: 1 - x), 2, 1),
    "logits by hand": (edit("moe.router_logits", lambda x: x.flip(-1)), 2, 1),
    "scores by hand": (edit("moe.selection_scores", lambda x: -x), 2, 1),
    "weights by hand": (edit("moe.expert_weights", lambda x: x * 3), 3, 1),
}


@pytest.mark.parametrize("name", TOP1)
def test_one_of_two(name: str) -> None:
    given, routed, shared_out = TOP1[name]
    close(run(mixture(), given), routed, shared_out)


# Both are chosen: routed = p * 1 + (1 - p) * 2 of the unit.
TOP2 = {
    "none": (edits.scale("moe.in", 1.0), 2 - P0),
    "off zero": (experts.off(1, 1), P0),
    "off renormalise": (experts.off(1, 1, "renormalise"), 1.0),
    "off renormalise both": (experts.off(1, [0, 1], "renormalise"), 0.0),
    "force number": (routing.force(1, 1, 0.75), 0.25 + 1.5),
    "swap": (experts.swap(1, 0, 1), 2 * P0 + (1 - P0)),
    "temperature": (routing.temperature(0.5), 2 - float(torch.tensor(2.0).sigmoid())),
    "one chosen": (routing.top_k(1), 1.0),
    "random router": (routing.random(0), None),
}


@pytest.mark.parametrize("name", TOP2)
def test_two_of_two(name: str) -> None:
    given, routed = TOP2[name]
    found = run(mixture(2), given)
    if routed is None:
        assert UNIT < found[0] < 2 * UNIT
    else:
        close(found, routed, 1)


def test_displaced_weight() -> None:
    """Of two: the displaced expert's weight goes to the forced one, here of three experts' two."""
    router = RouterConfig(width=2, n_experts=3, n_chosen=2)
    layer = MoE(
        small_config(
            width=2, moe=MoEConfig(layers=(1,), router=router, expert_hidden=1, n_shared=0)
        ),
        "blocks.1.moe",
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        layer.router.weight_ED[:, 0] = torch.tensor([3.0, 2.0, 1.0])
        layer.experts.gate_up_E2FD[:, 0, 0, 0] = 1.0
        layer.experts.gate_up_E2FD[:, 1, 0, 1] = 1.0
        layer.experts.down_EDF[:, 0, 0] = torch.tensor([1.0, 10.0, 100.0])
    p = torch.tensor([3.0, 2.0, 1.0]).softmax(-1)
    own = p[[0, 2]] / p[[0, 2]].sum()
    displaced = p[[0, 1]] / p[[0, 1]].sum()
    for weight, (a, b) in (("own", own), ("displaced", displaced), (0.4, (0.6, 0.4))):
        found = run(layer, routing.force(1, 2, weight))[0]
        assert found == pytest.approx(float(a + 100 * b) * UNIT, rel=1e-5), weight


def test_without_correction_bias() -> None:
    """The bias made it choose expert 1, whose probability is the smaller."""
    biased = mixture(bias=[0.0, 1.0])
    close(run(biased, edits.scale("moe.in", 1.0)), 2, 1)
    close(run(biased, routing.without_correction_bias()), 1, 1)
    narrowed = routing.without_correction_bias(positions=0)
    close(run(biased, narrowed), 1, 1)
    close(run(biased, routing.without_correction_bias(positions=1)), 2, 1)


def test_in_the_given_order() -> None:
    close(run(mixture(), [shared.scale(3.0), shared.zero()]), 1, 0)
    close(run(mixture(), [experts.swap(1, 0, 1), experts.swap(1, 0, 1)]), 1, 1)
    close(run(mixture(), [experts.swap(1, 0, 1), routing.forbid(1, 0)]), 1, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (routing.forbid(1, [0, 1]), "leaves 0 experts"),
        (routing.forbid(1, 2), "expert 2 does not exist"),
        (routing.force(1, 2), "expert 2 does not exist"),
        (routing.force(1, [0, 1]), "forces 2 experts, but 1 are chosen"),
        (experts.swap(1, 0, 5), "expert 5 does not exist"),
        (routing.top_k(3), "k=3, but blocks.1.moe.router has 2 experts"),
        (edits.zero("moe.expert_ids"), "holds integers"),
        (edit("moe.expert_ids", lambda x: x + 7), "expected 0..1"),
        (edit("moe.expert_weights", lambda x: x[..., 0]), "returned shape"),
    ],
)
def test_refused(given: Edit, message: str) -> None:
    with pytest.raises((EditError, ValueError), match=message):
        run(mixture(), given)


def test_duplicate_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="name one expert twice"):
        run(mixture(2), edit("moe.expert_ids", torch.zeros_like))
