"""The view of pictures: every box has its own token's routing, and a picture stays behind."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from plots.cases import VisionTrace

from ernie_lab.inputs.media import Grid
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.pictures import Picture
from ernie_lab.widgets import explore_image
from ernie_lab.widgets.image import VALUES

sys.path.insert(0, str(Path(__file__).parents[1] / "trace"))

# ipywidgets builds a comm without a kernel and says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def stand_in(rows=4, cols=4, n_frames=1, original=(300, 200), **sizes):
    trace = VisionTrace(rows, cols, n_frames=n_frames, **sizes)
    one = trace.media[0]
    trace.media = (
        Picture(0, one.start, one.kind, Grid(*one.grid), one.frames, original, one.timestamps),
    )
    return trace


@pytest.fixture(scope="module")
def trace():
    return stand_in()


def sent(view, name, dtype="<f4"):
    return np.frombuffer(view.values[name], dtype)


def in_boxes(array):
    """Of a bank's array `[token …]`: one delimiter comes before the picture's 16 tokens."""
    return np.asarray(array)[1:17]


def test_every_box_has_its_own_tokens_routing(trace):
    view = explore_image(trace)
    view.layer = 2
    ledger = trace.routing("vision")
    at = {"layer": 2}
    assert np.array_equal(
        sent(view, "ids", "<i2").reshape(16, 2), in_boxes(ledger.expert_ids.sel(at))
    )
    weights = sent(view, "weights").reshape(16, 2)
    assert np.allclose(weights, in_boxes(ledger.expert_weights.sel(at)), atol=1e-6)
    assert np.allclose(sent(view, "margin"), in_boxes(ledger.margin.sel(at)), atol=1e-6)
    probs = in_boxes(ledger.router_probs.sel(at))
    assert np.allclose(sent(view, "entropy"), -(probs * np.log(probs)).sum(-1), atol=1e-5)
    chosen = np.take_along_axis(probs, in_boxes(ledger.expert_ids.sel(at)), 1)
    assert np.allclose(sent(view, "probs").reshape(16, 2), chosen, atol=1e-6)
    assert view.about["highest_entropy"] == pytest.approx(np.log(8))
    widest = max(in_boxes(ledger.margin.sel(layer=layer)).max() for layer in (1, 2))
    assert view.picture["widest_margin"] == pytest.approx(widest)


def test_entropy_by_hand():
    trace = stand_in()
    probs = trace.ledgers["vision"].router_probs
    even = np.zeros(probs.shape)
    even[..., 3] = 1.0  # one expert has all: no entropy, although 0 log 0 is in it
    even[:, 1] = [0.5, 0.25, 0.25, 0, 0, 0, 0, 0]
    trace.ledgers["vision"].router_probs = probs.copy(data=even)
    entropy = sent(explore_image(trace), "entropy")
    assert entropy[0] == pytest.approx(1.5 * np.log(2))
    assert np.array_equal(entropy[1:], np.zeros(15, "<f4"))


def test_pixels_and_places_are_those_of_the_original(trace):
    view = explore_image(trace)
    found = np.asarray(Image.open(io.BytesIO(view.picture["frames"][0])))
    assert np.array_equal(found, trace.media[0].frames[0])
    boxes = np.frombuffer(view.picture["boxes"], "<f4").reshape(4, 4, 4)
    assert boxes[1, 2].tolist() == [100, 75, 150, 150]  # 200 x 300 pixels in 4 x 4 boxes
    assert view.picture["original"] == "200 x 300"
    assert np.frombuffer(view.picture["positions"], "<i4").tolist() == [*range(5, 21)]


def test_a_clip_has_a_picker_of_frame_pairs():
    trace = stand_in(n_frames=4)
    view = explore_image(trace)
    assert [first for first, _ in view.about["pairs"]["0"]] == [0, 2]
    assert view.about["pairs"]["0"][1][1] == "frames 2 and 3 (1.0 and 1.5 s)"
    before = view.values["ids"]
    view.frame = 2
    assert len(view.picture["frames"]) == 2 and view.picture["frame"] == view.values["frame"] == 2
    assert view.values["ids"] != before
    later = trace.routing("vision").expert_ids.values[0, 17:33]
    assert np.array_equal(sent(view, "ids", "<i2").reshape(16, 2), later)
    assert "frames 2 and 3" in view.still().title
    with pytest.raises(ValueError, match=r"frame=1: this trace has \[0, 2\]"):
        view.frame = 1


@pytest.mark.parametrize("value", VALUES)
def test_a_picture_of_what_is_shown_stays(trace, value):
    view = explore_image(trace, model="toy")
    view.value, view.layer, view.slot = value, 2, 1
    data, _metadata = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "layer 2" in view.still().alt + view.still().title
    assert "image 0, 4 x 4" in data["text/html"] and "toy" in view.still().caption
    assert "layer 2 of 1..2" in data["text/plain"] and VALUES[value] in data["text/plain"]


def test_a_large_picture_loses_its_numbers_and_says_so():
    view = explore_image(stand_in(30, 40, n_experts=64, k=6, layers=(1,)))
    title = view.still().title
    assert title.startswith("Weight of the first choice on image 0, layer 1 (too many patches")
    assert len(view._repr_mimebundle_()[0]["image/png"]) < 250_000


def test_a_token_that_the_bank_did_not_read_has_no_routing():
    trace = stand_in()
    trace.tokens = trace.tokens[trace.tokens["pos"] != trace.first + 2]
    view = explore_image(trace)
    assert sent(view, "ids", "<i2").reshape(16, 2)[2].tolist() == [-1, -1]
    assert np.isnan(sent(view, "weights").reshape(16, 2)[2]).all()
    assert view.still().png()


def test_what_is_not_known_is_not_offered():
    trace = stand_in()
    ledger = trace.ledgers["vision"]

    class Unkept(type(ledger)):
        @property
        def router_probs(self):
            raise NotKept("router_probs was not kept")

        margin = router_probs

    for name in ("router_probs", "margin"):
        delattr(ledger, name)
    ledger.__class__ = Unkept
    view = explore_image(trace)
    assert [value for value, _ in view.about["values"]] == ["expert", "weight"]
    assert np.isnan(sent(view, "margin")).all() and np.isnan(sent(view, "probs")).all()
    view.value = "entropy"
    with pytest.raises(ValueError, match="the router's probabilities are not known"):
        view.still()


def test_errors_name_the_next_step(trace):
    with pytest.raises(TypeError, match="explore_image takes a Trace, not int"):
        explore_image(3)
    with pytest.raises(ValueError, match=r"image=4: this trace has \[0\]"):
        explore_image(trace, image=4)
    bare = stand_in()
    bare.media = ()
    bare.tokens["image"] = bare.tokens["image"].where(bare.tokens["image"] < 0)
    with pytest.raises(ValueError, match="run the prompt with images= or videos="):
        explore_image(bare)


def test_an_expert_or_choice_that_is_not_there_is_refused(trace):
    view = explore_image(trace)
    with pytest.raises(
        ValueError, match=rf"expert=99: the bank has 0\.\.{trace.n_experts - 1}, or"
    ):
        view.expert = 99
    with pytest.raises(ValueError, match=r"slot=2: the choices of a token are 0\.\.1"):
        view.slot = 2
    assert (view.expert, view.slot) == (-1, 0)
    view.expert, view.slot = trace.n_experts - 1, 1


def test_a_misspelt_name_is_not_set(trace):
    with pytest.raises(AttributeError, match="ImageExplorer has no 'layr', did you mean 'layer'"):
        explore_image(trace).layr = 2


def test_a_real_trace_with_two_images_and_a_clip():
    from support.models import small_vl_model
    from vl_driver import MIXED, NEW, record

    trace = record(small_vl_model(), MIXED, ("routing",), new=NEW)
    view = explore_image(trace)
    assert len(view.about["pictures"]) == 3
    view.image = 1
    ids = trace.folded(trace.routing("vision").expert_ids, image=1).sel(layer=view.layer, frame=0)
    shape = ids.shape
    assert np.array_equal(sent(view, "ids", "<i2").reshape(shape), ids.values)
    boxes = trace.boxes().query("image == 1")
    sides = boxes[[f"original_{side}" for side in ("left", "top", "right", "bottom")]]
    found = np.frombuffer(view.picture["boxes"], "<f4").reshape(-1, 4)
    assert np.allclose(found, sides)
    view.image = 2
    assert view.frame == 0 and len(view.picture["frames"]) == 2
