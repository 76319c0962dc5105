"""Figures of effects: what is drawn, what is hollow, what is said, and what is refused."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from ernie_lab import plots
from ernie_lab.experiments.effects import Effects
from ernie_lab.interventions.comparison import Comparison
from ernie_lab.trace.provenance import Provenance

EMPTY = pd.DataFrame()


def conditions(rows):
    """value, low, high, floor, control, n_changed of each name, for loss_change."""
    columns = ["loss_change", "low", "high", "floor", "control", "n_changed"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    table = table.rename(columns={end: f"loss_change_{end}" for end in ("low", "high", "floor")})
    return table.assign(n_tokens=480, n_documents=12, loss_base=1.25, n_fired=3)


def comparison(rows, routing=EMPTY):
    return Comparison(
        tokens=EMPTY, sequences=EMPTY, conditions=conditions(rows), routing=routing, edits=EMPTY,
        figures=EMPTY, noise=pd.DataFrame(index=range(8)),
        provenance=Provenance(model="m", config_hash="", dtype="float32", device="cpu"),
        settings={},
    )  # fmt: skip


FOUND = comparison(
    {
        "clear": (0.5, 0.3, 0.7, 0.1, False, 3),
        "holds 0": (0.5, -0.1, 1.1, 0.1, False, 3),
        "control": (0.01, -0.02, 0.04, 0.1, True, 3),
        "in the noise": (-0.05, -0.06, -0.04, 0.1, False, 3),
        "idle": (0.0, 0.0, 0.0, 0.1, False, 0),
    }
)


def dots(view):
    """By row name: where the dot is and whether it is filled."""
    ax = view.figure.axes[0]
    names = dict(
        zip(ax.get_yticks(), (label.get_text() for label in ax.get_yticklabels()), strict=True)
    )
    found = {}
    for line in ax.lines:
        if line.get_marker() in ("o", "s"):
            (x,), (y,) = line.get_xdata(), line.get_ydata()
            found[names[y]] = (float(x), line.get_markerfacecolor() != "white")
    return found


def test_an_effect_is_filled_where_interval_and_floor_both_say_so():
    assert dots(plots.plot_effects(FOUND)) == {
        "clear": (0.5, True),
        "holds 0": (0.5, False),
        "in the noise": (-0.05, False),
        "idle": (0.0, False),
        "control": (0.01, False),
    }


def test_a_star_of_the_table_is_a_filled_dot_of_the_figure():
    starred = [line for line in repr(FOUND).splitlines()[2:-1] if "*" in line]
    assert [line.split("  ")[0] for line in starred] == ["clear"]
    assert "no effect is outside the interval" in repr(FOUND)


def test_words_of_the_figure():
    view = plots.plot_effects(FOUND)
    ax = view.figure.axes[0]
    words = [text.get_text() for text in ax.texts]
    assert "+0.5 [0.3, 0.7]" in words and "+0 [0, 0] changed nothing" in words
    assert "controls" in words
    assert "worse than intact →" in ax.get_xlabel() and "nats per token" in ax.get_xlabel()
    assert "n = 480 predicted tokens of 12 documents" in view.caption
    assert "Noise floor 0.1: the 95th percentile of what 8 equivalent runs" in view.caption
    assert "control (control) +0.01" in view.alt and "Noise floor 0.1" in view.alt
    band = next(patch for patch in ax.patches if patch.get_width() == pytest.approx(0.2))
    assert band.get_x() == pytest.approx(-0.1)


def test_order_by_effect_keeps_controls_apart_and_last():
    view = plots.plot_effects(FOUND, order="effect")
    ax = view.figure.axes[0]
    names = [label.get_text() for label in ax.get_yticklabels()]
    assert names == ["clear", "holds 0", "in the noise", "idle", "control"]
    assert np.diff(ax.get_yticks())[-1] > 1.5


def test_no_effect_of_an_agreement_is_one():
    table = FOUND.conditions.rename(
        columns=lambda name: name.replace("loss_change", "top1_agreement")
    )
    table["top1_agreement_floor"] = 0.95
    table["top1_agreement"] = [0.9, 0.97, 1.0, 0.5, 1.0]
    table["top1_agreement_low"], table["top1_agreement_high"] = 0.4, 0.99
    found = dataclasses.replace(FOUND, conditions=table)
    view = plots.plot_effects(found, metric="top1_agreement")
    assert [filled for _, filled in dots(view).values()] == [True, False, True, False, False]
    assert "the interval holds 1" in view.caption and "Noise floor 0.05" in view.caption


def test_other_prompts_beside():
    other = comparison(
        {n: (0.0, -0.1, 0.1, np.nan, c, 1) for n, c in FOUND.conditions.control.items()}
    )
    view = plots.plot_effects(FOUND, beside=other, beside_name="on JSON")
    squares = [line for line in view.figure.axes[0].lines if line.get_marker() == "s"]
    assert len(squares) == 5 and "Orange: on JSON" in view.caption
    less = dataclasses.replace(other, conditions=other.conditions.drop(index="idle"))
    with pytest.raises(ValueError, match="no condition 'idle'"):
        plots.plot_effects(FOUND, beside=less)


def test_without_a_floor_or_an_interval_it_says_so():
    table = FOUND.conditions.assign(loss_change_floor=np.nan, n_documents=1)
    table["loss_change_low"] = table["loss_change_high"] = np.nan
    view = plots.plot_effects(dataclasses.replace(FOUND, conditions=table))
    assert "No noise floor was measured (noise=0)." in view.caption
    assert "One document: no interval." in view.caption
    assert dots(view)["clear"] == (0.5, True)


def test_sixty_conditions_with_hard_names_can_be_read():
    rows = {
        f"<b>$x^{i}$ 植物 {'long ' * 12}{i}": (i / 10, i / 10 - 1, i / 10 + 1, 0.01, i % 9 == 0, 1)
        for i in range(60)
    }
    view = plots.plot_effects(comparison(rows))
    assert len(view.png()) < 250_000
    ticks = view.figure.axes[0].get_yticklabels()
    assert all(len(tick.get_text()) <= 46 for tick in ticks)
    assert "and 45 more" in view.alt
    with pytest.raises(ValueError, match="61 conditions, 1 to 60"):
        plots.plot_effects(comparison(rows | {"more": (0, 0, 0, 0, False, 1)}))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"metric": "logit_diff_change"}, "this comparison has loss_change; .* needs answers="),
        ({"order": "size"}, 'must be "given" or "effect"'),
    ],
)
def test_refusals(wrong, words):
    with pytest.raises(ValueError, match=words):
        plots.plot_effects(FOUND, **wrong)
    nothing = dataclasses.replace(FOUND, conditions=FOUND.conditions.assign(loss_change=np.nan))
    with pytest.raises(ValueError, match="no condition has a value"):
        plots.plot_effects(nothing)


def test_the_callers_axes():
    ax = Figure().add_subplot()
    assert plots.plot_effects(FOUND, ax=ax, title="t") is ax
    assert ax.get_title(loc="left") == "t"


def mediation():
    names = ["TE", "FE", "RE", "FE (ids only)", "RE (ids only)", "interaction",
             "interaction (ids only)"]  # fmt: skip
    rows = [("loss", name, i, i - 0.5, i + 0.5, 0.1) for i, name in enumerate(names)]
    table = pd.DataFrame(rows, columns=["measure", "effect", "value", "low", "high", "floor"])
    found = dataclasses.replace(FOUND, settings={"frozen_layers": [1, 2, 4], "exempt_layers": []})
    return Effects(table, found)


def test_mediation_has_its_paths_in_order_and_says_what_they_are():
    view = plots.plot_mediation(mediation())
    assert list(dots(view)) == [
        "TE: total, routing free", "FE: routing held", "RE: re-routing alone",
        "interaction: TE - FE - RE", "FE (ids only)", "RE (ids only)", "interaction (ids only)",
    ]  # fmt: skip
    assert dots(view)["interaction: TE - FE - RE"] == (5.0, True)
    assert "Routing held in layers 1, 2, 4" in view.caption.replace("1..2", "1, 2")
    assert "ids held, weights free" in [text.get_text() for text in view.figure.axes[0].texts]
    with pytest.raises(ValueError, match="these effects are on 'loss'"):
        plots.plot_mediation(mediation(), measure="logit difference")


def drifting(n_conditions, layers, banks=("text",)):
    rng = np.random.default_rng(0)
    rows = [
        (f"edit {c}", layer, bank, 100, x, x - 0.01, x + 0.01, 0.002)
        for c in range(n_conditions)
        for bank in banks
        for layer in layers
        for x in [float(rng.random())]
    ]
    names = [
        "condition",
        "layer",
        "bank",
        "n_tokens",
        "flips",
        "flips_low",
        "flips_high",
        "flips_floor",
    ]
    return dataclasses.replace(FOUND, routing=pd.DataFrame(rows, columns=names))


def test_drift_of_few_conditions_is_lines_at_true_layers():
    found = drifting(2, (3, 7, 11))
    ax = plots.plot_routing_drift(found).figure.axes[0]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["3", "7", "11"]
    drawn = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 3]
    assert np.allclose(drawn, found.routing["flips"].to_numpy().reshape(2, 3))
    one = plots.plot_routing_drift(found, conditions=["edit 1"])
    assert "edit 1 largest in layer" in one.alt and "of 1:" in one.alt


def test_drift_of_many_conditions_is_a_heat_map():
    found = drifting(60, range(28))
    view = plots.plot_routing_drift(found)
    (image,) = view.figure.axes[0].images
    assert np.allclose(image.get_array(), found.routing["flips"].to_numpy().reshape(60, 28))
    assert len(view.png()) < 250_000


def test_drift_names_the_bank_and_what_is_there():
    found = drifting(1, (1, 2), banks=("text", "vision"))
    with pytest.raises(ValueError, match="banks text and vision; name one"):
        plots.plot_routing_drift(found)
    assert "vision bank" in plots.plot_routing_drift(found, bank="vision").title
    with pytest.raises(ValueError, match="no condition 'x'"):
        plots.plot_routing_drift(found, bank="text", conditions=["x"])
    with pytest.raises(ValueError, match="no layer of this model routes"):
        plots.plot_routing_drift(FOUND)


def test_effects_by_layer_stand_at_their_layers():
    rows = {f"layer {n}": (n / 10, 0.0, n / 5, 0.1, False, 1) for n in (2, 4, 8)}
    lines = {"shared off": {8: "layer 8", 2: "layer 2", 4: "layer 4"}}
    view = plots.plot_effects_by_layer(comparison(rows), lines)
    ax = view.figure.axes[0]
    assert ax.lines[0].get_ydata().tolist() == [0.2, 0.4, 0.8]
    assert "shared off largest in layer 8, 0.8" in view.alt
    for wrong, words in [
        ({}, "0 lines"), ({"a": {}}, "no layer"), ({"a": {1: "layer 1"}}, "no condition 'layer 1'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            plots.plot_effects_by_layer(comparison(rows), wrong)


def test_large_figures_stay_readable():
    layers = range(1, 28)
    rows = {
        f"{kind} {n}": (np.sin(n + kind), -1, 1, 0.1, False, 1) for kind in range(6) for n in layers
    }
    lines = {f"kind {kind}": {n: f"{kind} {n}" for n in layers} for kind in range(6)}
    view = plots.plot_effects_by_layer(comparison(rows), lines)
    assert len(view.figure.axes[0].get_xticklabels()) == 27
    assert len(view.png()) < 250_000


def test_next_tokens_side_by_side():
    table = pd.DataFrame({"token": [" yes", "<b>"], "base": [0.75, 0.1], "edited": [0.25, 0.5]})
    view = plots.plot_next_tokens(table, actual="<b>", model="m")
    ax = view.figure.axes[0]
    assert [bar.get_width() for bar in ax.patches] == [0.75, 0.1, 0.25, 0.5]
    ticks = ax.get_yticklabels()
    assert [t.get_text() for t in ticks] == ["␣yes", "<b>"]
    assert [t.get_fontweight() for t in ticks] == ["normal", "bold"]
    assert "Bold: how the text goes on" in view.caption and " yes 0.75 intact" in view.alt
    with pytest.raises(ValueError, match="no column edited"):
        plots.plot_next_tokens(table.drop(columns="edited"))
    with pytest.raises(ValueError, match="0 tokens"):
        plots.plot_next_tokens(table.head(0))
