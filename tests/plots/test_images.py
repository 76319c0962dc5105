"""Pictures with experts, values and attention over them: the drawn numbers are the trace's."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from plots.cases import VisionTrace

from ernie_lab import plots
from ernie_lab.plots.panels import HUES


@pytest.fixture(scope="module")
def trace():
    return VisionTrace()


def panels(view):
    """The small axes by their titles."""
    return {ax.get_title(loc="left"): ax for ax in view.figure.axes[0].child_axes}


def starting(view, word):
    return next(ax for title, ax in panels(view).items() if title.startswith(word))


def written(ax):
    """`[row][col]` of the texts in the boxes."""
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in ax.texts}
    return cells


def values(ax):
    """What lies over the pixels."""
    return ax.images[-1].get_array()


def in_boxes(trace, array):
    """`[row, col]` of a bank's array `[token]`, found by hand: one delimiter comes first."""
    return np.asarray(array)[1:17].reshape(4, 4)


VIEWS = {
    "experts": lambda t: plots.plot_image_experts(t),
    "one": lambda t: plots.plot_expert_on_image(t, expert=3),
    "grid": lambda t: plots.plot_expert_on_image(t, layer=1),
    "value": lambda t: plots.plot_image_value(t, t.routing("vision").margin, name="margin"),
    "attention": lambda t: plots.plot_image_attention(t, layer=1, heads="all"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_every_picture_says_what_it_is(trace, name):
    view = VIEWS[name](trace)
    assert isinstance(view, plots.View)
    assert view.png().startswith(b"\x89PNG")
    assert "image 0" in view.title + view.alt and len(view.alt) > 60
    assert "stand-in" in view.caption
    first = view.figure.axes[0].child_axes[-1]
    assert first.get_xlabel() == "column"
    assert view.figure.axes[0].child_axes[0].get_ylabel() == "row"


def test_boxes_have_the_number_and_the_hue_of_their_first_expert(trace):
    view = plots.plot_image_experts(trace, layers=[2, 1])
    chosen = in_boxes(trace, trace.routing("vision").expert_ids.sel(layer=2)[:, 0])
    ax = starting(view, "layer 2")
    assert written(ax) == {(r, c): str(chosen[r, c]) for r in range(4) for c in range(4)}
    assert np.allclose(values(ax), HUES[chosen])
    most = np.bincount(chosen.ravel()).argmax()
    assert ax.get_title(loc="left") == f"layer 2: expert {most} in {(chosen == most).sum()} of 16"
    assert np.array_equal(starting(view, "what").images[0].get_array(), trace.media[0].frames[0])
    assert "12.5%" in view.caption and "not of what the expert does" in view.caption


def test_the_pixels_lie_under_their_boxes(trace):
    ax = starting(plots.plot_image_experts(trace, layer=1), "layer 1")
    assert [tuple(image.get_extent()) for image in ax.images] == [(0, 4, 4, 0)] * 2
    assert ax.get_xlim() == (0, 4) and ax.get_ylim() == (4, 0)


def test_many_experts_are_numbers_on_one_hue_by_weight():
    trace = VisionTrace(n_experts=64, k=6)
    view = plots.plot_image_experts(trace, layer=1, slot=2)
    ledger = trace.routing("vision")
    ax = starting(view, "layer 1")
    weights = in_boxes(trace, ledger.expert_weights.sel(layer=1)[:, 2])
    chosen = in_boxes(trace, ledger.expert_ids.sel(layer=1)[:, 2])
    assert np.allclose(values(ax), weights)
    assert written(ax)[2, 3] == str(chosen[2, 3])
    assert (ax.images[-1].norm.vmin, ax.images[-1].norm.vmax) == (0, 1)
    assert view.title.endswith("went to third") and view.figure.axes[-1].get_ylabel()


def test_one_expert_is_its_weight_and_bare_elsewhere(trace):
    ledger = trace.routing("vision")
    view = plots.plot_expert_on_image(trace, expert=5)
    for layer in (1, 2):
        ids = ledger.expert_ids.sel(layer=layer).values
        weight = (ledger.expert_weights.sel(layer=layer).values * (ids == 5)).sum(-1)
        ax = starting(view, f"layer {layer}")
        assert np.allclose(values(ax), in_boxes(trace, weight))
        n = int((in_boxes(trace, weight) > 0).sum())
        assert ax.get_title(loc="left") == f"layer {layer}: {n} of 16"
        assert ax.images[-1].cmap(0.0)[3] == 0  # bare


def test_all_experts_stand_in_their_order(trace):
    view = plots.plot_expert_on_image(trace, layer=2)
    assert [title.split(":")[0] for title in panels(view)] == [f"expert {e}" for e in range(8)]
    some = plots.plot_expert_on_image(trace, layer=2, experts=[7, 2])
    assert [title.split(":")[0] for title in panels(some)] == ["expert 7", "expert 2"]
    assert np.allclose(values(starting(some, "expert 7")), values(starting(view, "expert 7")))
    with pytest.raises(ValueError, match=r"one layer, not 2: name it with layer="):
        plots.plot_expert_on_image(trace)
    with pytest.raises(ValueError, match="experts 0 to 7"):
        plots.plot_expert_on_image(trace, expert=8)


def test_values_are_found_by_their_coordinates_or_their_number(trace):
    margin = trace.routing("vision").margin
    view = plots.plot_image_value(trace, margin, name="margin")
    for layer in (1, 2):
        expected = in_boxes(trace, margin.sel(layer=layer))
        assert np.allclose(values(starting(view, f"layer {layer}")), expected)
    plain = plots.plot_image_value(trace, np.arange(16.0), name="n", unit="nats")
    assert np.array_equal(values(starting(plain, "n")), np.arange(16.0).reshape(4, 4))
    assert plain.figure.axes[-1].get_ylabel() == "n (nats)"
    assert "highest 15 nats at row 3, column 3" in plain.alt
    whole = plots.plot_image_value(trace, np.arange(float(len(trace.tokens))), name="n")
    assert values(starting(whole, "n"))[0, 0] == trace.first
    with pytest.raises(ValueError, match=r"7 values: .* 30 rows .* 16 tokens of image 0"):
        plots.plot_image_value(trace, np.zeros(7), name="n")


def test_a_centre_makes_the_scale_symmetric_and_gaps_are_crossed(trace):
    effect = np.linspace(-1, 3, 16)
    effect[5] = np.nan
    view = plots.plot_image_value(trace, effect, name="effect", center=0.0)
    ax = starting(view, "effect")
    assert (ax.images[-1].norm.vmin, ax.images[-1].norm.vmax) == (-3, 3)
    below, above = ax.images[-1].cmap(0.1), ax.images[-1].cmap(0.9)
    assert below[2] > below[0] and above[0] > above[2]
    (crosses,) = [c for c in ax.collections if isinstance(c, PathCollection)]
    assert crosses.get_offsets()[0].tolist() == [1.5, 1.5]
    assert "×: no value" in view.caption


def test_attention_of_the_last_token(trace):
    view = plots.plot_image_attention(trace, layer=1)
    weights = trace.pattern(1).values[:, -1].mean(0)
    here = slice(trace.first, trace.first + 16)
    ax = starting(view, "mean of heads")
    assert np.allclose(values(ax), weights[here].reshape(4, 4))
    mass = weights[here].sum()
    assert view.title == f"Layer 1: “.” (position 29) gives {mass:.0%} of its attention to image 0"
    assert f"the first token “<s>” {weights[0]:.0%}" in view.caption
    assert f"would give the picture {16 / 30:.0%}" in view.caption
    row, col = divmod(int(weights[here].argmax()), 4)
    frame = next(line for line in ax.lines if len(line.get_xdata()) == 5)
    assert (min(frame.get_xdata()), min(frame.get_ydata())) == (col, row)
    assert f"row {row}, column {col}" in view.alt


def test_attention_has_a_panel_for_each_head_and_cannot_look_ahead(trace):
    view = plots.plot_image_attention(trace, layer=2, heads=[2, 0], query=trace.first + 5)
    assert [title.split(":")[0] for title in panels(view)] == ["what the model saw", "head 2",
                                                               "head 0"]  # fmt: skip
    drawn = values(starting(view, "head 2"))
    weights = trace.pattern(2).values[2, trace.first + 5]
    assert np.allclose(drawn.compressed(), weights[trace.first : trace.first + 6])
    assert drawn.mask.sum() == 10 and "cannot see" in view.caption
    assert "“img0 r1 c1”" in view.title
    with pytest.raises(ValueError, match="comes before the picture"):
        plots.plot_image_attention(trace, layer=2, query=2)
    with pytest.raises(ValueError, match=r"heads \[0, 1, 2\] were kept"):
        plots.plot_image_attention(trace, layer=2, heads=7)


def test_a_thin_maximum_stays_on_a_large_picture():
    trace = VisionTrace(20, 30, layers=(1,), n_heads=1)
    view = plots.plot_image_attention(trace, layer=1, query="last")
    weights = trace.pattern(1).values[0, -1, trace.first : trace.first + 600].reshape(20, 30)
    assert np.allclose(values(starting(view, "mean")), weights)
    view.png()


def test_a_part_of_a_picture_keeps_its_true_rows_and_columns():
    trace = VisionTrace(6, 8)
    view = plots.plot_image_experts(trace, layer=1, rows=(2, 4), cols=(5, 8))
    whole = written(starting(plots.plot_image_experts(trace, layer=1), "layer 1"))
    part = written(starting(view, "layer 1"))
    assert part == {place: whole[place] for place in part} and len(part) == 6
    assert starting(view, "what").images[0].get_array().shape == (56, 84, 3)
    assert tuple(starting(view, "what").images[0].get_extent()) == (5, 8, 4, 2)
    with pytest.raises(ValueError, match=r"rows=\(2, 9\).*within 0 and 6"):
        plots.plot_image_experts(trace, layer=1, rows=(2, 9))


def test_a_clip_goes_from_left_to_right_in_pairs_of_frames():
    trace = VisionTrace(2, 3, n_frames=6)
    view = plots.plot_clip_experts(trace, layer=2)
    axes = view.figure.axes[0].child_axes
    assert [ax.get_title(loc="left") for ax in axes[:6]] == [
        "frame 0, 0.0 s", "frame 2, 1.0 s", "frame 4, 2.0 s",
        "frame 1, 0.5 s", "frame 3, 1.5 s", "frame 5, 2.5 s",
    ]  # fmt: skip
    frames = trace.media[0].frames
    assert np.array_equal(axes[1].images[0].get_array(), frames[2])
    assert np.array_equal(axes[4].images[0].get_array(), frames[3])
    chosen = trace.routing("vision").expert_ids.sel(layer=2).values[1:19, 0].reshape(3, 2, 3)
    for pair, ax in enumerate(axes[6:]):
        cells = {(r, c): str(chosen[pair, r, c]) for r in range(2) for c in range(3)}
        assert written(ax) == cells
    still = plots.plot_image_experts(trace, layer=2, frame=3)
    assert "clip 0, frames 2 and 3 (1.0 and 1.5 s)" in still.title
    assert written(starting(still, "layer 2"))[0, 0] == str(chosen[1, 0, 0])
    with pytest.raises(ValueError, match=r"frames=\(0, 16\)"):
        plots.plot_clip_experts(VisionTrace(1, 1, n_frames=18), layer=1)
    with pytest.raises(ValueError, match="take plot_image_experts"):
        plots.plot_clip_experts(VisionTrace(), layer=1)


def test_what_cannot_be_read_is_refused():
    trace = VisionTrace(30, 40, layers=range(1, 5))
    with pytest.raises(ValueError, match=r"4 x 1200 numbered boxes.*layers=\[…\].*rows="):
        plots.plot_image_experts(trace)
    with pytest.raises(ValueError, match="do not fit on a page"):
        plots.plot_image_experts(VisionTrace(10, 200, layers=(1,)))
    with pytest.raises(ValueError, match=r"layers=\[9\]: the trace has experts in layers"):
        plots.plot_image_experts(trace, layer=9)
    with pytest.raises(ValueError, match="slots 0 to 1"):
        plots.plot_image_experts(trace, layer=1, slot=2)
    with pytest.raises(ValueError, match="pictures 0 to 0"):
        plots.plot_image_experts(trace, image=1)


def test_a_token_outside_the_trace_is_a_cross(trace):
    part = VisionTrace()
    gone = part.first + 2
    part.tokens = part.tokens[part.tokens["pos"] != gone]
    view = plots.plot_image_experts(part, layer=1)
    assert (0, 2) not in written(starting(view, "layer 1"))
    assert len(written(starting(view, "layer 1"))) == 15 and "×" in view.caption


def test_ax_draws_one_panel_there(trace):
    figure = Figure()
    ax = figure.add_subplot()
    assert plots.plot_image_experts(trace, layer=1, ax=ax) is ax
    assert isinstance(ax, Axes) and len(ax.texts) == 16 and "image 0" in ax.get_title(loc="left")
    figure.canvas.draw()


def test_a_real_trace_has_everything(recorded):
    ledger = recorded.routing("vision")
    view = plots.plot_image_experts(recorded, image=1, layer=2)
    ids = recorded.folded(ledger.expert_ids, image=1).sel(layer=2, frame=0, slot=0)
    expected = {(r, c): str(int(ids.sel(row=r, col=c))) for r in range(2) for c in range(3)}
    assert written(starting(view, "layer 2")) == expected
    assert "small-vl" in view.caption
    clip = plots.plot_clip_experts(recorded, image=2, layer=1)
    assert clip.png()
    attended = plots.plot_image_attention(recorded, layer=1, image=1, query="last")
    pattern = recorded.pattern(1, 0)
    expected = pattern.values[:, -1].mean(0)[9:15].reshape(2, 3)
    assert np.allclose(values(starting(attended, "mean")), expected)
    other = pattern.values[:, -1, 2:6].sum(1).mean()
    assert f"other pictures {other:.0%}" in attended.caption
