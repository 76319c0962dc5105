"""`Trace.report`: what a trace can be drawn as, on one page, without a model or a network."""

import re

import pytest
from support.labs import picture, small_lab, small_vl_lab

import ernie_lab as el
from ernie_lab.trace.keys import NotKept

PROMPT = "abcabdabe, the cab."


@pytest.fixture(scope="module")
def lab():
    return small_lab()


def page_of(trace, tmp_path, **options):
    return trace.report(tmp_path / "out.html", **options).read_text()


def headings(page):
    return re.findall(r"<h2[^>]*>([^<]*)</h2>", page)


def test_a_loaded_trace_shows_routing_and_attention(lab, tmp_path):
    run = lab.run(PROMPT, keep=["routing", "attn.pattern"])
    run.trace.save(tmp_path / "saved")
    page = page_of(el.Trace.load(tmp_path / "saved"), tmp_path, title="<My> run")
    assert "<title>&lt;My&gt; run</title>" in page
    assert headings(page) == [
        "What this is", "Every token, every layer", "How close the choices were", "Expert load",
        "Attention",
    ]  # fmt: skip
    assert not re.search(r"<script|<link|https?://|url\(|@import", page)
    assert "model: small" in page and "kept: routing; attn.pattern" in page
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(alts) == 3 + 3 and all(len(alt) > 40 for alt in alts), "three layers have attention"
    assert "Not drawn" not in page


def test_part_of_a_routing_says_what_it_lacks(lab, tmp_path):
    page = page_of(lab.run(PROMPT, keep="moe.expert_ids").trace, tmp_path)
    assert "Which experts each token went to" in page
    assert "Not drawn: margins." in page and "router_logits" in page


def test_attention_alone_is_enough(lab, tmp_path):
    page = page_of(lab.run(PROMPT, keep="blocks.1.attn.pattern").trace, tmp_path)
    assert headings(page) == ["What this is", "Attention"]


def test_nothing_to_show_is_an_error(lab, tmp_path):
    trace = lab.run(PROMPT, keep="residual").trace
    with pytest.raises(NotKept, match=r'it kept blocks\.0\.resid_pre.*keep="routing"'):
        trace.report(tmp_path / "out.html")
    assert not list(tmp_path.iterdir())


def test_many_sequences_are_told_and_not_drawn(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("ernie_lab.plots.trace_report.MAX_SEQUENCES", 1)
    trace = lab.run(["abc", "ab", "a"], keep="moe.expert_ids").trace
    page = page_of(trace, tmp_path)
    assert "sequence 0: expert load" in page
    assert "sequence 1: expert load" not in page
    assert "2 more sequences are not drawn" in page and "All sequences: expert load" in page


def test_size_is_capped_and_each_loss_is_stated(lab, tmp_path):
    page = page_of(lab.run(PROMPT, keep="routing").trace, tmp_path, max_bytes=30_000)
    assert len(page.encode()) < 32_000
    assert "Kept under 0.0 MB" in page and "left out the figure" in page


def test_edited_sites_are_named(lab, tmp_path):
    run = lab.run("abc", keep="moe.expert_ids", edits=el.shared.zero([1]))
    assert "edited sites: blocks.1.moe.shared_out" in page_of(run.trace, tmp_path)


def test_pictures_and_two_banks(tmp_path):
    lab = small_vl_lab()
    keep = ["routing", "attn.pattern"]
    trace = lab.generate("what?", images=[picture()], max_new_tokens=2, keep=keep).trace
    page = page_of(trace, tmp_path)
    assert headings(page)[1] == "Vision experts on the picture"
    assert "The text bank:" in page and "The vision bank:" in page
    assert "Share of attention between text and picture" in page
    assert "the last sampled token was never read" in page
    assert "Not drawn" not in page
