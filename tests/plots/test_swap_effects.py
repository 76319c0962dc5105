"""The heat map over pairs of layers: what stands where, and what is refused."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ernie_lab import plots


def table(layers=(1, 3, 4)):
    """value = 10 i + j, so that a cell tells where it belongs."""
    rows = [(i, j, 10 * i + j) for i in layers for j in layers]
    found = pd.DataFrame(rows, columns=["i", "j", "value"]).astype({"value": float})
    return found.assign(low=found.value - 1, high=found.value + 1)


def image(view):
    (drawn,) = view.figure.axes[0].images
    return np.ma.filled(drawn.get_array(), np.nan)


def test_each_row_lies_at_its_layers():
    view = plots.plot_swap_effects(
        table(), name="loss change", unit="nats", above="both off", diagonal="one off", model="m"
    )
    assert image(view).tolist() == [[11, 13, 14], [31, 33, 34], [41, 43, 44]]
    ax = view.figure.axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "3", "4"]
    words = [text.get_text() for text in ax.texts]
    assert "+31" in words and "+30 … +32" in words
    assert "Below the diagonal: swapped; above it: both off; on it: one off." in view.caption
    assert "Largest at i = 4, j = 4: 44" in view.alt and "below the diagonal (swapped)" in view.alt
    assert view.png().startswith(b"\x89PNG")


def test_a_triangle_leaves_the_other_empty_and_unnamed():
    half = table().query("i > j")
    view = plots.plot_swap_effects(half, name="loss change", above="both off")
    assert np.isnan(image(view)[np.triu_indices(3)]).all()
    assert "both off" not in view.caption


def test_what_cannot_be_told_from_nothing_is_grey():
    rows = [(2, 1, 0.001, 0.0005, 0.002), (3, 1, 1.0, -1.0, 3.0), (3, 2, -1.0, -2.0, -0.5)]
    few = pd.DataFrame(rows, columns=["i", "j", "value", "low", "high"])
    view = plots.plot_swap_effects(few, name="loss change", noise=0.01)
    weight = {t.get_text(): t.get_fontweight() for t in view.figure.axes[0].texts}
    assert weight["+0.001"] == weight["+1"] == "normal" and weight["-1"] == "bold"
    assert "Noise floor 0.01" in view.caption


def test_many_layers_have_colours_alone():
    view = plots.plot_swap_effects(table(range(28)), name="loss change")
    assert not view.figure.axes[0].texts
    assert len(view.png()) < 150_000


def test_all_zero_and_one_layer_can_be_drawn():
    nothing = pd.DataFrame({"i": [1], "j": [1], "value": [0.0]})
    assert plots.plot_swap_effects(nothing, name="loss change").png()


def test_the_callers_axes():
    ax = Figure().add_subplot()
    assert plots.plot_swap_effects(table(), name="loss change", ax=ax, title="t") is ax
    assert ax.get_title(loc="left") == "t"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (table().drop(columns="j"), "no column j"),
        (table().drop(columns="low"), "both low and high"),
        (pd.concat([table(), table()]), "same i and j"),
        (table().iloc[:0], "0 layers"),
        (table().assign(value=np.nan), "no value"),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(ValueError, match=words):
        plots.plot_swap_effects(wrong, name="loss change")
