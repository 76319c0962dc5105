"""Figures of specialisation: what is drawn where, in which words, and what is refused."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.figure import Figure

from ernie_lab import plots
from ernie_lab.analysis.specialisation import Specialisation
from ernie_lab.plots.style import OKABE_ITO

BLUE = OKABE_ITO["blue"]


def specialised(layers=(2, 5, 9), above=(True, False, True), n_redrawn=20) -> Specialisation:
    rng = np.random.default_rng(0)
    rows, nulls = [], []
    for layer, is_above in zip(layers, above, strict=True):
        row = {"layer": layer, "bits": 0.5 if is_above else 0.1, "label_bits": 2.0}
        row |= {"low": row["bits"] - 0.05, "high": row["bits"] + 0.05, "above": is_above}
        row |= {"above_twins": is_above and layer > 2}
        row |= {"permuted": 0.01, "permuted_p95": 0.03, "untrained": 0.25}
        for variant in ("norm", "variance"):
            drawn = rng.uniform(0.15, 0.25, n_redrawn)
            row |= {f"{variant}_median": np.median(drawn)}
            row |= {f"{variant}_p95": np.quantile(drawn, 0.95)}
            name = f"redrawn router, equal {variant}"
            nulls += [(layer, name, i, bits) for i, bits in enumerate(drawn)]
        nulls += [(layer, "untrained twin", 0, 0.25), (layer, "permuted labels", 0, 0.01)]
        rows.append(row)
    return Specialisation(
        label="domain", table=pd.DataFrame(rows).set_index("layer"),
        nulls=pd.DataFrame(nulls, columns=["layer", "null", "draw", "bits"]), by="documents",
        model="toy", bank=None, given=None, n_tokens=4000, n_documents=50, n_fitted=3900,
        n_redrawn=n_redrawn,
    )  # fmt: skip


def texts(artists) -> list[str]:
    return [artist.get_text() for artist in artists]


def dots(ax, marker="o"):
    return [line for line in ax.lines if line.get_marker() == marker]


def test_the_learned_router_stands_beside_its_nulls() -> None:
    view = plots.plot_specialisation(specialised())
    ax = view.figure.axes[0]
    assert texts(ax.get_xticklabels()) == ["2", "5", "9"] and ax.get_xlabel() == "layer"
    assert ax.get_ylabel() == "bits between expert and domain"
    learned = dots(ax)
    assert [float(line.get_ydata()[0]) for line in learned] == [0.5, 0.1, 0.5]
    assert [line.get_markerfacecolor() for line in learned] == [BLUE, "white", BLUE]
    assert [float(line.get_ydata()[0]) for line in dots(ax, "D")] == [0.25] * 3
    words = texts(ax.get_legend().get_texts())
    assert "20 redrawn routers, equal row norms" in words and "untrained twin" in words
    assert "permuted labels, 95 % below" in words
    assert "toy. 4,000 tokens of 50 documents; at most 2.00 bits" in view.caption
    assert "Information is not function" in view.caption and "Permuted: documents" in view.caption
    assert "layer 5 0.100 (redrawn median" in view.alt and "layers 2, 9" in view.alt
    assert view.alt.endswith("layers 2, 9; above the untrained twin in layer 9.")
    assert view.png()


def test_without_a_twin_none_is_promised() -> None:
    found = specialised()
    bare = found.nulls[found.nulls["null"] != "untrained twin"]
    table = found.table.assign(untrained=np.nan)
    copied = {name: getattr(found, name) for name in found.__slots__}
    view = plots.plot_specialisation(Specialisation(**copied | {"nulls": bare, "table": table}))
    assert "untrained" not in " ".join(texts(view.figure.axes[0].get_legend().get_texts()))
    assert "ntrained" not in view.caption


def test_many_layers_fit_and_too_many_are_refused() -> None:
    layers = tuple(range(1, 28))
    view = plots.plot_specialisation(specialised(layers, (True,) * 27))
    assert len(texts(view.figure.axes[0].get_xticklabels())) == 27
    assert view.figure.get_size_inches()[0] <= 10 and "…" in view.alt
    with pytest.raises(ValueError, match="129 layers, at most 128: narrow with layers="):
        plots.plot_specialisation(specialised(tuple(range(129)), (True,) * 129))


def shares(n_experts=4, layers=(3,), names=("sums", "植 $x$")) -> xr.Dataset:
    share = np.zeros((len(layers), n_experts, len(names)))
    share[:, 0, 0], share[:, 1, 0] = 0.9, 0.1
    share[:, 2:, 1] = 1 / (n_experts - 2)
    variables = {"share": share, "low": share - 0.02, "high": share + 0.02}
    return xr.Dataset(
        {name: (("layer", "expert", "label"), values) for name, values in variables.items()}
        | {"n_tokens": (("label",), np.full(len(names), 1200))},
        coords={"layer": list(layers), "expert": range(n_experts), "label": list(names)},
        attrs={"k": 1, "fair_share": 1 / n_experts, "n_documents": 9},
    )


def test_a_domain_map_is_relative_to_the_fair_share() -> None:
    view = plots.plot_domain_load(shares(), model="toy")
    ax = view.figure.axes[0]
    (image,) = ax.images
    assert image.get_array()[0, 0] == pytest.approx(np.log2(3.6))
    assert image.norm.vmin == -image.norm.vmax
    assert texts(ax.texts) == ["90", "10", "×", "×", "×", "×", "50", "50"]
    rows = texts(ax.get_yticklabels())
    assert rows[0] == "sums  (1,200)" and rows[1].endswith("$x$  (1,200)")
    assert view.title == "Layer 3: which experts each domain goes to"
    assert "White: 25.0 %" in view.caption and "± 2.0 points" in view.caption
    assert "first choice" in view.caption and "not being needed" in view.caption
    assert "sums to expert 0, 90 %" in view.alt and view.png()


def test_a_domain_map_is_of_one_layer() -> None:
    both = shares(layers=(3, 7))
    with pytest.raises(ValueError, match=r"layers \[3, 7\] are given; pick one, layer=3"):
        plots.plot_domain_load(both)
    with pytest.raises(ValueError, match="no layer 4"):
        plots.plot_domain_load(both, layer=4)
    assert plots.plot_domain_load(both, layer=7).title.startswith("Layer 7")
    assert plots.plot_domain_load(both.sel(layer=7)).title.startswith("Layer 7")
    wide = plots.plot_domain_load(shares(64))
    assert not texts(wide.figure.axes[0].texts) and "Numbers" not in wide.caption
    with pytest.raises(ValueError, match="61 labels, at most 60"):
        plots.plot_domain_load(shares(names=tuple(f"d{i}" for i in range(61))))


def saturation(values, layers=(1, 2, 3)) -> pd.DataFrame:
    table = pd.DataFrame({"layer": layers, "saturation": values})
    spread = {"low": table["saturation"] - 0.02, "high": table["saturation"] + 0.02}
    told = {"uniform": 0.25, "independent": 0.3, "n_tokens": 9000, "n_documents": 40}
    return table.assign(**spread, **told).set_index("layer")


def test_saturation_has_a_line_for_each_checkpoint() -> None:
    tables = {"step 100": saturation([0.3, 0.4, 0.5]), "step 900": saturation([0.8, 0.8, 0.52])}
    view = plots.plot_saturation(tables, model="toy")
    ax = view.figure.axes[0]
    lines = dots(ax)
    assert [list(line.get_ydata()) for line in lines] == [[0.3, 0.4, 0.5], [0.8, 0.8, 0.52]]
    assert lines[0].get_color() != lines[1].get_color()
    assert [1, 1] in [list(line.get_ydata()) for line in ax.lines]
    names = {text.get_text(): text.xy[1] for text in ax.texts if hasattr(text, "xy")}
    assert names["step 900"] - names["step 100"] >= 0.06, "names do not overlap"
    assert {"uniform routing", "the final checkpoint"} <= set(texts(ax.texts))
    assert "0.25 for uniform routing; up to 0.3 (grey)" in view.caption
    assert "step 100: 0.30, 0.40, 0.50" in view.alt and view.png()
    with pytest.raises(ValueError, match="different layers"):
        plots.plot_saturation({"a": saturation([1, 1, 1]), "b": saturation([1], layers=(1,))})
    with pytest.raises(ValueError, match="9 checkpoints"):
        plots.plot_saturation({str(i): saturation([1, 1, 1]) for i in range(9)})
    with pytest.raises(ValueError, match="0 checkpoints"):
        plots.plot_saturation({})


def test_the_token_null_stands_over_guessing() -> None:
    table = pd.DataFrame(
        {
            "token_id": [0.9, 0.6], "low": [0.88, 0.55], "high": [0.92, 0.65],
            "context_free": [0.3, 0.35], "uniform": 0.25, "seen": 0.97, "n_tokens": 4000,
            "n_fitted": 4100,
        },
        index=pd.Index([1, 4], name="layer"),
    )  # fmt: skip
    view = plots.plot_token_null(table, model="toy")
    ax = view.figure.axes[0]
    assert [list(line.get_ydata()) for line in dots(ax)] == [[0.9, 0.6], [0.3, 0.35]]
    assert texts(ax.get_xticklabels()) == ["1", "4"] and ax.get_ylim() == (0, 1)
    assert "97%" in view.caption and "4,100 tokens" in view.caption
    assert "token id alone 0.90, 0.60" in view.alt and view.png()


@pytest.mark.parametrize("name", ["specialisation", "domain", "saturation", "token"])
def test_on_the_axes_of_a_caller(name: str) -> None:
    ax = Figure().subplots()
    table = pd.DataFrame(
        {"token_id": [0.9], "low": [0.8], "high": [1.0], "context_free": [0.3], "uniform": [0.2],
         "seen": [1.0], "n_tokens": [5], "n_fitted": [5]}, index=[1],
    )  # fmt: skip
    drawn = {
        "specialisation": lambda: plots.plot_specialisation(specialised(), ax=ax, title="T"),
        "domain": lambda: plots.plot_domain_load(shares(), ax=ax, title="T"),
        "saturation": lambda: plots.plot_saturation({"a": saturation([1, 1, 1])}, ax=ax, title="T"),
        "token": lambda: plots.plot_token_null(table, ax=ax, title="T"),
    }
    assert drawn[name]() is ax and ax.get_title(loc="left") == "T"
