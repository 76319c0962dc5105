"""`compare`: against single runs, in batches, with pictures, resumed, saved, refused."""

import math
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support.labs import small_lab
from support.models import small_vl_model

import ernie_lab as el
from ernie_lab.experiments import compare
from ernie_lab.experiments.noise import variants
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.interventions import Edit, at, experts, routing, shared
from ernie_lab.interventions.comparison import Comparison
from ernie_lab.lab import Lab

PROMPTS = ["hello there, how are you?", "no", "what is this thing here"]
SHARED = "blocks.1.moe.shared_out"
QUIET = {"progress": False, "noise": 0, "n_draws": 50}


def off() -> Edit:
    return el.edit(SHARED, torch.zeros_like)


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


@pytest.fixture(scope="module")
def found(lab: Lab) -> Comparison:
    """In batches of several sequences and one."""
    return compare(
        lab,
        PROMPTS,
        {"off": [off()], "half": el.edit(SHARED, lambda x: x / 2)},
        controls={"nothing": []},
        answers=("a", "b"),
        documents=["x", "y", "x"],
        metrics={
            "norm": lambda base, edited, batch: (edited.logits - base.logits).norm(dim=-1),
            "last": lambda base, edited, batch: edited.logits[:, -1].amax(-1),
        },
        batch_tokens=50,
        progress=False,
        n_draws=50,
    )


def test_every_token_agrees_with_runs_of_its_own(lab: Lab, found: Comparison) -> None:
    assert found.settings["n_batches"] == 2
    for number, prompt in enumerate(PROMPTS):
        base, edited = (
            lab.run(prompt, keep="routing"),
            lab.run(prompt, keep="routing", edits=[off()]),
        )
        rows = found.tokens.query(f"condition == 'off' and sequence == {number}")
        assert "".join(rows["text"]).replace("Ġ", " ") == prompt
        assert list(rows["pos"]) == list(range(len(prompt)))
        close = {"rtol": 1e-4, "atol": 1e-5}
        np.testing.assert_allclose(rows["loss_base"], base.token_loss[0], **close)
        np.testing.assert_allclose(rows["loss"], edited.token_loss[0], **close)
        log_p, log_q = (run.logits[0, :-1].log_softmax(-1) for run in (base, edited))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        np.testing.assert_allclose(rows["kl"].iloc[1:], kl, **close)
        assert math.isnan(rows["kl"].iloc[0])
        agree = base.logits[0, :-1].argmax(-1) == edited.logits[0, :-1].argmax(-1)
        assert (rows["top1_agreement"].iloc[1:] == agree.float().numpy()).all()
        ours, theirs = base.trace.expert_ids.values, edited.trace.expert_ids.values
        for place, layer in enumerate((1, 2)):
            flips = [
                1 - len(set(a) & set(b)) / 2
                for a, b in zip(ours[place], theirs[place], strict=True)
            ]
            assert list(rows[f"flips[{layer}]"]) == flips
        norm = (edited.logits - base.logits)[0].norm(dim=-1)
        np.testing.assert_allclose(rows["norm"], norm, rtol=1e-3, atol=1e-4)
        a, b = lab.tokenizer.encode("ab")
        difference = edited.logits[0, -1, a] - edited.logits[0, -1, b]
        row = found.sequences.query(f"condition == 'off' and sequence == {number}").iloc[0]
        assert row["logit_diff"] == pytest.approx(float(difference), abs=1e-4)
        assert row["last"] == pytest.approx(float(edited.logits[0, -1].max()), abs=1e-4)


def test_conditions_average_over_tokens(found: Comparison) -> None:
    assert list(found.conditions.index) == ["off", "half", "nothing"]
    tokens = found.tokens[found.tokens["condition"] == "off"]
    row = found.conditions.loc["off"]
    assert row["n_tokens"] == sum(map(len, PROMPTS)) - 3
    assert row["n_documents"] == 2
    for metric in ("loss_change", "kl", "top1_agreement", "norm", "flips"):
        assert row[metric] == pytest.approx(tokens[metric].mean())
    assert row["loss_change"] == pytest.approx(row["loss"] - row["loss_base"])
    assert row["kl_low"] <= row["kl"] <= row["kl_high"]
    per_document = tokens.groupby("document")["kl"].mean()
    assert row["kl_low"] == pytest.approx(per_document.min())
    assert row["kl_high"] == pytest.approx(per_document.max())
    assert found.metrics[-2:] == ("norm", "last")
    sequences = found.sequences[found.sequences["condition"] == "off"]
    change = sequences["logit_diff"] - sequences["logit_diff_base"]
    assert row["logit_diff_change"] == pytest.approx(change.mean())


def test_controls_and_counts(found: Comparison) -> None:
    assert found.conditions["control"].tolist() == [False, False, True]
    assert found.conditions["n_fired"].tolist() == [2, 2, 0]
    assert found.conditions["n_changed"].tolist() == [2, 2, 0]
    nothing = found.conditions.loc["nothing"]
    assert (nothing["loss_change"], nothing["kl"], nothing["flips"]) == (0, 0, 0)
    assert nothing["top1_agreement"] == 1
    assert found.edits["condition"].tolist() == ["off", "half"]


def test_routing_drifts_only_downstream(found: Comparison) -> None:
    drift = found.routing.set_index(["condition", "layer"])["flips"]
    assert drift["off", 1] == 0
    assert drift["off", 2] > 0
    assert (drift["nothing"] == 0).all()


def test_the_floor_is_small_and_not_zero_in_float32(found: Comparison) -> None:
    row = found.conditions.loc["off"]
    assert len(found.noise) == 8
    assert 0 < row["loss_change_floor"] < 1e-5 < row["loss_change"] ** 2
    expected = np.percentile(found.noise["loss_change"].abs(), 95)
    assert row["loss_change_floor"] == pytest.approx(expected)
    assert 0 < row["norm_floor"] < 1e-3
    assert "*" in repr(found).splitlines()[2]
    assert "*" not in repr(found).splitlines()[4]
    assert "Intervals are over 2 documents only: too narrow for 95 %." in repr(found)


def test_no_equivalent_run_is_the_base_run() -> None:
    for variant in variants(16, seed=5):
        assert variant.kernel == "math" or variant.filler is not None
        assert sorted(i for group in variant.groups(7) for i in group) == list(range(7))


def test_labels_and_loss_mask(lab: Lab) -> None:
    prompt = "hello"
    ids = lab.prepare(prompt).input_ids[0].tolist()
    counted = [False, False, True, True, False]
    table = compare(lab, prompt, {"off": off()}, loss_mask=counted, **QUIET)
    rows = table.tokens
    assert list(rows["loss"].notna()) == counted
    assert list(rows["kl"].notna()) == counted
    assert table.conditions.loc["off", "n_tokens"] == 2
    other = [ids[0], 20, *ids[2:]]
    changed = compare(lab, prompt, {"off": off()}, labels=other, **QUIET).tokens
    expected = lab.run(prompt, labels=other).token_loss[0, 1]
    assert changed["loss_base"][1] == pytest.approx(float(expected))


def test_by_a_column(found: Comparison) -> None:
    table = found.by("document", "kl").set_index(["condition", "document"])
    mine = found.tokens.query("condition == 'off' and document == 'y'")["kl"]
    assert table.loc[("off", "y"), "kl"] == pytest.approx(mine.mean())


def test_saved_and_loaded(found: Comparison, tmp_path: Path) -> None:
    again = Comparison.load(found.save(tmp_path / "c"))
    for name in ("tokens", "sequences", "conditions", "routing", "edits", "figures", "noise"):
        pd.testing.assert_frame_equal(
            getattr(again, name), getattr(found, name), check_dtype=False, check_index_type=False
        )
    assert again.provenance == found.provenance
    assert repr(again) == repr(found)
    assert "<table>" in again._repr_html_()
    assert again.provenance.details["controls"] == ["nothing"]


def test_it_resumes_from_its_parts(lab: Lab, tmp_path: Path) -> None:
    settings = {**QUIET, "batch_tokens": 1, "folder": tmp_path}
    whole = compare(lab, PROMPTS, {"a": off()}, **settings)
    assert whole.settings["parts_found"] == 0
    again = compare(lab, PROMPTS, {"b": off()}, **settings)
    assert again.settings["parts_found"] == 3
    np.testing.assert_array_equal(again.tokens["loss"], whole.tokens["loss"])
    assert again.edits["n_changed"].tolist() == [3]
    other = compare(lab, PROMPTS, {"a": el.edit(SHARED, torch.ones_like)}, **settings)
    assert other.settings["parts_found"] == 0
    fewer = compare(lab, PROMPTS[:2], {"a": off()}, **settings)
    assert fewer.settings["parts_found"] == 2
    for part in (tmp_path / "parts").glob("*.npz"):
        part.write_bytes(b"cut short")
    assert compare(lab, PROMPTS, {"a": off()}, **settings).settings["parts_found"] == 0


def test_an_interrupt_keeps_what_was_finished(lab: Lab, tmp_path: Path) -> None:
    settings = {**QUIET, "batch_tokens": 1, "folder": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(lab, PROMPTS, {"a": off()}, metrics={"stop": _stop_at("no")}, **settings)
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 2


def _stop_at(prompt: str):
    def stop(base, edited, batch):
        if batch.input_ids.shape[1] == len(prompt):
            raise KeyboardInterrupt
        return edited.token_loss

    return stop


def test_edits_that_change_nothing_are_named(lab: Lab) -> None:
    same = el.edit(SHARED, lambda x: x)
    with pytest.warns(el.EditChangedNothingWarning, match=r"'idle'.*applied once.*is 0"):
        compare(lab, PROMPTS, {"idle": [same]}, **QUIET)
    doubled = el.edit("blocks.1.moe.selection_scores", lambda x: x * 2)  # the choice stays
    with pytest.warns(
        el.EditChangedNothingWarning, match="changed values, but no prediction that counts"
    ):
        compare(lab, PROMPTS, {"scale": [doubled]}, **QUIET)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        after = el.edit("final_norm.normalized", lambda x: x + 0.0)
        compare(lab, PROMPTS, {"both": [off(), after]}, **QUIET)
    assert [("final_norm" in str(w.message), "applied once" in str(w.message)) for w in told] == [
        (True, True)
    ]


def test_what_is_refused(lab: Lab) -> None:
    with pytest.raises(TypeError, match="conditions must name edits"):
        compare(lab, PROMPTS, [off()], **QUIET)
    for wrong in ("zero", 3, {"zero": 1}):
        with pytest.raises(el.EditError, match=r"condition 'x': .* must be an edit or a list"):
            compare(lab, PROMPTS, {"x": wrong}, **QUIET)
    with pytest.raises(el.SiteError, match="no site matches"):
        compare(lab, PROMPTS, {"x": el.edit("blocks.9.nothing", torch.zeros_like)}, **QUIET)
    with pytest.raises(ValueError, match="at least 8"):
        compare(lab, PROMPTS, {"x": off()}, **{**QUIET, "noise": 3})
    with pytest.raises(ValueError, match=r"loss_mask have lengths \[2\]"):
        compare(lab, "hello", {"x": off()}, loss_mask=[True, False], **QUIET)
    with pytest.raises(ValueError, match="'hello' is 5 tokens"):
        compare(lab, "hello", {"x": off()}, answers=("hello", "a"), **QUIET)
    with pytest.raises(ValueError, match="2 documents for 3 prompts"):
        compare(lab, PROMPTS, {"x": off()}, documents=["a", "b"], **QUIET)
    with pytest.raises(ValueError, match=r"metrics \['kl'\] have names"):
        compare(lab, PROMPTS, {"x": off()}, metrics={"kl": lambda a, b, c: 0}, **QUIET)
    with pytest.raises(ValueError, match=r"returned shape \(\).*how the prompts are batched"):
        compare(lab, PROMPTS, {"x": off()}, metrics={"m": lambda a, b, c: b.loss}, **QUIET)


def test_a_function_gives_each_batch_its_edits(lab: Lab) -> None:
    seen = []

    def of(sequences):
        seen.append(sequences)
        return off()

    table = compare(lab, PROMPTS, {"x": of}, batch_tokens=50, **QUIET)
    assert sorted(seen) == [(0, 2), (1,)]
    assert table.edits["n_fired"].tolist() == [2]


def test_metrics_may_read_traces(lab: Lab) -> None:
    def moved(base, edited, batch):
        path = "blocks.2.resid_post"
        change = (edited.trace[path].values - base.trace[path].values) ** 2
        out = torch.full(batch.mask.shape, torch.nan)
        out[batch.mask] = torch.from_numpy(change.sum(-1))
        return out

    table = compare(
        lab, PROMPTS, {"off": off()}, metrics=moved, keep="blocks.2.resid_post", progress=False
    )
    assert (table.tokens["moved"] > 0).all()
    assert math.isnan(table.conditions.loc["off", "moved_floor"])
    assert table.conditions.loc["off", "kl_floor"] > 0


def picture(grid: Grid, seed: int) -> Media:
    random = torch.Generator().manual_seed(seed)
    frames = np.zeros((grid.t, grid.h * 2, grid.w * 2, 3), np.uint8)
    patches = torch.randn((grid.n_patches, 12), generator=random)
    return Media("image", patches, grid, frames, original_size=(8, 8))


def test_with_pictures_and_two_banks() -> None:
    lab = Lab(model=small_vl_model(), model_id="small vl")
    prompts = [[7, 52, *[50] * 4, 53, 8, 9], [11, 12, 13], [5, 52, *[50] * 6, 53, 6, 7, 8]]
    images = [[picture(Grid(1, 4, 4), 1)], [], [picture(Grid(1, 4, 6), 2)]]
    table = compare(
        lab,
        prompts,
        {"off": off(), "text": el.edit("blocks.1.moe.bank", torch.zeros_like)},
        images=images,
        progress=False,
        n_draws=50,
    )
    alone = lab.run(prompts[2], images=images[2], edits=[off()])
    rows = table.tokens.query("condition == 'off' and sequence == 2")
    np.testing.assert_allclose(rows["loss"], alone.token_loss[0], rtol=1e-4, atol=1e-5)
    assert list(rows["content"]) == [
        "text",
        "delimiter",
        *["image"] * 6,
        "delimiter",
        *["text"] * 3,
    ]
    drift = table.routing.set_index(["condition", "layer", "bank"])["flips"]
    assert drift["text", 1, "vision"] == 1
    assert drift["text", 1, "text"] == 0
    assert drift["off", 1, "text"] == drift["off", 1, "vision"] == 0
    assert 0 < drift["off", 2, "vision"] <= 1
    assert 0 < table.conditions.loc["off", "kl_floor"] < 1e-6 < table.conditions.loc["off", "kl"]


def test_ready_made_edits_and_exchanged_parts(lab: Lab, tmp_path: Path) -> None:
    conditions = {
        "swap": [shared.swap(1, 2)],
        "twin": [shared.transplant(small_lab(moe=lab.config.moe), layers=[1])],
        "off": [experts.off(layer=2, ids=[1, 2, 3, 4], how="zero")],
        "forbid": [routing.forbid(layer=1, experts=[3])],
        "first tokens": [at(shared.zero(layers=[1]), positions=[0, 1])],
    }
    with warnings.catch_warnings():
        # The twin has the same weights: a transplant that changes nothing.
        warnings.simplefilter("ignore", el.EditChangedNothingWarning)
        found = compare(
            lab,
            PROMPTS,
            conditions,
            controls={"permuted": [shared.permute_neurons(layers=[1, 2])]},
            folder=tmp_path,
            n_draws=50,
            progress=False,
        )
        again = compare(
            lab,
            PROMPTS,
            conditions,
            controls={"permuted": [shared.permute_neurons(layers=[1, 2])]},
            folder=tmp_path,
            n_draws=50,
            progress=False,
        )
    kl = found.conditions["kl"]
    assert (kl[["swap", "off", "forbid", "first tokens"]] > 1e-3).all()
    assert kl["twin"] == 0
    assert kl["permuted"] < 1e-6
    swapped = lab.run(PROMPTS[0], edits=[shared.swap(1, 2)])
    rows = found.tokens.query("condition == 'swap' and sequence == 0")
    np.testing.assert_allclose(rows["loss"], swapped.token_loss[0], rtol=1e-4, atol=1e-5)
    drift = found.routing.set_index(["condition", "layer"])["flips"]
    assert drift["forbid", 1] > 0
    # What the edits report is a mean over the tokens of all batches.
    alone = lab.run(PROMPTS, edits=[shared.swap(1, 2)]).edits[0].measured
    figures = found.figures[found.figures["condition"] == "swap"].set_index("figure")["value"]
    assert figures.to_dict() == pytest.approx(alone, rel=1e-5)
    assert len(alone) > 0
    # Read, not computed: the same numbers, and one part for each condition and equivalent run.
    assert again.settings["parts_found"] == len(kl) + 8
    pd.testing.assert_frame_equal(again.tokens, found.tokens)


def test_edits_that_name_sequences_need_one_batch(lab: Lab) -> None:
    first = at(shared.zero(layers=[1]), sequence=0)
    with pytest.raises(ValueError, match=r"names sequences.*several batches"):
        compare(lab, PROMPTS, {"first": first}, batch_tokens=1, **QUIET)
    table = compare(lab, PROMPTS, {"first": first}, **QUIET)
    assert table.sequences["kl"].gt(1e-3).tolist() == [True, False, False]


def test_replaying_a_batch_of_its_own(lab: Lab) -> None:
    """A function of the sequences gives every batch the routing that was recorded of it."""

    def replayed(sequences):
        trace = lab.run([PROMPTS[i] for i in sequences], keep="routing").trace
        return [routing.replay(trace)]

    with pytest.warns(el.EditChangedNothingWarning, match="of each batch"):
        table = compare(lab, PROMPTS, {"own": replayed}, batch_tokens=50, **QUIET)
    assert table.conditions.loc["own", "kl"] == 0


def test_a_change_that_only_the_answer_sees(lab: Lab) -> None:
    last = el.edit("final_norm.normalized", lambda x: torch.cat([x[:, :-1], -x[:, -1:]], 1))
    table = compare(lab, "hello", {"last": last}, answers=("a", "b"), **QUIET)
    assert table.conditions.loc["last", "kl"] == 0
    assert table.conditions.loc["last", "logit_diff_change"] != 0
    with pytest.warns(el.EditChangedNothingWarning, match="no prediction that counts"):
        compare(lab, "hello", {"last": last}, **QUIET)


def test_a_dense_model(tmp_path: Path) -> None:
    lab = small_lab(moe=None)
    off = el.edit("blocks.1.mlp.mlp_out", torch.zeros_like)
    found = compare(lab, PROMPTS, {"off": off}, progress=False, n_draws=50)
    assert "flips" not in found.metrics
    assert found.routing.empty
    assert found.conditions.loc["off", "kl"] > 1e-3
    again = Comparison.load(found.save(tmp_path / "dense"))
    assert again.routing.empty
    assert repr(again) == repr(found)


def test_a_name_is_no_lab() -> None:
    with pytest.raises(TypeError, match=r"expected a Lab: el\.load\('tiny-text'\)"):
        el.compare("tiny-text", ["a"], {"x": el.shared.zero()})
    with pytest.raises(TypeError, match=r"el\.load\('tiny-text'\)"):
        el.compare_labs("tiny-text", "tiny-text", ["a"])
    with pytest.raises(TypeError, match=r"el\.load\('tiny-text'\)"):
        el.effects("tiny-text", ["a"], edits=el.shared.zero())
    with pytest.raises(TypeError, match=r"el\.load\('tiny-text'\)"):
        el.widgets.explore_ablation("tiny-text", "a")
