"""What heads look at: each measure by hand, joined over sequences, and against looking evenly."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import ernie_lab as el
from ernie_lab.analysis import (
    attention_distances,
    attention_statistics,
    repeated_tokens,
    vision_attention_statistics,
)
from ernie_lab.analysis import attention_measures as measures

# a b | a b: the last two tokens have come before.
IDS = [7, 8, 9, 7, 8]
ROWS = [
    [1.0, 0, 0, 0, 0],
    [0.5, 0.5, 0, 0, 0],
    [0.2, 0.3, 0.5, 0, 0],
    [0.1, 0.6, 0.2, 0.1, 0],
    [0.0, 0.25, 0.5, 0.25, 0],
]


def by_hand(rows=ROWS, ids=IDS, **more):
    n = len(rows)
    places = measures.Places.of(range(n), range(n), ids, **more)
    found = measures.measure([rows], places)
    values = {name: found.values[i, 0] for i, name in enumerate(found.names)}
    return values, dict(zip(found.names, found.even, strict=True))


def test_each_measure_by_hand():
    values, even = by_hand()
    assert list(values) == list(measures.UNITS)
    nats = [0, np.log(2), -(0.2 * np.log(0.2) + 0.3 * np.log(0.3) + 0.5 * np.log(0.5))]
    np.testing.assert_allclose(values["entropy"][:3], nats)
    np.testing.assert_allclose(values["effective_keys"][:3], np.exp(nats))
    np.testing.assert_allclose(values["sink"], [1, 0.5, 0.2, 0.1, 0])
    np.testing.assert_allclose(values["self"], [1, 0.5, 0.5, 0.1, 0])
    np.testing.assert_allclose(values["previous"], [np.nan, 0.5, 0.3, 0.2, 0.25])
    np.testing.assert_allclose(values["distance"][3:], [0.3 + 1.2 + 0.2, 0.75 + 1 + 0.25])
    # Token 3 is token 0 again, and next came 1; token 4 is token 1 again, and next came 2.
    np.testing.assert_allclose(values["duplicate"], [np.nan] * 3 + [0.1, 0.25])
    np.testing.assert_allclose(values["induction"], [np.nan] * 3 + [0.6, 0.5])
    np.testing.assert_allclose(even["induction"][3:], [1 / 4, 1 / 5])
    np.testing.assert_allclose(even["entropy"], np.log(range(1, 6)))
    np.testing.assert_allclose(even["distance"], [0, 0.5, 1, 1.5, 2])


def test_the_token_before_is_no_follower_of_itself():
    """In `x x`, what came after the first x is the query."""
    values, _ = by_hand(np.tril(np.ones((3, 3))) / [[1], [2], [3]], [5, 5, 5])
    np.testing.assert_allclose(values["duplicate"], [np.nan, 1 / 2, 2 / 3])
    np.testing.assert_allclose(values["induction"], [np.nan, np.nan, 1 / 3])


def test_placeholders_of_pictures_are_no_repeats():
    values, _ = by_hand(ids=[7, 7, 7, 7, 8], comparable=[True, False, False, False, True])
    assert np.isnan(values["duplicate"]).all()


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_a_head_that_looks_evenly_has_the_reference_everywhere(n, seed):
    ids = np.random.default_rng(seed).integers(0, 3, n)
    rows = np.tril(np.ones((n, n)))
    values, even = by_hand(rows / rows.sum(1, keepdims=True), ids)
    for name, value in values.items():
        np.testing.assert_allclose(value, even[name], err_msg=name, atol=1e-12)
        assert np.isnan(even["duplicate"]).tolist() == [x in (0,) or ids[x] not in ids[:x]
                                                        for x in range(n)]  # fmt: skip


@given(st.integers(2, 9), st.integers(0, 2**32 - 1))
def test_bounds(n, seed):
    weights = np.tril(np.random.default_rng(seed).exponential(size=(n, n)))
    values, even = by_hand(weights / weights.sum(1, keepdims=True), np.arange(n) % 2)
    assert (values["entropy"] <= even["entropy"] + 1e-9).all()
    for name, unit in measures.UNITS.items():
        shown = values[name][~np.isnan(values[name])]
        assert (shown >= -1e-12).all()
        assert unit != "share" or (shown <= 1 + 1e-9).all()


def test_patches_in_two_dimensions():
    """A frame of 1 x 2 and a third patch below: distances 0, 1, 1 and sqrt 2."""
    rows = [[0.5, 0.25, 0.25], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
    found = measures.measure_patches([rows], [0, 0, 1], [0, 1, 0])
    distance = found.values[found.names.index("distance"), 0]
    np.testing.assert_allclose(distance, [0.5, 0.5 * 2**0.5, 0])
    even = found.even[found.names.index("distance")]
    np.testing.assert_allclose(even, [2 / 3, (1 + 2**0.5) / 3, (1 + 2**0.5) / 3])


class Trace:
    """Two sequences, two layers, maps made up."""

    layers = (2, 5)

    def __init__(self, maps, ids, n_decoded=0):
        self.maps, self.ids = maps, ids
        parts = [
            pd.DataFrame({
                "sequence": s, "pos": range(len(one)), "id": one, "content": "text",
                "phase": ["prefill"] * (len(one) - n_decoded) + ["decode"] * n_decoded,
            })
            for s, one in enumerate(ids)
        ]  # fmt: skip
        self.tokens = pd.concat(parts, ignore_index=True)
        self.sites, self.sequences, self.media = (), tuple(range(len(ids))), ()

    def __contains__(self, key):
        return key[1] in self.layers

    def pattern(self, layer, sequence):
        ids = self.ids[sequence]
        maps = np.asarray(self.maps[sequence])
        coords = {"head": [3, 4][: len(maps)]}
        for axis in ("query", "key"):
            coords[f"{axis}_pos"] = (axis, range(len(ids)))
            coords[f"{axis}_id"] = (axis, ids)
            coords[f"{axis}_modality"] = (axis, np.array(["text"] * len(ids), object))
        return xr.DataArray(maps, dims=("head", "query", "key"), coords=coords)


EYE = np.eye(5)


def test_statistics_are_means_over_queries_with_true_numbers():
    trace = Trace([[ROWS, EYE], [np.eye(3), np.eye(3)]], [IDS, [1, 2, 3]])
    found = attention_statistics(trace, n_draws=50)
    assert found.layer.values.tolist() == [2, 5] and found["head"].values.tolist() == [3, 4]
    sink = found.sel(statistic="sink")
    # The first token of each sequence is left out: 4 queries and 2.
    assert sink.n.values.tolist() == [6, 6]
    assert float(sink.value.sel(layer=2, head=3)) == pytest.approx((0.5 + 0.2 + 0.1) / 6)
    evenly = (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 2 + 1 / 3) / 6
    assert float(sink.even.sel(layer=2)) == pytest.approx(evenly)
    # Two documents: the interval runs from the mean of the one to that of the other.
    assert float(sink.low.sel(layer=2, head=3)) == 0
    assert float(sink.high.sel(layer=2, head=3)) == pytest.approx(0.2)
    induction = found.sel(statistic="induction", layer=2)
    assert int(induction.n) == 2 and float(induction.value[0]) == pytest.approx(0.55)
    assert np.isnan(induction.low).all(), "only one document has repeats"
    assert found.unit.sel(statistic="entropy") == "nats"
    assert found.n_documents == 2
    assert len(found["value"].to_dataframe()) == 8 * 2 * 2


def test_which_queries_count():
    trace = Trace([[ROWS]], [IDS], n_decoded=2)

    def sink(**how):
        return attention_statistics(trace, **how).sel(statistic="sink", layer=2)

    assert float(sink(queries="decode").value[0]) == pytest.approx(0.05)
    assert float(sink(queries="prefill", skip=0).value[0]) == pytest.approx((1 + 0.5 + 0.2) / 3)
    assert float(sink(queries=[False, False, True, False, False]).value[0]) == pytest.approx(0.2)
    assert float(sink(first=2, skip=4).value[0]) == pytest.approx(0.25)
    parts = sink(by="phase")
    assert parts.group.values.tolist() == ["prefill", "decode"]
    assert parts.value.sel(group="decode").values == pytest.approx([0.05])
    assert parts.n.values.tolist() == [2, 2]
    labelled = sink(by=["a", "a", "a", "b", "b"])
    assert labelled.value.sel(group="b").values == pytest.approx([0.05])


def test_windows_of_one_document_stay_together():
    trace = Trace([[np.eye(3)]] * 3, [[1, 2, 3]] * 3)
    assert attention_statistics(trace).n_documents == 3
    one = attention_statistics(trace, documents=["a", "a", "a"])
    assert one.n_documents == 1 and np.isnan(one.low).all()
    with pytest.raises(ValueError, match="2 documents for 3 sequences"):
        attention_statistics(trace, documents=["a", "b"])


def test_distances_add_up_and_name_their_bins():
    trace = Trace([[ROWS, EYE]], [IDS])
    found = attention_distances(trace, skip=3).sel(layer=2)
    assert found.distance.values.tolist() == ["0", "1", "2-3", "4-7"]
    assert found.from_tokens.values.tolist() == [0, 1, 2, 4]
    np.testing.assert_allclose(found.value.sel(head=3), [0.05, 0.225, 0.725, 0])
    np.testing.assert_allclose(found.value.sum("distance"), 1)
    np.testing.assert_allclose(found.even.sum("distance"), 1)
    inner = attention_distances(trace, edges=[1, 3])
    assert inner.distance.values.tolist() == ["1-2"]
    with pytest.raises(ValueError, match="must rise"):
        attention_distances(trace, edges=[3, 1])


def test_refusals_name_what_is_wrong():
    trace = Trace([[ROWS]], [IDS])
    with pytest.raises(ValueError, match="no query counts"):
        attention_statistics(trace, queries="decode")
    with pytest.raises(ValueError, match="no query counts"):
        attention_statistics(trace, skip=9)
    with pytest.raises(ValueError, match="patterns of layers"):
        attention_statistics(trace, layers=[3])
    with pytest.raises(ValueError, match="expected True or False"):
        attention_statistics(trace, queries=[True])
    with pytest.raises(ValueError, match="no column"):
        attention_statistics(trace, by="domain")
    with pytest.raises(ValueError, match=r"sum to 0, expected 1"):
        attention_statistics(Trace([[np.zeros((5, 5))]], [IDS]))
    trace.layers = ()
    with pytest.raises(ValueError, match='keep="attention"'):
        attention_statistics(trace)
    with pytest.raises(ValueError, match=r"vision\.blocks"):
        vision_attention_statistics(trace)


def test_repeated_tokens():
    for prompt in repeated_tokens(range(50, 80), 6, 4, repeats=3):
        assert prompt[:6] == prompt[6:12] == prompt[12:]
        assert len(set(prompt)) == 6 and set(prompt) <= set(range(50, 80))
    assert repeated_tokens(range(9), 4, 2) == repeated_tokens(range(9), 4, 2)
    with pytest.raises(ValueError, match="length=10 of 9"):
        repeated_tokens(range(9), 10, 1)


@pytest.fixture(scope="module")
def lab():
    return el.load("tiny-text")


def test_a_generation_is_one_sequence(lab):
    """Prefill and decode joined are what one forward over the same tokens gives."""
    gen = lab.generate("In the beginning", max_new_tokens=4, min_new_tokens=4, keep="attention")
    ids = gen.trace.tokens["id"].tolist()
    whole = lab.run([ids], keep="attention").trace
    joined, once = (attention_statistics(t)["value"] for t in (gen.trace, whole))
    np.testing.assert_allclose(joined, once, atol=1e-5)
    decoded = attention_statistics(gen.trace, queries="decode")
    assert decoded.n.max() == 3
    xr.testing.assert_allclose(decoded, attention_statistics(gen.trace.sel(phase="decode")))


def test_the_same_as_without_maps(lab):
    """Entropy, sink and distance of `attention_summary`, which never makes a map."""
    text, keep = "In the beginning God created", ["attention", "attn.q_rot", "attn.k_rot"]
    trace = lab.run(text, keep=keep).trace
    found = attention_statistics(trace, layers=[3])["value"].sel(layer=3)
    without = el.analysis.attention_summary(trace, layer=3).isel(query=slice(1, None))
    names = {"entropy": "entropy", "sink": "first", "self": "own", "distance": "distance"}
    for ours, theirs in names.items():
        np.testing.assert_allclose(
            found.sel(statistic=ours), without[theirs].mean("query"), atol=1e-5, err_msg=ours
        )


def test_heads_that_were_not_kept_have_no_number(lab):
    keep = [
        el.keep("attention", layers=[1], heads=[0, 2]),
        el.keep("attention", layers=[4], heads=[2, 3]),
    ]
    found = attention_statistics(lab.run("In the beginning", keep=keep).trace)
    missing = np.isnan(found["value"].sel(statistic="sink"))
    assert found["head"].values.tolist() == [0, 2, 3]
    assert missing.values.tolist() == [[False, False, True], [True, False, False]]


def test_the_vision_tower():
    from ernie_lab.organisms.boards import samples

    board = samples.boards()[0]
    vl = el.load("tiny-vl")
    run = vl.run(board.questions[0].text, images=[board.picture],
                 keep=["vision.blocks.*.attn.pattern", "attention"])  # fmt: skip
    found = vision_attention_statistics(run.trace)
    n_patches = run.trace.vision_pattern(0).sizes["key"]
    np.testing.assert_allclose(found.even.sel(statistic="entropy"), np.log(n_patches))
    assert (found["value"].sel(statistic="effective_keys") <= n_patches + 1e-6).all()
    by = attention_statistics(run.trace, by="content")
    assert set(by.group.values) == {"text", "delimiter", "image"}
    picture = attention_statistics(run.trace, by="image")
    assert picture.group.values.tolist() == [0], "text has no picture and does not count"
    assert int(picture.n.max()) == int((run.trace.tokens["content"] == "image").sum())
    assert int(by.n.sel(statistic="duplicate", group="image").max()) == 0
