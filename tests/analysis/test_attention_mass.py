"""Shares of attention between groups: by hand, pooled over sequences, beside looking evenly."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from plots.cases import VisionTrace

from ernie_lab.analysis.attention_mass import FIRST, attention_mass, evenly, groups, masses


class Two:
    """Two sequences of three text tokens each, one layer, two heads; patterns given."""

    layers = (4,)
    tokens = pd.DataFrame(
        {"sequence": [0] * 3 + [1] * 3, "pos": [0, 1, 2] * 2, "kind": list("aababb")}
    )

    def __init__(self, maps):
        self.maps = np.array(maps, dtype=float)

    def __contains__(self, key):
        return key == ("pattern", 4, "attn")

    def pattern(self, layer, sequence=None):
        coords = {f"{axis}_pos": (axis, [0, 1, 2]) for axis in ("query", "key")}
        coords["head"] = [0, 5]
        return xr.DataArray(self.maps[sequence], dims=("head", "query", "key"), coords=coords)


LEFT = [[1, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]]
RIGHT = [[1, 0, 0], [0.1, 0.9, 0], [0.0, 0.6, 0.4]]
TRACE = Two([[LEFT, RIGHT], [RIGHT, LEFT]])


def test_groups_and_masses_by_hand():
    trace = VisionTrace(1, 2, layers=(1,), n_heads=1)
    pattern = trace.pattern(1)
    queries, keys = groups(pattern, trace.tokens, 0)
    assert list(queries) == ["text before", "picture", "delimiters", "text after", "generated"]
    assert list(keys) == [FIRST, *queries]
    assert np.flatnonzero(keys["picture"]).tolist() == [5, 6]
    assert np.flatnonzero(queries["text before"]).tolist() == [1, 2, 3]
    weights = pattern.values[0]
    found = masses(weights, queries, keys)["text after"]
    assert found[2] == pytest.approx(weights[8:14, 5:7].sum(1).mean())
    even = evenly(pattern, queries, keys)
    assert even["picture"][2] == pytest.approx((1 / 6 + 2 / 7) / 2)
    for shares in (*masses(weights, queries, keys).values(), *even.values()):
        assert shares.sum() == pytest.approx(1)


def test_every_layer_and_head_of_a_trace():
    trace = VisionTrace(1, 2, layers=(1, 4), n_heads=3)
    found = attention_mass(trace)
    assert found.mass.dims == ("sequence", "layer", "head", "source", "target")
    assert found.mass["layer"].values.tolist() == [1, 4]
    np.testing.assert_allclose(found.mass.sum("target"), 1)
    weights = trace.pattern(4).values[2]
    one = found.mass.sel(sequence=0, layer=4, head=2, source="text after", target="picture")
    assert float(one) == pytest.approx(weights[8:14, 5:7].sum(1).mean())
    assert found.n_queries[0].values.tolist() == [3, 2, 2, 6, 2]
    assert "2 layers, 3 heads" in repr(found)
    only = attention_mass(trace, layers=[4], heads=[2])
    np.testing.assert_allclose(only.mass[0, 0, 0], found.mass[0, 1, 2])


def test_labels_and_sequences_pooled_by_hand():
    """Groups a, b of tokens (a a b) and (a b b); the first token is apart."""
    found = attention_mass(TRACE, labels="kind")
    assert found.sources == ("a", "b")
    assert found.targets == (FIRST, "a", "b")
    assert found.n_queries.values.tolist() == [[1, 1], [0, 2]]
    table = found.table(per_head=True, n_draws=200)
    # Head 0: sequence 0 has one query b, of LEFT; sequence 1 two, of RIGHT.
    rows = table.loc[(4, 0, "b")]
    assert rows["share"].tolist() == pytest.approx([0.3 / 3, 0.3 / 3, 2.4 / 3])
    assert rows["n"].tolist() == [3, 3, 3]
    assert rows["even"].tolist() == pytest.approx([7 / 18, 1 / 9, 1 / 2])
    # Draws are of whole sequences: (0, 0), a mix, or (1, 1).
    assert rows["low"].tolist() == pytest.approx([0.05, 0.0, 0.5])
    assert rows["high"].tolist() == pytest.approx([0.2, 0.3, 0.95])
    # Only one sequence has a query a: no interval.
    alone = table.loc[(4, 0, "a")]
    assert alone["share"].tolist() == [0.5, 0.5, 0.0]
    assert alone["low"].isna().all() and alone["high"].isna().all()


def test_the_mean_over_heads():
    per_head = attention_mass(TRACE, labels=list("aababb")).table(per_head=True)["share"]
    pooled = attention_mass(TRACE, labels="kind").table()["share"]
    assert pooled.index.names == ["layer", "source", "target"]
    means = per_head.groupby(["layer", "source", "target"], sort=False).mean()
    pd.testing.assert_series_equal(pooled, means)


def test_looking_evenly_is_its_own_reference():
    even = np.tril(np.ones((3, 3)))
    even /= even.sum(1, keepdims=True)
    table = attention_mass(Two([[even, even]] * 2), labels="kind").table()
    np.testing.assert_allclose(table["share"], table["even"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"heads": [3]}, r"heads \[3\]: heads \[0, 5\] were kept"),
        ({"heads": []}, r"heads \[0, 5\] were kept"),
        ({"sequences": [7]}, r"sequences \[7\]: the trace has \[0, 1\]"),
        ({"labels": "colour"}, "no column of trace.tokens"),
        ({"labels": ["a"]}, "1 labels for 6 tokens"),
        ({"layers": []}, 'keep="attention"'),
    ],
)
def test_what_cannot_be_measured(arguments, match):
    with pytest.raises(ValueError, match=match):
        attention_mass(TRACE, **{"labels": "kind", **arguments})


def test_a_sequence_without_a_picture():
    trace = VisionTrace(1, 2, layers=(1,))
    trace.tokens = trace.tokens.assign(content="text")
    with pytest.raises(ValueError, match="sequence 0 has no picture"):
        attention_mass(trace)
