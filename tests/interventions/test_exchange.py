"""Edits that exchange parts: shared tensors, both ways to do it, phases, gradients, precision."""

import copy
from dataclasses import replace
from typing import Any

import edit_cases as cases
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions import EditTap, at, experts, routing, shared
from ernie_lab.interventions import catalogue as edits

LAB, VL = cases.lab(), cases.vl_lab()
SITE = "blocks.1.resid_mid"
GENERATE: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "stop": []}


def test_an_exchange_for_some_tokens() -> None:
    """Where it is narrowed the donor's output stands, elsewhere the own."""
    site = "blocks.1.moe.shared_out"
    for edit in (
        shared.swap(1, 2),
        shared.transplant(cases.lab(5), 1, norm_matched=True),
        shared.permute_neurons(0, 1),
    ):
        own, whole, some = (
            LAB.run("hello", keep=site, edits=e).trace.tensor(site)
            for e in ((), edit, at(edit, positions=[1, 3]))
        )
        torch.testing.assert_close(some[[1, 3]], whole[[1, 3]])
        assert torch.equal(some[[0, 2, 4]], own[[0, 2, 4]])


@pytest.mark.parametrize("name", ["routing.random", "experts.swap", "routing.share_router"])
def test_narrowed_to_every_token(name: str) -> None:
    """The two ways of an exchange, in the model and beside it, are one."""
    edit = cases.vl_edits(VL)[name]
    every = at(at(edit, positions=slice(0, None)), phase="prefill")
    one, other = (VL.run(**cases.VL_PROMPT, edits=e).logits for e in (edit, every))
    mask = VL.run(**cases.VL_PROMPT).mask
    torch.testing.assert_close(one[mask], other[mask], atol=1e-5, rtol=1e-5)


def test_swap_twice_is_the_identity() -> None:
    run = LAB.run("hello", edits=[shared.swap(1, 2), shared.swap(2, 1)])
    assert torch.equal(run.logits, LAB.run("hello").logits)
    first, second = run.edits
    assert first.after == ()
    assert second.after == ("shared.swap(1, 2) (2 sites in common)",)


def test_norm_ratio_is_reported() -> None:
    run = LAB.run(cases.PROMPTS, edits=shared.swap(1, 2), keep=["moe.in", "moe.shared_out"])
    told = run.edits[0].measured
    for layer in (1, 2):
        site = f"blocks.{layer}.moe.shared_out"
        inputs = run.trace.tensor(f"blocks.{layer}.moe.in")
        moe = LAB.model.blocks[layer].moe
        own = moe.shared(inputs, moe.sites.shared).detach().norm(dim=-1)
        ratio = (run.trace.tensor(site).norm(dim=-1) / own).mean()
        assert told[f"norm ratio at {site}"] == pytest.approx(float(ratio), rel=1e-5)
    matched = LAB.run(
        "hello", edits=shared.swap(1, 2, norm_matched=True), keep=["moe.in", "moe.shared_out"]
    ).trace
    moe = LAB.model.blocks[1].moe
    own = moe.shared(matched.tensor("blocks.1.moe.in"), moe.sites.shared).detach().norm(dim=-1)
    torch.testing.assert_close(matched.tensor("blocks.1.moe.shared_out").norm(dim=-1), own)


def test_weights_are_shared() -> None:
    """An exchanged model holds the very tensors of the lab's, and of the donor's."""
    donor = cases.lab(5)
    edit = shared.transplant(donor, 1)
    model = EditTap.of(edit, el.all_sites(LAB.model), model=LAB.model).model
    for name, parameter in model.named_parameters():
        owner = donor.model if name.startswith("blocks.1.moe.shared.") else LAB.model
        assert parameter is owner.get_parameter(name), name
    assert [s.path for s in el.all_sites(model)] == [s.path for s in el.all_sites(LAB.model)]


@pytest.mark.filterwarnings("ignore::ernie_lab.interventions.edits.EditChangedNothingWarning")
def test_gradients_flow_through_edits() -> None:
    """d loss / d resid under an edit, by finite differences."""
    for edit in (shared.swap(1, 2, norm_matched=True), routing.force(2, 3, "displaced")):
        run = LAB.run("hello", keep=SITE, grad=True, edits=edit)
        slope = float(run.trace.gradient(run.loss, SITE)[2, 7])
        move = torch.zeros(32)
        move[7] = 1e-2
        up, down = (
            float(LAB.run("hello", edits=[edit, edits.add(SITE, move, by, positions=2)]).loss)
            for by in (1.0, -1.0)
        )
        assert slope == pytest.approx((up - down) / 2e-2, abs=5e-3)


def test_half_precision() -> None:
    half = replace(LAB, model=copy.deepcopy(LAB.model).to(torch.bfloat16))
    plain = half.run("hello", keep="routing")
    for edit in (
        shared.swap(1, 2, norm_matched=True),
        experts.off([1, 2], [0, 1, 2, 3], "renormalise"),
        routing.force(1, 3, 0.5),
        routing.random(0, positions=[1, 2]),
        shared.random_direction(0),
        routing.uniform(0),
    ):
        run = half.run("hello", edits=edit)
        assert run.logits.dtype == torch.bfloat16
        assert not torch.equal(run.logits, plain.logits)
    with pytest.warns(el.EditChangedNothingWarning):
        again = half.run("hello", edits=routing.replay(plain.trace))
    assert torch.equal(again.logits, plain.logits)
    with pytest.raises(el.EditError, match=r"has dtype torch.float32, the model torch.bfloat16"):
        half.run("hello", edits=shared.transplant(LAB))


@pytest.mark.parametrize("edit", [shared.swap(1, 2), experts.swap(1, 0, 3), routing.random(0)])
def test_an_exchange_in_one_phase(edit: Any) -> None:
    """What the prompt wrote is the model's own, what follows the donor's."""
    site = edit.select(el.all_sites(LAB.model))[0].path
    text = "hello"
    settings = {**GENERATE, "keep": [site, "routing", "moe.in"]}
    plain = LAB.generate(text, **settings)
    late = LAB.generate(text, edits=at(edit, phase="decode"), **settings)
    assert torch.equal(late.trace.tensor(site)[:5], plain.trace.tensor(site)[:5])
    both = LAB.generate(text, edits=at(edit, steps=range(9)), **settings)
    whole = LAB.generate(text, edits=edit, **settings)
    assert both.tokens == whole.tokens
    torch.testing.assert_close(both.trace.tensor(site), whole.trace.tensor(site))


def test_a_narrowed_router_with_an_empty_bank() -> None:
    edit = at(routing.random(0, bank="vision"), where=["image", "delimiter"])
    settings = {**GENERATE, "keep": "routing"}
    gen = VL.generate(**cases.VL_PROMPT, edits=edit, **settings)
    whole = VL.generate(**cases.VL_PROMPT, edits=routing.random(0, bank="vision"), **settings)
    assert gen.tokens == whole.tokens


def test_parts_need_the_model() -> None:
    with pytest.raises(el.EditError, match="exchanges parts of the model"):
        EditTap.of(shared.swap(1, 2), el.all_sites(LAB.model))
    tap = EditTap.of(edits.zero(SITE, positions=1), el.all_sites(LAB.model))
    with torch.no_grad(), pytest.raises(el.EditError, match="bound to no forward"):
        LAB.model(torch.tensor([[1, 2, 3]]), tap=tap)


def test_layers_of_another_k() -> None:
    """Losses count what was chosen, also where layers differ in k."""
    run = LAB.run("hello", edits=routing.top_k(4, layers=2), keep="routing")
    assert run.trace.tensor("blocks.1.moe.expert_ids").shape == (5, 2)
    assert run.trace.tensor("blocks.2.moe.expert_ids").shape == (5, 4)
    assert run.trace.n_chosen == 4
    probs = torch.cat([run.trace.tensor(f"blocks.{i}.moe.router_probs") for i in (1, 2)])
    ids = [run.trace.tensor(f"blocks.{i}.moe.expert_ids").flatten() for i in (1, 2)]
    load = torch.bincount(torch.cat(ids), minlength=8) / 30
    assert float(run.aux_loss) == pytest.approx(float(3 * 8 * (load * probs.mean(0)).sum()))


def test_a_redrawn_router_of_the_learned_load() -> None:
    """On the states that it was fitted on, its MaxVio is at most 0.05 above the learned one's."""
    prompts = [p * 6 for p in ("abcdefgh", "the cat, a dog.", "Hello you there", "xyz ABC")]
    base = LAB.run(prompts, keep=["routing", "moe.in"]).trace
    edit = routing.random(0, 1, trace=base)
    found = {}
    for name, given in (("base", ()), ("fitted", edit), ("unfitted", routing.random(0, 1))):
        trace = LAB.run(prompts, edits=given, keep="routing").trace
        counts = torch.bincount(trace.tensor("blocks.1.moe.expert_ids").flatten(), minlength=8)
        found[name] = float(counts.max() / counts.double().mean() - 1)
    assert found["fitted"] <= found["base"] + 0.051 < found["unfitted"]
    assert LAB.run("hello", edits=edit, keep="routing").trace.correction_bias.shape == (2, 8)
    vision = VL.run(**cases.VL_PROMPT, keep=["routing", "moe.in"]).trace
    states = routing.random(0, bank="vision", trace=vision).states
    assert states["blocks.1.moe.vision.router_logits"].shape == (6, 32)
    with pytest.raises(el.EditError, match="give one"):
        routing.random(0, trace=base, keep_bias=True)
