"""TE, FE, RE and their interaction, against four runs made by hand."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.labs import small_lab
from support.models import small_vl_model

import ernie_lab as el
from ernie_lab.experiments import Effects, effects
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.interventions import routing
from ernie_lab.lab import Lab

PROMPTS = ["hello there, how are you?", "no", "what is this thing here"]
QUIET = {"progress": False, "noise": 0, "n_draws": 50}
IDS, WEIGHTS = "blocks.*.moe.expert_ids", "blocks.*.moe.expert_weights"


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def values(found: Effects, measure: str = "loss") -> dict[str, float]:
    return found.table[found.table["measure"] == measure].set_index("effect")["value"].to_dict()


def held(trace: el.Trace, layers: tuple[int, ...]) -> list:
    """Ids and weights put back by hand, with no replay of the package."""

    def to(path: str):
        return lambda x: trace.tensor(path).view_as(x)

    paths = [f"blocks.{n}.moe.{name}" for n in layers for name in ("expert_ids", "expert_weights")]
    return [el.edit(path, to(path)) for path in paths]


def test_the_four_runs_by_hand(lab: Lab) -> None:
    prompt, keep = PROMPTS[0], [IDS, WEIGHTS]
    off = el.edit("blocks.0.mlp.mlp_out", torch.zeros_like)
    base, edited = lab.run(prompt, keep=keep), lab.run(prompt, keep=keep, edits=[off])
    fixed = lab.run(prompt, edits=[off, *held(base.trace, (1, 2))])
    replayed = lab.run(prompt, edits=held(edited.trace, (1, 2)))
    found = effects(lab, prompt, off, answers=("a", "b"), **QUIET)
    te, fe, re = (float(run.loss - base.loss) for run in (edited, fixed, replayed))
    got = values(found)
    assert got["TE"] == pytest.approx(te, abs=1e-5)
    assert got["FE"] == pytest.approx(fe, abs=1e-5)
    assert got["RE"] == pytest.approx(re, abs=1e-5)
    assert got["interaction"] == pytest.approx(te - fe - re, abs=1e-5)
    assert abs(re) > 1e-3 and abs(te - fe) > 1e-3
    a, b = lab.tokenizer.encode("ab")
    differences = [
        float(run.logits[0, -1, a] - run.logits[0, -1, b])
        for run in (base, edited, fixed, replayed)
    ]
    got = values(found, "logit difference")
    assert got["FE"] == pytest.approx(differences[2] - differences[0], abs=1e-4)
    te, fe, re = (x - differences[0] for x in differences[1:])
    assert got["interaction"] == pytest.approx(te - fe - re, abs=1e-4)
    assert found.frozen_layers == (1, 2)


def test_batches_and_flips(lab: Lab) -> None:
    off = el.edit("blocks.0.mlp.mlp_out", torch.zeros_like)
    found = effects(lab, PROMPTS, off, batch_tokens=50, **QUIET)
    whole = effects(lab, PROMPTS, off, **QUIET)
    assert found.comparison.settings["n_batches"] == 2
    pd.testing.assert_series_equal(found.table["value"], whole.table["value"], atol=1e-5)
    flips = found.comparison.conditions["flips"]
    assert flips["TE"] == flips["RE"] > 0
    assert flips["FE"] == 0


def test_an_edit_after_all_routing_acts_directly(lab: Lab) -> None:
    off = el.edit("blocks.2.moe.shared_out", torch.zeros_like)
    got = values(effects(lab, PROMPTS, off, **QUIET))
    assert got["TE"] == got["FE"] != 0
    assert got["RE"] == got["interaction"] == 0


def test_an_edit_of_routing_is_not_undone_in_its_own_layer(lab: Lab) -> None:
    forbid = routing.forbid(layer=1, experts=[0, 1, 2])
    found = effects(lab, PROMPTS, forbid, **QUIET)
    assert (found.exempt_layers, found.frozen_layers) == ((1,), (2,))
    drift = found.comparison.routing.set_index(["condition", "layer"])["flips"]
    assert drift["FE", 1] == drift["TE", 1] > 0
    assert drift["FE", 2] == 0 < drift["TE", 2]
    assert drift["RE", 1] == 0
    assert drift["RE", 2] == drift["TE", 2]
    everywhere = el.edit("moe.expert_ids", lambda ids: (ids + 1) % 8)
    every = effects(lab, PROMPTS, everywhere, **QUIET)
    assert every.frozen_layers == ()
    got = values(every)
    assert got["TE"] == got["FE"]
    assert got["RE"] == 0


def test_ids_only_has_names_of_its_own(lab: Lab) -> None:
    off = el.edit("blocks.0.mlp.mlp_out", torch.zeros_like)
    found = effects(lab, PROMPTS, off, ids_only=True, **QUIET)
    got = values(found)
    assert got["interaction (ids only)"] == pytest.approx(
        got["TE"] - got["FE (ids only)"] - got["RE (ids only)"]
    )
    assert got["FE (ids only)"] != got["FE"]
    assert found.comparison.conditions.loc["FE (ids only)", "flips"] == 0


def test_floors_intervals_and_files(lab: Lab, tmp_path: Path) -> None:
    off = el.edit("blocks.0.mlp.mlp_out", torch.zeros_like)
    found = effects(lab, PROMPTS, off, progress=False, n_draws=50)
    rows = found.table.set_index("effect")
    noise = found.comparison.noise["loss_change"].to_numpy()
    assert rows.loc["TE", "floor"] == pytest.approx(np.percentile(abs(noise), 95))
    assert 0 < rows.loc["interaction", "floor"] < 4 * abs(noise).max()
    assert (rows["low"] <= rows["value"]).all() and (rows["value"] <= rows["high"]).all()
    again = Effects.load(found.save(tmp_path / "e"))
    pd.testing.assert_frame_equal(again.table, found.table)
    assert again.frozen_layers == (1, 2)
    assert repr(again) == repr(found)
    assert "interaction = TE - FE - RE" in again._repr_html_()


def test_an_edit_that_does_nothing_is_named(lab: Lab) -> None:
    with pytest.warns(el.EditChangedNothingWarning, match="condition 'TE'") as told:
        effects(lab, "hello", el.edit("blocks.0.mlp.mlp_out", lambda x: x), **QUIET)
    assert len(told) == 1


def test_with_pictures() -> None:
    lab = Lab(model=small_vl_model(), model_id="small vl")
    random = torch.Generator().manual_seed(1)
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    one = Media("image", torch.randn((16, 12), generator=random), Grid(1, 4, 4), frames, (8, 8))
    prompts = [[7, 52, *[50] * 4, 53, 8, 9], [11, 12, 13]]
    off = el.edit("blocks.0.mlp.mlp_out", torch.zeros_like)
    found = effects(lab, prompts, off, images=[[one], []], **QUIET)
    drift = found.comparison.routing.set_index(["condition", "layer", "bank"])["flips"]
    assert (drift["FE"] == 0).all()
    assert drift["TE", 2, "vision"] == drift["RE", 2, "vision"] > 0
    got = values(found)
    assert got["interaction"] == pytest.approx(got["TE"] - got["FE"] - got["RE"])
    # Across the banks: the edited layer alone goes on with its own routing.
    moved = routing.cross_bank(tokens="vision", layers=[1])
    crossed = effects(lab, prompts, moved, images=[[one], []], **QUIET)
    assert crossed.exempt_layers == (1,)
    drift = crossed.comparison.routing.set_index(["condition", "layer", "bank"])["flips"]
    assert drift["FE", 1, "vision"] == 1
    assert drift["FE", 2, "vision"] == 0


def test_the_effect_of_nothing(lab: Lab) -> None:
    with pytest.raises(ValueError, match="edits= is empty"):
        effects(lab, PROMPTS, [])
