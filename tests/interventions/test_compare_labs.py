"""`compare_labs`: two models on the same tokens, each beside its own noise."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from edit_cases import lab as other_lab
from support.labs import picture, small_lab, small_tokenizer, small_vl_lab
from support.models import small_model, small_vl_model

from ernie_lab.experiments import LabComparison, compare_labs
from ernie_lab.lab import Lab

PROMPTS = ["hello there, how are you?", "no", "what is this thing here"]
QUIET = {"progress": False, "noise": 0, "n_draws": 50}


@pytest.fixture(scope="module")
def a() -> Lab:
    return small_lab()


@pytest.fixture(scope="module")
def b() -> Lab:
    return other_lab(seed=5)


@pytest.fixture(scope="module")
def found(a: Lab, b: Lab) -> LabComparison:
    return compare_labs(
        a, b, PROMPTS, names=("one", "other"), documents=["x", "y", "x"], progress=False
    )


def test_against_single_runs(a: Lab, b: Lab, found: LabComparison) -> None:
    one, other = (lab.run(PROMPTS[0], keep="routing") for lab in (a, b))
    rows = found.tokens.query("sequence == 0")
    np.testing.assert_allclose(rows["loss_a"], one.token_loss[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(rows["loss_b"], other.token_loss[0], rtol=1e-4, atol=1e-5)
    log_p, log_q = (run.logits[0].log_softmax(-1) for run in (one, other))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    np.testing.assert_allclose(rows["kl"][1:], kl[:-1], rtol=1e-3, atol=1e-5)
    ids = [run.trace.expert_ids.values for run in (one, other)]
    k = ids[0].shape[-1]
    by_hand = [
        [1 - len(set(x) & set(y)) / k for x, y in zip(*layers, strict=True)]
        for layers in zip(*ids, strict=True)
    ]
    np.testing.assert_allclose(rows["flips[1]"], by_hand[0], atol=1e-6)
    layer = found.routing.set_index("layer").loc[1]
    assert layer["flips"] == pytest.approx(found.tokens["flips[1]"].mean())
    assert layer["flips_low"] <= layer["flips"] <= layer["flips_high"]


def test_each_has_a_floor_of_its_own(found: LabComparison) -> None:
    table = found.summary
    assert table.loc["loss_change", "value"] == pytest.approx(
        table.loc["loss_b", "value"] - table.loc["loss_a", "value"]
    )
    for metric in ("loss_change", "kl"):
        row = table.loc[metric]
        assert 0 < row["floor_a"] < 1e-5 and 0 < row["floor_b"] < 1e-5
        assert row["floor_a"] != row["floor_b"]
        assert row["beyond"] and row["low"] < row["value"] < row["high"]
    assert found.noise["model"].tolist() == ["a"] * 8 + ["b"] * 8
    assert math.isnan(table.loc["loss_a", "floor_a"]) and not table.loc["loss_a", "beyond"]
    assert {"flips_floor_a", "flips_floor_b"} <= set(found.routing)


def test_a_model_against_itself_is_no_difference(a: Lab) -> None:
    same = compare_labs(a, a, PROMPTS, progress=False, n_draws=50)
    assert same.tokens["kl"].max() == 0 and same.routing["flips"].max() == 0
    assert not same.summary["beyond"].any()
    assert same.names == ("small (a)", "small (b)")


def test_dtypes_are_an_effect(a: Lab) -> None:
    half = dataclasses.replace(a, model=small_model().to(torch.bfloat16))
    table = compare_labs(a, half, PROMPTS, progress=False, n_draws=50)
    assert table.names == ("small, float32", "small, bfloat16")
    kl = table.summary.loc["kl"]
    assert kl["value"] > 10 * kl["floor_a"]
    # Its own floor is much higher, and that is the one to be beyond.
    assert kl["floor_b"] > 10 * kl["floor_a"]
    assert "bfloat16 on cpu" in repr(table)


def test_shown_saved_and_loaded(found: LabComparison, tmp_path: Path) -> None:
    text = repr(found)
    assert "a: one [" in text and "b: other [" in text
    assert "KL(a || b)" in text and "Flips of two lots: 0.75." in text
    assert "<table>" in found._repr_html_()
    again = LabComparison.load(found.save(tmp_path / "c"))
    assert repr(again) == text
    for name in ("summary", "tokens", "sequences", "routing", "noise"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(found, name), check_dtype=False, check_index_type=False
        )
    assert again.a == found.a and again.b == found.b
    table = found.by("document", "kl").set_index("document")
    mine = found.tokens.query("document == 'y'")["kl"].mean()
    assert table.loc["y", "kl"] == pytest.approx(mine)


def test_it_resumes_from_its_parts(a: Lab, b: Lab, tmp_path: Path) -> None:
    settings = {**QUIET, "batch_tokens": 1, "folder": tmp_path}
    first = compare_labs(a, b, PROMPTS, **settings)
    again = compare_labs(a, b, PROMPTS, **settings)
    assert first.settings["parts_found"] == 0
    assert again.settings["parts_found"] == 3
    pd.testing.assert_frame_equal(again.tokens, first.tokens)
    # Another model is not mistaken for the one before.
    third = compare_labs(a, other_lab(seed=6), PROMPTS, **settings)
    assert third.settings["parts_found"] == 0
    assert third.summary.loc["kl", "value"] != first.summary.loc["kl", "value"]


def test_answers_continuations_and_own_metrics(a: Lab, b: Lab) -> None:
    table = compare_labs(a, b, "hello", answers=("a", "b"), **QUIET)
    ids = a.tokenizer.encode("ab")
    for lab, side in ((a, "a"), (b, "b")):
        logits = lab.run("hello").logits[0, -1]
        expected = float(logits[ids[0]] - logits[ids[1]])
        assert table.sequences[f"logit_diff_{side}"][0] == pytest.approx(expected, abs=1e-4)
    table = compare_labs(a, b, ["he", "no"], continuations="w", **QUIET)
    assert table.tokens["loss_a"].notna().sum() == 2
    back = compare_labs(a, b, "hello", metrics={"back": _kl_backwards}, **QUIET)
    swapped = compare_labs(b, a, "hello", **QUIET)
    got = back.summary.loc["back", "value"]
    assert got == pytest.approx(swapped.summary.loc["kl", "value"], rel=1e-4)


def _kl_backwards(run_a, run_b, batch):
    log_p, log_q = (run.logits.log_softmax(-1) for run in (run_b, run_a))
    kl_BS = (log_p.exp() * (log_p - log_q)).sum(-1)
    return torch.cat([torch.full_like(kl_BS[:, :1], torch.nan), kl_BS[:, :-1]], 1)


def test_two_banks_and_pictures() -> None:
    one = small_vl_lab()
    other = dataclasses.replace(
        one, model=small_vl_model(seed=3, text=one.config.text, ids=one.config.ids)
    )
    given = {"images": [[picture(0)], [picture(1)]]}
    table = compare_labs(one, other, ["what?", "who?"], continuations="yes", **given, **QUIET)
    assert table.routing["bank"].unique().tolist() == ["text", "vision"]
    assert table.summary.loc["kl", "n"] == 6
    assert table.summary.loc["flips", "value"] > 0


def test_other_routers_are_compared_without_flips(a: Lab, tmp_path: Path) -> None:
    dense = small_lab(moe=None)
    table = compare_labs(a, dense, PROMPTS, **QUIET)
    assert "flips" not in table.summary.index and table.routing.empty
    assert "No set flips: they route in other layers." in repr(table)
    again = LabComparison.load(table.save(tmp_path / "c"))
    assert repr(again) == repr(table)


def test_what_is_refused(a: Lab) -> None:
    wider = small_lab(vocab_size=70)
    with pytest.raises(ValueError, match=r"predicts 61 words, small .* 70"):
        compare_labs(a, wider, PROMPTS, **QUIET)
    reversed_ = dataclasses.replace(a, tokenizer=_Reversed())
    with pytest.raises(ValueError, match="prompt 0 has other token ids: from position 0 on"):
        compare_labs(a, reversed_, PROMPTS, **QUIET)
    ids = a.tokenizer.encode("hello")
    with pytest.raises(ValueError, match=r"id .* at position 0 is 'h' to .* 'H' to"):
        compare_labs(a, dataclasses.replace(a, tokenizer=_Loud()), [ids], **QUIET)


class _Reversed:
    """Other ids for the same text."""

    def __init__(self) -> None:
        self.plain = small_tokenizer()

    def __getattr__(self, name):
        return getattr(self.plain, name)

    def encode(self, text, *, special=True):
        return self.plain.encode(text)[::-1]


class _Loud(_Reversed):
    """Other texts for the same ids."""

    def token_strings(self, ids):
        return [text.upper() for text in self.plain.token_strings(ids)]
