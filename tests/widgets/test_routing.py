"""The routing view: what it sends to the browser is the trace's, and it leaves a picture behind."""

import base64
import json

import numpy as np
import pandas as pd
import pytest
from plots.cases import HARD_TOKENS, Ledger, VisionTrace

import ernie_lab as el
from ernie_lab.plots.router_token import Choice
from ernie_lab.widgets import explore_routing
from ernie_lab.widgets.reading import Reading
from ernie_lab.widgets.routing import STILL_LAYERS, STILL_TOKENS, _spread

# ipywidgets builds a comm without a kernel and says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class TextTrace:
    """A stand-in for the trace of a text model: two sequences, the second one generated on."""

    banks, media = ("text",), ()

    def __init__(self, layers=(1, 3), n_experts=16, k=4, texts=(" a", "b", "c", "d", "e")):
        n = len(texts)
        self.tokens = pd.DataFrame({
            "sequence": [0] * n + [1] * n, "pos": [*range(n)] * 2, "id": 0,
            "text": pd.Series([*texts] * 2, dtype=pd.StringDtype("python")),
            "phase": ["prefill"] * n + ["prefill"] * (n - 2) + ["decode"] * 2, "content": "text",
        })  # fmt: skip
        self.n_experts, self.n_chosen = n_experts, k
        named = self.tokens.assign(text="")  # texts come from the table
        self.ledger = Ledger(named, list(layers), n_experts, k, 0)

    def routing(self, bank=None):
        assert bank is None
        return self.ledger

    def pattern(self, layer, sequence=None):
        raise NotImplementedError


@pytest.fixture
def trace():
    return TextTrace()


def sent(view):
    """ids and weights `[token slot]` as the browser reads them."""
    k = view.about["n_chosen"]
    ids = np.frombuffer(view.choices["ids"], "<i2").reshape(-1, k)
    return ids, np.frombuffer(view.choices["weights"], "<f4").reshape(-1, k)


def test_a_layer_of_one_sequence_is_sent(trace):
    view = explore_routing(trace)
    view.sequence = 1
    view.layer = 3
    ids, weights = sent(view)
    assert np.array_equal(ids, trace.ledger.expert_ids.sel(layer=3).values[5:])
    assert np.allclose(weights, trace.ledger.expert_weights.sel(layer=3).values[5:])
    assert view.choices["layer"] == 3 and view.choices["sequence"] == 1
    assert view.tokens == {"texts": ["␣a", "b", "c", "d", "e"], "positions": [0, 1, 2, 3, 4],
                           "border": 3}  # fmt: skip


def test_a_token_has_its_experts_the_runners_up_and_the_work_of_the_bias(trace):
    view = explore_routing(trace)
    view.token = 2
    ledger = trace.ledger
    chosen = ledger.expert_ids.values[0, 2]
    choice = Choice.of(ledger.router_probs.values[0, 2], ledger.correction_bias.values[0], chosen)
    lines = view.detail["lines"]
    assert [line["expert"] for line in lines[:4]] == chosen.tolist()
    assert [line["expert"] for line in lines[4:]] == list(choice.order[4:7])
    assert lines[0]["prob"] == pytest.approx(ledger.router_probs.values[0, 2, chosen[0]])
    assert sum(line["weight"] for line in lines[:4]) == pytest.approx(1)
    assert all(line["weight"] is None for line in lines[4:])
    assert f"Margin {choice.margin:.3g}" in view.detail["words"][0]
    assert f"expert {choice.order[4]}." in view.detail["words"][0]


@pytest.mark.parametrize(
    ("probs", "bias", "words"),
    [
        ([0.5, 0.3, 0.2], [0, 0, 0], "no correction bias"),
        ([0.5, 0.3, 0.2], [0.01, 0, 0], "changed nothing"),
        ([0.5, 0.3, 0.2], [0, 0, 0.4], "put expert 2 in the place of expert 1."),
    ],
)
def test_what_the_bias_did_by_hand(trace, probs, bias, words):
    ledger = trace.ledger
    chosen = np.argsort(-(np.array(probs) + bias), kind="stable")[:2]
    ledger.expert_ids = ledger.expert_ids[:1, :1, :2].copy(data=chosen.reshape(1, 1, 2))
    ledger.expert_weights = ledger.expert_weights[:1, :1, :2]
    ledger.router_probs = ledger.router_probs[:1, :1, :3].copy(data=np.reshape(probs, (1, 1, 3)))
    ledger.correction_bias = ledger.correction_bias[:1, :3].copy(data=np.reshape(bias, (1, 3)))
    found = Reading(trace, "text").token(0, 1, 0)
    assert words in found["words"][1]
    notes = {line["expert"]: line["note"] for line in found["lines"]}
    if "put" in words:
        assert (notes[2], notes[1], notes[0]) == ("by the bias", "lost to the bias", "")
    else:
        assert not any(notes.values())


def test_without_probabilities_the_choices_remain(trace):
    del trace.ledger.router_probs

    class Unkept(Ledger):
        @property
        def router_probs(self):
            raise ValueError("not kept")

    trace.ledger.__class__ = Unkept
    found = Reading(trace, "text").token(0, 1, 0)
    assert len(found["lines"]) == 4 and found["lines"][0]["prob"] is None
    assert found["words"] == ["Only choices and weights are known: not kept"]


def test_two_banks_are_never_in_one_map():
    trace = VisionTrace()
    view = explore_routing(trace)
    assert view.bank == "text" and view.about["banks"] == ["text", "vision"]
    view.expert = 5
    view.bank = "vision"
    assert view.expert == -1, "expert 5 of the other bank is another expert"
    ids, _ = sent(view)
    assert np.array_equal(ids, trace.routing("vision").expert_ids.values[0])
    assert view.tokens["texts"][:2] == ["<|IMAGE_START|>", "img0 r0 c0"]
    assert "vision bank" in repr(view) and "vision" in view.still().title
    with pytest.raises(ValueError, match="bank='audio'"):
        view.bank = "audio"


def test_a_token_or_expert_that_is_not_there_is_refused(trace):
    view = explore_routing(trace)
    with pytest.raises(ValueError, match=r"token=999: this sequence has tokens 0\.\.4$"):
        view.token = 999
    with pytest.raises(ValueError, match="token=-1"):
        view.token = -1
    with pytest.raises(ValueError, match=r"expert=99: the bank has 0\.\.15, or -1 for none"):
        view.expert = 99
    assert (view.token, view.expert) == (0, -1)
    view.token, view.expert = 4, 15
    view.expert = -1
    assert view.detail["token"] == 4


def test_another_sequence_with_fewer_tokens_takes_its_first():
    texts = el.load("tiny-text").run(["And God said", "In"], keep="routing").trace
    view = explore_routing(texts)
    view.token = len(view.tokens["texts"]) - 1
    assert view.token > 0
    view.sequence = 1
    assert view.token == view.detail["token"] == 0


def test_token_texts_are_made_visible_and_stay_text():
    view = explore_routing(TextTrace(texts=HARD_TOKENS))
    json.dumps(view.tokens)
    texts = view.tokens["texts"]
    assert texts[1] == "<script>alert(1)</script>"  # shown by textContent alone
    assert {"⏎", "⇥", "<0xE4>", "∅"} <= set(texts)
    assert not any(c in text for text in texts for c in "\n\t\x00\u202e")
    for name in ("routing.js", "image.js", "parts.js"):
        script = el.widgets.live.script(name)
        assert not [word for word in ("innerHTML", "insertAdjacent", "http:", "https:", "eval(",
                                      "getElementById") if word in script]  # fmt: skip


def test_a_picture_stays_and_says_what_it_leaves_out():
    trace = TextTrace(layers=range(1, 28), n_experts=64, k=6, texts=["w"] * 150)
    view = explore_routing(trace, model="large")
    view.layer = 20
    data, _metadata = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert len(data["image/png"]) < 130_000
    assert 'alt="Expert map of large' in data["text/html"]
    assert "layer 20 of 1..27, 150 tokens, 6 of 64 experts each" in data["text/plain"]
    title = view.still().title
    assert title.endswith(f"({STILL_TOKENS} of 150 tokens, {STILL_LAYERS} of 27 layers; "
                          "with a kernel, all)")  # fmt: skip


def test_the_layers_of_the_picture_are_spread_and_hold_the_one_that_is_shown():
    assert _spread([1, 2], 8, 1) == [1, 2]
    assert _spread([*range(28)], 8, 0) == [0, 4, 8, 12, 15, 19, 23, 27]
    assert 13 in _spread([*range(28)], 8, 13) and len(_spread([*range(28)], 8, 13)) == 8


def test_a_real_trace():
    generation = el.load("tiny-text").generate("And God said", max_new_tokens=4, keep="routing")
    view = explore_routing(generation.trace)
    ids, weights = sent(view)
    assert len(ids) == len(generation.trace) and np.allclose(weights.sum(1), 1, atol=1e-5)
    assert view.tokens["border"] == 3 and view.about["model"]
    assert "tokens" in view.still().alt
    with pytest.raises(TypeError, match=r"takes a Trace, not Generation: pass its \.trace"):
        explore_routing(generation)
    with pytest.raises(ValueError, match="layer=99: this trace has"):
        view.layer = 99


@pytest.mark.parametrize(
    ("name", "told"),
    [("layr", "did you mean 'layer'"), ("tokn", "'token"), ("quux", "its state: .*expert, layer")],
)
def test_a_misspelt_name_is_not_set(trace, name, told):
    view = explore_routing(trace)
    with pytest.raises(AttributeError, match=f"RoutingExplorer has no '{name}'.*{told}"):
        setattr(view, name, 3)
    view.layer = 3
    assert view.layer == 3
