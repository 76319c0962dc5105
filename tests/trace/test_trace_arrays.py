"""What users read from a trace: names, axes, coordinates, routing, slices, reprs."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trace_driver import BIAS, N_CHOSEN, N_EXPERTS, SITES, TEXTS, forward, generation

from ernie_lab.sites import SiteError, all_sites
from ernie_lab.trace import routing
from ernie_lab.trace.keys import NotKept, lookup


def test_routing_arrays():
    trace, fired = generation()
    assert trace.router_logits.dims == ("layer", "token", "expert")
    assert trace.expert_ids.dims == trace.expert_weights.dims == ("layer", "token", "slot")
    assert trace.router_logits.layer.values.tolist() == [1, 2]
    assert (trace.layers, trace.n_experts, trace.n_chosen) == ((1, 2), N_EXPERTS, N_CHOSEN)
    assert trace.router_logits.expert.values.tolist() == list(range(N_EXPERTS))
    sampled = trace.router_logits.sel(layer=2, token=2).values
    assert np.array_equal(sampled, fired["blocks.2.moe.router_logits"][1][0, 0].numpy())
    assert trace.expert_ids.dtype == np.int64
    assert trace.expert_ids.text.values[6] == "\\udce4", "coordinates write out what Arrow refuses"
    assert trace.expert_ids.text.values[8] == "\x00"
    trace.expert_ids.to_dataframe()
    assert trace.correction_bias.layer.values.tolist() == [1, 2]
    assert np.array_equal(trace.correction_bias.sel(layer=2), BIAS[2])


def test_derived_equals_recorded():
    derived, _ = generation("routing")
    recorded, _ = generation("blocks.*.moe.*")
    assert "blocks.1.moe.router_probs" in recorded.sites
    for name in ("router_probs", "selection_scores"):
        a, b = getattr(derived, name), getattr(recorded, name)
        assert a.dims == b.dims
        assert np.abs(a.values - b.values).max() <= 1e-6
    assert derived.to_frame().equals(recorded.to_frame())


def test_derived_by_hand():
    logits = torch.log(torch.tensor([[[1.0, 2.0, 4.0, 1.0]]]))
    probs = routing.router_probs(logits)
    assert torch.allclose(probs, torch.tensor([[[0.125, 0.25, 0.5, 0.125]]]))
    scores = routing.selection_scores(probs, torch.tensor([[0.0, 0.0, 0.0, 0.375]]))
    assert torch.allclose(scores, torch.tensor([[[0.125, 0.25, 0.5, 0.5]]]))
    ids = torch.tensor([[[2, 3]]])
    assert torch.allclose(routing.margin(scores, 2), torch.tensor([[0.25]]))
    assert routing.margin(scores, 4).isnan().all()
    assert routing.without_bias(probs, ids).tolist() == [[[True, False]]]
    routing.require_choice(scores, ids, [3])
    with pytest.raises(ValueError, match=r"tokens per layer: \{3: 1\}.*selection_scores"):
        routing.require_choice(scores, torch.tensor([[[2, 0]]]), [3])


def test_deriving_is_refused_when_the_choice_was_edited():
    trace, _ = generation()
    kept = trace.values["blocks.2.moe.expert_ids"]
    kept.parts[None].values.copy_((kept.parts[None].values + 2) % N_EXPERTS)
    for ask in (lambda: trace.router_probs, lambda: trace.selection_scores, trace.to_frame):
        with pytest.raises(ValueError, match=r"do not follow.*moe\.selection_scores"):
            ask()
    assert trace.expert_ids.shape == (2, 10, N_CHOSEN), "what was recorded stays readable"


def test_to_frame():
    trace, _ = generation()
    frame = trace.to_frame()
    assert len(frame) == 2 * 10 * N_CHOSEN
    row = frame[(frame.layer == 2) & (frame.sequence == 1) & (frame.pos == 3) & (frame.slot == 1)]
    (row,) = row.to_dict("records")
    at = {"layer": 2, "token": 8}
    probs, scores = trace.router_probs.sel(at).values, trace.selection_scores.sel(at).values
    expert = int(trace.expert_ids.sel(at | {"slot": 1}))
    best = np.sort(scores)[::-1]
    assert (row["expert"], row["text"], row["phase"], row["id"]) == (expert, "\x00", "prefill", 23)
    assert row["weight"] == pytest.approx(float(trace.expert_weights.sel(at | {"slot": 1})))
    assert row["prob"] == pytest.approx(probs[expert])
    assert row["margin"] == pytest.approx(best[N_CHOSEN - 1] - best[N_CHOSEN])
    assert row["without_bias"] == (expert in np.argsort(probs)[::-1][:N_CHOSEN])
    assert not frame.without_bias.all()
    ledger = trace.routing()
    assert ledger.margin.dims == ("layer", "token")
    assert ledger.without_bias.dims == ("layer", "token", "slot")


def test_bank_is_for_models_with_two():
    trace, _ = generation()
    assert trace.banks == ("text",)
    assert trace.routing("text").expert_ids.equals(trace.expert_ids)
    assert trace.to_frame(bank="text").equals(trace.to_frame())
    for ask in (trace.routing, trace.to_frame):
        with pytest.raises(ValueError, match="one bank"):
            ask(bank="vision")


@pytest.mark.parametrize(
    "key, path",
    [
        ("blocks.1.attn.pattern", "blocks.1.attn.pattern"),
        ("blocks.1.attn.hook_pattern", "blocks.1.attn.pattern"),
        (("pattern", 1), "blocks.1.attn.pattern"),
        (("attn_scores", -1), "blocks.2.attn.scores"),
        (("resid_post", -1), "blocks.2.resid_post"),
        (("hook_resid_pre", 0), "blocks.0.resid_pre"),
        (("normalized", 1, "ln2"), "blocks.1.norm2.normalized"),
        (("scale", 1), "blocks.1.norm1.scale"),
        (("k", 2, "attn"), "blocks.2.attn.k"),
        (("pre", 0, "mlp"), "blocks.0.mlp.gate_proj"),
        (("gate_proj", 1), "blocks.1.moe.shared.gate_proj"),
        (("mlp_out", 1), "blocks.1.moe.moe_out"),
        (("mlp_out", 0), "blocks.0.mlp.mlp_out"),
        (("router_logits", 2), "blocks.2.moe.router_logits"),
        ("blocks.1.mlp.gate.hook_out", "blocks.1.moe.router_logits"),
        (SITES[0], "embed"),
    ],
)
def test_keys(key, path):
    assert lookup(key, SITES).path == path


def test_names_without_a_layer_stack():
    trace, _ = generation("all")
    stack = trace["resid_post"]
    assert stack.dims == ("layer", "token", "width")
    assert stack.layer.values.tolist() == [0, 1, 2]
    assert np.array_equal(stack.sel(layer=1), trace["resid_post", 1])
    assert trace["router_logits"].equals(trace["moe.router_logits"])
    assert trace["mlp_out"].layer.values.tolist() == [0, 1, 2]
    assert trace["norm1.scale"].dims == ("layer", "token")
    assert trace["embed"].dims == ("token", "width")
    assert trace["attn.k"].dims == ("layer", "token", "kv_head", "head_width")
    assert "resid_post" in trace and ("k", 2) in trace and "attn.pattern" not in trace


def test_a_name_means_one_quantity():
    trace, _ = generation("all")
    with pytest.raises(SiteError, match=r"say which of mlp\.gate_proj, moe\.shared\.gate_proj"):
        _ = trace["gate_proj"]
    with pytest.raises(SiteError, match=r"say which of mlp\.mlp_out, moe\.moe_out"):
        _ = trace["out"]
    assert "gate_proj" not in trace and ("gate_proj", 1) in trace
    assert trace["moe.shared.gate_proj"].layer.values.tolist() == [1, 2]
    assert trace["mlp.gate_proj"].layer.values.tolist() == [0]
    assert trace["mlp.mlp_out"].layer.values.tolist() == [0], "a whole name is no alias"
    assert trace["moe_out"].layer.values.tolist() == [1, 2]
    assert trace["hook_mlp_out"].layer.values.tolist() == [0, 1, 2]


def test_no_neurons_of_another_kind_are_stacked(model):
    """Dense and shared neurons of equal number: the shapes alone would not give it away."""
    for name in ("act", "up", "gate_proj", "out"):
        with pytest.raises(SiteError, match="say which of mlp"):
            lookup(name, all_sites(model))
    assert [site.quantity for site in lookup("mlp_out", all_sites(model))] == [
        "mlp.mlp_out",
        "moe.moe_out",
        "moe.moe_out",
    ]


def test_integers_of_numpy_torch_and_xarray():
    trace, _ = generation(["routing", "attention"])
    for two in (np.int64(2), np.array(2), torch.tensor(2), trace.router_logits.layer[1]):
        assert trace.sel(layer=two).layers == (2,)
        assert trace.sel(layer=[two]).layers == (2,)
        assert trace.sel(position=two).tokens.pos.tolist() == [2, 2]
        assert trace["router_logits", two].equals(trace["router_logits", 2])
        assert trace.pattern(two, np.int32(1)).equals(trace.pattern(2, 1))
    assert trace.sel(sequence=np.uint8(1)).sequences == (1,)
    assert trace.sel(layer=trace.router_logits.layer).layers == (1, 2)
    assert trace.sel(position=slice(np.int64(1), np.int64(3))).tokens.pos.tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layer": "2"}, "layer='2': expected an integer or several"),
        ({"layer": 1.0}, r"layer=1\.0: expected an integer"),
        ({"layer": [1, True]}, r"layer=\[1, True\]: expected"),
        ({"sequence": np.array([True, False])}, "sequence=array.*expected"),
        ({"position": "last"}, "positions='last': expected an index, several, a range or a slice"),
        ({"position": slice("a", None)}, "positions=slice.*a bound='a': expected an integer"),
    ],
)
def test_wrong_types_are_named(wrong, message):
    trace, _ = generation()
    with pytest.raises(TypeError, match=message):
        trace.sel(**wrong)


@pytest.mark.parametrize(
    "key", [("pattern", "1"), ("pattern",), (), ("pattern", 1, "attn", 0), (1, "pattern"), 3, None]
)
def test_keys_of_wrong_types_are_named(key):
    with pytest.raises(TypeError, match=r"a key is .*\('pattern', 3\), not") as caught:
        lookup(key, SITES)
    assert repr(key) in str(caught.value)


def test_a_tensor_is_a_copy():
    trace, _ = generation(["routing", "attention"])
    for key, sequence in (("blocks.1.moe.expert_ids", None), ("blocks.1.attn.pattern", 1)):
        before = trace.tensor(key, sequence).clone()
        trace.tensor(key, sequence)[0] = 99
        assert torch.equal(trace.tensor(key, sequence), before)
    with pytest.raises(
        ValueError, match=r"no sequence 7 in blocks\.1\.attn\.pattern; it has \[0, 1\]"
    ):
        trace.tensor("blocks.1.attn.pattern", 7)


def test_keys_refused():
    trace, _ = generation("attention", layers=[1])
    with pytest.raises(NotKept, match=r"blocks\.2\.attn\.pattern exists but was not kept.*keep="):
        _ = trace["pattern", 2]
    with pytest.raises(NotKept, match="not kept"):
        _ = trace["resid_post"]
    with pytest.raises(NotKept, match="keep='routing'"):
        _ = trace.router_logits
    with pytest.raises(SiteError, match="nearest"):
        _ = trace["blocks.1.attn.patern"]
    with pytest.raises(SiteError, match=r"ambiguous in layer 1: blocks\.1\.norm1"):
        _ = trace["normalized", 1]
    with pytest.raises(SiteError, match="ambiguous"):
        _ = trace["normalized"]
    with pytest.raises(SiteError, match=r"layers 0\.\.2"):
        _ = trace["pattern", 3]
    with pytest.raises(SiteError, match="no part 'foo'"):
        _ = trace["pattern", 1, "foo"]
    with pytest.raises(SiteError, match=r"layer 0 is dense; layers with experts: 1\.\.2"):
        _ = trace["router_logits", 0]
    with pytest.raises(SiteError, match=r"layer 1 has no mlp\.gate_proj; it is in layers 0"):
        _ = trace["mlp.gate_proj", 1]
    with pytest.raises(SiteError, match="is the rms in TransformerLens"):
        _ = trace["hook_scale", 1, "ln1"]
    with pytest.raises(ValueError, match=r"t\.pattern\(layer, sequence\)"):
        _ = trace["blocks.1.attn.pattern"]
    with pytest.raises(ValueError, match="take a layer"):
        _ = trace["pattern"]
    with pytest.raises(ValueError, match="no sequence 5"):
        trace.pattern(1, 5)
    with pytest.raises(TypeError, match="not 0"):
        list(trace)
    with pytest.raises(ValueError, match="site of every layer"):
        trace.tensor("pattern")


def test_attention_maps():
    trace, _ = generation(["attention", "attn.scores"])
    one = trace.sel(sequence=1)
    array = one["blocks.1.attn.pattern"]
    assert array.dims == ("head", "query", "key")
    assert array.equals(trace.pattern(1, 1)) and array.equals(one.pattern(-2))
    assert array.key_text.values.tolist() == ["<x>", "\\udce4", "‮x", "\x00", "y"]
    # The driver's prefill is not causal; only keys that came after their forward are filled:
    # 3 later tokens for the 2 queries of the prefill, then 2 and 1 for the decoded ones.
    assert np.isneginf(trace.scores(1, 0)).sum("key").values[0].tolist() == [3, 3, 2, 1, 0]
    assert (trace.pattern(1, 0) == 0).sum("key").values[0].tolist() == [3, 3, 2, 1, 0]


def test_arrays_are_read_only_and_bfloat16_becomes_float32():
    trace, _ = generation("resid_post", dtype="bfloat16")
    array = trace["resid_post", 0]
    assert array.dtype == np.float32
    assert trace.tensor(("resid_post", 0)).dtype == torch.bfloat16
    whole, _ = generation("resid_post")
    with pytest.raises(ValueError, match=r"view|read-only"):
        whole["resid_post", 0][0] = 1.0


def test_uneven_filters_do_not_stack():
    from ernie_lab.trace.keep import keep

    trace, _ = generation([keep("routing", layers=1, positions=0), keep("routing", layers=2)])
    with pytest.raises(ValueError, match="different filters"):
        _ = trace.router_logits
    assert trace["router_logits", 1].sizes["token"] == 2
    mixed, _ = generation(
        [keep("moe.expert_ids", positions=0), "moe.router_logits", "moe.expert_weights"]
    )
    with pytest.raises(ValueError, match="same filters"):
        mixed.to_frame()


lengths = st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple)
bounds = st.none() | st.integers(-7, 7)


@given(lengths, bounds, bounds, st.integers(1, 3))
def test_positions_slice_like_python(lengths, start, stop, step):
    trace = forward(lengths, ["routing", "attention"])
    wanted = slice(start, stop, step)
    expected = [100 * i + pos for i, n in enumerate(lengths) for pos in range(n)[wanted]]
    if not expected:
        with pytest.raises(ValueError, match="no token has"):
            trace.sel(position=wanted)
        return
    part = trace.sel(position=wanted)
    assert part.tokens.id.tolist() == expected
    assert part.router_logits.id.values.tolist() == expected
    assert len(part) == len(expected)
    for i in part.sequences:
        array = part.pattern(1, i)
        assert array.equals(trace.pattern(1, i).isel(query=wanted))


@settings(max_examples=15)
@given(lengths, st.data())
def test_slices_commute_and_keep_their_numbers(lengths, data):
    trace = forward(lengths, ["routing", "attention", "embed"])
    chosen = data.draw(
        st.lists(st.integers(0, len(lengths) - 1), min_size=1, unique=True).map(sorted)
    )
    layer = data.draw(st.sampled_from([1, 2, -1]))
    position = data.draw(st.integers(0, min(lengths) - 1))
    a = trace.sel(sequence=chosen).sel(position=position).sel(layer=layer)
    b = trace.sel(sequence=chosen, position=position, layer=layer)
    c = trace.sel(layer=layer).sel(position=[position]).sel(sequence=chosen)
    for part in (a, b, c):
        assert part.sequences == tuple(chosen)
        assert part.layers == (layer % 3,)
        assert "embed" in part.sites
        assert part.router_logits.identical(a.router_logits)
        assert part.tokens.equals(a.tokens)
        assert part.pattern(layer, chosen[-1]).identical(a.pattern(layer, chosen[-1]))


def test_sel_phase_and_refusals():
    trace, _ = generation()
    assert trace.sel(phase="decode").tokens.pos.tolist() == [2, 3, 4, 4]
    assert trace.sel(phase="prefill", sequence=1, position=-2).tokens.pos.tolist() == [3]
    assert trace.sel(position=[0, -1]).tokens.pos.tolist() == [0, 4, 0, 4]
    for bad, message in [
        ({"sequence": 2}, r"sequence=\[2\] is not in this trace; it has \[0, 1\]"),
        ({"layer": 0}, r"layer=\[0\].*\[1, 2\]"),
        ({"layer": []}, "layer"),
        ({"position": [0, 7]}, r"\[7\].*longest has 5"),
        ({"phase": "other"}, "phase"),
        ({"position": 0, "phase": "decode"}, "no token has"),
    ]:
        with pytest.raises(ValueError, match=message):
            trace.sel(**bad)
    with pytest.raises(ValueError, match="no token has"):
        trace.sel(position=slice(0, 2)).sel(position=4)


def test_reprs():
    trace, _ = generation(["routing", "residual", "attention"])
    text = repr(trace)
    for part in ("fake/model @ abc", "10 tokens (6 prefill, 4 decode) of 2 sequences", "1..2"):
        assert part in text
    assert "last sampled token" in text
    page = trace._repr_html_()
    assert "&lt;x&gt;" in page and "<x>" not in page
    assert all(mark in page for mark in ("⏎", "∅", "&lt;U+202E&gt;", "&lt;0xE4&gt;"))
    assert page.isprintable() and page.encode("utf-8")
    assert len(page) < 10_000
    assert "last sampled" not in repr(forward((3,)))
    assert "1 token (1 prefill) of 1 sequence, 6 sites" in repr(forward((1,)))
    assert "… " in repr(generation("all")[0])


def test_traces_copy_and_pickle():
    trace, _ = generation(["routing", "attention"])
    for other in (pickle.loads(pickle.dumps(trace)), copy.deepcopy(trace)):
        assert other.to_frame().equals(trace.to_frame())
    assert trace.tokens.text.tolist() == [*TEXTS[0][:5], *TEXTS[1][:5]]


def test_a_trace_is_no_array():
    trace, _ = generation("routing")
    with pytest.raises(TypeError, match=r"not 0. A trace is no array; .* t.expert_ids"):
        list(trace)
