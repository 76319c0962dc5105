"""Switching experts off: the numbers are those of `lab.run`, and every press shows its result."""

import base64
import time
import warnings

import numpy as np
import pytest
import torch
from support.labs import picture, small_lab, small_vl_lab
from support.models import small_config

import ernie_lab as el
from ernie_lab.model.text import TextModel
from ernie_lab.widgets import explore_ablation
from ernie_lab.widgets.switches import Switches, Text

# ipywidgets builds a comm without a kernel and says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PROMPT = "abcabdabe, the cab."


@pytest.fixture(scope="module")
def lab():
    return small_lab()


@pytest.fixture
def explorer(lab):
    return explore_ablation(lab, PROMPT)


def shown(explorer):
    return explorer.status.value + explorer.result.value


def test_presses_are_the_edits_of_a_run(lab, explorer):
    layer = next(iter(explorer.shared))
    explorer.shared[layer].value = True
    explorer.layer.value = layer
    explorer.experts[0].value = explorer.experts[2].value = True
    same = [el.shared.zero([layer]), el.experts.off(layer, [0, 2])]
    assert [repr(edit) for edit in explorer.edits] == [repr(edit) for edit in same]
    run = lab.run(PROMPT, edits=same, keep="routing")
    assert torch.equal(explorer.change.run.logits, run.logits)
    call = f'el.shared.zero([{layer}]), el.experts.off({layer}, [0, 2], "zero")'
    assert explorer.code == f'lab.run(prompt, edits=[{call}], keep="routing")'
    assert explorer.code.replace('"', "&quot;") in shown(explorer)
    again = eval(explorer.code, {"el": el, "lab": lab, "prompt": PROMPT})
    assert torch.equal(again.logits, run.logits)


def test_figures_by_hand(lab, explorer):
    layer = next(iter(explorer.shared))
    explorer.set(shared=[layer], experts={layer: [1]}, how="renormalise")
    change = explorer.change
    base = lab.run(PROMPT, keep="routing")
    run = lab.run(PROMPT, edits=explorer.edits, keep="routing")
    assert change.losses == pytest.approx((float(base.loss), float(run.loss)), rel=1e-5)
    p, q = (one.logits[0].double().softmax(-1) for one in (base, run))
    assert torch.allclose(change.kl().double(), (p * (p / q).log()).sum(-1), atol=1e-6)
    position = 7
    table = change.next_tokens(position)
    assert np.allclose(table["base"], p[position, table["id"].tolist()], atol=1e-6)
    assert np.allclose(table["edited"], q[position, table["id"].tolist()], atol=1e-6)
    rest = torch.stack([p, q])[:, position].amax(0)
    assert set(rest.topk(10).indices.tolist()) == set(table["id"])
    before, after = (one.trace.expert_ids.to_numpy() for one in (base, run))
    by_hand = [
        np.mean([1 - len({*a} & {*b}) / len(a) for a, b in zip(x, y, strict=True)])
        for x, y in zip(before, after, strict=True)
    ]
    assert list(change.flips()[""].values()) == pytest.approx(by_hand)
    assert [(n_fired, n_changed) for _, n_fired, n_changed in change.counts] == [(1, 1), (1, 1)]


def test_the_buttons_follow_the_picked_layer(explorer):
    first, second = list(explorer.shared)[:2]
    explorer.set(experts={second: [3]})
    assert not any(button.value for button in explorer.experts), "another layer is shown"
    explorer.layer.value = second
    assert [e for e, button in enumerate(explorer.experts) if button.value] == [3]
    counts = explorer.text.counts(second, "")
    assert sum(counts) == len(explorer.text.trace) * explorer.text.trace.n_chosen
    assert explorer.experts[3].description == f"3 · {counts[3]}"
    explorer.layer.value = first
    assert explorer.switches.routed == {(second, ""): frozenset({3})}, "looking changes nothing"


def test_reset_and_all(explorer):
    explorer.all_shared.click()
    assert all(button.value for button in explorer.shared.values())
    assert explorer.switches.shared == frozenset(explorer.shared)
    explorer.all_shared.click()
    assert not explorer.switches.shared
    explorer.experts[1].value = True
    explorer.reset.click()
    assert explorer.edits == [] and not explorer.experts[1].value
    assert explorer.code == 'lab.run(prompt, keep="routing")'
    assert explorer.change.run is explorer.text.base


def test_another_sense_of_off_and_another_position(explorer):
    layer = next(iter(explorer.shared))
    explorer.set(experts={layer: [0, 1]})
    zero = explorer.change.losses
    explorer.how.value = "next_best"
    assert "forbid" in repr(explorer.edits[0]) and explorer.change.losses != zero
    before = explorer.result.value
    explorer.after.value = 3
    assert explorer.result.value != before
    assert "next token after <bdi>…abca</bdi>" in explorer.result.value
    goes_on = explorer.text.trace.tokens["id"][4] in set(explorer.change.next_tokens(3)["id"])
    assert ("<b><bdi>b</bdi></b> ← the text" in explorer.result.value) == goes_on


def test_an_error_is_shown_and_the_next_press_works(explorer):
    n = explorer.text.trace.n_experts
    layer = next(iter(explorer.shared))
    explorer.set(experts={layer: range(n)}, how="next_best")
    assert explorer.error is not None
    assert "EditError" in explorer.status.value and "role='alert'" in explorer.status.value
    assert "next token" not in explorer.result.value, "no stale figures under an error"
    explorer.reset.click()
    explorer.how.value = "zero"
    assert explorer.error is None and "EditError" not in shown(explorer)


def test_an_edit_that_changes_nothing_says_so(explorer):
    layer = next(iter(explorer.shared))
    counts = explorer.text.counts(layer, "")
    idle = [e for e, n in enumerate(counts) if n == 0]
    short = explore_ablation(explorer.text.lab, "ab") if not idle else explorer
    idle = [e for e, n in enumerate(short.text.counts(layer, "")) if n == 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        short.set(experts={layer: idle[:1]})
    assert "changed nothing" in short.status.value


@pytest.mark.parametrize("name", ["layer", "how", "experts", "shard"])
def test_what_is_set_past_the_switches_is_refused(explorer, name):
    with pytest.raises(AttributeError, match=rf"setting '{name}'.*explorer\.set\(shared="):
        setattr(explorer, name, 3)


def test_hard_text_is_escaped():
    lab = small_lab()
    tokens = lab.tokenizer
    lab = el.Lab(lab.model, Hostile(tokens), model_id="<script>x</script>")
    found = explore_ablation(lab, PROMPT)
    assert "<script>" not in found.title.value + shown(found)
    assert "&lt;script&gt;" in found.result.value
    found._repr_mimebundle_()


class Hostile:
    """A tokenizer whose every token is markup."""

    def __init__(self, own):
        self.own = own

    def token_strings(self, ids):
        return ["<script>alert(1)</script>\n\u202e" for _ in ids]

    def __getattr__(self, name):
        return getattr(self.own, name)


def test_without_a_kernel_the_output_is_a_picture(explorer):
    explorer.set(shared=[next(iter(explorer.shared))])
    data, _metadata = explorer._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert "Probabilities of the next token" in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "el.shared.zero" in data["text/plain"]


def test_pictures_and_two_banks():
    lab = small_vl_lab()
    asked = Text.read(lab, "what?", images=[picture()])
    counts = asked.counts(1, "vision")
    busy = counts.index(max(counts))
    found = explore_ablation(lab, "what?", images=[picture()], experts={1: [busy]}, bank="vision")
    assert found.text.banks == ("text", "vision")
    assert set(found.change.flips()) == {"text", "vision"}
    assert 'bank="vision"' in found.code and "images=images" in found.code
    found.bank.value = "vision"
    found.layer.value = 1
    assert found.experts[busy].value
    found.bank.value = "text"
    assert not found.experts[busy].value
    run = lab.run("what?", images=[picture()], edits=el.experts.off(1, [busy], bank="vision"))
    assert torch.equal(run.logits, found.change.run.logits)
    words = explore_ablation(lab, "what?")
    assert words.text.banks == ("text",)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"shared": [0]}, "layer 0 has no experts"),
        ({"experts": {1: [99]}}, "expert 99 is not in 0.."),
        ({"how": "mean"}, "must be one of zero, renormalise, next_best"),
        ({"bank": "vision"}, "bank='vision'"),
    ],
)
def test_refusals(lab, wrong, words):
    with pytest.raises(ValueError, match=words):
        explore_ablation(lab, PROMPT, **wrong)
    with pytest.raises(ValueError, match="one prompt at a time: 2"):
        explore_ablation(lab, ["ab", "ba"])


def test_one_number_needs_no_list(lab):
    explorer = explore_ablation(lab, PROMPT, shared=1, experts={2: 3})
    assert explorer.switches == Switches(frozenset({1}), {(2, ""): frozenset({3})})
    explorer.set(shared=np.int64(2), experts={1: 0})
    assert explorer.switches == Switches(frozenset({2}), {(1, ""): frozenset({0})})
    for wrong, words in [
        ({"shared": "1"}, "shared='1': expected an integer or several"),
        ({"experts": {1: [0.5]}}, r"experts of layer 1=\[0\.5\]: expected an integer"),
        ({"experts": [3]}, r"experts=\[3\]: expected a dict by layer"),
        ({"experts": 0}, "experts=0: expected a dict by layer"),
    ]:
        with pytest.raises(TypeError, match=words):
            explorer.set(**wrong)


def test_a_dense_model_is_refused():
    dense = el.Lab(TextModel(small_config(moe=None)).eval(), small_lab().tokenizer)
    with pytest.raises((ValueError, el.SiteError), match=r"dense|experts"):
        explore_ablation(dense, PROMPT)


def test_switches_are_values():
    one = Switches().with_experts((3, ""), frozenset({1})).with_experts((1, ""), frozenset({2}))
    assert list(one.routed) == [(1, ""), (3, "")], "in the order of the layers"
    assert one.with_experts((3, ""), frozenset()).routed == {(1, ""): frozenset({2})}


def test_a_press_is_quick(lab):
    text = Text.read(lab, PROMPT)
    started = time.perf_counter()
    text.without(Switches(frozenset({1}))).next_tokens(3)
    assert time.perf_counter() - started < 1.0
