"""The figures of modality isolation: what they draw, say, and refuse; small and large."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure
from plots.cases import VisionTrace

from ernie_lab import plots
from ernie_lab.analysis.attention_mass import attention_mass
from ernie_lab.analysis.cka import LayerCKA, layer_cka, paired_cka
from ernie_lab.analysis.isolation import IsolationReport
from ernie_lab.analysis.modality_isolation import ModalityIsolation
from ernie_lab.analysis.residual_geometry import residual_geometry
from ernie_lab.plots.by_layer import look_of

KINDS = ("text", "delimiter", "image")


def texts(labels):
    return [label.get_text() for label in labels]


def shared(layers):
    index = pd.MultiIndex.from_product([layers, KINDS], names=["layer", "content"])
    columns = ["n_tokens", "median", "low", "high", "share", "share_low", "share_high"]
    table = pd.DataFrame(np.ones((len(index), 7)), index=index, columns=columns)
    table["median"] = np.geomspace(0.1, 20, len(index))
    table["low"], table["high"] = table["median"] * 0.8, table["median"] * 1.3
    table["share"] = np.linspace(0.1, 0.9, len(index))
    table["n_tokens"] = np.tile([99, 12, 96], len(layers))
    return table


def routers(layers, n_experts=8):
    size = np.linspace(0.08, 0.12, len(layers))
    return pd.DataFrame(
        {
            "size": size, "size_low": 0.07, "size_high": 0.1, "size_random": 0.09,
            "largest": 3 * size, "largest_low": 0.2, "largest_high": 0.3, "n_experts": n_experts,
        },
        index=pd.Index(layers, name="layer"),
    )  # fmt: skip


def report(layers, leaks=0):
    index = pd.MultiIndex.from_product([layers, ["text", "vision"]], names=["layer", "bank"])
    table = pd.DataFrame(
        {"expected": 10, "used": 10, "leaks": 0, "deviation": 0.0, "other_gate": 0.7}, index=index
    )
    table.loc[(layers[1], "vision"), "leaks"] = leaks
    rows = pd.DataFrame({"layer": [layers[1]] * leaks, "used": "text"})
    return IsolationReport(tuple(layers), 20, rows, table, 0, 2e-3)


def isolation(layers=(1, 2, 5), leaks=0, with_shared=True):
    attention = attention_mass(VisionTrace(2, 2, layers=layers[:2]))
    both = shared(layers) if with_shared else None
    return ModalityIsolation("stand-in", report(layers, leaks), routers(layers), both, attention)


def states(n_layers=3, n_tokens=60, width=6, seed=0):
    rng = np.random.default_rng(seed)
    kinds = np.array([KINDS[i % 3] for i in range(n_tokens)])
    values = rng.normal(size=(n_layers, n_tokens, width)) + 1
    values[:, kinds == "image", 0] += 3
    coords = {
        "layer": [2 * i for i in range(n_layers)], "modality": ("token", kinds),
        "sequence": ("token", np.arange(n_tokens) // 12),
    }  # fmt: skip
    return xr.DataArray(values, dims=("layer", "token", "width"), coords=coords)


def crossing(layers, seed=0):
    rng = np.random.default_rng(seed)
    names = ["cosine", "size", "change", "by_lot_cosine", "by_lot_size", "by_lot_change"]
    table = pd.DataFrame(rng.uniform(0, 1, (len(layers), 6)), columns=names)
    table["shuffled_cosine"], table["n_tokens"] = 0.01, 99
    for name, prefix in (("cosine", ""), ("size", "size_"), ("change", "change_")):
        table[f"{prefix}low"], table[f"{prefix}high"] = table[name] - 0.1, table[name] + 0.1
    return table.set_index(pd.Index(layers, name="layer"))


def test_the_dashboard():
    view = plots.plot_isolation(isolation())
    proof, rows, ratio, attention = view.figure.axes[:4]
    assert "isolated" in view.title and "not isolated" not in view.title
    assert proof.get_title(loc="left") == "Apart: the banks (no leak in 60 choices)"
    drawn = [line for line in proof.lines if line.get_marker() in "os"]
    values = sorted({float(y) for line in drawn for y in line.get_ydata()})
    assert values == [1e-9, 0.7]  # a deviation of 0 is on the floor of the log axis
    assert texts(proof.get_xticklabels()) == ["1", "2", "5"]
    assert proof.get_yscale() == "log" and ratio.get_yscale() == "log"
    size = next(line for line in rows.lines if len(line.get_xdata()) == 3)
    np.testing.assert_allclose(size.get_ydata(), [0.08, 0.1, 0.12])
    assert texts(attention.get_yticklabels())[1] == "picture (4)"
    shown = attention.images[0].get_array()
    assert shown.shape == (5, 6) and shown[0, 2] is np.ma.masked
    np.testing.assert_allclose(shown.filled(0).sum(1), 1, atol=0.01)
    assert "0 leaks in 20 tokens x 3 layers" in view.alt and "stand-in" in view.caption
    assert "picture" in view.alt and view.png()


def test_the_dashboard_of_a_leaky_model():
    view = plots.plot_isolation(isolation(leaks=7))
    proof = view.figure.axes[0]
    assert "not isolated" in view.title and "(7 leaks)" in proof.get_title(loc="left")
    marks = [text for text in proof.texts if text.get_text() == "7"]
    assert len(marks) == 1 and marks[0].xy[0] == 2  # in its layer
    assert "7 leaks" in view.alt


def test_a_model_without_shared_experts():
    view = plots.plot_isolation(isolation(with_shared=False))
    assert "no shared experts" in texts(view.figure.axes[2].texts)[0]
    assert "Shared over routed" not in view.alt


def test_shared_ratio_lines_and_twin():
    table = shared((1, 2, 5))
    view = plots.plot_shared_ratio(table, untrained=2 * table, model="m")
    ax = view.figure.axes[0]
    assert ax.get_yscale() == "log" and texts(ax.get_xticklabels()) == ["1", "2", "5"]
    lines = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert len(lines) == 6
    np.testing.assert_allclose(lines[0].get_ydata(), table.xs("text", level="content")["median"])
    assert texts(ax.get_legend().get_texts()) == [*KINDS, "untrained twin"]
    assert "99 text, 12 delimiter, 96 image" in view.caption and "layers 1 to 5" in view.alt
    share = plots.plot_shared_ratio(table, value="share").figure.axes[0]
    assert share.get_yscale() == "linear" and "share" in share.get_ylabel()
    own = Figure().subplots()
    assert plots.plot_shared_ratio(table, ax=own) is own
    with pytest.raises(ValueError, match='must be "ratio" or "share"'):
        plots.plot_shared_ratio(table, value="norm")
    with pytest.raises(ValueError, match="is of one layer"):
        plots.plot_shared_ratio(table.loc[1])


def test_residual_geometry_panels():
    found, twin = residual_geometry(states()), residual_geometry(states(seed=1))
    view = plots.plot_residual_geometry(found, untrained=twin, model="m")
    norms, cosines, between = view.figure.axes
    assert norms.get_yscale() == "log" and texts(between.get_xticklabels()) == ["0", "2", "4"]
    assert len([x for x in norms.lines if len(x.get_xdata()) == 3]) == 6
    drawn = [line.get_ydata() for line in cosines.lines if len(line.get_xdata()) == 3]
    pair = found.cosines.xs(("text", "image"), level=("first", "second"))
    assert any(np.allclose(line, pair["cosine"]) for line in drawn)
    assert any(np.allclose(line, pair["null_p05"]) for line in drawn)
    assert any(np.allclose(line.get_ydata(), found.between["share"]) for line in between.lines)
    assert "20 text, 20 delimiter, 20 image tokens of 5 documents" in view.caption
    assert "text and image" in view.alt and "Untrained twin" in view.alt and view.png()
    alone = plots.plot_residual_geometry(found)
    assert "compare with a twin" in alone.caption and "Untrained" not in alone.alt
    other = residual_geometry(states(), ["a", "b"] * 30)
    with pytest.raises(ValueError, match=r"the twin has kinds \('a', 'b'\)"):
        plots.plot_residual_geometry(found, untrained=other)
    many = residual_geometry(states(), list("abcdef") * 10)
    with pytest.raises(ValueError, match="15 pairs, at most 6"):
        plots.plot_residual_geometry(many)


def test_counterfactual_by_direction():
    tables = {"text": crossing([1, 2, 5]), "vision": crossing([1, 2, 5], 1)}
    view = plots.plot_counterfactual(tables, untrained={"text": crossing([1, 2, 5], 2)}, model="m")
    axes = view.figure.axes
    assert axes[0].get_title(loc="left") == "text tokens → vision bank"
    assert axes[1].get_title(loc="left") == "vision tokens → text bank"
    lines = [line.get_ydata() for line in axes[0].lines if len(line.get_xdata()) == 3]
    for name in ("cosine", "by_lot_cosine", "shuffled_cosine"):
        assert any(np.allclose(line, tables["text"][name]) for line in lines)
    assert axes[0].get_ylim() == axes[1].get_ylim() and axes[2].get_ylim() == axes[3].get_ylim()
    assert "own bank by lot" in view.alt and "vision tokens through the text bank" in view.alt
    assert view.png()
    assert len(plots.plot_counterfactual({"vision": tables["vision"]}).figure.axes) == 3
    with pytest.raises(ValueError, match="whose tokens cross"):
        plots.plot_counterfactual({"image": tables["text"]})
    with pytest.raises(ValueError, match="whose tokens cross"):
        plots.plot_counterfactual({})


def test_layer_cka_squares():
    found = layer_cka(states(), n_permuted=5)
    view = plots.plot_layer_cka({"text": found, "image": found}, model="m")
    first = view.figure.axes[0]
    np.testing.assert_allclose(first.images[0].get_array(), found.value)
    assert texts(first.get_xticklabels()) == ["0", "2", "4"] and len(first.texts) >= 9
    assert first.get_title(loc="left") == "text" and "60 tokens" in texts(first.texts)[-1]
    assert "neighbouring layers" in view.alt and view.png()
    assert len(plots.plot_layer_cka(found).figure.axes) == 2
    with pytest.raises(ValueError, match="7 panels, 1 to 6"):
        plots.plot_layer_cka({str(i): found for i in range(7)})


def test_paired_cka_beside_shuffled_pairs():
    first = states()
    table = paired_cka(first, first + 0.1 * states(seed=3), n_permuted=20)
    twin = paired_cka(first, states(seed=4), n_permuted=20)
    view = plots.plot_paired_cka(table, untrained=twin, pairs="glyphs and words", model="m")
    ax = view.figure.axes[0]
    lines = [line.get_ydata() for line in ax.lines if len(line.get_xdata()) == 3]
    for values in (table["cka"], table["null_p95"], twin["cka"]):
        assert any(np.allclose(line, values) for line in lines)
    assert "N = 60 glyphs and words" in view.caption and "highest in layer" in view.alt
    own = Figure().subplots()
    assert plots.plot_paired_cka(table, ax=own) is own


def test_kinds_have_one_look():
    assert look_of("image", KINDS) == look_of("vision", ["vision"])
    assert look_of("a", ["text", "a", "b"]) != look_of("b", ["text", "a", "b"])
    with pytest.raises(ValueError, match="6 kinds besides"):
        look_of("a", list("abcdef"))


def test_at_released_size():
    """28 layers (27 mixture layers) x 64 experts: numbers thinned, nothing refused."""
    layers = list(range(1, 28))
    many = isolation(tuple(layers))
    views = [
        plots.plot_isolation(many),
        plots.plot_shared_ratio(shared(layers), untrained=shared(layers)),
        plots.plot_counterfactual({"text": crossing(layers), "vision": crossing(layers)}),
        plots.plot_residual_geometry(residual_geometry(states(28), n_draws=20, n_permuted=5)),
        plots.plot_layer_cka(_cka(28)),
    ]
    for view in views:
        view.figure.canvas.draw()
        ticks = [t for ax in view.figure.axes[:2] for t in texts(ax.get_xticklabels())]
        assert len(ticks) <= 2 * 16
    with pytest.raises(ValueError, match="200 layers, 1 to 128"):
        plots.plot_shared_ratio(shared(range(200)))


def _cka(n):
    value = xr.DataArray(
        np.exp(-np.abs(np.subtract.outer(np.arange(n), np.arange(n))) / 9),
        dims=("layer", "other"), coords={"layer": range(n), "other": range(n)},
    )  # fmt: skip
    return LayerCKA(value, value, value, 0.05, 256, 20)


def test_the_legend_of_the_routers_is_below_its_panel():
    view = plots.plot_isolation(isolation())
    view.png(dpi=50)
    ax = view.figure.axes[1]
    assert ax.get_legend().get_window_extent().y1 < ax.get_window_extent().y0
