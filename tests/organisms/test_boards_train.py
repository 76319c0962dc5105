"""The taps of the gates, and a training of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from ernie_lab.model.vl import VLModel, eye
from ernie_lab.organisms.ablations import Keep, SilenceExpert
from ernie_lab.organisms.boards import train as training
from ernie_lab.organisms.boards.bench import half
from ernie_lab.organisms.boards.gates import parts, routed_share
from ernie_lab.organisms.boards.measure import Answers, answers, batches, unseen_rows
from ernie_lab.organisms.boards.questions import KINDS, ON_BOARDS
from ernie_lab.organisms.boards.recipe import (
    N_EXPERTS,
    NARROW,
    WIDE,
    EyeRecipe,
    Recipe,
    config,
    last_stage,
)
from ernie_lab.organisms.boards.rows import Encoder, encode_rows
from ernie_lab.organisms.boards.seeing import Seen, initialise_eye, look, train_eye
from ernie_lab.organisms.boards.step import (
    TrainingTap,
    board_mix,
    silent_tokens,
    training_rows,
)
from ernie_lab.organisms.boards.taps import (
    KeepVision,
    at_mean,
    layers,
    learned_routers,
    off,
    paths,
    random_choice,
    reroute_vision,
    through_text_bank,
)
from ernie_lab.organisms.boards.tokens import train_tokenizer
from ernie_lab.organisms.initial import initialise


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(train_tokenizer())


@pytest.fixture(scope="module")
def model() -> VLModel:
    model = VLModel(config(NARROW))
    initialise(model, 0, 0.06)
    initialise_eye(model, 0, 0.4)
    return model.requires_grad_(False)


@pytest.fixture(scope="module")
def seen(model: VLModel) -> dict[str, Seen]:
    return {medium: look(model, medium, 6, 1) for medium in ("image", "video")}


@pytest.fixture(scope="module")
def batch(encoder: Encoder, seen: dict[str, Seen]):
    return batches(unseen_rows(encoder, seen, (0,), {"image": 4, "video": 2}), encoder)


def run(model, batch, seen, tap):
    return answers(model, batch, seen, tap).nats_Q


def test_each_layer_is_replaced_by_its_own_mean(model, batch, seen) -> None:
    """A list shared between the layers would give all of them the same mean."""
    quantity = "vision.routed_out"
    keep = Keep(frozenset(paths(model, quantity).values()))
    run(model, batch, seen, keep)
    means = {layer: keep.all(path).mean(0) for layer, path in paths(model, quantity).items()}
    assert len({tuple(mean.tolist()) for mean in means.values()}) == len(layers(model))
    tap = at_mean(model, means, quantity)
    for layer, site in (
        (m, b.sites.moe.vision.routed_out) for m, b in enumerate(model.blocks) if b.moe
    ):
        replaced = tap(site, torch.zeros(3, 128))
        torch.testing.assert_close(replaced, means[layer].expand(3, -1))
    only = at_mean(model, {2: means[2]}, quantity)
    site = model.blocks[3].sites.moe.vision.routed_out
    assert torch.equal(only(site, torch.ones(2, 128)), torch.ones(2, 128))


def test_edits_change_answers_and_silencing_all_is_off(model, batch, seen) -> None:
    base = run(model, batch, seen, KeepVision.of(model))
    for tap in (
        off(model, "vision.routed_out"),
        off(model, "shared_out"),
        through_text_bank(model),
        random_choice(model, "vision", 0),
        SilenceExpert(1, 0, "vision."),
    ):
        assert not np.allclose(base, run(model, batch, seen, tap), atol=1e-6)
    # The learned router in the place of itself changes nothing.
    same = reroute_vision(model, learned_routers(model, "vision"))
    np.testing.assert_allclose(base, run(model, batch, seen, same), atol=1e-5)


def test_what_the_vision_bank_reads(model, batch, seen) -> None:
    keep = KeepVision.of(model)
    run(model, batch, seen, keep)
    n = 4 * (16 + 2) + 2 * (32 + 2)
    for layer in layers(model):
        assert torch.cat(keep.states[layer]).shape == (n, 128)
        assert torch.cat(keep.choices[layer]).shape == (n, 2)


def test_shares_of_facts_by_hand() -> None:
    shares = routed_share(np.array([[0, 1], [0, 2], [3, 1]]), np.array([5, 5, 7]))
    assert shares[5, :4].tolist() == [1.0, 0.5, 0.5, 0.0]
    assert shares[7, :4].tolist() == [0.0, 1.0, 0.0, 1.0]
    assert shares.shape == (256, N_EXPERTS)


def test_percent_right_by_kind() -> None:
    kinds = np.array([KINDS.index("value"), KINDS.index("value"), KINDS.index("name")])
    found = Answers(np.array([True, False, True]), np.zeros(3), kinds, np.zeros((3, 2)))
    assert found.share() == {"value": 50.0, "name": 100.0}
    assert parts(found.share()) == "value 50.0, name 100.0"


def test_halves_are_disjoint(seen) -> None:
    first, second = half(seen["image"], 0), half(seen["image"], 1)
    assert [*first.scenes, *second.scenes] == seen["image"].scenes
    assert torch.equal(
        torch.cat([first.features_NMD, second.features_NMD]), seen["image"].features_NMD
    )


def test_rows_of_a_step_follow_its_seed(encoder, seen) -> None:
    recipe = Recipe(rows_per_step=6)
    one, again, other = (
        encode_rows(training_rows(recipe, step, encoder, seen), encoder) for step in (3, 3, 4)
    )
    assert torch.equal(one.ids_BS, again.ids_BS)
    assert not torch.equal(one.ids_BS, other.ids_BS)


def test_the_mix_moves_and_stays_a_mix() -> None:
    recipe = Recipe(n_steps=100)
    for step in (0, 10, 99):
        mix = board_mix(recipe, step)
        assert set(mix) == set(ON_BOARDS)
        assert sum(mix.values()) == pytest.approx(1.0, abs=0.02)
    assert board_mix(recipe, 0) != board_mix(recipe, 99)


def test_only_the_twin_learns_without_its_vision_experts() -> None:
    assert last_stage(Recipe()).vision_dropout == 0
    assert last_stage(Recipe(dense_hidden=WIDE)).vision_dropout > 0.5
    assert last_stage(Recipe(seed=2)).seed != 2


def test_whole_rows_are_silent(model, batch) -> None:
    torch.manual_seed(0)
    assert silent_tokens(batch[0], 0.0) is None
    silent_N = silent_tokens(batch[0], 0.5)
    per_row = silent_N.split(batch[0].bank_BS.sum(1).tolist())
    assert {len(row.unique()) for row in per_row} == {1}
    assert 0 < silent_N.float().mean() < 1
    site = model.blocks[1].sites.moe.vision.routed_out
    out = TrainingTap(0.0, silent_N)(site, torch.ones(len(silent_N), 3))
    assert torch.equal(out[:, 0] == 0, silent_N)


def test_a_short_training(tmp_path: Path) -> None:
    model = VLModel(config(NARROW))
    quick = EyeRecipe(n_steps=2, images_per_step=2, clips_per_step=1)
    accuracy = train_eye(model, quick)
    assert set(accuracy) >= {"shape, first frame", "row"}
    weights = {name: parameter.detach().clone() for name, parameter in eye(model)}
    recipe = Recipe(n_steps=3, rows_per_step=6, warmup_steps=1)
    trained = training.train(tmp_path, recipe, weights, share=0.002)
    for name, parameter in eye(trained):
        assert torch.equal(parameter, weights[name]), "the eye is frozen"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["recipe"]["n_steps"] == 3
    assert np.isfinite(lines[-1]["loss"])
    assert "held_out/value" in lines[-1]
    for routers in trained.routers().values():
        assert all(router.correction_bias_E.abs().sum() > 0 for router in routers.values())
    assert (tmp_path / "final.pt").exists()
