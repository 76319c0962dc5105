"""Heads over two ranks: 1e-12 of one process in fp64, the same choices, and gathered taps."""

import gc
from pathlib import Path

import pytest
import torch
from parallel.conftest import Load
from parallel.test_expert_parallel import TEXT, everything, random_text
from support.labs import picture

import ernie_lab as el
from ernie_lab.interventions import Edit
from ernie_lab.lab import Lab
from ernie_lab.parallel.layouts import layout_of
from ernie_lab.parallel.messages import Kind, Link, Message
from ernie_lab.parallel.ranks import RankError, Ranks

TP = {"placement": "ep:2+tp", "dtype": "float64"}


def opened(load_over_two: Load, source: str | Path) -> list[Lab]:
    return [el.load(source, dtype="float64"), load_over_two(source, **TP)]


def assert_close(one: el.Run, other: el.Run) -> None:
    """To 1e-12 of the largest value at each site; integers, such as expert ids, exactly."""
    assert _differ(one.logits, other.logits) <= 1e-12
    for path, kept in one.trace.values.items():
        for i, part in kept.parts.items():
            x, y = part.values, other.trace.values[path].parts[i].values
            assert x.shape == y.shape, path
            if x.is_floating_point():
                # Scores and pattern are kept in fp32 and fp64: see their dtypes.
                bound = 1e-12 if x.dtype == torch.float64 else 2e-6
                assert _differ(x, y) <= bound, path
            else:
                assert torch.equal(x, y), path


def _differ(x: torch.Tensor, y: torch.Tensor) -> float:
    if x.numel() == 0:
        return 0.0
    masked = x.isinf()
    assert torch.equal(masked, y.isinf())
    x, y = (t.masked_fill(masked, 0.0).double() for t in (x, y))
    return float((x - y).abs().max() / x.abs().max().clamp(min=1.0))


def test_text(load_over_two: Load) -> None:
    labs = opened(load_over_two, "tiny-text")
    assert_close(*(lab.run([TEXT, TEXT[:9]], keep=everything(labs[0])) for lab in labs))


def test_pictures(load_over_two: Load) -> None:
    labs = opened(load_over_two, "tiny-vl")
    image = picture(0, 56, 84)
    assert_close(*(lab.run("What?", images=[image], keep=everything(labs[0])) for lab in labs))


def test_biases_are_added_once(load_over_two: Load, tmp_path: Path) -> None:
    labs = opened(load_over_two, random_text(tmp_path))
    ids = torch.randint(3, 61, (2, 20)).tolist()
    assert_close(*(lab.run(ids, keep=everything(labs[0])) for lab in labs))


@pytest.mark.parametrize(
    "edit",
    [
        el.edits.zero("attn.z", layers=2, heads=3),  # of rank 1
        el.edits.zero("attn.result", layers=1, heads=0),
        el.edit("blocks.3.attn.k", lambda x: x * torch.tensor([1.0, 3.0])[:, None]),
        el.edit("blocks.2.attn.pattern", lambda x: torch.ones_like(x) / x.shape[-1]),
        el.edit("blocks.2.attn.scores", lambda x: x.roll(1, 1)),
        el.edit("blocks.4.attn.attn_out", lambda x: 2 * x),
    ],
    ids=lambda edit: repr(edit)[:40],
)
def test_edits_of_heads(load_over_two: Load, edit: Edit) -> None:
    labs = opened(load_over_two, "tiny-text")
    runs = [lab.run(TEXT, edits=edit, keep=["attn.z", "attn.q", "resid_post"]) for lab in labs]
    assert_close(*runs)
    assert _differ(runs[1].logits, labs[1].run(TEXT).logits) > 1e-3


def test_generation_with_caches_in_pieces(
    load_over_two: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, split = opened(load_over_two, "tiny-text")
    texts = [TEXT, TEXT[:9]]
    assert (
        split.generate(texts, max_new_tokens=10).tokens
        == one.generate(texts, max_new_tokens=10).tokens
    )
    forgotten: list[Message] = []
    send = Link.send
    monkeypatch.setattr(
        Link,
        "send",
        lambda link, m: (
            forgotten.extend(x for x in m.values() if x.kind is Kind.FORGET and x.flags),
            send(link, m),
        ),
    )
    # Interrupted in the midst, and another begun: each has a cache of its own.
    running = split.stream(TEXT, max_new_tokens=10)
    next(running), next(running)
    assert (
        split.generate(texts, max_new_tokens=10).tokens
        == one.generate(texts, max_new_tokens=10).tokens
    )
    assert running.result.tokens == one.generate(TEXT, max_new_tokens=10).tokens
    del running
    gc.collect()
    split.run(TEXT)
    assert len(forgotten) == 2  # what other ranks hold of a cache ends with it


def test_each_rank_holds_its_heads_alone(load_over_two: Load, two_ranks: Ranks) -> None:
    split = load_over_two("tiny-text", placement="ep:2+tp")
    one = el.load("tiny-text")
    parts = [
        p for name, p in one.model.named_parameters() if ".experts." in name or ".attn." in name
    ]
    assert two_ranks.reports[1]["bytes_held"] == sum(p.nbytes for p in parts) // 2
    assert one.report.held.total - split.report.held.total == sum(p.nbytes for p in parts) // 2
    with pytest.raises(ValueError, match="projection o is in pieces: 2 ranks"):
        _ = split.model.blocks[1].attn.o  # type: ignore[union-attr]


def test_what_nobody_wants_does_not_travel(
    load_over_two: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = load_over_two("tiny-text", **TP)
    shown: list[int] = []
    receive = Link.receive

    def watched(link: Link, *arguments: object) -> Message:
        message = receive(link, *arguments)  # type: ignore[arg-type]
        shown.append(message.kind)
        return message

    monkeypatch.setattr(Link, "receive", watched)
    split.run(TEXT, keep="resid_post")
    assert Kind.SHOWN not in shown
    split.run(TEXT, keep="blocks.2.attn.z")
    assert shown.count(Kind.SHOWN) == 1


def test_a_tap_that_raises_inside_a_head(load_over_two: Load) -> None:
    split = load_over_two("tiny-text", **TP)
    before = split.run(TEXT).logits

    def stop(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split.run(TEXT, edits=el.edit("blocks.2.attn.q", stop))
    with pytest.raises(RankError, match="inside a tap"):
        split.run(TEXT, edits=el.edit("blocks.2.attn.q", lambda x: split.run(TEXT) and x))
    assert torch.equal(split.run(TEXT).logits, before)


def test_layouts() -> None:
    sites = {site.path: site for site in el.all_sites(el.load("tiny-vl").model)}
    layouts = {
        "blocks.2.attn.q": "heads:2",
        "blocks.2.attn.k_rot": "heads:2",
        "blocks.2.attn.pattern": "heads:1",
        "blocks.2.attn.result": "heads:2",
        "blocks.2.attn.attn_out": "whole",
        "blocks.2.moe.text.expert_act": "experts",
        "blocks.2.moe.vision.expert_out": "experts",
        "blocks.2.moe.text.slot_out": "whole",
        "blocks.2.moe.text.expert_ids": "whole",
        "vision.blocks.1.attn.pattern": "whole",
    }
    for path, layout in layouts.items():
        assert layout_of(sites[path], "ep:2+tp") == layout, path
        if layout.startswith("heads"):
            assert layout_of(sites[path], "ep:2") == "whole"
    assert {layout_of(site, None) for site in sites.values()} == {"whole"}
    assert {layout_of(site, "stream") for site in sites.values()} == {"whole"}
