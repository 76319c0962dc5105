"""Sums and averages of an attribution, on numbers that can be added by hand."""

import numpy as np
import pandas as pd
import pytest

from ernie_lab.analysis.attribution import Attribution, component_table
from ernie_lab.analysis.components import Component


@pytest.fixture
def found() -> Attribution:
    """Two tokens; an embedding, a head and two slots of layer 1, whose experts differ."""
    components = [
        Component("embed"),
        Component("head", 0, 3),
        Component("slot", 1, 0),
        Component("slot", 1, 1),
    ]
    return Attribution(
        title="By hand",
        targets=pd.DataFrame({"pos": [0, 1], "expert": [7, 8], "value": [10.0, -2.0]}),
        components=component_table(components),
        values=np.array([[1.0, 2.0, 3.0, 4.0], [-1.0, 0.0, 5.0, -6.0]]),
        experts=np.array([[-1, -1, 5, 6], [-1, -1, 6, 5]]),
        banks=np.array([[-1, -1, 0, 0], [-1, -1, 1, 1]]),
    )


def test_sums_and_their_error(found: Attribution) -> None:
    assert found.residual_error == 0
    off = found.targets.assign(value=[10.0, -1.0])
    wrong = Attribution("x", off, found.components, found.values, found.experts, found.banks)
    assert wrong.residual_error == pytest.approx(0.1)


def test_by_kind(found: Attribution) -> None:
    table = found.by("kind").set_index("kind")
    assert table["mean"].to_dict() == {"embed": 0.0, "head": 1.0, "slot": 3.0}
    # Slots: 3 + 4 and 5 - 6.
    assert table["mean_size"].to_dict() == {"embed": 1.0, "head": 1.0, "slot": 4.0}
    assert (table["n"] == 2).all()
    by_layer = found.by("kind", "layer")
    assert by_layer["layer"].isna().tolist() == [True, False, False]
    assert by_layer["layer"].tolist()[1:] == [0, 1]
    apart = found.by("kind", of="expert").set_index(["expert", "kind"])["mean"]
    assert apart[7, "slot"] == 7 and apart[8, "slot"] == -1
    with pytest.raises(KeyError, match="components have no 'expert'"):
        found.by("expert")


def test_by_expert_keeps_the_banks_apart(found: Attribution) -> None:
    table = found.by_expert().set_index(["layer", "bank", "expert"])
    assert len(table) == 4
    assert table.loc[(1, "text", 5), "mean_when_chosen"] == 3
    assert table.loc[(1, "vision", 5), "mean_when_chosen"] == -6
    assert table.loc[(1, "text", 6), "mean"] == 2
    assert (table["n"] == 1).all()


def test_the_largest_and_the_whole(found: Attribution) -> None:
    top = found.top(2, row=1)
    assert top["component"].tolist() == ["slot 1.1", "slot 1.0"]
    assert top["expert"].tolist() == [5, 6]
    assert found.top(4)["component"].iloc[-1] == "embed"
    frame = found.to_frame()
    assert frame["contribution"].tolist() == [1, 2, 3, 4, -1, 0, 5, -6]
    assert frame["slot_expert"].isna().tolist() == [True, True, False, False] * 2
    assert frame["slot_bank"].tolist()[2] == "text" and frame["slot_bank"].tolist()[6] == "vision"
    assert frame["expert"].tolist() == [7] * 4 + [8] * 4
    assert "close to 0.0e+00" in repr(found)
    assert "<table" in found._repr_html_()
