"""The stream, logits and router preferences as sums that close, on text and with pictures."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.labs import small_lab
from support.models import small_config, small_vl_model

import ernie_lab as el
from ernie_lab.analysis.decomposition import decompose, decomposition_sites
from ernie_lab.analysis.direct import direct_logit_attribution, neuron_attribution
from ernie_lab.analysis.router_attribution import router_attribution, router_attribution_sites
from ernie_lab.checkpoint.config import RouterConfig
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.lab import Lab
from ernie_lab.trace.keys import NotKept

CLOSES = 1e-4
LAYER = 2


def picture(grid: Grid, seed: int) -> Media:
    random = torch.Generator().manual_seed(seed)
    frames = np.zeros((grid.t, grid.h * 2, grid.w * 2, 3), np.uint8)
    return Media("image", torch.randn((grid.n_patches, 12), generator=random), grid, frames, (8, 8))


PROMPTS = [[7, 52, *[50] * 4, 53, 8, 9], [11, 12, 13], [5, 52, *[50] * 6, 53, 6, 7, 8]]
IMAGES = [[picture(Grid(1, 4, 4), 1)], [], [picture(Grid(1, 4, 6), 2)]]


def everything(lab: Lab) -> list[str]:
    router = router_attribution_sites(lab, LAYER)
    more = ["logits", "blocks.*.moe.shared.act", "blocks.0.mlp.act"]
    return list(dict.fromkeys([*decomposition_sites(lab), *router, *more]))


@pytest.fixture(scope="module", params=["text", "vl", "biases"])
def recorded(request):
    """A lab and a run in which everything was kept; texts of unequal length, so with padding."""
    if request.param == "vl":
        lab = Lab(model=small_vl_model(), model_id="small vl")
        return lab, lab.run(PROMPTS, images=IMAGES, keep=everything(lab))
    attention = dataclasses.replace(small_config().attention, use_bias=True)
    biases = {"attention": attention, "head_bias": True}
    lab = small_lab(**({} if request.param == "text" else biases))
    return lab, lab.run(["hello there", "no", "what is it"], keep=everything(lab))


def test_the_parts_sum_to_the_stream(recorded) -> None:
    lab, run = recorded
    found = decompose(run.trace, lab)
    assert found.residual_error < CLOSES
    n_layers, n_heads = 3, 4
    kinds = found.components["kind"].value_counts()
    assert kinds["head"] == n_layers * n_heads
    assert (kinds["slot"], kinds["shared"], kinds["mlp"], kinds["embed"]) == (4, 2, 1, 1)
    exact = run.trace.tensor("blocks.2.resid_post")
    torch.testing.assert_close(found.values.sum(0), exact, rtol=1e-4, atol=1e-4)
    assert found.norms()["share"].sum() == pytest.approx(1, abs=1e-5)
    assert f"into {len(found.parts)} components" in repr(found)


def test_a_missing_part_is_noticed(recorded) -> None:
    """The check of the check: without its largest part the sum does not close."""
    lab, run = recorded
    found = decompose(run.trace, lab)
    largest = max(found.parts, key=lambda part: float(part.values_ND.norm()))
    rest = found.sum() - largest.values_ND
    assert float(((rest - found.exact_ND).norm(dim=-1) / found.exact_ND.norm(dim=-1)).max()) > 0.1


def test_the_stream_before_a_router(recorded) -> None:
    lab, _ = recorded
    given = {"images": IMAGES} if lab.tokenizer is None else {}
    prompts = PROMPTS if lab.tokenizer is None else ["hello there", "no"]
    trace = lab.run(prompts, keep=decomposition_sites(lab, 1), **given).trace
    found = decompose(trace, lab, layer=1)
    assert found.residual_error < CLOSES
    assert set(found.components["layer"].dropna()) == {0, 1}
    assert "slot" not in set(found.components["kind"])


def test_slots_name_their_experts(recorded) -> None:
    lab, run = recorded
    found = decompose(run.trace, lab)
    slot = next(p for p in found.parts if str(p.component) == "slot 2.1")
    for bank in run.trace.banks:
        ids = run.trace.routing(bank).expert_ids.sel(layer=2, slot=1)
        rows = run.trace.tokens.reset_index().merge(
            ids.to_dataframe(name="expert").reset_index(drop=True)[["sequence", "pos", "expert"]],
            on=["sequence", "pos"],
        )
        assert slot.expert_N[rows["index"].tolist()].tolist() == rows["expert"].tolist()
        assert set(slot.bank_N[rows["index"].tolist()].tolist()) == {("text", "vision").index(bank)}


@pytest.mark.parametrize("against", [None, 9])
def test_direct_attribution_closes_on_the_logits(recorded, against) -> None:
    lab, run = recorded
    found = direct_logit_attribution(run.trace, lab, 5, against)
    assert found.residual_error < CLOSES
    logits = run.logits[run.mask].double()
    other = logits.mean(1) if against is None else logits[:, against]
    np.testing.assert_allclose(found.targets["value"], logits[:, 5] - other, atol=1e-5)
    n_biases = found.components["kind"].eq("head_bias").sum()
    assert n_biases == getattr(lab.config, "head_bias", False)


def test_one_contribution_by_hand(recorded) -> None:
    lab, run = recorded
    found = direct_logit_attribution(run.trace, lab, 5, 9)
    column = list(found.components["component"]).index("shared 1")
    shared = run.trace.tensor("blocks.1.moe.shared_out")[0]
    weight = lab.model.embed_VD if lab.model.unembed_VD is None else lab.model.unembed_VD
    x = run.trace.tensor("blocks.2.resid_post")[0]
    scale = 1 / math.sqrt(float(x.square().mean()) + lab.model.final_norm.eps)
    direction = (lab.model.final_norm.gain_D * (weight[5] - weight[9])).detach()
    by_hand = float((shared * scale * direction).sum())
    assert found.values[0, column] == pytest.approx(by_hand, rel=1e-4)


def test_the_next_token(recorded) -> None:
    lab, run = recorded
    found = direct_logit_attribution(run.trace, lab)
    lengths = run.batch.lengths
    assert len(found.targets) == sum(lengths) - len(lengths)
    tokens = run.trace.tokens
    expected = [
        token for _, part in tokens.groupby("sequence") for token in part["id"].tolist()[1:]
    ]
    assert found.targets["token"].tolist() == expected


def test_an_edited_run_under_the_scale_of_its_base(recorded) -> None:
    lab, run = recorded
    given = {"images": IMAGES} if lab.tokenizer is None else {}
    prompts = PROMPTS if lab.tokenizer is None else ["hello there", "no", "what is it"]
    off = el.edit("blocks.2.moe.shared_out", torch.zeros_like)
    edited = lab.run(prompts, keep=everything(lab), edits=[off], **given)
    base = direct_logit_attribution(run.trace, lab, 5, 9)
    other = direct_logit_attribution(edited.trace, lab, 5, 9, base=run.trace)
    column = list(base.components["component"]).index("shared 2")
    change = other.targets["value"] - base.targets["value"]
    np.testing.assert_allclose(change, -base.values[:, column], atol=1e-4)
    assert other.residual_error < CLOSES


def test_by_expert_adds_up_to_the_slots(recorded) -> None:
    lab, run = recorded
    found = direct_logit_attribution(run.trace, lab, 5)
    table = found.by_expert()
    slots = found.by("kind").set_index("kind").loc["slot", "mean"]
    assert table["mean"].sum() == pytest.approx(slots)
    assert table["n"].sum() == len(found.targets) * 4
    if "vision" in run.trace.banks:
        assert set(table["bank"]) == {"text", "vision"}
    frame = found.to_frame()
    assert len(frame) == found.values.size
    assert frame["contribution"].sum() == pytest.approx(found.values.sum())
    one = frame[frame["slot_expert"] == table["expert"][0]]
    assert len(one) >= table["n"][0]


@pytest.mark.parametrize("layer", [0, 2])
def test_neurons_sum_to_their_block(recorded, layer) -> None:
    lab, run = recorded
    whole = direct_logit_attribution(run.trace, lab, 5, 9)
    neurons = neuron_attribution(run.trace, lab, layer, 5, 9)
    name = "mlp 0" if layer == 0 else "shared 2"
    column = list(whole.components["component"]).index(name)
    assert neurons.residual_error < CLOSES
    np.testing.assert_allclose(neurons.values.sum(1), whole.values[:, column], atol=1e-5)


def test_router_attribution_closes_on_the_router_logits(recorded) -> None:
    lab, run = recorded
    for bank in run.trace.banks:
        name = bank if len(run.trace.banks) > 1 else None
        found = router_attribution(run.trace, lab, LAYER, name, slot=None)
        assert found.residual_error < CLOSES
        ledger = run.trace.routing(bank if name else None)
        logits = ledger.router_logits.sel(layer=LAYER).values
        ids = ledger.expert_ids.sel(layer=LAYER).values
        scores = ledger.selection_scores.sel(layer=LAYER).values
        row = 0
        for slot in range(2):
            for n in range(len(logits)):
                best = np.argsort(-scores[n])
                target = found.targets.iloc[row]
                assert target["expert"] == ids[n, slot] == best[slot]
                assert target["against"] == best[2]
                difference = logits[n, ids[n, slot]] - logits[n, best[2]]
                assert target["value"] == pytest.approx(difference, abs=1e-5)
                assert target["prob_advantage"] + target["bias_advantage"] >= 0
                row += 1
        assert len(found.targets) == row
        average = found.by("kind", "layer")
        assert average["mean"].sum() == pytest.approx(found.targets["value"].mean(), rel=1e-4)


def test_router_attribution_of_any_two_experts(recorded) -> None:
    lab, run = recorded
    bank = "text" if len(run.trace.banks) > 1 else None
    found = router_attribution(run.trace, lab, LAYER, bank, expert=3, against=6)
    logits = run.trace.routing(bank).router_logits.sel(layer=LAYER).values
    np.testing.assert_allclose(found.targets["value"], logits[:, 3] - logits[:, 6], atol=1e-6)
    assert found.residual_error < CLOSES
    chosen = (run.trace.routing(bank).expert_ids.sel(layer=LAYER).values == 3).any(-1)
    assert ((found.targets["slot"] >= 0) == chosen).all()
    runner = router_attribution(run.trace, lab, LAYER, bank, expert=3)
    assert (runner.targets["against"] != 3).all()


def test_what_is_missing_is_named() -> None:
    lab = small_lab()
    trace = lab.run("hello", keep="routing").trace
    with pytest.raises(NotKept, match=r"embed_in.*keep=el\.analysis\.decomposition_sites\(lab\)"):
        decompose(trace, lab)
    with pytest.raises(NotKept, match=r"router_attribution_sites\(lab, 2\)"):
        router_attribution(trace, lab, 2)
    with pytest.raises(NotKept, match=r"blocks\.1\.moe\.shared\.act"):
        neuron_attribution(trace, lab, 1, 5)
    full = lab.run("hello", keep=everything(lab)).trace
    with pytest.raises(ValueError, match="'hi' is 2 tokens"):
        direct_logit_attribution(full, lab, "hi")
    with pytest.raises(ValueError, match="layer 0 is dense"):
        router_attribution(full, lab, 0)
    with pytest.raises(ValueError, match="one bank"):
        router_attribution(full, lab, 1, "vision")
    narrow = lab.run(
        "hello", keep=[*decomposition_sites(lab)[1:], el.keep("embed_in", positions=[-1])]
    ).trace
    with pytest.raises(ValueError, match="same positions"):
        decompose(narrow, lab)


def test_all_at_one_position_is_enough() -> None:
    lab = small_lab()
    sites = el.keep(*decomposition_sites(lab), positions=[-1])
    trace = lab.run("hello there", keep=sites).trace
    assert len(decompose(trace, lab).exact_ND) == 1
    assert direct_logit_attribution(trace, lab, "a", "b").residual_error < CLOSES


def test_a_dense_model() -> None:
    lab = small_lab(moe=None)
    run = lab.run("hello", keep=[*decomposition_sites(lab), "logits"])
    assert decompose(run.trace, lab).residual_error < CLOSES
    found = direct_logit_attribution(run.trace, lab, 5)
    assert found.residual_error < CLOSES
    assert found.by_expert().empty


def test_two_experts_by_hand() -> None:
    """Width 32, two experts of which one is chosen: w_0 reads axis 0, w_1 axis 1."""
    moe = small_config().moe
    one = type(moe)(
        layers=(1, 2),
        router=RouterConfig(width=32, n_experts=2, n_chosen=1),
        expert_hidden=16,
        n_shared=2,
    )
    lab = small_lab(moe=one)
    router = lab.model.blocks[1].moe.router
    with torch.no_grad():
        router.weight_ED.zero_()
        router.weight_ED[0, 0] = router.weight_ED[1, 1] = 1.0
        lab.model.blocks[1].norm2.gain_D.fill_(2.0)
    trace = lab.run("hey", keep=[*router_attribution_sites(lab, 1), "blocks.1.resid_mid"]).trace
    found = router_attribution(trace, lab, 1, expert=0, against=1)
    x = trace.tensor("blocks.1.resid_mid")
    scale = 1 / (x.square().mean(-1) + lab.model.blocks[1].norm2.eps).sqrt()
    np.testing.assert_allclose(found.targets["value"], 2 * scale * (x[:, 0] - x[:, 1]), rtol=1e-5)
    embed = trace.tensor("embed_in")
    by_hand = 2 * scale * (embed[:, 0] - embed[:, 1])
    np.testing.assert_allclose(found.values[:, 0], by_hand, rtol=1e-5)
