"""Recordings of the vision-language model: banks, patches, image tokens; nothing is changed."""

import numpy as np
import pytest
import torch
from support.models import small_vl_model
from support.taps import Collect
from vl_driver import CLIP, MIXED, NEW, SMALL, TEXT_ALONE, VISION_IDS, WIDE, call, inputs, record

from ernie_lab.interventions.edits import EditTap, edit
from ernie_lab.sites import SiteError, Step, all_sites
from ernie_lab.trace.budget import estimate_bytes
from ernie_lab.trace.keep import Keep, keep
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers

EVERYTHING = ["all", "vision.*", "blocks.*"]


@pytest.fixture(scope="module")
def vl():
    return small_vl_model()


@pytest.fixture(scope="module")
def mixed(vl):
    return record(vl, MIXED, EVERYTHING)


@pytest.fixture(scope="module")
def collected(vl):
    collect = Collect()
    with torch.no_grad():
        call(vl, inputs(vl, MIXED), collect)
    return collect


def by_hand(site, x, given, bank_BS):
    """The rows that a trace must have, told from mask, ids and the bank alone."""
    real = given.mask.flatten().bool().tolist()
    if site.bank is not None:
        number = ("text", "vision").index(site.bank)
        members = [i for i, bank in enumerate(bank_BS.flatten().tolist()) if bank == number]
        return x[[row for row, i in enumerate(members) if real[i]]]
    if site.row == "b" and not site.ragged:
        return x.flatten(0, 1)[[i for i, is_real in enumerate(real) if is_real]]
    return x


def test_every_site_is_recorded_as_it_flowed(vl, mixed, collected):
    given = inputs(vl, MIXED)
    assert mixed.sites == tuple(site.path for site in all_sites(vl))
    for site, x in collected.seen:
        if site.ragged:
            for i, mask in enumerate(given.mask.bool()):
                assert torch.equal(mixed.tensor(site, i), x[i][:, mask][:, :, mask]), site.path
            continue
        if site.row == "i":
            frames = [(0, 0), (1, 0), *((2, frame) for frame in range(4))]
            sizes = [16, 24, 8, 8, 8, 8]
            for number, ((image, frame), n) in enumerate(zip(frames, sizes, strict=True)):
                mine = mixed.tensor(site, image=image, frame=frame)
                assert torch.equal(mine, x[number, :, :n, :n]), site.path
            continue
        layer = 1 if site.layer is None else max(site.layer, 1)
        expected = by_hand(site, x, given, collected[f"blocks.{layer}.moe.bank"])
        assert torch.equal(mixed.tensor(site), expected), site.path
        assert mixed[site.path].shape == expected.shape


def test_rows_point_to_their_tokens(mixed):
    tokens = mixed.tokens
    ids = [token for one in MIXED for token in one.ids]
    assert tokens.id.tolist() == ids
    for bank in ("text", "vision"):
        wanted = [token for token in ids if (token in VISION_IDS) == (bank == "vision")]
        for name in ("router_logits", "expert_ids", "slot_out", "routed_out"):
            assert mixed[f"moe.{bank}.{name}"].id.values.tolist() == wanted
        assert tokens[tokens.bank == bank].id.tolist() == wanted
    assert mixed["resampler.out"].id.values.tolist() == [t for t in ids if t in (50, 51)]
    assert mixed["resampler.norm.scale"].dims == ("image_token",)


def test_a_banks_routing_says_in_four_lines_what_it_is(mixed):
    n_vision = int((mixed.tokens.bank == "vision").sum())
    first, *others = repr(mixed.routing("vision")).splitlines()
    assert f"vision bank: {n_vision} tokens x 2 of " in first and "layers 1..2" in first
    assert len(others) == 3 and all(len(line) <= 120 for line in others)
    assert "selection_scores, expert_ids" in others[0] and "slot_out" not in others[0]


def test_tokens_table(mixed):
    tokens = mixed.tokens
    names = {52: "delimiter", 53: "delimiter", 54: "delimiter", 55: "delimiter"}
    content = [{50: "image", 51: "video", **names}.get(i, "text") for i in tokens.id]
    assert tokens.content.tolist() == content
    assert tokens.modality.tolist() == [c if c in ("image", "video") else "text" for c in content]
    cells = tokens.dropna(subset=["image"])[["image", "frame", "row", "col"]]
    assert cells.to_numpy().tolist() == (
        [[0, 0, row, col] for row in range(2) for col in range(2)]
        + [[1, 0, row, col] for row in range(2) for col in range(3)]
        + [[2, frame, row, 0] for frame in (0, 2) for row in range(2)]
    )


@pytest.mark.parametrize("kept", ["all", EVERYTHING])
def test_recording_is_bit_neutral(vl, kept):
    given, sites = inputs(vl, MIXED), all_sites(vl)
    taps = [Recorder(Keep.of(kept, sites)).bind(given.step) for _ in range(2)]
    with torch.no_grad():
        plain = call(vl, given, Collect(wanted=lambda site: False)).logits
        taped = [call(vl, given, tap).logits for tap in taps]
    assert torch.equal(taped[0], taped[1])
    if kept == "all":
        assert torch.equal(plain, taped[0])
    else:  # attention by head, where `attn.result` is asked for
        assert torch.allclose(plain, taped[0], atol=1e-5)


def test_a_batch_equals_its_singles(vl, mixed):
    first = 0
    for i, one in enumerate(MIXED):
        single, mine = record(vl, [one], EVERYTHING), mixed.sel(sequence=i)
        if not one.media:
            assert "vision.out" not in single.sites
        for path in single.sites:
            site = single.values[path].site
            if site.row == "i":
                pairs = [
                    (
                        single.tensor(path, image=j, frame=f),
                        mine.tensor(path, image=first + j, frame=f),
                    )
                    for j, medium in enumerate(one.media)
                    for f in range(medium.grid.t)
                ]
            else:
                pairs = [(single.tensor(path), mine.tensor(path))]
            for a, b in pairs:
                assert a.shape == b.shape, path
                difference = a.nan_to_num(neginf=0) - b.nan_to_num(neginf=0)
                assert not difference.numel() or difference.abs().max() <= 1e-4, path
        first += len(one.media)


def test_positions_reach_into_banks_and_image_tokens(vl, mixed):
    wanted = [1, 2, 3, 7]
    some = record(vl, MIXED, ["routing", "resampler.out", "vision.out"], positions=wanted)
    for path in some.sites:
        whole, part = mixed[path], some[path]
        if path == "vision.out":
            assert part.identical(whole), "patches have no positions"
        else:
            assert part.identical(whole.isel({whole.dims[0]: np.isin(whole.pos, wanted)}))
    with pytest.raises(SiteError, match="have patches, not tokens"):
        Keep.of(keep("vision.out", positions=0), all_sites(vl))


def test_heads_of_the_tower(vl, mixed):
    some = record(vl, MIXED, keep("vision.blocks.0.attn.*", heads=1))
    assert some["vision.blocks.0.attn.z"]["head"].values.tolist() == [1]
    for name in ("z", "k"):
        path = f"vision.blocks.0.attn.{name}"
        assert some[path].equals(mixed[path].sel(head=[1]))
    assert some.vision_pattern(0, 1).equals(mixed.vision_pattern(0, 1).sel(head=[1]))
    with pytest.raises(ValueError, match=r"heads=\[2\].*heads 0..1"):
        record(vl, MIXED, keep("vision.blocks.0.attn.z", heads=2))


def test_decoding_appends_to_the_text_bank(vl):
    trace = record(vl, MIXED, ["routing", "attention", "vision.out", "moe.bank"], new=NEW)
    tokens = trace.tokens
    decoded = tokens[tokens.phase == "decode"]
    assert decoded.id.tolist() == [21, 24, 22, 23, 25]
    assert set(decoded.bank) == set(decoded.content) == {"text"} and decoded.image.isna().all()
    text, vision = (trace.routing(bank).expert_ids for bank in ("text", "vision"))
    assert text.id.values.tolist() == tokens[tokens.bank == "text"].id.tolist()
    assert (vision.phase == "prefill").all()
    assert trace["vision.out"].sizes["patch"] == 16 + 24 + 32
    longer = [type(one)(one.ids + [row[i] for row in NEW if row[i] >= 0], one.media)
              for i, one in enumerate(MIXED)]  # fmt: skip
    whole = record(vl, longer, ["routing", "attention"])
    assert np.array_equal(whole.routing("text").expert_ids, text)
    logits = [t.routing("text").router_logits for t in (whole, trace)]
    assert np.abs(logits[0] - logits[1]).max() <= 1e-4
    assert trace.sel(phase="decode").routing("vision").expert_ids.shape == (2, 0, 2)


def test_banks_without_tokens_and_runs_without_pictures(vl, tmp_path):
    trace = record(vl, TEXT_ALONE, EVERYTHING, new=[[3, 4]])
    assert trace.media == () and set(trace.tokens.bank) == {"text"}
    ledger = trace.routing("vision")
    assert ledger.expert_ids.shape == ledger.without_bias.shape == (2, 0, 2)
    assert ledger.router_probs.shape == (2, 0, 8) and ledger.margin.shape == (2, 0)
    assert trace["moe.vision.expert_act"].shape == (2, 0, 2, 12)
    assert len(trace.to_frame("vision")) == 0
    assert len(trace.to_frame()) == 2 * 8 * 2 and set(trace.to_frame().bank) == {"text"}
    with pytest.raises(NotKept, match=r"vision\.out did not fire: this run has no pictures"):
        _ = trace["vision.out"]
    assert "vision.out" not in trace.sites
    loaded = type(trace).load(trace.save(tmp_path / "run"))
    assert loaded.routing("vision").router_logits.shape == (2, 0, 8)
    only = record(vl, TEXT_ALONE, "vision.out")
    assert only.sites == () and "8 tokens" not in repr(only)


def to_bank(number, ids, given):
    """Sends the tokens of these ids to a bank, and all padding to the vision bank."""
    moved = torch.isin(given.ids, torch.tensor(ids))

    def fn(bank_BS):
        return bank_BS.masked_fill(moved, number).masked_fill(given.mask == 0, 1)

    return fn


def test_the_bank_may_be_edited_in_one_layer(vl, mixed, tmp_path):
    fn = to_bank(1, [8, 15], inputs(vl, MIXED))
    edits = [edit("blocks.2.moe.bank", fn)]
    collect = Collect()
    given = inputs(vl, MIXED)
    with torch.no_grad():
        call(vl, given, EditTap.of(edits, all_sites(vl), collect).bind(given.step))
    saved = record(vl, MIXED, ["routing", "moe.bank"], edits=edits).save(tmp_path / "run")
    for trace in (
        record(vl, MIXED, [*EVERYTHING], edits=edits),
        record(vl, MIXED, "routing", edits=edits),
        type(mixed).load(saved),
    ):
        for bank in ("text", "vision"):
            here = trace[f"blocks.2.moe.{bank}.expert_ids"]
            there = trace[f"blocks.1.moe.{bank}.expert_ids"]
            moved = [i for i in here.id.values if i in (8, 15)]
            assert moved == ([8, 15] if bank == "vision" else [])
            assert there.id.values.tolist() == mixed[f"moe.{bank}.expert_ids"].id.values.tolist()
            for name in ("router_logits", "expert_ids", "expert_weights"):
                path = f"blocks.2.moe.{bank}.{name}"
                (x,) = (x for site, x in collect.seen if site.path == path)
                (site,) = (site for site in all_sites(vl) if site.path == path)
                expected = by_hand(site, x, given, collect["blocks.2.moe.bank"])
                assert torch.equal(trace.tensor(path), expected)
            with pytest.raises(ValueError, match=r"other tokens: an edit of moe\.bank.*layer"):
                _ = trace.routing(bank).expert_ids
            assert trace.sel(layer=2).routing(bank).expert_ids.sizes["token"] == len(here)
        frame = trace.to_frame()
        assert len(frame) == 2 * len(trace) * 2
        crossed = frame[frame.bank != frame.expected_bank]
        assert set(crossed.layer) == {2} and set(crossed.id) == {8, 15}
        assert set(crossed.bank) == {"vision"}


def test_bank_values_with_their_own_rows_under_edits(vl):
    """An edit of logits in a bank reroutes it, and the trace has what flowed."""
    fn = edit("blocks.1.moe.vision.router_logits", lambda x: -x)
    trace = record(vl, MIXED, "blocks.*.moe.*", edits=[fn])
    plain = record(vl, MIXED, "blocks.*.moe.*")
    path = "blocks.1.moe.vision.router_logits"
    assert torch.equal(trace.tensor(path), -plain.tensor(path))
    assert torch.equal(
        trace.tensor("blocks.1.moe.text.expert_ids"), plain.tensor("blocks.1.moe.text.expert_ids")
    )
    assert not torch.equal(
        trace.tensor("blocks.1.moe.vision.expert_ids"),
        plain.tensor("blocks.1.moe.vision.expert_ids"),
    )


def counts(vl, prompts, *edits):
    given = inputs(vl, prompts)
    tap = EditTap.of(edits, all_sites(vl))
    with torch.no_grad():
        call(vl, given, tap.bind(given.step))
    return [(count.n_fired, count.n_changed) for count in tap.counts]


def test_only_real_tokens_count_as_changed(vl):
    given = inputs(vl, MIXED)
    # Padding stands in the text bank, from its first row of sequence 1 on.
    n_first = sum(token not in VISION_IDS for token in MIXED[0].ids)

    def on_padding(x):
        x[n_first] += 1
        return x

    def beyond_the_frame(x):
        x[0, :, 20:] = 7
        return x

    assert counts(
        vl,
        MIXED,
        edit("blocks.1.moe.text.router_logits", on_padding),
        edit("blocks.1.moe.text.router_logits", lambda x: x + 1),
        edit("blocks.1.moe.vision.router_logits", lambda x: -x),
        edit("vision.blocks.0.attn.pattern", beyond_the_frame),
        edit("vision.blocks.0.resid_pre", lambda x: x * 2),
        edit("resampler.out", lambda x: x * 2),
    ) == [(1, 0), (1, 1), (1, 1), (1, 0), (1, 1), (1, 1)]
    # With padding in the vision bank, its rows there do not count either: it has the first ones
    # of sequence 1, and all others stay in place.
    n_first = sum(token in VISION_IDS for token in MIXED[0].ids)
    assert counts(
        vl,
        MIXED,
        edit("blocks.1.moe.bank", to_bank(0, [], given)),
        edit("blocks.1.moe.vision.router_logits", on_padding),
        edit("blocks.2.moe.vision.router_logits", on_padding),
    ) == [(1, 0), (1, 0), (1, 1)]
    assert counts(
        vl,
        TEXT_ALONE,
        edit("vision.out", lambda x: x * 2),
        edit("blocks.1.moe.vision.router_logits", lambda x: -x),
    ) == [(0, 0), (1, 0)]


def test_gradients_in_banks_and_in_the_tower():
    model = small_vl_model()
    given, sites = inputs(model, MIXED), all_sites(model)
    recorder = Recorder(Keep.of(EVERYTHING, sites), grad=True)
    labels = given.ids.masked_fill(given.mask == 0, -100)
    held = Collect()
    tap = recorder.bind(given.step)

    class Both:
        def wants(self, site, /):
            return True

        def __call__(self, site, x, /):
            return held(site, tap(site, x))

    out = call(model, given, Both(), labels=labels)
    trace = recorder.trace(
        [list(one.ids) for one in MIXED], sites=sites, provenance=Provenance.now("small-vl")
    )
    for path in ("blocks.1.moe.vision.router_logits", "blocks.2.moe.text.expert_act"):
        (grad,) = torch.autograd.grad(out.loss, held[path], retain_graph=True)
        site = next(site for site in sites if site.path == path)
        expected = by_hand(site, grad, given, held["blocks.1.moe.bank"])
        gradient = trace.gradient(out.loss, path)
        assert np.array_equal(gradient.values, expected.numpy())
        assert gradient.id.equals(trace[path].id) and np.abs(gradient).max() > 0
    for path in ("vision.patch_embed", "resampler.spatial", "resampler.out"):
        (grad,) = torch.autograd.grad(out.loss, held[path], retain_graph=True)
        gradient = trace.gradient(out.loss, path)
        assert np.array_equal(gradient.values, grad.numpy())
        assert gradient.dims == trace[path].dims and np.abs(gradient).max() > 0
    pattern = trace.gradient(out.loss, "vision.blocks.1.attn.pattern", image=1)
    assert pattern.shape == (2, 24, 24) and np.abs(pattern).max() > 0


def test_the_estimate_is_what_is_stored(vl, mixed):
    lengths = [len(one.ids) for one in MIXED]
    what, grids = Keep.of(EVERYTHING, all_sites(vl)), (SMALL, WIDE, CLIP)
    n_vision = [sum(token in VISION_IDS for token in one.ids) for one in MIXED]
    sizes = estimate_bytes(what, vl.config, lengths, grids=grids, n_vision=n_vision)
    assert sizes == {path: kept.n_bytes for path, kept in mixed.values.items()}
    bound = estimate_bytes(what, vl.config, lengths, grids=grids)
    assert all(bound[path] >= size for path, size in sizes.items())
    assert bound["blocks.1.moe.vision.expert_ids"] == sum(lengths) * 2 * 8
    longer = estimate_bytes(what, vl.config, lengths, 3, grids=grids, n_vision=n_vision)
    assert longer["blocks.1.moe.vision.expert_ids"] == sizes["blocks.1.moe.vision.expert_ids"]
    assert longer["blocks.1.moe.text.expert_ids"] > sizes["blocks.1.moe.text.expert_ids"]
    some = Keep.of(keep("routing", "resampler.out", positions=[0, 1]), all_sites(vl))
    few = estimate_bytes(some, vl.config, lengths, grids=grids, n_vision=n_vision)
    stored = record(vl, MIXED, keep("routing", "resampler.out", positions=[0, 1]))
    assert all(few[path] >= kept.n_bytes for path, kept in stored.values.items())
    heads = Keep.of(keep("vision.blocks.0.attn.pattern", heads=0), all_sites(vl))
    (size,) = estimate_bytes(heads, vl.config, lengths, grids=grids).values()
    assert size == (16**2 + 24**2 + 4 * 8**2) * 4


def test_refuses_steps_that_do_not_fit(vl):
    given, sites = inputs(vl, MIXED), all_sites(vl)
    step = given.step

    def bound(**changes):
        fields = {name: getattr(step, name) for name in Step.__slots__} | changes
        return Recorder(Keep.of("vision.out", sites)).bind(Step(**fields))

    with pytest.raises(ValueError, match=r"14 image tokens, but the 1 pictures.*make 4"):
        bound(grids=(SMALL,))
    with pytest.raises(ValueError, match=r"step\.bank has shape \[2, 2\]"):
        bound(bank=torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"grids \[\] of the step.*Step\(grids="), torch.no_grad():
        call(vl, given, bound(grids=(), modality=None))
    recorder = Recorder(Keep.of("embed", sites))
    blind = Step("prefill", 0, step.positions, step.mask)
    with torch.no_grad():
        call(vl, given, recorder.bind(blind))
    with pytest.raises(ValueError, match=r"two banks of experts.*Step without bank="):
        recorder.trace(given.ids.tolist(), sites=sites, provenance=Provenance.now("x"))
    one = Routers(8, 2, {})
    with pytest.raises(TypeError, match="two banks have two routers"):
        recorder.trace(given.ids.tolist(), sites=sites, provenance=Provenance.now("x"), routers=one)
    interrupted = Recorder(Keep.of("vision.out", sites))
    interrupted.bind(step)
    with pytest.raises(RuntimeError, match="did not fire in forward 0"):
        interrupted.trace(given.ids.tolist(), sites=sites, provenance=Provenance.now("x"))
    with pytest.raises(ValueError, match="only a prefill"):
        interrupted.bind(Step("decode", 1, step.positions, step.mask, grids=(SMALL,)))
