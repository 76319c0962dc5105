"""Two banks of experts: never on one axis; tokens of pictures by their place; who looks at whom."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.collections import PolyCollection
from plots.cases import VisionTrace

from ernie_lab import plots
from ernie_lab.analysis.balance import load, multinomial_reference
from ernie_lab.plots.trace_report import Reported, reportable, routing_report
from ernie_lab.trace.provenance import Provenance


@pytest.fixture(scope="module")
def trace():
    return VisionTrace()


def texts(labels):
    return [label.get_text() for label in labels]


def test_banks_have_a_panel_and_a_reference_each(trace):
    view = plots.plot_banks(trace)
    text, vision = view.figure.axes[:2]
    for ax, bank, n in ((text, "text", 12), (vision, "vision", 18)):
        ids = trace.routing(bank).expert_ids.values
        relative = np.stack([load(layer, 8) for layer in ids]) * 8
        drawn = ax.images[0].get_array()
        assert np.allclose(drawn, np.log2(np.clip(relative, 2.0**-9, None)))
        assert ax.get_title(loc="left") == f"{bank} bank: {n} tokens"
        assert texts(ax.get_yticklabels()) == ["1", "2"] and ax.get_xlabel() == "expert"
        reference = multinomial_reference(n, 8, 2)
        assert f"95 % of uniform ≤ {reference.p95:.2f}" in texts(ax.texts)
    assert "N = 12 tokens x 2 of 8" in view.caption and "N = 18" in view.caption
    assert "text bank" in view.alt and "vision bank" in view.alt
    assert view.png()


def test_experts_without_a_token_are_counted_not_told_by_the_darkest_blue(trace):
    view = plots.plot_banks(trace)
    for bank in ("text", "vision"):
        ids = trace.routing(bank).expert_ids.values
        unused = sum(int((load(layer, 8) == 0).sum()) for layer in ids)
        said = f"{unused} of 16 without any token" in view.caption
        assert said if unused else "without any" not in view.caption.split(f"{bank}:")[1][:60]
    assert "is the end of the bar or less" in view.caption


def test_figures_of_an_edited_run_say_so_once(recorded):
    edits = ["routing.forbid([3], layers=[1])", "two"]
    source = Provenance(model="m", details={"edits": edits})
    trace = dataclasses.replace(recorded, provenance=source)
    said = "m, edited: routing.forbid([3], layers=[1]) and 1 more"
    assert said.removeprefix("m, ") in repr(trace)
    assert "edited" not in repr(recorded)
    for view in (
        plots.plot_banks(trace),
        plots.plot_image_experts(trace),
        plots.plot_expert_map(trace.sel(sequence=2), bank="text"),
    ):
        assert view.caption.count(said) == 1
    assert plots.plot_banks(trace, model=said).caption.count("edited") == 1
    assert "edited" not in plots.plot_banks(recorded).caption
    long = Provenance(model="m", details={"edits": ["x" * 99]})
    assert long.edited == f"edited: {'x' * 59}…"


def test_a_bank_without_tokens_says_so():
    trace = VisionTrace()
    trace.tokens = trace.tokens[trace.tokens["bank"] == "vision"]
    view = plots.plot_banks(trace, layers=[2])
    assert "no token went to the text bank" in texts(view.figure.axes[0].texts)
    assert "text bank: no tokens" in view.alt


def test_a_map_of_a_trace_with_two_banks_needs_one(trace):
    with pytest.raises(ValueError, match="bank='text' or bank='vision'"):
        plots.plot_expert_map(trace)
    view = plots.plot_expert_map(trace, bank="text")
    ax = view.figure.axes[0]
    assert texts(ax.get_xticklabels())[:5] == ["<s>", "User", ":", "␣", "⏎"]
    assert texts(ax.get_xticklabels(minor=True))[3:5] == ["3", "22"]  # true positions
    assert "12 tokens of the text bank" in view.caption and "Dotted" in view.caption
    (marks,) = [c for c in ax.collections if isinstance(c, PolyCollection)]
    assert len(marks.get_paths()) == 2 * 12 * 2
    vision = plots.plot_expert_map(trace, bank="vision")
    names = texts(vision.figure.axes[0].get_xticklabels())
    assert names[1] == "img0 r0 c0" and names[7] == "img0 r1 c2"
    assert vision.title == "Which vision experts each token went to, layer by layer"
    assert "Dotted" not in vision.caption


def test_tokens_of_pictures_are_called_by_their_place(trace):
    pattern = trace.pattern(1)
    ax = plots.plot_attention(pattern[0], layer=1, head=0, tokens=trace.tokens).figure.axes[0]
    assert texts(ax.get_xticklabels())[4:7] == ["<|IMAGE…TART|>", "img0 r0 c0", "img0 r0 c1"]
    margin = trace.routing("vision").margin
    ax = plots.plot_generation(margin, name="margin", tokens=trace.tokens).figure.axes[0]
    assert texts(ax.get_xticklabels())[16] == "img0 r3 c3"
    clip = VisionTrace(1, 2, n_frames=4)
    ax = plots.plot_expert_map(clip, bank="vision").figure.axes[0]
    assert texts(ax.get_xticklabels())[3] == "vid0 f2 r0 c0"
    with pytest.raises(ValueError, match="no position 6 of sequence 0"):
        plots.plot_generation(margin, name="m", tokens=trace.tokens.drop(index=6))


def test_a_router_is_of_a_bank_and_a_row_of_the_tokens_names_its_token(trace):
    ledger = trace.routing("vision")
    row = trace.tokens.iloc[trace.first + 6]
    view = plots.plot_router_token(
        ledger.router_probs.values[0, 7], ledger.expert_ids.values[0, 7],
        ledger.correction_bias.values[0], token=row, layer=1, bank="vision",
    )  # fmt: skip
    assert view.title == "How the vision router of layer 1 routed token “img0 r1 c2” (position 11)"
    assert "2 of 8 vision experts" in view.caption and view.alt.startswith("Vision router")


def test_a_picture_in_a_text_is_one_chip_with_its_mean(trace):
    margin = trace.routing("vision").margin.sel(layer=1)
    shown = plots.token_html(margin, trace.tokens, name="margin")
    assert shown.html.count("<bdi") == 3 and "PLACEHOLDER" not in shown.html
    assert ">image 0: 4x4 tokens</bdi>" in shown.html
    mean = margin.values[1:17].mean()
    assert f"positions 5 to 20 · mean margin: {mean:.4g}, from" in shown.html
    assert "[image 0: 4x4 tokens]" in repr(shown) and "img0 r" in repr(shown)
    clip = VisionTrace(2, 3, n_frames=4)
    every = np.zeros(len(clip.tokens))
    assert (
        "clip 0: 2 pairs of frames, each 2x3 tokens"
        in plots.token_html(every, clip.tokens, name="x").html
    )


def test_chips_are_known_from_the_modality_alone(trace):
    margin = trace.routing("vision").margin.sel(layer=1)
    kinds = ["text", *["image"] * 16, "text"]
    shown = plots.token_html(margin.assign_coords(modality=("token", kinds)), name="margin")
    assert ">image: 16 tokens</bdi>" in shown.html and shown.html.count("<bdi") == 3


def test_modality_attention_draws_layers_and_the_even_row():
    trace = VisionTrace(2, 2, layers=(1, 4, 9))
    view = plots.plot_modality_attention(trace)
    axes = view.figure.axes[:5]
    assert [ax.get_title(loc="left") for ax in axes] == [
        "from text before (3)", "from picture (4)", "from delimiters (2)", "from text after (6)",
        "from generated (2)",
    ]  # fmt: skip
    assert texts(axes[0].get_yticklabels()) == ["1", "4", "9", "even"]
    layers, even = (image.get_array() for image in axes[3].images)
    assert layers.shape == (3, 6) and even.shape == (1, 6)
    weights = trace.pattern(4).values.mean(0)
    assert layers[1, 2] == pytest.approx(weights[10:16, 5:9].sum(1).mean())
    assert layers[:, 5].mask.all()  # what they cannot see
    assert "3 heads" in view.caption and "text after:" in view.alt and view.png()
    assert "1 head;" in plots.plot_modality_attention(trace, heads=[2]).caption
    with pytest.raises(ValueError, match=r"heads \[0, 1, 2\] were kept"):
        plots.plot_modality_attention(trace, heads=[3])


def test_bars_beside_their_control_and_the_noise():
    table = pd.DataFrame(
        {
            "condition": ["off", "$x$ 植物", "gone"], "value": [2.0, -0.5, np.nan],
            "low": [1.5, -0.7, np.nan], "high": [2.5, -0.3, np.nan], "control": [0.1, 0.0, 0.2],
        }
    )  # fmt: skip
    view = plots.plot_ablation_bars(
        table, name="loss change", unit="nats", noise=0.25, control_name="no facts", n=40, model="m"
    )
    ax = view.figure.axes[0]
    bars = [bar for group in ax.containers for bar in group]
    assert [bar.get_width() for bar in bars[:2]] == [2.0, -0.5]
    assert [bar.get_width() for bar in bars[3:]] == [0.1, 0.0, 0.2]
    assert [bar.get_y() for bar in bars[:3]] < [bar.get_y() for bar in bars[3:]]
    intervals = [list(line.get_xdata()) for line in ax.lines]
    assert [1.5, 2.5] in intervals and [-0.7, -0.3] in intervals
    assert {-0.25, 0.25} <= {line.get_xdata()[0] for line in ax.lines}
    assert texts(ax.get_yticklabels())[0] == "off" and ax.get_xlabel() == "loss change (nats)"
    assert {"+2", "-0.5", "no value"} <= set(texts(ax.texts))
    assert "n = 40" in view.caption and "noise floor, 0.25 nats" in view.caption
    assert "off 2 (no facts 0.1)" in view.alt and view.png()
    plain = plots.plot_ablation_bars(table[["condition", "value"]], name="x")
    assert plain.figure.axes[0].get_legend() is None
    with pytest.raises(ValueError, match="no column value"):
        plots.plot_ablation_bars(table[["condition"]], name="x")
    with pytest.raises(ValueError, match="both low and high"):
        plots.plot_ablation_bars(table.drop(columns="high"), name="x")
    with pytest.raises(ValueError, match="says which conditions are controls"):
        plots.plot_ablation_bars(table.assign(control=True), name="x")


def test_a_report_of_pictures_has_both_banks(recorded, tmp_path):
    trace = recorded.sel(sequence=[0])
    assert reportable(trace)
    path = routing_report(tmp_path / "r.html", "T", {"Two": Reported("small-vl", trace, "an end")})
    page = path.read_text()
    assert "vision experts on the picture" in page and "an end" in page
    assert "The text bank:" in page and "The vision bank:" in page
    assert "image 0: 2x2 tokens" in page
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(alts) == 11 and all(len(alt) > 40 for alt in alts)
    assert sum("of the text bank" in alt for alt in alts) == 1


def test_a_report_of_text_alone_has_one_bank(recorded, tmp_path):
    trace = recorded.sel(sequence=2)
    path = routing_report(tmp_path / "r.html", "T", {"Text": Reported("small-vl", trace)})
    assert "vision experts" not in path.read_text()


def test_the_real_patterns_sum_to_one_between_the_groups(recorded):
    view = plots.plot_modality_attention(recorded, sequence=0)
    for ax in view.figure.axes[:-1]:
        for image in ax.images:
            assert np.allclose(image.get_array().sum(1), 1, atol=1e-5)
    with pytest.raises(ValueError, match="has no picture"):
        plots.plot_modality_attention(recorded, sequence=2)
    with pytest.raises(ValueError, match=r"sequences \[0, 1, 2\]"):
        plots.plot_modality_attention(recorded)


def test_patches_of_the_tower_see_each_other():
    coords = {"query_row": ("query", [0, 0]), "query_col": ("query", [0, 1])}
    pattern = xr.DataArray([[0.25, 0.75], [0.5, 0.5]], dims=("query", "key"), coords=coords)
    view = plots.plot_attention(pattern, layer=0, head=0)
    assert not np.ma.getmaskarray(view.figure.axes[0].images[0].get_array()).any()
    assert "cannot see" not in view.caption


def test_the_caption_of_several_sequences_says_which(recorded):
    view = plots.plot_modality_attention(recorded, sequence=1)
    assert "Sequence 1 of 3, counted from 0" in view.caption
    assert "Sequence" not in plots.plot_modality_attention(recorded.sel(sequence=1)).caption
