"""The logit lens, per layer and per expert."""

import math

import numpy as np
import pytest
import torch
from support.labs import small_lab
from support.models import small_vl_model

from ernie_lab.analysis.lens import expert_lens, expert_lens_sites, lens_logits, logit_lens
from ernie_lab.lab import Lab
from ernie_lab.trace.keys import NotKept

PROMPTS = ["hello there", "no"]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


def test_the_last_layer_is_the_model(lab: Lab) -> None:
    run = lab.run(PROMPTS, keep="residual")
    found = logit_lens(run.trace, lab, keep_logits=True)
    logits = run.logits[run.mask]
    torch.testing.assert_close(found.logits[2], logits, rtol=1e-5, atol=1e-5)
    table = found.table
    assert len(table) == 3 * 13
    last = table[table["layer"] == 2]
    assert (last["kl"] == 0).all()
    assert (table[table["layer"] == 0]["kl"] > 0.01).all()
    assert last["top_id"].tolist() == logits.argmax(-1).tolist()
    probs = logits.softmax(-1)
    np.testing.assert_allclose(last["top_prob"], probs.amax(-1), rtol=1e-5)
    np.testing.assert_allclose(last["entropy"], -(probs * probs.log()).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(last["next_prob"][:10], (-run.token_loss[0, 1:]).exp(), rtol=1e-4)
    assert last["next_rank"].isna().tolist() == [*[False] * 10, True, False, True]
    row, after = 3, int(run.batch.input_ids[0, 4])
    order = logits[row].argsort(descending=True).tolist()
    assert last["next_rank"].iloc[row] == 1 + order.index(after)


def test_a_partial_stream_by_hand(lab: Lab) -> None:
    trace = lab.run(PROMPTS, keep="residual").trace
    found = logit_lens(trace, lab, "resid_mid", keep_logits=True)
    x = trace.tensor("blocks.1.resid_mid")[4]
    norm, model = lab.model.final_norm, lab.model
    normed = norm.gain_D * x / math.sqrt(float(x.square().mean()) + norm.eps)
    weight = model.embed_VD if model.unembed_VD is None else model.unembed_VD
    torch.testing.assert_close(found.logits[1][4], (weight @ normed).detach(), rtol=1e-4, atol=1e-5)
    # Another function than attribution: it does not see the length of what it reads.
    torch.testing.assert_close(lens_logits(lab, 7 * x[None]), lens_logits(lab, x[None]))


def test_words(lab: Lab) -> None:
    found = logit_lens(lab.run("hello", keep="residual").trace, lab, n_top=3)
    first = found.table.iloc[0]
    assert len(first["top"].split(", ")) >= 3
    assert first["top"].split(", ")[0] in repr(found)
    assert "<table" in found._repr_html_()
    ids = logit_lens(lab.run("hello", keep="residual").trace, lab.model).table["top"]
    assert ids.str.fullmatch(r"\d+").all()


@pytest.mark.parametrize("kind", ["text", "vl"])
def test_every_expert_is_read_by_itself(lab: Lab, kind: str) -> None:
    if kind == "vl":
        lab = Lab(model=small_vl_model(), model_id="small vl")
        trace = lab.run([[7, 8, 9, 10], [11, 12]], keep=expert_lens_sites(lab, 1)).trace
        out, ids = (trace.tensor(f"blocks.1.moe.text.{n}") for n in ("expert_out", "expert_ids"))
    else:
        trace = lab.run(PROMPTS, keep=expert_lens_sites(lab, 1)).trace
        out, ids = (trace.tensor(f"blocks.1.moe.{n}") for n in ("expert_out", "expert_ids"))
    found = expert_lens(trace, lab, 1).table
    assert sorted(found["slot"].unique()) == [-1, 0, 1]
    assert len(found) == 3 * len(trace)
    second = found[found["slot"] == 1]
    assert second["expert"].tolist() == ids[:, 1].tolist()
    assert set(second["bank"]) == {"text"}
    assert second["top_id"].tolist() == lens_logits(lab, out[:, 1]).argmax(-1).tolist()
    shared = found[found["slot"] == -1]
    expected = lens_logits(lab, trace.tensor("blocks.1.moe.shared_out")).argmax(-1)
    assert shared["top_id"].tolist() == expected.tolist()
    assert (shared["kl"] > 0).all()


def test_what_is_missing_is_named(lab: Lab) -> None:
    trace = lab.run("hello", keep="routing").trace
    with pytest.raises(NotKept, match=r"resid_post.*keep="):
        logit_lens(trace, lab)
    with pytest.raises(NotKept, match=r"keep=el\.analysis\.expert_lens_sites\(lab, 1\)"):
        expert_lens(trace, lab, 1)
    with pytest.raises(ValueError, match="layer 0 is dense"):
        expert_lens(trace, lab, 0)
    partial = logit_lens(lab.run("hello", keep="blocks.0.resid_post").trace, lab)
    assert partial.table["kl"].isna().all()
