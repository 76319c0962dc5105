"""`compare` on answers: what follows a prompt counts alone; where labels stand."""

import numpy as np
import pandas as pd
import pytest
import torch
from support.labs import picture, small_lab, small_vl_lab

import ernie_lab as el
from ernie_lab.experiments import compare
from ernie_lab.interventions import Edit
from ernie_lab.lab import Lab

QUIET = {"progress": False, "noise": 0, "n_draws": 50}


def off() -> Edit:
    return el.edit("blocks.1.moe.shared_out", torch.zeros_like)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def test_only_the_continuation_counts(lab: Lab) -> None:
    table = compare(lab, ["he", "no"], {"off": off()}, continuations=["llo", "w"], **QUIET)
    alone = lab.run("hello", edits=[off()]).token_loss[0]
    counted = table.tokens.dropna(subset="loss")
    assert counted["text"].tolist() == ["l", "l", "o", "w"]
    np.testing.assert_allclose(counted["loss"][:3], alone[2:], rtol=1e-4, atol=1e-5)
    one = compare(lab, ["he", "no"], {"off": off()}, continuations="w", **QUIET)
    ids = compare(
        lab, ["he", "no"], {"off": off()}, continuations=lab.tokenizer.encode("w"), **QUIET
    )
    pd.testing.assert_frame_equal(one.tokens, ids.tokens)
    written = lab.generate(["he", "no"], max_new_tokens=2, temperature=0).tokens
    found = compare(lab, ["he", "no"], {"off": off()}, continuations=written, **QUIET)
    assert found.tokens.dropna(subset="loss")["id"].tolist() == written[0] + written[1]


def test_a_continuation_after_a_question_with_a_picture() -> None:
    """The same numbers as a run of the whole chat, read at the answer alone."""
    lab = small_vl_lab()
    question, seen, answer = "what?", [picture(0), picture(1)], lab.tokenizer.encode("yes")
    given = {"images": [[seen[0]], [seen[1]]]}
    found = compare(
        lab, [question] * 2, {"off": off()}, continuations=["yes", "no"], **given, **QUIET
    )
    prompt = lab.prepare(question, images=[seen[0]])
    ids = prompt.input_ids[0].tolist() + answer
    run = lab.run([ids], images=[[seen[0]]], edits=[off()])
    rows = found.tokens.query("sequence == 0")
    assert rows["id"].tolist() == ids
    assert rows["loss"].notna().tolist() == [False] * (len(ids) - 3) + [True] * 3
    assert set(rows["content"][-3:]) == {"text"}
    np.testing.assert_allclose(rows["loss"][-3:], run.token_loss[0, -3:], rtol=1e-4, atol=1e-5)


def test_continuations_refused(lab: Lab) -> None:
    prompts = ["he", "no"]
    with pytest.raises(ValueError, match="3 continuations for 2 prompts"):
        compare(lab, prompts, {"x": off()}, continuations=["a", "b", "c"], **QUIET)
    with pytest.raises(ValueError, match="no token"):
        compare(lab, prompts, {"x": off()}, continuations="", **QUIET)
    with pytest.raises(ValueError, match="continuations= with answers="):
        compare(lab, prompts, {"x": off()}, continuations="a", answers=("a", "b"), **QUIET)


def test_labels_stand_in_the_place_of_the_token_that_they_replace(lab: Lab) -> None:
    """As the docstring says: label 2 is predicted from tokens 0 and 1."""
    ids = lab.tokenizer.encode("hello")
    labels = [-100, -100, 20, -100, -100]
    found = compare(lab, "hello", {"off": off()}, labels=labels, **QUIET).tokens
    logits = lab.run(ids[:2]).logits[0, -1]
    assert found["loss_base"][2] == pytest.approx(-float(logits.log_softmax(-1)[20]), abs=1e-5)
