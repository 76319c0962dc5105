"""Replaying routing: a run's own changes no bit; another's is what flows; wrong prompts raise."""

import edit_cases as cases
import numpy as np
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions import at, routing, shared

LAB, VL = cases.lab(), cases.vl_lab()
IDLE = "ignore::ernie_lab.interventions.edits.EditChangedNothingWarning"
GENERATE = {"max_new_tokens": 5, "temperature": 0.0, "stop": []}


@pytest.mark.filterwarnings(IDLE)
@pytest.mark.parametrize("ids_only", [False, True])
@pytest.mark.parametrize("keep", ["routing", "all"])
def test_own_routing_is_bit_identical(ids_only: bool, keep: str) -> None:
    plain = LAB.run(cases.PROMPTS, keep="routing")
    edit = routing.replay(plain.trace, ids_only=ids_only)
    again = LAB.run(cases.PROMPTS, edits=edit, keep=keep)
    assert torch.equal(plain.logits, again.logits)
    assert again.edits[0].n_changed == 0
    assert again.edits[0].n_fired == (2 if ids_only else 4)


@pytest.mark.filterwarnings(IDLE)
def test_own_routing_in_generation() -> None:
    plain = LAB.generate(cases.PROMPTS, keep="routing", **GENERATE)
    edit = routing.freeze(plain.trace)
    again = LAB.generate(cases.PROMPTS, edits=edit, keep=["routing"], **GENERATE)
    assert again.tokens == plain.tokens
    assert again.edits[0].n_changed == 0
    for path in plain.trace.values:
        assert torch.equal(again.trace.tensor(path), plain.trace.tensor(path)), path


@pytest.mark.filterwarnings(IDLE)
def test_own_routing_of_both_banks() -> None:
    plain = VL.generate(**cases.VL_PROMPT, keep="routing", **GENERATE)
    again = VL.generate(
        **cases.VL_PROMPT, edits=routing.replay(plain.trace), keep="routing", **GENERATE
    )
    assert again.tokens == plain.tokens
    assert again.edits[0].n_changed == 0
    for path in plain.trace.values:
        assert torch.equal(again.trace.tensor(path), plain.trace.tensor(path)), path
    run = VL.run(**cases.VL_PROMPT, keep="routing")
    same = VL.run(**cases.VL_PROMPT, edits=routing.replay(run.trace))
    assert torch.equal(run.logits, same.logits)


def test_frozen_routing_under_an_edit() -> None:
    """The fixed-routing effect: later layers keep the base run's experts."""
    base = LAB.run(cases.PROMPTS, keep="routing").trace
    free = LAB.run(cases.PROMPTS, edits=shared.zero(1), keep="routing").trace
    frozen = LAB.run(
        cases.PROMPTS, edits=[shared.zero(1), routing.freeze(base, layers=2)], keep="routing"
    ).trace
    ids = "blocks.2.moe.expert_ids"
    assert not torch.equal(free.tensor(ids), base.tensor(ids))
    for name in ("expert_ids", "expert_weights"):
        path = f"blocks.2.moe.{name}"
        assert torch.equal(frozen.tensor(path), base.tensor(path))
    logits = "blocks.2.moe.router_logits"
    assert not torch.equal(frozen.tensor(logits), base.tensor(logits))


def test_another_runs_routing_is_what_flows() -> None:
    edited = LAB.run(cases.PROMPTS, edits=routing.uniform(3), keep="routing").trace
    replayed = LAB.run(
        cases.PROMPTS, edits=routing.replay(edited, ids_only=True), keep="routing"
    ).trace
    for layer in (1, 2):
        path = f"blocks.{layer}.moe.expert_ids"
        assert torch.equal(edited.tensor(path), replayed.tensor(path))
    # The same experts, and in the first of the layers also the same probabilities.
    np.testing.assert_allclose(
        edited.expert_weights.sel(layer=1), replayed.expert_weights.sel(layer=1), rtol=1e-6
    )


def test_tokens_that_the_trace_has_not() -> None:
    gen = LAB.generate("hello", keep="routing", edits=routing.uniform(1), **GENERATE)
    text = [*gen.prompts[0], *gen.tokens[0]]
    with pytest.raises(el.EditError, match=r"position 9 \(1 such tokens"):
        LAB.run(text, edits=routing.replay(gen.trace))
    run = LAB.run(text, edits=routing.replay(gen.trace, missing="keep"), keep="routing")
    ids = "blocks.1.moe.expert_ids"
    assert torch.equal(run.trace.tensor(ids)[:-1], gen.trace.tensor(ids))
    narrowed = at(routing.replay(gen.trace), positions=range(3))
    run = LAB.run(text, edits=narrowed, keep="routing")
    assert torch.equal(run.trace.tensor(ids)[:3], gen.trace.tensor(ids)[:3])


def test_another_prompt_is_refused() -> None:
    trace = LAB.run("hello", keep="routing").trace
    with pytest.raises(el.EditError, match="sequence 0 differs at position 1; pass same_tokens"):
        LAB.run("hullo", edits=routing.replay(trace))
    edits = routing.replay(trace, same_tokens=False)
    path = "blocks.2.moe.expert_ids"
    run = LAB.run("hullo", edits=edits, keep="routing")
    assert torch.equal(run.trace.tensor(path), trace.tensor(path))


def test_moved_tokens_are_refused() -> None:
    trace = VL.run(**cases.VL_PROMPT, keep="routing").trace
    with pytest.raises(el.EditError, match="was in the other bank"):
        VL.run(**cases.VL_PROMPT, edits=[routing.cross_bank("text"), routing.replay(trace)])


def test_what_a_trace_must_hold() -> None:
    bare = LAB.run("hello", keep="blocks.1.resid_mid").trace
    with pytest.raises(el.EditError, match='keep="routing"'):
        routing.replay(bare)
    with pytest.raises(el.EditError, match="without its weights"):
        routing.replay(LAB.run("hello", keep="moe.expert_ids").trace)
    trace = LAB.run("hello", keep="routing").trace
    with pytest.raises(el.EditError, match="bank='vision'"):
        routing.replay(trace, bank="vision")
    with pytest.raises(el.EditError, match="no routing of these layers"):
        routing.replay(trace, layers=0)
    with pytest.raises(el.EditError, match="takes a trace, not Run"):
        routing.replay(LAB.run("hello"))
