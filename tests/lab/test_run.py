"""`lab.run`: losses, recording, batches, edits, and what is refused."""

import math
import threading

import numpy as np
import pytest
import torch
from support.labs import small_lab
from torch import Tensor

import ernie_lab as el
from ernie_lab.inputs import default_template
from ernie_lab.inputs.errors import PromptError
from ernie_lab.lab import Lab
from ernie_lab.results import NothingKept

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
PROMPTS = ["hello there, how are you?", "no"]


@pytest.fixture
def lab() -> Lab:
    return small_lab()


def test_loss_is_cross_entropy_of_the_prompt(lab: Lab) -> None:
    run = lab.run("hello there")
    ids = run.batch.input_ids
    by_hand = torch.nn.functional.cross_entropy(run.logits[0, :-1], ids[0, 1:])
    torch.testing.assert_close(run.loss, by_hand)
    assert run.token_loss.shape == ids.shape
    assert math.isnan(run.token_loss[0, 0])
    torch.testing.assert_close(run.token_loss[0, 1:].mean(), by_hand)


def test_batch_of_two_equals_two_singles(lab: Lab) -> None:
    both = lab.run(PROMPTS, keep="all")
    for i, prompt in enumerate(PROMPTS):
        alone = lab.run(prompt, keep="all")
        torch.testing.assert_close(both.logits[i][both.mask[i]], alone.logits[0], **CLOSE)
        part = both.trace.sel(sequence=i)
        assert len(part) == len(alone.trace)
        np.testing.assert_array_equal(part.expert_ids.values, alone.trace.expert_ids.values)
        np.testing.assert_allclose(
            part["blocks.2.resid_post"].values,
            alone.trace["blocks.2.resid_post"].values,
            atol=1e-5,
            rtol=1e-5,
        )
        losses = both.token_loss[i][both.mask[i]]
        torch.testing.assert_close(losses, alone.token_loss[0], equal_nan=True, **CLOSE)


def test_no_padding_row_in_a_trace(lab: Lab) -> None:
    trace = lab.run(PROMPTS, keep=["routing", "attention"]).trace
    assert len(trace) == sum(map(len, PROMPTS))
    assert list(trace.tokens.groupby("sequence").size()) == [25, 2]
    assert "".join(trace.tokens["text"][:5]) == "hello"
    assert trace.pattern(1, sequence=1).shape == (4, 2, 2)


def test_labels(lab: Lab) -> None:
    ids = lab.prepare("hello").input_ids[0].tolist()
    ignored = [-100, -100, -100, *ids[3:]]
    run = lab.run("hello", labels=ignored)
    torch.testing.assert_close(run.loss, lab.run("hello").token_loss[0, 3:].mean())
    with pytest.raises(ValueError, match=r"label 99 must be in 0\.\.60, or -100"):
        lab.run("hello", labels=[99, *ids[1:]])
    with pytest.raises(ValueError, match="labels would not be used"):
        lab.run("hello", labels=ids, logits="last")
    with pytest.raises(ValueError, match=r"labels have lengths \(3,\), the prompts \(5,\)"):
        lab.run("hello", labels=[1, 2, 3])


def test_logits_modes_agree(lab: Lab) -> None:
    every, last, loss = (lab.run(PROMPTS, logits=mode) for mode in ("all", "last", "loss"))
    torch.testing.assert_close(last.logits, every.logits[:, -1:])
    assert last.loss is None
    assert loss.logits is None
    torch.testing.assert_close(loss.loss, every.loss)
    with pytest.raises(ValueError, match="does not compute all logits"):
        lab.run("hello", logits="loss", keep="logits")
    with pytest.raises(ValueError, match='must be "all", "last" or "loss"'):
        lab.run("hello", logits="some")


def test_aux_loss_counts_the_real_choices(lab: Lab) -> None:
    run = lab.run(PROMPTS, keep="all")
    trace, n_experts, k = run.trace, 8, 2
    probs = trace.router_probs.values.reshape(-1, n_experts)
    load = np.bincount(trace.expert_ids.values.ravel(), minlength=n_experts) / trace.expert_ids.size
    assert float(run.aux_loss) == pytest.approx(
        k * n_experts * (load * probs.mean(0)).sum(), rel=1e-5
    )
    assert float(run.aux_loss) != pytest.approx(float(run.aux_loss_transformers), rel=1e-3)
    assert float(run.loss_with_aux) == pytest.approx(float(run.loss + 0.001 * run.aux_loss))


def test_recording_does_not_change_the_run(lab: Lab) -> None:
    plain = lab.run(PROMPTS)
    assert torch.equal(lab.run(PROMPTS, keep="all").logits, plain.logits)
    assert torch.equal(lab.run(PROMPTS, keep="moe.slot_out").logits, plain.logits)
    assert torch.equal(lab.run(PROMPTS, keep=["attention", "attn.result"]).logits, plain.logits)


def test_unknown_arguments_are_refused(lab: Lab) -> None:
    for verb in (lab.run, lab.generate, lab.stream, lab.run_with_cache, lab.run_with_hooks):
        with pytest.raises(TypeError, match="unexpected keyword"):
            verb("hello", edit=[])
    with pytest.raises(PromptError, match="enable_thinking would have no effect"):
        lab.run("hello", chat={"enable_thinking": True})
    chat = [{"role": "user", "content": "hi"}]
    options = {"add_generation_prompt": False, "template": default_template()}
    plain = lab.run(chat, chat=options).batch.texts[0]
    assert not plain.endswith("Assistant: ")


def test_an_edit_of_padding_alone_changes_nothing(lab: Lab) -> None:
    def on_padding(x: Tensor) -> Tensor:
        x[1, 0] += 1.0
        return x

    with pytest.warns(el.EditChangedNothingWarning):
        run = lab.run(PROMPTS, edits=el.edit("blocks.1.resid_mid", on_padding))
    assert (run.edits[0].n_fired, run.edits[0].n_changed) == (1, 0)


def test_too_large_is_refused_before_running(lab: Lab) -> None:
    with pytest.raises(el.TraceTooLarge, match=r"the budget is 100 B"):
        lab.run("hello", keep="all", max_bytes=100)


@pytest.mark.parametrize("verb", ["run", "generate"])
def test_the_size_counts_the_experts_that_an_edit_adds(lab: Lab, verb: str) -> None:
    """More slots than the config says: what fits without the edit does not fit with it."""
    call = {"run": lab.run, "generate": lambda *a, **b: lab.generate(*a, max_new_tokens=3, **b)}
    keep = "blocks.1.moe.expert_out"
    (plain,) = call[verb]("hello", keep=keep).trace.values.values()
    edit = el.routing.top_k(6, layers=1)
    (wider,) = call[verb]("hello", keep=keep, edits=edit).trace.values.values()
    k = lab.config.decoder.moe.router.n_chosen
    assert wider.n_bytes == plain.n_bytes * 6 // k
    call[verb]("hello", keep=keep, max_bytes=plain.n_bytes)
    call[verb]("hello", keep=keep, edits=edit, max_bytes=wider.n_bytes)
    with pytest.raises(el.TraceTooLarge, match="the budget is"):
        call[verb]("hello", keep=keep, edits=edit, max_bytes=wider.n_bytes - 1)


def test_nothing_kept(lab: Lab) -> None:
    with pytest.raises(NothingKept, match='keep="routing"'):
        _ = lab.run("hello").trace


def test_prompts_of_every_form(lab: Lab) -> None:
    ids = lab.prepare("hello").input_ids[0]
    expected = lab.run("hello").logits
    for prompt in (ids.tolist(), ids, ids[None], ["hello"], [ids.tolist()]):
        assert torch.equal(lab.run(prompt).logits, expected)
    chat = [{"role": "user", "content": "hi"}]
    with pytest.warns(UserWarning, match="small has no chat template; the general one"):
        lab.run(chat)
    template = {"template": default_template()}
    assert lab.run(chat, chat=template).batch.texts[0].endswith("Assistant: ")


def test_refused_inputs(lab: Lab) -> None:
    with pytest.raises(ValueError, match="token id 61 must be in"):
        lab.run([61])
    with pytest.raises(PromptError):
        lab.run("")
    with pytest.raises(ValueError, match="vision-language"):
        lab.run("hello", images=["x.png"])
    with pytest.raises(el.SiteError, match="layer 0 is dense"):
        lab.run("hello", keep="blocks.0.moe.router_logits")
    bare = Lab(model=lab.model)
    with pytest.raises(PromptError, match="text needs a tokenizer"):
        bare.run("hello")
    assert bare.run([5, 6], keep="routing").trace.tokens["text"].tolist() == ["5", "6"]


def test_an_edit_reroutes_and_is_recorded_as_it_flowed(lab: Lab) -> None:
    base = lab.run("hello there", keep="routing")
    edits = [el.edit("blocks.1.moe.router_logits", torch.neg)]
    edited = lab.run("hello there", keep="routing", edits=edits)
    np.testing.assert_allclose(
        edited.trace.router_logits.sel(layer=1), -base.trace.router_logits.sel(layer=1), rtol=1e-6
    )
    changed = edited.trace.expert_ids.sel(layer=1) != base.trace.expert_ids.sel(layer=1)
    assert bool(changed.any())
    assert not torch.allclose(edited.logits, base.logits, atol=1e-3)
    (count,) = edited.edits
    assert (count.n_fired, count.n_changed) == (1, 1)
    assert torch.equal(lab.run("hello there").logits, base.logits)


def test_edits_are_applied_in_order(lab: Lab) -> None:
    add = el.edit("blocks.1.resid_mid", lambda x: x + 1)
    double = el.edit("blocks.1.resid_mid", lambda x: 2 * x)
    one, other = (
        lab.run("hello", edits=edits, keep="blocks.1.resid_mid").trace["blocks.1.resid_mid"]
        for edits in ([add, double], [double, add])
    )
    np.testing.assert_allclose(one - other, 1.0, atol=1e-5)


def test_what_an_edit_cut_off_is_not_derived(lab: Lab) -> None:
    """Probabilities computed from the logits would be numbers that never flowed."""
    edits = el.edit("blocks.1.moe.router_probs", lambda x: 0.9 * x)
    bare = ["moe.router_logits", "moe.expert_ids", "moe.expert_weights"]
    trace = lab.run("hello", keep=bare, edits=edits).trace
    with pytest.raises(ValueError, match="edit"):
        _ = trace.router_probs
    kept = lab.run("hello", keep="routing", edits=edits).trace.router_probs
    np.testing.assert_allclose(kept.sel(layer=1).sum("expert"), 0.9, atol=1e-6)
    np.testing.assert_allclose(kept.sel(layer=2).sum("expert"), 1.0, atol=1e-6)


def test_edits_that_cannot_be(lab: Lab) -> None:
    with pytest.raises(el.SiteError, match="no site matches 'nowhere'"):
        lab.run("hello", edits=[el.edit("nowhere", torch.neg)])
    with pytest.raises(
        el.EditError, match=r"returned shape .* expected torch.Size\(\[1, 5, 32\]\)"
    ):
        lab.run("hello", edits=[el.edit("blocks.1.resid_mid", lambda x: x[:, 1:])])
    with pytest.raises(el.EditError, match=r"returned dtype torch\.float64"):
        lab.run("hello", edits=[el.edit("blocks.1.resid_mid", Tensor.double)])
    with pytest.raises(el.EditError, match="is not an edit"):
        lab.run("hello", edits=[torch.neg])
    with pytest.raises(el.EditError, match="'zero' must be an edit or a list of edits"):
        lab.run("hello", edits="zero")


def test_an_edit_that_changes_nothing_warns(lab: Lab) -> None:
    with pytest.warns(el.EditChangedNothingWarning, match="changed nothing"):
        run = lab.run("hello", edits=[el.edit("blocks.1.resid_mid", lambda x: x + 0)])
    assert run.edits[0].n_changed == 0
    assert torch.equal(run.logits, lab.run("hello").logits)


def test_an_edit_on_demand_also_runs_without_recording(lab: Lab) -> None:
    """Zeroing the pattern of every head takes away all of attention's output."""
    edit = el.edit("blocks.1.attn.pattern", torch.zeros_like)
    run = lab.run("hello", edits=[edit], keep="blocks.1.attn.attn_out")
    assert float(np.abs(run.trace["blocks.1.attn.attn_out"]).max()) == 0.0


def test_interrupt_leaves_nothing_behind(lab: Lab) -> None:
    before = lab.run("hello", keep="routing")

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lab.run("hello", keep="all", edits=[el.edit("blocks.2.resid_pre", interrupt)])
    after = lab.run("hello", keep="routing")
    assert torch.equal(before.logits, after.logits)
    np.testing.assert_array_equal(before.trace.router_logits, after.trace.router_logits)
    assert torch.is_grad_enabled()


def test_threads_do_not_meet(lab: Lab) -> None:
    alone = {p: lab.run(p, keep="routing").trace.router_logits.values for p in PROMPTS}
    failures: list[str] = []

    def work(prompt: str) -> None:
        for _ in range(5):
            found = lab.run(prompt, keep="routing").trace.router_logits.values
            if not np.allclose(found, alone[prompt], atol=1e-5):
                failures.append(prompt)

    threads = [threading.Thread(target=work, args=(p,)) for p in PROMPTS * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_gradients_of_sites(lab: Lab) -> None:
    """d loss / d resid by finite differences, at one number."""
    site = "blocks.1.resid_mid"
    run = lab.run("hello", keep=site, grad=True)
    gradient = run.trace.gradient(run.loss, site)
    step = torch.zeros(1, 5, 32)
    step[0, 2, 7] = 1e-2
    up, down = (
        lab.run("hello", edits=[el.edit(site, lambda x, s=sign: x + s * step)]).loss
        for sign in (1, -1)
    )
    assert float(gradient[2, 7]) == pytest.approx(float(up - down) / 2e-2, abs=2e-3)


def test_a_dense_model_has_no_routing() -> None:
    lab = small_lab(moe=None)
    run = lab.run("hello", keep="residual")
    assert run.aux_loss is None
    assert run.loss_with_aux is run.loss
    with pytest.raises(el.SiteError, match="this model is dense"):
        lab.run("hello", keep="routing")


def test_reprs(lab: Lab) -> None:
    assert "8 of width 16; 2 chosen, 2 shared; in layers 1, 2" in repr(lab)
    assert "<table>" in lab._repr_html_()
    assert repr(lab.run("hello", keep="routing")).startswith("Run(1 sequences, 5 tokens, loss=")
    assert repr(lab.run("hello", keep="routing").trace.routing()).splitlines()[:2] == [
        f"Routing of {lab.model_id}: 5 tokens x 2 of 8 experts, layers 1..2",
        "  kept: router_logits, expert_ids, expert_weights",
    ]


def test_sites_are_listed_and_narrowed_as_keep_does(lab: Lab) -> None:
    every = lab.sites()
    assert list(every.columns) == ["dims", "dtype", "on_demand", "meaning"]
    in_attention = [path for path in every.index if path.split(".")[2:3] == ["attn"]]
    assert lab.sites("attn.*").index.tolist() == in_attention
    assert lab.sites(["routing", "logits"]).index.tolist() == [
        *lab.run("hello", keep="routing").trace.sites, "logits"
    ]  # fmt: skip
    assert len(lab.sites(el.keep("attn.*", layers=2))) == len(in_attention) // 3
    with pytest.raises(el.SiteError, match="no site matches 'atn'"):
        lab.sites("atn")
