"""Patching attention maps, and rows of one of two banks; what has no meaning is refused."""

import pytest
import torch
from edit_cases import VL_PROMPT, image, vl_lab
from support.labs import small_lab

import ernie_lab as el
from ernie_lab.interventions import EditError
from ernie_lab.interventions import catalogue as edits
from ernie_lab.lab import Lab

PATTERN, SCORES = "blocks.1.attn.pattern", "blocks.1.attn.scores"
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_lab()


@pytest.mark.parametrize("site", [PATTERN, SCORES])
def test_a_patched_map_is_the_other_map(lab: Lab, site: str) -> None:
    """By hand: the other prompt's map, put in by a function."""
    other = lab.run("jelly", keep=site).trace
    run = lab.run("hello", edits=edits.patch(site, other), keep=[site, PATTERN])
    assert torch.equal(run.trace.tensor(site, 0), other.tensor(site, 0))
    rows = other.tensor(site, 0)
    by_hand = lab.run("hello", edits=el.edit(site, lambda x: rows[None].clone()))
    assert torch.equal(run.logits, by_hand.logits)
    assert not torch.allclose(run.logits, lab.run("hello").logits, atol=1e-4)


@pytest.mark.parametrize("site", [PATTERN, SCORES])
def test_an_own_map_changes_nothing(lab: Lab, site: str) -> None:
    prompts = ["hello there", "no"]
    own = lab.run(prompts, keep=site).trace
    with pytest.warns(el.EditChangedNothingWarning):
        run = lab.run(prompts, edits=edits.patch(site, own))
    assert torch.equal(run.logits, lab.run(prompts).logits)


def test_a_padded_batch_equals_single_runs(lab: Lab) -> None:
    """Keys are told by position, so the padding on the left moves nothing."""
    prompts, others = ["hello there", "no"], ["jelly beans", "go"]
    source = lab.run(others, keep=PATTERN).trace
    both = lab.run(prompts, edits=edits.patch(PATTERN, source))
    for i, prompt in enumerate(prompts):
        one = lab.run(others[i], keep=PATTERN).trace
        alone = lab.run(prompt, edits=edits.patch(PATTERN, one))
        torch.testing.assert_close(both.logits[i][both.mask[i]], alone.logits[0], **CLOSE)


def test_heads_and_positions(lab: Lab) -> None:
    other = lab.run("jelly", keep=PATTERN).trace
    plain = lab.run("hello", keep=PATTERN).trace.tensor(PATTERN, 0)
    edit = edits.patch(PATTERN, other, heads=2, positions=[3])
    mixed = lab.run("hello", edits=edit, keep=PATTERN).trace.tensor(PATTERN, 0)
    expected = plain.clone()
    expected[2, 3] = other.tensor(PATTERN, 0)[2, 3]
    assert torch.equal(mixed, expected)


def test_in_generation_and_from_one(lab: Lab) -> None:
    """Queries of decode steps too: the same as a full forward of the final text."""
    source = lab.generate("jelly", max_new_tokens=4, keep=PATTERN, temperature=0, stop=[]).trace
    edit = edits.patch(PATTERN, source)
    gen = lab.generate("hello", max_new_tokens=4, edits=edit, keep="routing", stop=[])
    text = list(gen.prompts[0]) + gen.tokens[0][:-1]
    whole = lab.run([text], edits=edit, keep="routing")
    assert whole.logits[0, 4:].argmax(-1).tolist() == gen.tokens[0]
    assert (whole.trace.expert_ids.values == gen.trace.expert_ids.values).all()


def test_a_longer_prompt_needs_a_longer_trace(lab: Lab) -> None:
    source = lab.run("no", keep=PATTERN).trace
    with pytest.raises(EditError, match="position 2"):
        lab.run("hello", edits=edits.patch(PATTERN, source))
    run = lab.run("hello", edits=edits.patch(PATTERN, source, missing="keep"), keep=PATTERN)
    got, plain = run.trace.tensor(PATTERN, 0), lab.run("hello", keep=PATTERN).trace
    assert torch.equal(got[:, 2:], plain.tensor(PATTERN, 0)[:, 2:])
    assert torch.equal(got[:, :2, :2], source.tensor(PATTERN, 0))


def test_a_grid_over_the_heads_of_maps(lab: Lab) -> None:
    """Each cell is one head's map put into one layer."""
    source = lab.run("jelly", keep="attn.pattern").trace

    def metric(run) -> float:
        return float(run.logits[0, -1, 5] - run.logits[0, -1, 9])

    grid = edits.patch_grid(
        lab, "hello", source, metric, site="attn.pattern", by="head", progress=False
    )
    assert grid.shape == (3, 4) and grid.attrs["source"] == "small, float32 on cpu"
    one = lab.run("hello", edits=edits.patch(PATTERN, source, heads=2))
    assert float(grid.sel(layer=1, head=2)) == pytest.approx(metric(one), abs=1e-6)


def test_files(lab: Lab, tmp_path) -> None:
    edit = edits.patch(PATTERN, lab.run("jelly", keep=PATTERN).trace, heads=[0, 1])
    (again,) = edits.load(edits.save(edit, tmp_path))
    assert again == edit
    first, second = (lab.run("hello", edits=one).logits for one in (edit, again))
    assert torch.equal(first, second)


def test_what_has_no_meaning_says_why(lab: Lab) -> None:
    trace = lab.run("jelly", keep="attention").trace
    with pytest.raises(EditError, match="no mean over tokens"):
        edits.mean(PATTERN, trace)
    with pytest.raises(EditError, match="keys of its own number"):
        edits.resample("attn.pattern", trace)
    some = lab.run("jelly", keep=el.keep(PATTERN, heads=[1])).trace
    with pytest.raises(EditError, match="some heads alone"):
        edits.patch(PATTERN, some)


BANKED = "blocks.2.moe.vision.router_logits"


def test_rows_of_a_bank_are_told_by_sequence_and_position() -> None:
    vl = vl_lab()
    other = {**VL_PROMPT, "images": [[image(4, 4, 2)], []]}
    source = vl.run(**other, keep=[BANKED, "blocks.2.moe.vision.expert_out"]).trace
    edit = edits.patch(BANKED, source)
    run = vl.run(**VL_PROMPT, edits=edit, keep=BANKED)
    assert torch.equal(run.trace.tensor(BANKED), source.tensor(BANKED))
    mean = vl.run(**VL_PROMPT, edits=edits.mean(BANKED, source), keep=BANKED).trace.tensor(BANKED)
    torch.testing.assert_close(mean, source.tensor(BANKED).mean(0).expand_as(mean))
    drawn = vl.run(**VL_PROMPT, edits=edits.resample(BANKED, source), keep=BANKED).trace
    rows = {tuple(row) for row in source.tensor(BANKED).tolist()}
    assert {tuple(row) for row in drawn.tensor(BANKED).tolist()} <= rows
    # A text token that the edit sends to the vision bank was not there in the trace.
    crossed = [el.routing.cross_bank("text"), edits.patch("blocks.2.moe.vision.expert_out", source)]
    with pytest.raises(EditError, match="was in the other bank"):
        vl.run(**VL_PROMPT, edits=crossed)


def test_patches_of_pictures_are_no_tokens() -> None:
    vl = vl_lab()
    trace = vl.run(**VL_PROMPT, keep=["vision.out", "vision.blocks.0.attn.pattern"]).trace
    with pytest.raises(EditError, match="patches and no tokens"):
        edits.patch("vision.out", trace)
    with pytest.raises(EditError, match="patches and no tokens"):
        edits.resample("vision.out", trace)
    with pytest.raises(EditError, match="one map for each frame"):
        edits.mean("vision.blocks.0.attn.pattern", trace)
    rows = vl.run(**VL_PROMPT, edits=edits.mean("vision.out", trace), keep="vision.out").trace
    torch.testing.assert_close(
        rows.tensor("vision.out"), trace.tensor("vision.out").mean(0).expand(16, -1)
    )
