"""Co-activation, similarities, paths and contexts: what is drawn is what was measured."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from plots.cases import HARD_TOKENS
from support.routings import by_lot, routing

from ernie_lab import plots
from ernie_lab.analysis import coactivation, context_overlap, find, path_steps
from ernie_lab.plots.similarity import leaf_order


def texts(labels):
    return [label.get_text() for label in labels]


@pytest.fixture(scope="module")
def made():
    """Experts 1 and 4 go together."""
    lot = by_lot(2, 240, 6, 2)
    ids = lot.expert_ids.values.copy()
    ids[1, ::3] = [1, 4]
    return routing(ids, layers=[2, 7], sequence=lot.expert_ids.sequence.values,
                   id=np.arange(240) % 11)  # fmt: skip


def test_coactivation_draws_lifts_under_true_numbers(made):
    together = coactivation(made)
    view = plots.plot_coactivation(together, layer=7, model="toy")
    ax = view.figure.axes[0]
    order = [int(text) for text in texts(ax.get_yticklabels())]
    assert sorted(order) == list(range(6)) and order == [
        int(t) for t in texts(ax.get_xticklabels())
    ]
    assert abs(order.index(1) - order.index(4)) == 1
    values = together.sel(layer=7).values[np.ix_(order, order)]
    drawn = ax.images[0].get_array()
    assert np.allclose(drawn.filled(np.nan), np.log2(values), equal_nan=True)
    limits = ax.images[0].norm
    assert limits.vmin == -limits.vmax
    row, col = order.index(1), order.index(4)
    assert f"{values[row, col]:.1f}" in texts(ax.texts)
    assert view.title == "Which experts go together in layer 7"
    assert "toy, N = 240 tokens × 2 of 6" in view.caption and "chance alone leaves" in view.caption
    assert "Most: experts" in view.alt and f"{np.nanmax(values):.2f}; least" in view.alt
    assert view.png()


def test_shares_are_drawn_as_amounts_and_by_number(made):
    view = plots.plot_coactivation(
        coactivation(made, "share"), layer=2, order="number", bank="text"
    )
    ax = view.figure.axes[0]
    assert texts(ax.get_yticklabels()) == [str(i) for i in range(6)]
    assert ax.images[0].norm.vmin == 0 and ax.get_xlabel() == "also went to expert"
    assert "Balanced experts by chance: 0.20" in view.caption  # (k - 1) / (E - 1)
    assert view.title == "Which text experts go together in layer 2"


def test_sixty_four_experts_keep_their_numbers():
    view = plots.plot_coactivation(coactivation(by_lot(1, 500, 64, 6)))
    assert len(texts(view.figure.axes[0].get_yticklabels())) == 64
    assert not view.figure.axes[0].texts  # no room for numbers in cells
    big = xr.DataArray(np.eye(200), dims=("expert", "other"))
    with pytest.raises(ValueError, match="at most 160"):
        plots.plot_similarity(big, name="cosine")


def test_coactivation_errors(made):
    together = coactivation(made)
    with pytest.raises(ValueError, match="one of 2, 7 is drawn at a time"):
        plots.plot_coactivation(together)
    with pytest.raises(ValueError, match="plot_similarity"):
        plots.plot_coactivation(np.eye(4))
    with pytest.raises(ValueError, match="order='size'"):
        plots.plot_coactivation(together, layer=2, order="size")


def test_alike_stand_together():
    near = np.array([[1, 0, 0.9, 0], [0, 1, 0, 0.8], [0.9, 0, 1, 0], [0, 0.8, 0, 1.0]])
    order = leaf_order(near)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}


def test_similarity_shows_chance_and_is_never_narrower():
    small = np.array([[1.0, 0.01], [0.01, 1.0]])
    cosines = xr.DataArray(
        small, dims=("expert", "other"), coords={"expert": [3, 9], "other": [3, 9], "layer": 5},
        attrs={"chance": 0.0, "chance_spread": 0.1, "chance_name": "two random rows"},
    )  # fmt: skip
    view = plots.plot_similarity(cosines, name="cosine of router rows", model="toy")
    ax = view.figure.axes[0]
    assert ax.images[0].norm.vmax == pytest.approx(0.3)
    assert texts(ax.get_xticklabels()) == ["3", "9"]
    assert texts(ax.texts) == [".01", ".01"]  # not an expert with itself
    bar = view.figure.axes[1]
    lines = sorted(float(np.mean(line.get_ydata())) for line in bar.lines)
    assert [lines[0], lines[-1]] == pytest.approx([-0.1, 0.1])
    assert view.title == "Cosine of router rows in layer 5"
    assert "toy, layer 5: 1 pairs" in view.caption and "±0.100, two random rows" in view.caption
    assert "expert 3, expert 9, 0.010" in view.alt


def test_two_sets_of_experts_have_no_diagonal():
    values = np.array([[0.5, -0.2], [0.1, -0.4]])
    view = plots.plot_similarity(
        xr.DataArray(values, dims=("text_expert", "vision_expert")), name="cosine"
    )
    ax = view.figure.axes[0]
    assert ax.get_ylabel() == "text expert" and ax.get_xlabel() == "vision expert"
    assert len(ax.texts) == 4 and not ax.patches
    assert view.title == "Cosine: text experts against vision experts"
    with pytest.raises(ValueError, match="same experts"):
        plots.plot_similarity(
            values, name="cosine", rows="text expert", columns="vision expert", order="alike"
        )
    with pytest.raises(ValueError, match="no cell of the matrix is a number"):
        plots.plot_similarity(np.full((2, 2), np.nan), name="cosine")


def ribbons(ax):
    return [c for c in ax.collections if isinstance(c, PolyCollection)]


def test_paths_draw_what_is_wide_enough_and_say_what_is_hidden(made):
    steps = path_steps(made)
    view = plots.plot_expert_paths(steps, least=0.05, model="toy")
    ax = view.figure.axes[0]
    flow, first, second = ribbons(ax)
    shares = steps.values[0] / 240
    n_wide = int((shares >= 0.05).sum())
    assert len(flow.get_paths()) == n_wide
    assert texts(ax.get_xticklabels()) == ["2", "7"] and ax.get_xlabel() == "layer"
    heights = [np.ptp(path.vertices[:, 1]) for path in first.get_paths()]
    assert np.allclose(heights, shares.sum(1) * 0.86)
    assert len(second.get_paths()) == 6 and "4" in texts(ax.texts)
    assert f"Drawn: {n_wide} of {(shares > 0).sum()} ribbons" in view.caption
    assert f"{shares[shares >= 0.05].sum():.0%} of all steps" in view.caption
    i, j = np.unravel_index(shares.argmax(), shares.shape)
    assert f"layer 2 expert {i} to layer 7 expert {j}" in view.alt and view.png()


def test_a_ribbon_is_as_wide_where_it_is_steep():
    here, then = np.arange(8), (np.arange(8) * 3) % 8
    ids = np.stack([np.stack([here, then], -1), np.stack([then, here], -1)])
    view = plots.plot_expert_paths(path_steps(routing(ids)))
    ax = view.figure.axes[0]
    for path in ribbons(ax)[0].get_paths():
        outline = path.vertices
        half = len(outline) // 2
        across = outline[:half] - outline[half : 2 * half][::-1]
        inches = across * [1.7, 3.4]  # a column's width, the figure's height
        assert np.allclose(np.hypot(*inches.T), 0.86 / 8 * 3.4, rtol=1e-6)


def test_many_layers_go_on_in_a_second_row():
    lot = by_lot(14, 200, 64, 2)
    view = plots.plot_expert_paths(path_steps(lot))
    panels = [ax for ax in view.figure.axes if ax.get_xlabel() == "layer"]
    assert len(panels) == 2
    assert texts(panels[0].get_xticklabels())[-1] == texts(panels[1].get_xticklabels())[0] == "8"
    assert texts(panels[1].get_xticklabels())[-1] == "14"
    narrow = plots.plot_expert_paths(path_steps(lot), layers=[3, 4])
    assert texts(narrow.figure.axes[0].get_xticklabels()) == ["3", "4", "5"]


def test_path_errors(made):
    steps = path_steps(by_lot(4, 50, 4, 2))
    with pytest.raises(ValueError, match=r"least=1: the widest ribbon has"):
        plots.plot_expert_paths(steps, least=1)
    with pytest.raises(ValueError, match="no step begins in layer 4"):
        plots.plot_expert_paths(steps, layers=[4])
    with pytest.raises(ValueError, match="do not follow"):
        plots.plot_expert_paths(steps, layers=[1, 3])
    with pytest.raises(TypeError, match="path_steps"):
        plots.plot_expert_paths(coactivation(made))


def test_contexts_draw_kinds_with_intervals_at_true_layers(made):
    table = context_overlap(made, n_draws=50)
    view = plots.plot_contexts(table, model="toy", bank="vision", label="glyph")
    ax = view.figure.axes[0]
    kinds = list(dict.fromkeys(table.kind))
    assert len(ax.lines) == len(kinds) == len(ax.collections)
    line = ax.lines[kinds.index("token")]
    mine = table[table.kind == "token"]
    assert line.get_xdata().tolist() == [2, 7] and np.allclose(line.get_ydata(), mine.jaccard)
    assert "same glyph, other text" in texts(ax.texts)
    assert texts(ax.get_xticklabels()) == ["2", "7"] and ax.get_ylim()[0] == 0
    assert view.title == "Do vision experts read the glyph or its context?"
    assert "toy, vision bank" in view.caption and f"token {mine.n_pairs.iloc[0]:,}" in view.caption
    assert f"same glyph, other text {mine.jaccard.iloc[0]:.2f} to" in view.alt and view.png()
    heights = sorted(text.xy[1] for text in ax.texts)
    assert min(np.diff(heights)) > 0.05  # words do not overlap
    few = table.assign(n_pairs=table.n_pairs.where(table.kind != "document", 3))
    view = plots.plot_contexts(few)
    assert len(view.figure.axes[0].lines) == len(kinds) - 1
    assert "Not drawn, fewer than 20 pairs: document (3)." in view.caption
    with pytest.raises(ValueError, match="no kind has 20 pairs"):
        plots.plot_contexts(table.assign(n_pairs=1))
    with pytest.raises(ValueError, match="no column jaccard"):
        plots.plot_contexts(table.drop(columns="jaccard"))
    with pytest.raises(ValueError, match="kind 'else'"):
        plots.plot_contexts(pd.DataFrame([{"layer": 1, "kind": "else", "jaccard": 0, "low": 0,
                                           "high": 0}]))  # fmt: skip


def test_on_the_callers_axes(made):
    for draw in (
        lambda ax: plots.plot_coactivation(coactivation(made), layer=2, ax=ax, title="$x$"),
        lambda ax: plots.plot_similarity(np.eye(3), name="cosine", ax=ax, title="$x$"),
        lambda ax: plots.plot_expert_paths(path_steps(made), ax=ax, title="$x$"),
        lambda ax: plots.plot_contexts(context_overlap(made, n_draws=5), ax=ax, title="$x$"),
    ):
        ax = Figure().subplots()
        assert draw(ax) is ax and ax.get_title(loc="left") == "$x$"


def test_a_search_is_shown_escaped_with_its_hits_marked():
    n = len(HARD_TOKENS)
    # As in the coordinates of a trace: lone surrogates written out.
    hard = [text.encode("utf-8", "backslashreplace").decode() for text in HARD_TOKENS]
    made = routing([[[0, 1]] * n], text=hard, weights=[[[0.7, 0.3]] * n], sequence=[0] * n)
    found = find(made, layer=1, expert=0)
    shown = plots.context_html(found, n=5, model="<toy>")
    assert (
        "<script" not in shown.html
        and "&lt;script&gt;" in shown.html
        and "&lt;toy&gt;" in shown.html
    )
    assert shown.html.count("outline:2px") == 5 and shown.html.count("<tr") == 6
    assert "\u202e" not in shown.html and "weight 0.700" in shown.html
    assert "5 of 20 lines are shown" in shown.html and "dotted" not in shown.html
    assert "Layer 1, expert 0: 20 contexts" in repr(shown)
    with pytest.raises(ValueError, match="n=0"):
        plots.context_html(found, n=0)


def test_a_search_in_pictures_names_their_tokens(recorded):
    ledger = recorded.routing("vision")
    layer = int(ledger.expert_ids.layer[0])
    expert = int(ledger.expert_ids.sel(layer=layer).values[1, 0])
    shown = plots.context_html(find(ledger, layer=layer, expert=expert))
    assert "img0 r0 c0" in shown.html and "PLACEHOLDER" not in shown.html.split("</b>")[1]
    assert "not read by this bank" in shown.html and "image 0 ×" in shown.html
