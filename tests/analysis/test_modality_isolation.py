"""All four measurements of isolation by one call, and each equal to its own function."""

import numpy as np
import pandas as pd
import pytest

import ernie_lab as el
from ernie_lab.organisms.boards import samples

BOARDS = samples.boards()[:2]
TEXTS = [board.questions[0].text for board in BOARDS]
IMAGES = [[board.picture] for board in BOARDS]


@pytest.fixture(scope="module")
def lab():
    return el.load("tiny-vl")


def test_one_call_is_the_four_functions(lab):
    found = el.analysis.modality_isolation(lab, TEXTS, images=IMAGES)
    assert found.model == "tiny-vl" and found.report.isolated
    assert found.report.layers == (1, 2, 3, 4)
    pd.testing.assert_frame_equal(found.routers, el.analysis.router_alignment(lab, centred=True))
    keep = ["attention", "moe.routed_out", "moe.shared_out"]
    trace = lab.run(TEXTS, images=IMAGES, keep=keep).trace
    shared, routed = (trace[f"moe.{name}_out"] for name in ("shared", "routed"))
    again = el.analysis.shared_to_routed(shared, routed, trace.tokens["content"].tolist())
    pd.testing.assert_frame_equal(found.shared, again)
    mass = el.analysis.attention_mass(trace).mass
    np.testing.assert_allclose(found.attention.mass, mass)
    assert "no leaks" in repr(found) and "of 4 layers" in repr(found)


def test_edits_are_what_is_measured(lab):
    crossed = el.routing.cross_bank("vision", 2)
    found = el.analysis.modality_isolation(lab, TEXTS, images=IMAGES, edits=crossed)
    assert set(found.report.leaks["layer"]) == {2}
    sound = el.analysis.modality_isolation(lab, TEXTS, images=IMAGES)
    before, after = (one.shared["median"].xs("image", level="content") for one in (sound, found))
    assert before[1] == pytest.approx(after[1]) and before[2] != pytest.approx(after[2])


def test_what_has_no_two_modalities(lab):
    with pytest.raises(ValueError, match="reads text alone"):
        el.analysis.modality_isolation(el.load("tiny-text"), "And God said")
    with pytest.raises(ValueError, match="has no picture"):
        el.analysis.modality_isolation(lab, "Value of good head?")


def test_a_prompt_without_a_picture_is_named(lab):
    with pytest.raises(ValueError, match=r"prompt 0 has no picture.*images=\[picture\]"):
        el.analysis.modality_isolation(lab, "text only")


def test_the_report_takes_a_lab_and_says_what_else_it_takes(lab):
    batch = lab.prepare(TEXTS, images=IMAGES)
    of_lab, of_model = (el.analysis.isolation_report(one, batch) for one in (lab, lab.model))
    assert of_lab.isolated
    pd.testing.assert_frame_equal(of_lab.table, of_model.table)
    with pytest.raises(TypeError, match=r"lab\.prepare\(prompt, images=…\).*not a str"):
        el.analysis.isolation_report(lab, "a prompt")
    with pytest.raises(ValueError, match="one bank"):
        el.analysis.isolation_report(el.load("tiny-text"), batch)
