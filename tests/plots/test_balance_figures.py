"""Figures of balance, of the correction bias and of margins: what is drawn, and their words."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from analysis.routings import random_probs, routing
from matplotlib.figure import Figure

from ernie_lab import plots
from ernie_lab.analysis.balance_groups import balance_by
from ernie_lab.analysis.bias import bias_ledger
from ernie_lab.analysis.margins import flips_by_margin, margin_table

N = 80


@pytest.fixture(scope="module")
def one():
    bias = np.random.default_rng(0).normal(0, 0.02, (3, 8))
    return routing(random_probs(3, N), 2, bias, layers=[2, 5, 9], sequence=np.arange(N) // 8)


@pytest.fixture(scope="module")
def ledger(one):
    return bias_ledger(one, n_draws=100)


@pytest.fixture(scope="module")
def large():
    bias = np.random.default_rng(1).normal(0, 0.01, (28, 64))
    return routing(random_probs(28, 48, 64), 6, bias, sequence=np.arange(48) // 8)


@pytest.fixture(scope="module")
def large_ledger(large):
    return bias_ledger(large, n_draws=20)


def texts(labels):
    return [label.get_text() for label in labels]


def balance(one, by=None):
    return balance_by(one, by, n_random=100, n_draws=100)


def test_balance_draws_values_intervals_and_the_band(one):
    table = balance(one)
    view = plots.plot_balance(table, model="m")
    panels = view.figure.axes
    assert len(panels) == 4 and "MaxVio" in panels[0].get_title(loc="left")
    for ax, name in zip(panels, ("max_violation", "cv", "entropy", "least_loaded"), strict=True):
        points, intervals = ax.collections[-1], ax.collections[-2]
        assert points.get_offsets()[:, 1].tolist() == pytest.approx(table[name].tolist())
        drawn = [segment[:, 1].tolist() for segment in intervals.get_segments()]
        ends = table[[f"{name}_low", f"{name}_high"]].to_numpy()
        assert np.allclose(drawn, ends)
        band = ax.collections[0].get_datalim(ax.transData).extents
        assert band[1] == pytest.approx(table[f"{name}_uniform_p05"].min())
        assert texts(ax.get_xticklabels()) == ["2", "5", "9"] and ax.get_xlabel() == "layer"
    assert "N = 80 tokens × 2 of 8" in view.caption and "10 documents" in view.caption
    assert "layers 2 to 9" in view.alt and "less balanced than uniform" in view.alt
    assert len(view.png()) < 150_000


def test_a_point_is_filled_only_outside_its_own_band(one):
    table = balance(one)
    table["max_violation_uniform_p95"] = table["max_violation"] + [0.1, -0.1, 0.1]
    points = plots.plot_balance(table).figure.axes[0].collections[-1]
    whites = [tuple(face) == (1, 1, 1, 1) for face in points.get_facecolors()]
    assert whites == [True, False, True]


def test_groups_have_direct_labels_and_at_most_eight_hues(one):
    names = [f"$x$ {i}" for i in range(8)]
    view = plots.plot_balance(balance(one, np.resize(np.array(names, dtype=object), N)))
    ax = view.figure.axes[0]
    assert {text.get_text() for text in ax.texts} >= set(names)
    heights = sorted(text.get_position()[1] for text in ax.texts if text.get_text() in names)
    assert (np.diff(heights) > 0.08).all() and "group by group" in view.title
    assert view.png() and "Intervals" not in view.caption
    with pytest.raises(ValueError, match="9 groups, at most 8"):
        plots.plot_balance(balance(one, np.arange(N) % 9))


def test_balance_on_an_ax_and_what_it_refuses(one):
    figure = Figure()
    ax = figure.add_subplot()
    drawn = plots.plot_balance(balance(one), statistics=["document_max_violation"], ax=ax)
    assert drawn is ax and "within a document" not in ax.get_title(loc="left")
    figure.canvas.draw()
    with pytest.raises(ValueError, match=r"statistics=\['median'\]; the table has max_violation"):
        plots.plot_balance(balance(one), statistics=["median"])
    with pytest.raises(ValueError, match="expected layer and group"):
        plots.plot_balance(pd.DataFrame({"cv": [1.0]}))


def test_bias_pairs_each_expert_without_and_with(ledger):
    view = plots.plot_correction_bias(ledger, model="m", bank="text")
    assert len([ax for ax in view.figure.axes if ax.collections]) == 3
    for ax, layer in zip(view.figure.axes, (2, 5, 9), strict=False):
        experts, row = ledger.experts.loc[layer], ledger.layers.loc[layer]
        without, load = (c.get_offsets() for c in ax.collections[-2:])
        expected = experts[["bias", "local_load"]].to_numpy()
        assert np.allclose(without, expected) and np.allclose(load[:, 1], experts["load"])
        title = ax.get_title(loc="left")
        assert title.startswith(f"layer {layer}: MaxVio {row['local_max_violation']:.2f} →")
        assert ax.get_xlabel() == "bias, centred (probability)"
    assert "text experts" in view.title and "its rule and no finding" in view.caption
    assert "layer 9: MaxVio" in view.alt and len(view.png()) < 150_000
    chance = ledger.layers["correlation_chance"]
    assert f"95 % below {chance.min():.2f} to {chance.max():.2f} by layer" in view.caption
    single = plots.plot_correction_bias(ledger, layers=[5])
    assert f"95 % below {chance[5]:.2f})" in single.caption, "of the layer that is drawn"
    assert single.figure.axes[0].get_title(loc="left").startswith("layer 5")


def test_the_extreme_biases_are_numbered_before_their_neighbours(ledger):
    experts = ledger.experts.copy()
    n = len(experts.loc[5])
    bias = np.linspace(-0.2, 0.2, n)
    bias[0], bias[1], bias[-2], bias[-1] = -1.0, -0.99, 0.99, 1.0  # too close for two numbers
    experts.loc[5, "bias"] = bias
    close = dataclasses.replace(ledger, experts=experts)
    (ax,) = plots.plot_correction_bias(close, layers=[5]).figure.axes
    names = [str(name) for name in experts.loc[5].index]
    assert {text.get_text() for text in ax.texts} == {names[0], names[-1]}


def test_bias_of_many_layers_is_three_maps_in_the_order_of_the_bias(large_ledger):
    found = large_ledger
    view = plots.plot_correction_bias(found)
    maps = [ax.images[0].get_array() for ax in view.figure.axes[:3]]
    assert [m.shape for m in maps] == [(28, 64)] * 3
    assert (np.diff(maps[0], axis=1) >= 0).all()
    order = np.argsort(found.experts.loc[7, "bias"].to_numpy())
    loads = found.experts.loc[7, "load"].to_numpy()[order]
    assert np.allclose(maps[2][6], np.log2(np.clip(loads, 2.0**-9, None)))
    assert texts(view.figure.axes[0].get_yticklabels()) == [str(n) for n in range(1, 29)]
    assert view.png() and "by rising bias" in view.figure.axes[1].get_xlabel()
    with pytest.raises(ValueError, match=r"28 layers do not fit on one ax: layers=\[n\]"):
        plots.plot_correction_bias(found, ax=Figure().add_subplot())
    with pytest.raises(ValueError, match=r"layers=\[40\] are not in the ledger"):
        plots.plot_correction_bias(found, layers=[40])
    with pytest.raises(ValueError, match="0 layers"):
        plots.plot_correction_bias(found, layers=[])


def test_shift_draws_what_is_gained_and_lost(ledger, large_ledger):
    view = plots.plot_expert_shift(ledger, model="m")
    for ax, layer in zip(view.figure.axes, (2, 5, 9), strict=True):
        gained, lost = ([bar.get_height() for bar in group] for group in ax.containers)
        experts = ledger.experts.loc[layer]
        assert gained == pytest.approx((100 * experts["added"]).tolist())
        assert lost == pytest.approx((-100 * experts["displaced"]).tolist())
        assert ax.get_ylabel() == f"layer {layer}\n% of tokens"
        assert f"{100 * ledger.layers.loc[layer, 'local_slots']:.1f} %\nof slots" in texts(ax.texts)
    assert texts(view.figure.axes[-1].get_xticklabels()) == [str(i) for i in range(8)]
    assert "fair share is 25 %" in view.caption and "most gained by expert" in view.alt
    assert view.png()
    found = large_ledger
    whole = plots.plot_expert_shift(found)
    net = 100 * (found.experts["added"] - found.experts["displaced"]).to_numpy().reshape(28, 64)
    assert np.allclose(whole.figure.axes[0].images[0].get_array(), net) and whole.png()
    ax = Figure().add_subplot()
    assert plots.plot_expert_shift(ledger, ax=ax) is ax and ax.images


def test_margins_show_quantiles_noise_and_the_share_within(one):
    table = margin_table(one, noise=0.004, n_draws=50)
    view = plots.plot_margins(table, model="m")
    (ax,) = view.figure.axes
    assert ax.get_xscale() == "log" and ax.get_ylabel() == "layer"
    lefts = [bar.get_x() for bar in ax.patches]
    assert lefts == pytest.approx(table["p25"].tolist())
    assert [f"{100 * share:.2g} %" for share in table["within_noise"]] == texts(ax.texts)[:3]
    assert texts(ax.get_yticklabels()) == ["2", "5", "9"]
    assert "noise level, 0.004" in view.caption and "within it" in view.alt
    assert view.png() and not any("$" in label for label in texts(ax.get_xticklabels()))
    plain = plots.plot_margins(margin_table(one))
    assert "noise" not in plain.caption
    with pytest.raises(ValueError, match="no column p05"):
        plots.plot_margins(table.drop(columns="p05"))
    with pytest.raises(ValueError, match="0 layers"):
        plots.plot_margins(table.iloc[:0])
    with pytest.raises(ValueError, match="every margin is 0"):
        plots.plot_margins(margin_table(one) * 0)


def test_flips_by_margin_is_a_map(one, large):
    without = routing(one.router_probs.values, 2, layers=[2, 5, 9], sequence=np.arange(N) // 8)
    table = flips_by_margin(one, without, n_draws=50)
    view = plots.plot_margin_flips(table, what="without the bias", model="m")
    ax = view.figure.axes[0]
    assert np.allclose(ax.images[0].get_array(), 100 * table["flips"].unstack("bin"))
    assert view.title.endswith("by margin: without the bias") and "80 tokens" in view.caption
    assert len(ax.texts) == 30 and view.png() and "smallest margins" in view.alt
    whole = flips_by_margin(large, large, n_draws=10)
    assert not plots.plot_margin_flips(whole).figure.axes[0].texts
    with pytest.raises(ValueError, match="no bin"):
        plots.plot_margin_flips(table.assign(flips=np.nan))
