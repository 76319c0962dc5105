"""A logit that is not finite is not one of a token that does not count."""

import dataclasses
import math
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.labs import small_lab
from torch import Tensor

import ernie_lab as el
from ernie_lab.inference.forward import LossNotFiniteWarning
from ernie_lab.interventions import Edit
from ernie_lab.interventions.metrics import kl_divergence
from ernie_lab.lab import Lab

# 9 and 4 tokens: 11 are predicted, and positions 6, 7 and 8 of the first from what `late` broke.
PROMPTS = ["hello you", "what"]
QUIET = {"progress": False, "noise": 0, "n_draws": 20}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def broken(x: Tensor) -> Tensor:
    x = x.clone()
    x[0, 5:] = math.nan
    return x


def late() -> Edit:
    return el.edit("blocks.2.resid_post", broken)


@pytest.fixture
def said() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def test_the_loss_of_a_run_is_not_that_of_the_survivors(lab: Lab) -> None:
    told = r"3 of 11 counted tokens have .* position 6 of sequence 0, so loss=nan; edits: .*broken"
    with pytest.warns(LossNotFiniteWarning, match=told):
        run = lab.run(PROMPTS, edits=[late()])
    assert math.isnan(run.loss)
    assert int(run.counted.sum()) == 11
    fine = lab.run(PROMPTS)
    assert torch.equal(run.counted, fine.counted)
    assert float(fine.loss) == float(fine.token_loss[~fine.token_loss.isnan()].mean())


def test_positions_are_told_without_padding(lab: Lab) -> None:
    def second(x: Tensor) -> Tensor:
        return torch.cat([x[:1], torch.cat([x[1:, :-2], x[1:, -2:] * math.nan], 1)])

    told = r"1 of 11 counted tokens has a loss .* position 3 of sequence 1, so loss=nan"
    with pytest.warns(LossNotFiniteWarning, match=told):
        lab.run(PROMPTS, edits=[el.edit("blocks.2.resid_post", second)])


def test_what_does_not_count_may_be_nan(lab: Lab) -> None:
    ids = lab.tokenizer.encode(PROMPTS[0])
    run = lab.run(PROMPTS[0], edits=[late()], labels=[*ids[:6], -100, -100, -100])
    assert math.isfinite(run.loss)
    assert int(run.counted.sum()) == 5


def test_a_condition_without_all_its_predictions_has_no_averages(
    lab: Lab, said: list[warnings.WarningMessage]
) -> None:
    off = el.edit("blocks.1.moe.shared_out", torch.zeros_like)
    found = el.compare(lab, PROMPTS, {"late": late(), "off": off}, answers=("a", "b"), **QUIET)
    assert [w.category for w in said] == [LossNotFiniteWarning]
    message = str(said[0].message)
    assert "condition 'late'" in message
    assert "3 of 11" in message
    assert "position 6 of sequence 0" in message
    row, fine = found.conditions.loc["late"], found.conditions.loc["off"]
    assert [row["n_tokens"], row["n_documents"]] == [11, 2]
    assert row["loss_base"] == fine["loss_base"] == pytest.approx(float(lab.run(PROMPTS).loss))
    assert np.isnan([row["loss"], *row[list(found.metrics)].astype(float)]).all()
    assert found.routing.query("condition == 'late'")["flips"].isna().all()
    assert "11 predicted tokens of 2 documents" in repr(found)
    # What is whole still has its numbers, to the last bit.
    alone = el.compare(lab, PROMPTS, {"off": off}, answers=("a", "b"), **QUIET)
    columns = [*found.metrics, "loss", "loss_base"]
    assert list(fine[columns]) == list(alone.conditions.loc["off", columns])
    assert list(found.sequences["loss_change"].isna()) == [True, False, False, False]
    by = found.by("document", "kl")
    assert list(by["kl"].isna()) == [True, False, False, False]
    assert found.tokens.query("condition == 'late' and counted")["top1"].isna().sum() == 3


def test_answers_that_are_no_number(lab: Lab, said: list[warnings.WarningMessage]) -> None:
    def last(x: Tensor) -> Tensor:
        x = x.clone()
        x[0, -1] = math.nan
        return x

    edit = el.edit("blocks.2.resid_post", last)
    found = el.compare(lab, PROMPTS, {"last": edit}, answers=("a", "b"), **QUIET)
    assert math.isnan(found.conditions.loc["last", "logit_diff_change"])
    assert not said  # least of all that nothing changed


def test_effects_have_none_of_the_survivors(lab: Lab, said: list[warnings.WarningMessage]) -> None:
    table = el.effects(lab, PROMPTS, late(), **QUIET).table.set_index("effect")["value"]
    assert np.isnan(table[["TE", "FE", "interaction"]]).all()
    assert table["RE"] == 0
    assert {w.category for w in said} == {LossNotFiniteWarning}


def test_the_model_itself(lab: Lab, said: list[warnings.WarningMessage]) -> None:
    other = small_lab()
    with torch.no_grad():
        other.model.embed_VD[other.tokenizer.encode("z")[0]] = math.nan  # tied: of every row
    other.run(PROMPTS)
    assert "11 of 11" in str(said[0].message)
    assert "so loss=nan; nothing was edited" in str(said[0].message)
    said.clear()
    found = el.compare(other, PROMPTS, {"nothing": []}, **QUIET)
    assert ["the unedited model: 11 of 11" in str(w.message) for w in said] == [True]
    assert found.conditions.loc["nothing", "n_tokens"] == 11
    assert math.isnan(found.conditions.loc["nothing", "loss_base"])
    said.clear()
    other = dataclasses.replace(other, model_id="broken")
    labs = el.compare_labs(lab, other, PROMPTS, **QUIET)
    assert ["broken: 11 of 11" in str(w.message) for w in said] == [True]
    assert math.isfinite(labs.summary.loc["loss_a", "value"])
    assert np.isnan(labs.summary["value"].drop("loss_a")).all()
    assert "11 predicted tokens" in repr(labs)


def test_kl_from_a_broken_model_is_not_zero() -> None:
    base, edited = torch.tensor([[math.nan, 1.0], [-math.inf, 1.0]]), torch.zeros(2, 2)
    found = kl_divergence(base, edited)
    assert found[0].isnan()
    assert found[1] == pytest.approx(math.log(2))


def test_prompts_of_one_token_predict_nothing(lab: Lab) -> None:
    with pytest.raises(ValueError, match="no prompt has a second token, so nothing is predicted"):
        el.compare(lab, ["a", "b"], {"nothing": []}, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        el.compare(lab, ["a", "b"], {"nothing": []}, answers=("a", "b"), **QUIET)
