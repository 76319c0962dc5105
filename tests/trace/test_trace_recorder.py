"""The recorder against hand-made forwards: a padded batch of two that decodes unequally."""

import numpy as np
import pytest
import torch
from trace_driver import (
    IDS,
    N_HEADS,
    PREFILL,
    SITES,
    drive,
    forward,
    generation,
    one_step,
    provenance,
    routers,
    steps,
)

from ernie_lab.sites import Site, SiteError, Step
from ernie_lab.trace.keep import Keep, keep
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.trace import Trace


def by_hand(fired):
    """Rows in the order (sequence, pos), from the masks alone: 2 + 3 and 4 + 1 tokens."""
    first = [fired[0][0, 2:], fired[1][0], fired[2][0], fired[3][0]]
    second = [fired[0][1], fired[1][1]]
    return torch.cat(first + second)


def test_rows_are_the_real_tokens_in_order():
    trace, fired = generation("all")
    for path in trace.sites:
        assert torch.equal(trace.tensor(path), by_hand(fired[path])), path


def test_tokens_table():
    trace, _ = generation()
    tokens = trace.tokens
    assert len(trace) == 10
    assert tokens.sequence.tolist() == [0] * 5 + [1] * 5
    assert tokens.pos.tolist() == [0, 1, 2, 3, 4] * 2
    assert tokens.id.tolist() == [10, 11, 12, 13, 14, 20, 21, 22, 23, 24]
    assert tokens.text.tolist() == ["a", " b", "\n", "é", "", "<x>", "\udce4", "‮x", "\x00", "y"]
    assert tokens.phase.tolist() == ["prefill"] * 2 + ["decode"] * 3 + ["prefill"] * 4 + ["decode"]
    assert tokens.image.isna().all()
    assert set(tokens.modality) == set(tokens.content) == {"text"}


def test_attention_is_joined_over_prefill_and_decode():
    trace, fired = generation(["attn.pattern", "attn.scores"])
    for name, fill in (("pattern", 0.0), ("scores", -torch.inf)):
        maps = fired[f"blocks.1.attn.{name}"]
        expected = torch.full((N_HEADS, 5, 5), fill)
        expected[:, :2, :2] = maps[0][0, :, 2:, 2:]
        # Columns 0 and 1 are padding of the prefill; later columns are decoded tokens.
        expected[:, 2, :3] = maps[1][0, :, 0, [2, 3, 4]]
        expected[:, 3, :4] = maps[2][0, :, 0, [2, 3, 4, 5]]
        expected[:, 4, :5] = maps[3][0, :, 0, [2, 3, 4, 5, 6]]
        assert torch.equal(trace.tensor(f"blocks.1.attn.{name}", 0), expected)
        expected = torch.full((N_HEADS, 5, 5), fill)
        expected[:, :4, :4] = maps[0][1]
        expected[:, 4, :5] = maps[1][1, :, 0]
        assert torch.equal(trace.tensor(f"blocks.1.attn.{name}", 1), expected)


def test_keys_of_a_finished_sequence_stay_out_of_a_resumed_one():
    mask = [PREFILL, torch.tensor([[0], [1]]), torch.tensor([[1], [1]])]
    recorder = Recorder(Keep.of("attention", SITES, layers=0))
    for index, m in enumerate(mask):
        phase = "decode" if index else "prefill"
        tap = recorder.bind(Step(phase, index, torch.zeros_like(m, dtype=torch.long), m.bool()))
        n_keys = 4 + index
        x = torch.arange(2 * N_HEADS * m.shape[1] * n_keys).float()
        x = x.reshape(2, N_HEADS, m.shape[1], n_keys)
        tap(next(site for site in SITES if site.path == "blocks.0.attn.pattern"), x)
    trace = recorder.trace([[1, 2, 3], [1, 2, 3, 4, 5, 6]], sites=SITES, provenance=provenance())
    # The third real token of sequence 0 is column 5; column 4 was padding for it.
    assert torch.equal(trace.tensor(("pattern", 0), 0)[:, 2], x[0, :, 0, [2, 3, 5]])


def test_filters_on_heads_positions_dtype():
    wish = [keep("attention", layers=[1], heads=[2, 0], positions=[1, 4]), keep("attn.z", heads=1)]
    trace, fired = generation(wish, dtype="float16")
    whole, _ = generation("attention")
    narrow = trace.tensor("blocks.1.attn.pattern", 1)
    expected = whole.tensor("blocks.1.attn.pattern", 1)[[2, 0]][:, [1, 4]].half()
    assert torch.equal(narrow, expected)
    array = trace.pattern(1, 1)
    assert array["head"].values.tolist() == [2, 0]
    assert array.query_pos.values.tolist() == [1, 4]
    assert array.key_pos.values.tolist() == [0, 1, 2, 3, 4]
    z = by_hand(fired["blocks.2.attn.z"])[:, [1]].half()
    assert torch.equal(trace.tensor(("z", 2)), z)
    assert trace["z", 2]["head"].values.tolist() == [1]


def test_positions_of_rows():
    trace, fired = generation("resid_post", positions=slice(1, 4, 2))
    assert torch.equal(
        trace.tensor(("resid_post", 0)), by_hand(fired["blocks.0.resid_post"])[[1, 3, 6, 8]]
    )
    assert trace["resid_post", 0].pos.values.tolist() == [1, 3, 1, 3]
    assert len(trace) == 10, "the tokens table keeps the whole text"
    last = forward((3, 5, 1), "resid_post", positions=[-1, -2])
    assert last["resid_post", 0].pos.values.tolist() == [1, 2, 3, 4, 0]


def test_the_recorder_copies_and_holds_nothing_of_the_model():
    recorder = Recorder(Keep.of("blocks.0.resid_pre", SITES))
    site = next(site for site in SITES if site.path == "blocks.0.resid_pre")
    huge = torch.zeros(1, 2, 4000)
    tap = recorder.bind(one_step((2,)))
    x = huge[..., :4]
    assert tap(site, x) is x
    huge.fill_(9.0)
    stored = recorder.trace([[1, 2]], sites=SITES, provenance=provenance()).tensor(site.path)
    assert torch.equal(stored, torch.zeros(2, 4))
    assert stored.untyped_storage().nbytes() == stored.nbytes


def test_wants_and_ignores():
    recorder = Recorder(Keep.of("blocks.1.attn.pattern", SITES))
    tap = recorder.bind(steps()[0])
    assert [site.path for site in SITES if tap.wants(site)] == ["blocks.1.attn.pattern"]
    x = torch.zeros(2, 4, 4)
    assert tap(SITES[0], x) is x


def site_of(path):
    return next(site for site in SITES if site.path == path)


def bound(path, step=None):
    return Recorder(Keep.of(path, SITES)).bind(step or steps()[0])


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"logits has shape \[2, 1, 6\].*logits='all'"):
        bound("logits")(site_of("logits"), torch.zeros(2, 1, 6))
    with pytest.raises(ValueError, match=r"'b s d'.*2 sequences of 4"):
        bound("embed")(site_of("embed"), torch.zeros(2, 4))
    path = "blocks.0.attn.pattern"
    with pytest.raises(ValueError, match=r"7 keys.*first forward of a cache"):
        bound(path)(site_of(path), torch.zeros(2, N_HEADS, 4, 7))
    odd = Site("vision.out", "p w", "")
    tap = Recorder(Keep.of(odd, [odd])).bind(steps()[0])
    with pytest.raises(ValueError, match=r"'p w' and the grids \[\].*Step\(grids="):
        tap(odd, torch.zeros(3, 4))
    odd = Site("odd", "d v", "")
    with pytest.raises(ValueError, match="'d v', not token rows"):
        Recorder(Keep.of(odd, [odd])).bind(steps()[0])(odd, torch.zeros(3, 4))
    tap = bound("embed")
    tap(site_of("embed"), torch.zeros(2, 4, 4))
    with pytest.raises(RuntimeError, match="fired twice"):
        tap(site_of("embed"), torch.zeros(2, 4, 4))
    path = "blocks.0.attn.z"
    tap = Recorder(Keep.of(path, SITES, heads=5)).bind(steps()[0])
    with pytest.raises(ValueError, match=r"heads=\[5\].*0..2"):
        tap(site_of(path), torch.zeros(2, 4, 3, 2))


def test_refuses_misuse_of_steps():
    recorder = Recorder(Keep.of("embed", SITES))
    with pytest.raises(RuntimeError, match=r"recorder\.bind"):
        recorder(site_of("embed"), torch.zeros(2, 4, 4))
    with pytest.raises(RuntimeError, match="nothing was recorded"):
        recorder.trace(IDS, sites=SITES, provenance=provenance())
    with pytest.raises(ValueError, match="forward 1 cannot follow 0"):
        recorder.bind(steps()[1])
    recorder.bind(steps()[0])
    with pytest.raises(RuntimeError, match="did not fire in forward 0"):
        recorder.trace(IDS, sites=SITES, provenance=provenance())
    other = Step("decode", 1, torch.zeros(3, 1), torch.ones(3, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="3 sequences, the ones before had 2"):
        recorder.bind(other)
    with pytest.raises(ValueError, match="generation has not reached"):
        drive(Recorder(Keep.of("embed", SITES, positions=-1)), steps())


def test_refuses_token_lists_of_another_length():
    def trace(ids, **options):
        recorder = Recorder(Keep.of("embed", SITES))
        drive(recorder, steps())
        return recorder.trace(ids, sites=SITES, provenance=provenance(), **options)

    assert len(trace([row[:5] for row in IDS])) == 10
    for ids in ([IDS[0][:4], IDS[1]], [[*IDS[0], 1], IDS[1]]):
        with pytest.raises(ValueError, match=r"of sequence 0: . given, 5 tokens recorded"):
            trace(ids)
    with pytest.raises(ValueError, match="1 sequences given, 2 recorded"):
        trace(IDS[:1])
    with pytest.raises(ValueError, match="not in the tokens table"):
        trace(IDS, columns={"mood": IDS})


def test_positions_that_were_not_reached_have_no_rows(tmp_path):
    """As when a text ends early; what no sequence can reach is refused before the run."""
    trace, _ = generation(["all", "attention"], positions=[9])
    assert trace["embed"].shape == (0, 4)
    assert trace["resid_post"].shape == (3, 0, 4)
    assert trace.router_probs.shape == (2, 0, 5) and trace.routing().margin.shape == (2, 0)
    assert len(trace.to_frame()) == 0
    assert trace.pattern(1, 1).shape == (N_HEADS, 0, 5)
    assert trace.sel(sequence=1)["blocks.1.attn.pattern"].shape == (N_HEADS, 0, 5)
    assert "10 tokens" in repr(trace) and trace._repr_html_()
    trace.save(tmp_path / "run")
    assert Trace.load(tmp_path / "run").pattern(1, 0).shape == (N_HEADS, 0, 5)


def test_a_sequence_too_short_for_a_position_has_no_row():
    trace = forward((2, 4), ["attention", "embed"], positions=3)
    assert trace["embed"].sequence.values.tolist() == [1]
    assert trace.pattern(0, 0).shape == (N_HEADS, 0, 2)
    assert trace.pattern(0, 1).shape == (N_HEADS, 1, 4)
    with pytest.raises(ValueError, match=r"one map per sequence, here \[0, 1\]"):
        _ = trace["blocks.0.attn.pattern"]
    assert trace.sel(position=3).pattern(0).shape == (N_HEADS, 1, 4)


def test_batch_of_two_equals_two_singles():
    """Rows of a right-padded batch are those of each sequence alone."""
    step = one_step((2, 3))
    recorder = Recorder(Keep.of("attention", SITES, layers=0))
    x = torch.randn(2, N_HEADS, 3, 3)
    recorder.bind(step)(site_of("blocks.0.attn.pattern"), x)
    trace = recorder.trace([[1, 2], [3, 4, 5]], sites=SITES, provenance=provenance())
    assert torch.equal(trace.tensor(("pattern", 0), 0), x[0, :, :2, :2])
    assert torch.equal(trace.tensor(("pattern", 0), 1), x[1])


def test_gradients_reach_the_values_that_flowed():
    site, later = site_of("blocks.0.resid_pre"), site_of("blocks.0.resid_mid")
    recorder = Recorder(Keep.of([site, later], SITES), grad=True)
    tap = recorder.bind(Step("prefill", 0, torch.zeros(2, 4), PREFILL))
    x_BSD = torch.randn(2, 4, 4, requires_grad=True)
    y_BSD = tap(later, tap(site, x_BSD * 2).square())
    loss = y_BSD[PREFILL].sum()
    trace = recorder.trace([IDS[0][:2], IDS[1][:4]], sites=SITES, provenance=provenance())
    gradient = trace.gradient(loss, site)
    assert gradient.dims == ("token", "width")
    assert torch.equal(torch.tensor(gradient.values), 4 * x_BSD.detach()[PREFILL])
    assert (trace.gradient(loss, later) == 1).all()
    (through_rows,) = torch.autograd.grad(trace.tensor(later).sum(), x_BSD)
    assert torch.equal(through_rows[PREFILL], 8 * x_BSD.detach()[PREFILL])
    assert trace[later].shape == (6, 4), "arrays detach"
    with pytest.raises(ValueError, match="before slicing"):
        trace.sel(sequence=0).gradient(loss, site)


def test_gradient_refuses_what_has_no_graph():
    recorder = Recorder(Keep.of("embed", SITES), grad=True)
    recorder.bind(steps()[0])(site_of("embed"), torch.zeros(2, 4, 4))
    trace = recorder.trace([[1, 2], [1, 2, 3, 4]], sites=SITES, provenance=provenance())
    with pytest.raises(ValueError, match="embed has no graph"):
        trace.gradient(torch.zeros(()), "embed")
    plain, _ = generation("embed")
    with pytest.raises(ValueError, match="grad=True"):
        plain.gradient(torch.zeros(()), "embed")


def test_records_under_compile_without_a_graph_break():
    site = site_of("blocks.0.resid_pre")

    @torch.compile(backend="eager", fullgraph=True)
    def double(x_BSD, tap):
        return tap(site, x_BSD * 2) + 1

    x_BSD = torch.randn(2, 4, 4)
    for _ in range(2):
        recorder = Recorder(Keep.of(site, SITES))
        double(x_BSD, recorder.bind(steps()[0]))
        trace = recorder.trace([[1, 2], [1, 2, 3, 4]], sites=SITES, provenance=provenance())
        assert torch.equal(trace.tensor(site), 2 * x_BSD[PREFILL])


def test_the_correction_bias_is_a_copy():
    mine = routers()
    recorder = Recorder(Keep.of("routing", SITES))
    drive(recorder, [one_step((2,))])
    live = {layer: bias_E.clone() for layer, bias_E in mine.correction_bias.items()}
    given = Routers(mine.n_experts, mine.n_chosen, live)
    trace = recorder.trace([[1, 2]], sites=SITES, provenance=provenance(), routers=given)
    live[1].add_(1.0)
    assert np.array_equal(trace.correction_bias.sel(layer=1), mine.correction_bias[1])


def test_dense_models_have_no_routers():
    recorder = Recorder(Keep.of("embed", SITES))
    drive(recorder, [one_step((2,))])
    trace = recorder.trace([[1, 2]], sites=SITES, provenance=provenance())
    with pytest.raises(SiteError, match="dense"):
        _ = trace.router_logits
