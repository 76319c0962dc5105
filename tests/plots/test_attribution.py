"""Bars of an attribution: the largest apart, the others together, and a sum that is theirs."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ernie_lab import plots
from ernie_lab.analysis import Attribution


def attribution(banks=1, n_rows=3, seed=0):
    """Embedding, two heads, a slot and a shared block of layer 1, and a dense MLP."""
    values = np.random.default_rng(seed).normal(size=(n_rows, 6))
    kinds = ["embed", "head", "head", "mlp", "slot", "shared"]
    components = pd.DataFrame(
        {
            "component": ["embed", "head 0.0", "head 0.1", "mlp 0", "slot 1.0", "shared 1"],
            "kind": kinds,
            "layer": pd.array([None, 0, 0, 0, 1, 1], dtype="Int64"),
            "index": pd.array([None, 0, 1, None, 0, None], dtype="Int64"),
        }
    )
    experts, bank = np.full((n_rows, 6), -1), np.full((n_rows, 6), -1)
    experts[:, 4], bank[:, 4] = 5 + np.arange(n_rows), np.arange(n_rows) % banks
    targets = pd.DataFrame(
        {
            "sequence": 0, "pos": range(n_rows), "id": 7, "text": ["$x$", "\n", "植物"][:n_rows],
            "layer": 2, "bank": "text", "slot": 0, "expert": 3, "against": 9,
            "value": values.sum(1),
        }
    )  # fmt: skip
    return Attribution("Router logits", targets, components, values, experts, bank)


def bars(view):
    (ax,) = view.figure.axes
    return [t.get_text() for t in ax.get_yticklabels()], [p.get_width() for p in ax.patches]


def test_one_number_shows_the_largest_the_others_and_their_sum():
    found = attribution()
    view = plots.plot_attribution(found, 1, n=4)
    names, widths = bars(view)
    order = np.argsort(-np.abs(found.values[1]))
    assert np.allclose(widths[:4], found.values[1][order[:4]])
    assert np.isclose(widths[4], found.values[1][order[4:]].sum())
    assert np.isclose(widths[5], found.values[1].sum())
    assert names[4:] == ["the other 2", "sum"]
    assert view.title == "Why expert 3 rather than 9 in layer 2: token “⏎” (position 1)"
    assert f"{found.values[1].sum():+.6f}" in view.caption and "Residual error" in view.caption
    assert view.png().startswith(b"\x89PNG") and len(view.alt) > 40


def test_every_component_has_a_name_and_slots_name_their_expert():
    names, _ = bars(plots.plot_attribution(attribution(), 2, n=12))
    assert set(names) == {
        "embedding", "layer 0, attention head 0", "layer 0, attention head 1",
        "layer 0, dense MLP", "layer 1, expert 7", "layer 1, shared experts", "sum",
    }  # fmt: skip
    names, _ = bars(plots.plot_attribution(attribution(banks=2), 1, n=12))
    assert "layer 1, vision expert 6" in names


def test_the_mean_has_slots_without_experts_and_the_spread_over_tokens():
    found = attribution()
    view = plots.plot_attribution(found, n=2, model="m")
    names, widths = bars(view)
    assert np.isclose(widths[-1], found.targets["value"].mean())
    assert np.isclose(sum(widths[:-1]), widths[-1])
    assert "mean of 3 numbers" in view.title and "percentile" in view.caption
    assert "layer 1, expert in slot 0" in bars(plots.plot_attribution(found))[0]
    (ax,) = view.figure.axes
    spread = [line for line in ax.lines if line.get_linewidth() == 1.0]
    others = np.argsort(-np.abs(found.values.mean(0)))[2:]
    low, high = np.percentile(found.values[:, others].sum(1), [5, 95])
    assert len(spread) == len(names) - 1
    assert np.allclose(spread[-1].get_xdata(), [low, high])


def test_a_sum_that_does_not_close_says_so():
    found = attribution()
    found.targets.loc[0, "value"] += 1
    view = plots.plot_attribution(found, 0)
    assert f"{found.residual_error:.1e}" in view.caption
    assert f"{found.targets['value'][0]:+.6f}" in view.caption


def test_draws_on_given_axes_and_refuses_what_it_cannot_draw():
    ax = Figure().add_subplot()
    assert plots.plot_attribution(attribution(), 0, ax=ax, title="t") is ax
    assert ax.get_title(loc="left") == "t"
    with pytest.raises(ValueError, match=r"row=3: .* 3 numbers"):
        plots.plot_attribution(attribution(), 3)
    with pytest.raises(ValueError, match="n=0"):
        plots.plot_attribution(attribution(), 0, n=0)


def test_direct_logits_are_named_by_token():
    found = attribution()
    targets = found.targets.drop(columns=["expert", "bank", "slot"]).assign(token=11)
    direct = Attribution(
        "Direct logit attribution", targets, found.components, found.values,
        found.experts, found.banks,
    )  # fmt: skip
    title = plots.plot_attribution(direct, 0).title
    assert title.startswith("Direct logit attribution: token id 11 against token id 9 after")
