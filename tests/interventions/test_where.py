"""Edits narrowed to tokens, phases, forwards, heads; collisions; what an edit reports."""

from typing import Any

import edit_cases as cases
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions import at, experts, routing, shared
from ernie_lab.interventions import catalogue as edits

LAB, VL = cases.lab(), cases.vl_lab()
SITE = "blocks.1.resid_mid"


def moved(lab: Any, prompt: dict[str, Any], edit: Any, site: str) -> list[tuple[int, int]]:
    """The (sequence, position) of the tokens where an edit changed a site."""
    base, run = (lab.run(**prompt, keep=site, edits=e).trace for e in ((), edit))
    differs = (base.tensor(site) != run.tensor(site)).flatten(1).any(1)
    places = run[site]
    pairs = zip(places.sequence.values.tolist(), places.pos.values.tolist(), strict=True)
    return [pair for pair, changed in zip(pairs, differs.tolist(), strict=True) if changed]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ({"positions": 1}, [(0, 1), (1, 1)]),
        ({"positions": -1}, [(0, 24), (1, 1)]),
        ({"positions": slice(23, None)}, [(0, 23), (0, 24)]),
        ({"positions": [0, 2], "sequence": 0}, [(0, 0), (0, 2)]),
        ({"sequence": 1}, [(1, 0), (1, 1)]),
        ({"sequence": -1, "phase": "prefill", "where": "text"}, [(1, 0), (1, 1)]),
    ],
)
def test_tokens_of_a_batch(tokens: dict[str, Any], expected: list[tuple[int, int]]) -> None:
    assert moved(LAB, {"prompt": cases.PROMPTS}, edits.zero(SITE, **tokens), SITE) == expected


IMAGE = [(0, 2), (0, 3), (0, 4), (0, 5)]
DELIMITERS = [(0, 1), (0, 6)]


@pytest.mark.parametrize(
    ("site", "tokens", "expected"),
    [
        ("blocks.1.moe.shared_out", {"where": "image"}, IMAGE),
        ("blocks.1.moe.shared_out", {"where": "delimiter"}, DELIMITERS),
        ("blocks.1.moe.vision.expert_weights", {"where": "image"}, IMAGE),
        ("blocks.1.moe.vision.routed_out", {"where": "delimiter"}, DELIMITERS),
        (
            "blocks.2.moe.text.expert_out",
            {"positions": [0, 2, 8]},
            [(0, 0), (0, 8), (1, 0), (1, 2)],
        ),
        ("blocks.2.moe.text.routed_out", {"sequence": 1}, [(1, 0), (1, 1), (1, 2)]),
        ("resampler.out", {"positions": [2, 5]}, [(0, 2), (0, 5)]),
    ],
)
def test_tokens_of_banks(site: str, tokens: Any, expected: list[tuple[int, int]]) -> None:
    assert moved(VL, cases.VL_PROMPT, edits.zero(site, **tokens), site) == expected


def test_a_moved_token_is_found_in_its_new_bank() -> None:
    site = "blocks.1.moe.text.routed_out"
    trace = VL.run(
        **cases.VL_PROMPT,
        edits=[
            routing.cross_bank("vision", layers=1, where="image"),
            edits.zero(site, positions=3),
        ],
        keep=site,
    ).trace
    silent = trace[site].values.any(1) == False  # noqa: E712
    assert trace[site].pos.values[silent].tolist() == [3]


def test_heads() -> None:
    site = "blocks.1.attn.z"
    base, run = (
        LAB.run("hello", keep=site, edits=e).trace.tensor(site)
        for e in ((), edits.zero(site, heads=[1, 3]))
    )
    assert torch.equal(run[:, [0, 2]], base[:, [0, 2]])
    assert not run[:, [1, 3]].any()
    with pytest.raises(el.SiteError, match="has no heads"):
        LAB.run("hello", edits=edits.zero(SITE, heads=1))
    with pytest.raises(el.EditError, match=r"has heads 0\.\.3"):
        LAB.run("hello", edits=edits.zero(site, heads=4))


GENERATE: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0.0, "stop": [], "keep": SITE}


@pytest.mark.parametrize(
    ("tokens", "silent"),
    [
        ({"phase": "prefill"}, [0, 1, 2, 3, 4]),
        ({"phase": "decode"}, [5, 6, 7]),
        ({"steps": 2}, [6]),
        ({"steps": [0, 3]}, [0, 1, 2, 3, 4, 7]),
        ({"positions": range(3, 7)}, [3, 4, 5, 6]),
        ({"positions": range(3, 7), "phase": "decode"}, [5, 6]),
    ],
)
def test_phases(tokens: dict[str, Any], silent: list[int]) -> None:
    gen = LAB.generate("hello", edits=edits.zero(SITE, **tokens), **GENERATE)
    found = (gen.trace.tensor(SITE) == 0).all(1).nonzero().squeeze(1).tolist()
    assert found == silent


def test_knockout() -> None:
    """From the scores alone: no attention there, and what is left sums to one."""
    edit = edits.knockout("text", "image", layers=[1], heads=[0, 1])
    trace = VL.run(**cases.VL_PROMPT, edits=edit, keep="attn.pattern").trace
    pattern = torch.tensor(trace.pattern(1, 0).values)
    assert pattern[:2, 7:, 2:6].abs().max() == 0
    assert pattern[2:, 7:, 2:6].min() > 0
    assert pattern[:2, 6, 2:6].min() > 0  # a delimiter is no text
    torch.testing.assert_close(pattern.sum(-1), torch.ones(4, 10))
    assert torch.tensor(trace.pattern(2, 0).values)[:, 7:, 2:6].min() > 0


def test_knockout_in_generation() -> None:
    """The answer may not read positions 1 and 2 of the prompt."""
    edit = edits.knockout(edits.tokens(phase="decode"), edits.tokens(positions=[1, 2]))
    settings = {**GENERATE, "keep": "attn.pattern"}
    for sequence, n in enumerate(map(len, cases.PROMPTS)):
        trace = LAB.generate(cases.PROMPTS, edits=edit, **settings).trace
        pattern = torch.tensor(trace.pattern(1, sequence).values)
        keys = [key for key in (1, 2) if key < n]
        answer = pattern[:, n:]
        assert answer[:, :, keys].abs().max() == 0
        assert answer[:, 0, 0].min() > 0
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:2]))


def test_a_query_without_any_key_is_refused() -> None:
    groups = (edits.tokens(positions=[0]), edits.tokens(positions=[0]))
    with pytest.raises(el.EditError, match="without any key"):
        LAB.run("hello", edits=edits.knockout(*groups, keep_self=False))
    with pytest.warns(el.EditChangedNothingWarning):
        LAB.run("hello", edits=edits.knockout(*groups))


@pytest.mark.parametrize(
    "edit",
    [
        shared.transplant(LAB),
        shared.swap(1, 1),
        experts.swap(1, 3, 3),
        routing.top_k(2),
        routing.temperature(1.0),
        edits.scale(["blocks.*.attn.*", "blocks.*.moe.shared*", "blocks.*.norm*"], 1.0),
        edits.scale(["moe.slot_out", "moe.expert_out", "moe.router_logits"], 1.0, layers=1),
        at(shared.transplant(LAB), positions=[2]),
        at(shared.zero(), phase="decode"),
    ],
    ids=repr,
)
def test_identities_change_no_bit(edit: Any) -> None:
    plain = LAB.run("hello").logits
    with pytest.warns(el.EditChangedNothingWarning):
        run = LAB.run("hello", edits=edit)
    assert run.edits[0].n_changed == 0
    assert torch.equal(run.logits, plain)


def test_random_direction_has_the_norm() -> None:
    site = "blocks.1.moe.shared_out"
    base = LAB.run("hello", keep=site).trace.tensor(site)
    for per in ("token", "layer"):
        edit = shared.random_direction(0, 1, per=per)
        x = LAB.run("hello", edits=edit, keep=site).trace.tensor(site)
        torch.testing.assert_close(x.norm(dim=-1), base.norm(dim=-1))
        alike = torch.nn.functional.cosine_similarity(x[:1], x[1:])
        assert bool((alike > 0.999).all()) is (per == "layer")


def test_uniform_is_uniform() -> None:
    trace = LAB.run(
        ["abcdefghijklmnopqrstuvwxyz" * 8], edits=routing.uniform(0), keep="routing"
    ).trace
    counts = torch.bincount(trace.tensor("blocks.1.moe.expert_ids").flatten(), minlength=8)
    expected = 26 * 8 * 2 / 8
    assert float(((counts - expected) ** 2 / expected).sum()) < 24.3  # chi^2, 7 df, p = 0.001


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: shared.zero(0), el.SiteError, r"no site in layer 0; it has in layers \[1, 2\]"),
        (lambda: shared.swap(1, 7), el.SiteError, "layer 7 does not exist"),
        (lambda: routing.forbid(1, 0, bank="text"), el.EditError, "leave it out"),
        (lambda: routing.cross_bank("text"), el.SiteError, "needs two banks"),
        (lambda: edits.zero("nowhere"), el.SiteError, "no site matches"),
        (lambda: edits.zero(SITE, positions=-1, phase="decode"), None, ""),
        (lambda: edits.add(SITE, torch.ones(5)), el.EditError, "direction has shape"),
        (lambda: edits.zero(SITE, sequence=3), el.EditError, r"has sequences 0\.\.0"),
        (lambda: shared.transplant(cases.vl_lab(), 0), el.SiteError, "layer 0 is dense"),
    ],
)
def test_refused_when_run(make: Any, error: Any, message: str) -> None:
    if error is None:
        with pytest.raises(el.EditError, match="count from the end"):
            LAB.generate("hello", edits=make(), **GENERATE)
        return
    with pytest.raises(error, match=message):
        LAB.run("hello", edits=make())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: at(shared.zero()), "something to narrow to"),
        (lambda: at(torch.neg, phase="decode"), "takes an edit"),
        (lambda: edits.zero(SITE, phase="later"), "phase='later' must be"),
        (lambda: edits.zero(SITE, where="picture"), "where='picture' must be"),
        (lambda: experts.off(1, 2, "gone"), "how='gone' must be"),
        (lambda: experts.off(1, 2, "mean"), "needs layer, ids and trace="),
        (lambda: routing.force(1, 2, 1.5), "must sum to"),
        (lambda: routing.temperature(0), "must be above 0"),
        (lambda: shared.transplant(3), "takes another lab"),
        (lambda: edits.mean(SITE, 3), "a Trace is needed"),
    ],
)
def test_refused_when_made(make: Any, message: str) -> None:
    with pytest.raises(el.EditError, match=message):
        make()


def test_banks_must_be_named() -> None:
    for edit in (routing.forbid(1, 0), experts.off(1, 0), routing.uniform(), routing.top_k(1)):
        with pytest.raises(el.EditError, match='say bank="text" or bank="vision"'):
            VL.run(**cases.VL_PROMPT, edits=edit)
    with pytest.raises(el.EditError, match="has patches and no tokens"):
        VL.run(**cases.VL_PROMPT, edits=edits.zero("vision.out", positions=1))
    VL.run(**cases.VL_PROMPT, edits=edits.zero("vision.out"))


def test_off_in_every_sense() -> None:
    """Conditions for `compare`; each is the edit that `off` makes."""
    trace = LAB.run("another Reference", keep=["moe.expert_out", "moe.expert_ids"]).trace
    seen = int(trace.tensor("blocks.2.moe.expert_ids")[0, 0])
    ways = experts.off_each_way(2, seen, trace=trace)
    assert list(ways) == ["zero", "renormalise", "next_best", "mean", "resample"]
    assert ways["zero"] == [experts.off(2, seen)]
    assert ways["next_best"] == [routing.forbid(2, seen)]
    assert ways["mean"] == [experts.off(2, seen, "mean", trace=trace)]
    assert list(experts.off_each_way(2, seen)) == ["zero", "renormalise", "next_best"]
    unseen = set(range(8)) - set(trace.tensor("blocks.2.moe.expert_ids").flatten().tolist())
    missing = min(unseen, default=99)
    with pytest.raises(el.EditError, match="no token of the trace chose expert"):
        experts.off(2, missing, "mean", trace=trace)
    with pytest.raises(el.EditError, match="expert 8 does not exist"):
        LAB.run("hello", edits=experts.off(1, 8))


def test_experts_that_nobody_chose_are_told_of() -> None:
    ids = LAB.run("hello", keep="routing").trace.tensor("blocks.2.moe.expert_ids")
    one, other = sorted(set(range(8)) - set(ids.flatten().tolist()))[:2]
    reason = (
        f"was applied once and changed nothing: no token chose expert {one} or {other} in layer 2"
    )
    for how in ("zero", "renormalise"):
        with pytest.warns(el.EditChangedNothingWarning, match=reason):
            LAB.run("hello", edits=experts.off(2, [one, other], how))
    first, last = (set(row.tolist()) for row in (ids[0], ids[-1]))
    late = min(last - first)
    edit = experts.off(2, late, positions=0)
    with pytest.warns(el.EditChangedNothingWarning, match=rf"narrowed to chose expert {late} in"):
        LAB.run("hello", edits=edit)
    with pytest.warns(el.EditChangedNothingWarning, match=r"applied 2 times and changed nothing$"):
        LAB.run("hello", edits=edits.scale("blocks.*.moe.shared_out", 1.0))
    assert experts.off(None).why_idle("no token") == ""


def test_replay_under_an_edit_of_the_embeddings() -> None:
    """Whose prompt it is, is told by the embeddings as they were before any edit."""
    trace = LAB.run("hello", keep="routing").trace
    run = LAB.run("hello", edits=[edits.scale("embed", 1.5), routing.freeze(trace)], keep="routing")
    assert torch.equal(
        run.trace.tensor("blocks.1.moe.expert_ids"), trace.tensor("blocks.1.moe.expert_ids")
    )


def test_collisions_are_told() -> None:
    run = LAB.run("hello", edits=[shared.scale(2.0), shared.zero(1), routing.temperature(2.0)])
    assert [count.after for count in run.edits] == [
        (),
        ("shared.scale(2.0) (1 site in common)",),
        (),
    ]
    assert [count.n_fired for count in run.edits] == [2, 1, 2]
    other = LAB.run("hello", edits=[shared.zero(1), shared.scale(2.0, 2), routing.temperature(2.0)])
    assert torch.equal(run.logits, other.logits)
