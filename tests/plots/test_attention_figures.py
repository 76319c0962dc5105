"""Attention in figures: statistics of heads, and maps of thousands of tokens."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure
from PIL import Image

from ernie_lab import plots

NAMES = ("entropy", "sink", "induction")


def statistics(n_layers=2, n_heads=3, seed=0, n_repeats=40):
    rng = np.random.default_rng(seed)
    value = rng.uniform(0.3, 0.9, (3, n_layers, n_heads))
    by_layer = np.ones((3, n_layers))
    n = np.array([90, 90, n_repeats])[:, None] * np.ones((1, n_layers), int)
    heads, layers = ("statistic", "layer", "head"), ("statistic", "layer")
    return xr.Dataset(
        {
            "value": (heads, value), "low": (heads, value - 0.05), "high": (heads, value + 0.05),
            "even": (layers, by_layer * [[2.0], [0.1], [0.02]]), "n": (layers, n.astype(int)),
        },
        coords={
            "statistic": list(NAMES), "layer": [3 * i + 1 for i in range(n_layers)],
            "head": [2 * i for i in range(n_heads)],
            "unit": ("statistic", ["nats", "share", "share"]),
        },
        attrs={"n_documents": 7},
    )  # fmt: skip


def texts(labels):
    return [label.get_text() for label in labels]


def panels(view):
    return [ax for ax in view.figure.axes if ax.images]


def test_one_panel_for_each_statistic_with_true_numbers():
    found = statistics()
    view = plots.plot_attention_statistics(found, model="m")
    drawn = panels(view)
    assert [ax.get_title(loc="left").split(":")[0] for ax in drawn] == ["sink", "induction",
                                                                       "entropy"]  # fmt: skip
    for ax, name in zip(drawn, ("sink", "induction", "entropy"), strict=True):
        shown = np.asarray(ax.images[0].get_array())
        np.testing.assert_allclose(shown, found["value"].sel(statistic=name))
        assert texts(ax.get_xticklabels()) == ["0", "2", "4"]
        assert texts(ax.get_yticklabels()) == ["1", "4"]
        written = {text.get_text() for text in ax.texts}
        assert f"{float(found['value'].sel(statistic=name)[0, 0]):.2f}" in written
    assert view.png().startswith(b"\x89PNG")
    assert "m, mean over 90 queries (induction 40) of 7 documents" in view.caption
    assert "looking evenly (sink 0.1, induction 0.02, entropy 2)" in view.caption
    layer, head = divmod(int(found["value"].sel(statistic="sink").values.argmax()), 3)
    assert f"most in layer {3 * layer + 1} head {2 * head} (evenly 0.10)" in view.alt


def test_the_twin_is_a_band_and_what_lies_outside_has_a_dot():
    found, twin = statistics(), statistics(seed=1)
    value = found["value"].copy()
    value[1] = [[0.5, 0.5, 0.99], [0.5, 0.01, 0.5]]
    found = found.assign(value=value, low=value - 0.02, high=value + 0.02)
    twin = twin.assign(value=twin["value"] * 0 + np.linspace(0.4, 0.6, 3))
    view = plots.plot_attention_statistics(found, "sink", untrained=twin)
    (ax,) = panels(view)
    places = sorted((round(line.get_ydata()[0]), round(line.get_xdata()[0])) for line in ax.lines)
    assert places == [(0, 2), (1, 1)]
    assert "untrained twin 0.40 to 0.60" in view.alt and "Orange" in view.caption
    assert "Orange" not in plots.plot_attention_statistics(found, "sink").caption


def test_heads_that_were_not_kept_are_grey_and_named_so():
    found = statistics()
    value = found["value"].copy()
    value[:, 0, 1] = np.nan
    view = plots.plot_attention_statistics(found.assign(value=value))
    assert "Grey: not kept." in view.caption
    assert all(ax.images[0].get_array().mask.sum() == 1 for ax in panels(view))
    assert "not kept" not in plots.plot_attention_statistics(found).caption


def test_large_models_are_legible_and_small():
    view = plots.plot_attention_statistics(statistics(28, 20))
    drawn = panels(view)
    assert not any(ax.texts for ax in drawn), "560 numbers would be dust"
    assert len(drawn[0].get_yticklabels()) == 14
    assert len(view.png()) < 200_000


def test_given_axes_take_one_statistic():
    figure = Figure()
    ax = figure.subplots()
    assert plots.plot_attention_statistics(statistics(), "sink", ax=ax, title="t") is ax
    assert ax.get_title(loc="left") == "t"
    with pytest.raises(ValueError, match="3 statistics do not fit on one ax"):
        plots.plot_attention_statistics(statistics(), ax=ax)


def test_refusals():
    found = statistics(n_repeats=0)
    assert len(panels(plots.plot_attention_statistics(found))) == 2
    with pytest.raises(ValueError, match="for want of repeats"):
        plots.plot_attention_statistics(found, "induction")
    with pytest.raises(ValueError, match="there are entropy, sink, induction"):
        plots.plot_attention_statistics(found, "sinks")
    with pytest.raises(ValueError, match=r"sel\(head="):
        plots.plot_attention_statistics(statistics(1, 200))
    grouped = found.expand_dims(group=["text", "image"])
    with pytest.raises(ValueError, match=r"found\.sel\(group=…\): 'text', 'image'"):
        plots.plot_attention_statistics(grouped)


def causal(n, hot):
    """All weight on the token itself, but for one query that looks at one key alone."""
    pattern = np.eye(n, dtype=np.float32)
    pattern[hot[0]] = 0
    pattern[hot] = 1
    return pattern


def test_a_thin_line_survives_two_thousand_tokens(tmp_path):
    """A head that looks 64 back: a line one cell wide, of which every piece must be seen."""
    n = 2000
    pattern = np.zeros((n, n), np.float32)
    pattern[np.arange(n), np.maximum(np.arange(n) - 640, 0)] = 1
    view = plots.plot_attention(pattern, layer=11, head=7)
    shown = view.figure.axes[0].images[0].get_array()
    assert max(shown.shape) <= 512
    line = [shown[i, i - 160] for i in range(200, len(shown))]
    assert np.min(line) == 1
    assert "One cell is the maximum of 4 queries x 4 keys" in view.caption
    with Image.open(view.save(tmp_path / "line.png", dpi=100)) as picture:
        assert picture.width < 1500


def test_one_hot_cell_in_a_grid_of_heads_survives():
    n = 1200
    maps = np.stack([causal(n, (900, 17)), np.eye(n, dtype=np.float32)])
    view = plots.plot_attention_heads(maps, layer=3, heads=[5, 19])
    first, second = (ax.images[0].get_array() for ax in view.figure.axes[0].child_axes)
    factor = -(-n // len(first))
    assert first[900 // factor, 17 // factor] == 1 and second[900 // factor, 17 // factor] == 0
    assert f"the maximum of {factor} queries x {factor} keys" in view.caption


def test_more_than_forty_million_cells_are_refused_by_the_argument_to_narrow():
    huge = np.broadcast_to(np.float32(0), (7000, 7000))
    with pytest.raises(ValueError, match=r"49 million cells, at most 40.*queries=\[…\]"):
        plots.plot_attention(huge, layer=0, head=0)
    many = np.broadcast_to(np.float32(0), (20, 2000, 2000))
    with pytest.raises(ValueError, match="80 million cells, at most 40: pass fewer heads"):
        plots.plot_attention_heads(many, layer=0)
