"""transformers with its weights changed by surgery gives the logits of our edits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.oracle import Pair, pair
from support.vl_inputs import Inputs, image
from support.vl_oracle import given
from support.vl_oracle import pair as vl_pair
from torch import Tensor

import ernie_lab as el
from ernie_lab.interventions import EditTap, experts, routing, shared
from ernie_lab.sites import Step

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
IDS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14]]


def mlp(theirs: Any, layer: int) -> Any:
    return theirs.model.layers[layer].mlp


def no_shared(theirs: Any) -> None:
    mlp(theirs, 1).shared_experts.down_proj.weight.zero_()


def swapped_shared(theirs: Any) -> None:
    one, other = mlp(theirs, 1), mlp(theirs, 2)
    one.shared_experts, other.shared_experts = other.shared_experts, one.shared_experts


def no_expert(theirs: Any) -> None:
    mlp(theirs, 2).experts.down_proj[[0, 3, 7]] = 0.0


def swapped_experts(theirs: Any) -> None:
    found = mlp(theirs, 1).experts
    for weight in (found.gate_up_proj, found.down_proj):
        weight[[2, 5]] = weight[[5, 2]].clone()


def forbidden(theirs: Any) -> None:
    mlp(theirs, 1).gate.moe_statics.e_score_correction_bias[0, [0, 4]] = -1e9


def no_bias(theirs: Any) -> None:
    for layer in (1, 2):
        mlp(theirs, layer).gate.moe_statics.e_score_correction_bias.zero_()


SURGERY: dict[str, tuple[Callable[[Any], None], Any]] = {
    "shared zero": (no_shared, shared.zero(1)),
    "shared swap": (swapped_shared, shared.swap(1, 2)),
    "expert off": (no_expert, experts.off(2, [0, 3, 7])),
    "experts swapped": (swapped_experts, experts.swap(1, 2, 5)),
    "forbidden": (forbidden, routing.forbid(1, [0, 4])),
    "next best": (forbidden, experts.off(1, [0, 4], "next_best")),
    "no bias": (no_bias, routing.without_correction_bias()),
}


@pytest.mark.parametrize("name", SURGERY)
def test_text(name: str, tmp_path: Path) -> None:
    operate, edit = SURGERY[name]
    both: Pair = pair(tmp_path, seed=3)
    ids = torch.tensor(IDS)
    with torch.no_grad():
        before = both.theirs(ids).logits
        operate(both.theirs)
        theirs = both.theirs(ids).logits
    ours = both.ours.run(IDS, edits=edit)
    assert not torch.allclose(before, theirs, atol=1e-3), "the surgery changed nothing"
    assert ours.edits[0].n_changed > 0
    torch.testing.assert_close(ours.logits, theirs, **CLOSE)


def vision_expert_off(theirs: Any) -> None:
    theirs.model.language_model.layers[1].mlp.vision_moe.experts.down_proj[4].zero_()


def vision_bank_off(theirs: Any) -> None:
    theirs.model.language_model.layers[2].mlp.vision_moe.experts.down_proj.zero_()


def vl_swapped(theirs: Any) -> None:
    one, other = (theirs.model.language_model.layers[i].mlp for i in (1, 2))
    one.shared_experts, other.shared_experts = other.shared_experts, one.shared_experts


VISUAL: dict[str, tuple[Callable[[Any], None], Any]] = {
    "vision expert off": (vision_expert_off, experts.off(1, 4, bank="vision")),
    "vision bank off": (vision_bank_off, experts.off(2, bank="vision")),
    "shared swap": (vl_swapped, shared.swap(1, 2)),
}


@pytest.mark.parametrize("name", VISUAL)
def test_vision_language(name: str, tmp_path: Path) -> None:
    operate, edit = VISUAL[name]
    both = vl_pair(tmp_path, seed=3)
    inputs = Inputs.of([5, 6, image(4, 6), 7, 8], config=both.config)
    with torch.no_grad():
        before = both.theirs(**given(inputs)).logits
        operate(both.theirs)
        theirs = both.theirs(**given(inputs)).logits
        ours = edited(both.ours, inputs, edit)
    assert not torch.allclose(before, theirs, atol=1e-3), "the surgery changed nothing"
    torch.testing.assert_close(ours, theirs, **CLOSE)


def edited(model: Any, inputs: Inputs, edit: Any) -> Tensor:
    tap = EditTap.of(edit, el.all_sites(model), model=model)
    mask = inputs.mask_BS.bool()
    grids = tuple(picture.grid for picture in inputs.pictures)
    step = Step("prefill", 0, mask.cumsum(1), mask, inputs.kinds_BS, inputs.bank_BS, grids)
    logits: Tensor = tap.model(**inputs.given(), tap=tap.bind(step)).logits
    return logits
