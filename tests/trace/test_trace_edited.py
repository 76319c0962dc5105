"""What an edit changed is never derived as if nothing had been changed."""

import json

import numpy as np
import pytest
import torch
from trace_driver import SITES, as_schema_2, generation

from ernie_lab.interventions.edits import EditTap, edit
from ernie_lab.sites import SiteError, Step, all_sites
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.trace import Trace

PROBS, SCORES = "blocks.2.moe.router_probs", "blocks.2.moe.selection_scores"
IDS = "blocks.2.moe.expert_ids"
LOGITS = "moe.router_logits"
REFUSED = r"of layers 2 does not follow.*an edit changed it.*moe\.selection_scores"

EVERYTHING = {"router_probs", "selection_scores", "margin", "without_bias", "to_frame"}


def readable(trace):
    """Which derived quantities the trace gives; the others must be refused, by name."""
    ledger = trace.routing()
    found = set()
    for name in EVERYTHING:
        try:
            ledger.to_frame() if name == "to_frame" else getattr(ledger, name)
            found.add(name)
        except ValueError:
            with pytest.raises(ValueError, match="an edit changed it"):
                ledger.to_frame()
    return found


@pytest.mark.parametrize(
    "edited, kept, given",
    [
        ((), (), EVERYTHING),
        ((PROBS,), (), set()),
        ((SCORES,), (), {"router_probs", "without_bias"}),
        ((IDS,), (), EVERYTHING),
        (("blocks.2.moe.router_logits", "embed"), (), EVERYTHING),
        ((PROBS,), (PROBS,), EVERYTHING),
        ((PROBS, SCORES), (PROBS,), {"router_probs", "without_bias"}),
        ((PROBS,), (SCORES,), {"selection_scores", "margin"}),
        ((PROBS, SCORES), (PROBS, SCORES), EVERYTHING),
    ],
)
def test_downstream_of_an_edit_nothing_is_derived(edited, kept, given):
    trace, _ = generation(["routing", *kept], edited=edited)
    assert readable(trace) == given
    if "router_probs" not in given:
        with pytest.raises(ValueError, match=REFUSED):
            _ = trace.router_probs
    assert readable(trace.sel(layer=1)) == EVERYTHING, "layer 1 was not edited"


def test_a_missing_choice_gives_no_licence_to_derive():
    trace, _ = generation(LOGITS, edited=(PROBS,))
    with pytest.raises(ValueError, match=REFUSED):
        _ = trace.router_probs
    assert generation(LOGITS)[0].router_probs.shape == (2, 10, 5)


def test_layers_that_were_kept_stand_beside_derived_ones():
    trace, _ = generation(["routing", PROBS], edited=(PROBS,))
    everything, _ = generation("blocks.*.moe.*")
    assert np.array_equal(trace.router_probs.sel(layer=2), everything["router_probs", 2])
    assert np.abs(trace.router_probs - everything.router_probs).max() <= 1e-6


def test_an_edited_choice_leaves_the_probabilities():
    trace, _ = generation(edited=(IDS,))
    plain = trace.router_probs
    kept = trace.values[IDS].parts[None].values
    kept.copy_((kept + 2) % 5)
    assert trace.router_probs.equals(plain)
    assert trace.selection_scores.shape == plain.shape
    unsaid, _ = generation()
    unsaid.values[IDS].parts[None].values.copy_(kept)
    with pytest.raises(ValueError, match=r"do not follow.*layer: \{2: \d+\}"):
        _ = unsaid.router_probs


def test_edited_sites_are_those_of_the_model():
    trace, _ = generation(edited={SCORES, PROBS})
    assert trace.edited == (PROBS, SCORES)
    assert trace.sel(sequence=0).edited == (PROBS, SCORES)
    with pytest.raises(SiteError, match=r"edited=\['blocks.9.x'\]"):
        generation(edited=["blocks.9.x"])


def test_a_saved_trace_remembers_its_edits(tmp_path):
    trace, _ = generation(edited=(PROBS,))
    trace.save(tmp_path / "run")
    loaded = Trace.load(tmp_path / "run")
    assert loaded.edited == (PROBS,)
    with pytest.raises(ValueError, match=REFUSED):
        loaded.to_frame()


@pytest.mark.parametrize("edits", [[], ["forbid(...)"]])
def test_schema_1_did_not_say_where_its_edits_were(tmp_path, edits):
    trace, _ = generation()
    trace.save(tmp_path / "old")
    path = tmp_path / "old" / "trace.json"
    assert json.loads(path.read_text())["schema"] == 3
    as_schema_2(tmp_path / "old")
    header = json.loads(path.read_text())
    del header["edited"]
    header["schema"] = 1
    header["provenance"]["details"]["edits"] = edits
    path.write_text(json.dumps(header))
    loaded = Trace.load(tmp_path / "old")
    assert loaded.edited == (tuple(site.path for site in SITES) if edits else ())
    assert readable(loaded) == (set() if edits else EVERYTHING)


def test_sharper_probabilities_of_a_model_are_not_those_of_its_logits(model):
    """An edit that keeps the order of the experts: the choice alone would not give it away."""

    def record(keep):
        sharper = edit("moe.router_probs", lambda p: p.square() / p.square().sum(-1, keepdim=True))
        recorder = Recorder(Keep.of(keep, all_sites(model)))
        tap = EditTap.of([sharper], all_sites(model), recorder)
        ids = torch.tensor([[5, 6, 7, 8]])
        mask = torch.ones_like(ids).bool()
        with torch.no_grad():
            model(ids, tap=tap.bind(Step("prefill", 0, mask.cumsum(1) - 1, mask)))
        biases = {i: r.correction_bias_E for i, r in model.routers().items()}
        return recorder.trace(
            ids.tolist(),
            sites=all_sites(model),
            provenance=Provenance.now("small"),
            routers=Routers(8, 2, biases),
            edited=tap.by_path.keys(),
        )

    trace = record([LOGITS, "moe.expert_weights"])
    with pytest.raises(ValueError, match=r"router_probs of layers 1\.\.2 does not follow"):
        _ = trace.router_probs
    flowed = record([LOGITS, "moe.router_probs"]).router_probs
    unedited = torch.tensor(trace.router_logits.values).softmax(-1).numpy()
    assert np.abs(flowed - unedited).max() > 1e-3
