"""The attention view without a browser: what it sends, what it refuses, what stays as a picture."""

import base64
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import ernie_lab as el
from ernie_lab import widgets
from ernie_lab.widgets.attention import as_bytes, pooled_bytes

# ipywidgets builds a comm without a kernel and says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def trace():
    lab = el.load("tiny-text")
    return lab.run(["In the beginning God", "a b a b a"], keep="attention").trace


@pytest.fixture
def view(trace):
    return widgets.explore_attention(trace, layer=2, head=1, model="m")


def shown(view):
    """The weights of the overview, as the page decodes them."""
    raw = np.frombuffer(view.overview["weights"], np.uint8).reshape(view.overview["shape"])
    return (raw / 255.0) ** 2


def floats(data):
    return np.frombuffer(data, "<f4")


@given(st.floats(0, 1))
def test_bytes_are_off_by_at_most_the_root_over_255(weight):
    (byte,) = as_bytes(np.array([weight]))
    assert abs((byte / 255) ** 2 - weight) <= np.sqrt(weight) / 255 + 1 / 255**2


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_pooling_takes_the_maximum_of_every_block(rows, cols, most, seed):
    weights = np.random.default_rng(seed).random((rows, cols))
    pooled, (down, across) = pooled_bytes(weights, most)
    assert max(pooled.shape) <= most
    for r, c in np.ndindex(*pooled.shape):
        block = weights[r * down : (r + 1) * down, c * across : (c + 1) * across]
        assert pooled[r, c] == as_bytes(block.max())


def test_it_starts_where_it_is_asked_to(trace, view):
    assert (view.layer, view.head, view.sequence) == (2, 1, 0)
    np.testing.assert_allclose(shown(view), trace.pattern(2, 0)[1], atol=0.005)
    assert view.about["layers"] == list(range(6)) and view.heads == [0, 1, 2, 3]
    texts = trace.tokens.query("sequence == 0")["text"].tolist()
    assert view.tokens["texts"] == [el.plots.visible(text) for text in texts]
    assert view.tokens["queries"] == list(range(len(texts))) and view.tokens["prompt"] == -1
    assert "layer 2, head 1" in view.overview["words"]
    first = widgets.explore_attention(trace)
    assert (first.layer, first.head) == (0, 0)


def test_another_layer_head_or_sequence_sends_its_map(trace, view):
    view.head = 3
    np.testing.assert_allclose(shown(view), trace.pattern(2, 0)[3], atol=0.005)
    view.layer = 5
    np.testing.assert_allclose(shown(view), trace.pattern(5, 0)[3], atol=0.005)
    assert (view.overview["layer"], view.overview["head"]) == (5, 3)
    view.token = 3
    view.sequence = 1
    assert view.token == -1 and len(view.tokens["texts"]) == trace.pattern(5, 1).sizes["key"]
    np.testing.assert_allclose(shown(view), trace.pattern(5, 1)[3], atol=0.005)


def test_a_token_has_its_row_and_its_column_exactly(trace, view):
    pattern = trace.pattern(2, 0)[1].values
    view.token = 2
    np.testing.assert_array_equal(floats(view.detail["row"]), pattern[2])
    np.testing.assert_array_equal(floats(view.detail["column"]), pattern[:, 2])
    view.probe = 1
    np.testing.assert_array_equal(floats(view.detail["row"]), pattern[1])
    view.probe = -1
    assert view.detail["token"] == 2
    before = view.detail["number"]
    view.token = -1
    assert view.detail["number"] > before and view.detail["row"] == b""


def test_two_views_know_nothing_of_each_other(trace, view):
    other = widgets.explore_attention(trace, layer=4)
    view.layer, view.token = 1, 2
    assert (other.layer, other.token) == (4, -1)


def test_only_some_heads_of_some_layers_keep_their_numbers():
    keep = [
        el.keep("attention", layers=[1], heads=[1, 3]),
        el.keep("attention", layers=[4], heads=[0, 3]),
    ]
    trace = el.load("tiny-text").run("In the beginning", keep=keep).trace
    view = widgets.explore_attention(trace, head=1)
    assert view.about["layers"] == [1, 4] and view.heads == [1, 3]
    view.layer = 4
    assert view.heads == [0, 3] and view.head == 0, "head 1 was not kept here"
    np.testing.assert_allclose(shown(view), trace.pattern(4)[0], atol=0.005)
    view.head = 3
    view.layer = 1
    assert view.head == 3


def test_generated_tokens_and_a_slice_of_queries():
    gen = el.load("tiny-text").generate(
        "In the beginning", max_new_tokens=4, min_new_tokens=4, keep="attention"
    )
    view = widgets.explore_attention(gen.trace)
    n_prompt = int((gen.trace.tokens["phase"] == "prefill").sum())
    assert view.tokens["prompt"] == n_prompt
    decoded = widgets.explore_attention(gen.trace.sel(phase="decode"))
    assert decoded.tokens["queries"] == list(range(n_prompt, n_prompt + 3))
    assert decoded.overview["shape"] == [3, n_prompt + 3]
    decoded.token = 0
    assert decoded.detail["row"] == b"" and len(floats(decoded.detail["column"])) == 3
    assert decoded.still().png().startswith(b"\x89PNG")


def test_pictures_are_named_by_their_place():
    from ernie_lab.organisms.boards import samples

    board = samples.boards()[0]
    run = el.load("tiny-vl").run(
        board.questions[0].text, images=[board.picture], keep=el.keep("attention", layers=[2])
    )
    view = widgets.explore_attention(run.trace)
    assert "img0 r1 c2" in view.tokens["texts"]


def test_a_saved_trace_needs_no_model(trace, view, tmp_path):
    again = widgets.explore_attention(
        el.Trace.load(trace.save(tmp_path / "saved")), layer=2, head=1, model="m"
    )
    assert again.overview == view.overview and again.tokens == view.tokens


def test_where_no_kernel_runs_there_is_the_picture(view):
    data, _metadata = view._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in data
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert 'alt="Attention of layer 2, head 1 of m' in data["text/html"]
    assert "layer 2 of [0, 1, 2, 3, 4, 5], head 1 of [0, 1, 2, 3]" in data["text/plain"]


def test_refusals(trace, view):
    with pytest.raises(ValueError, match=r"layer=9: this trace has \[0, 1"):
        widgets.explore_attention(trace, layer=9)
    with pytest.raises(ValueError, match="head=4"):
        widgets.explore_attention(trace, head=4)
    with pytest.raises(ValueError, match="sequence=2"):
        widgets.explore_attention(trace, sequence=2)
    with pytest.raises(ValueError, match="layer=7"):
        view.layer = 7
    assert view.layer == 2
    n_keys = len(view.tokens["texts"])
    for name in ("token", "probe"):
        with pytest.raises(ValueError, match=rf"{name}=77: .* keys 0\.\.{n_keys - 1}, or -1"):
            setattr(view, name, 77)
        assert getattr(view, name) == -1
    without = el.load("tiny-text").run("In", keep="routing").trace
    with pytest.raises(ValueError, match='keep="attention"'):
        widgets.explore_attention(without)
    with pytest.raises(TypeError, match=r"not SimpleNamespace; pass its \.trace"):
        widgets.explore_attention(SimpleNamespace(trace=trace))


class Long:
    """20 heads of 2,000 tokens, in any of 28 layers."""

    layers, n = tuple(range(28)), 2000
    tokens = pd.DataFrame({"sequence": 0, "pos": range(n), "text": "t", "content": "text"})

    def __init__(self):
        rng = np.random.default_rng(0)
        one = np.tril(rng.exponential(size=(self.n, self.n)).astype(np.float32) ** 4)
        self.map = one / one.sum(1, keepdims=True)

    def __contains__(self, key):
        return True

    def pattern(self, layer, sequence=None):
        maps = np.broadcast_to(self.map, (20, self.n, self.n))
        pos = np.arange(self.n)
        coords = {"head": range(20), "query_pos": ("query", pos), "key_pos": ("key", pos)}
        return xr.DataArray(maps, dims=("head", "query", "key"), coords=coords)


def test_a_misspelt_name_is_not_set(view):
    with pytest.raises(
        AttributeError, match="AttentionExplorer has no 'haed', did you mean 'head'"
    ):
        view.haed = 2


def test_two_thousand_tokens_are_pooled_with_a_window_in_full():
    long = Long()
    view = widgets.explore_attention(long, layer=27)
    assert view.overview["shape"] == [500, 500] and view.overview["factors"] == [4, 4]
    assert view.tile["start"] == [0, 0] and view.tile["shape"] == [64, 64]
    view.spot = [1000, 990]
    assert view.tile["start"] == [968, 958]
    raw = np.frombuffer(view.tile["weights"], np.uint8).reshape(64, 64)
    np.testing.assert_array_equal(raw, as_bytes(long.map[968:1032, 958:1022]))
    view.spot = [1999, 1999]
    assert view.tile["start"] == [1936, 1936], "the window stays inside"
    start = time.perf_counter()
    view.head = 7
    view.layer = 3
    # Some 50 ms on a quiet machine; the page adds its own.
    assert time.perf_counter() - start < 1.5


def test_a_map_that_is_too_large_names_what_to_narrow():
    class Huge(Long):
        def __init__(self):
            self.n = 7000
            self.map = np.float32(0)

    with pytest.raises(ValueError, match=r"49 million cells .*sel\(position=…\)"):
        widgets.explore_attention(Huge())


def test_the_script_is_bundled_fetches_nothing_and_writes_no_markup():
    source = widgets.AttentionExplorer._esm
    styles = widgets.AttentionExplorer._css
    for text in map(str, (source, styles)):
        assert not re.search(r"https?://|@import|innerHTML|insertAdjacentHTML|eval\(", text)
    assert "document.querySelector" not in str(source), "a view finds its own parts only"
    folder = Path(widgets.__file__).parent
    assert {"attention.js", "attention.css"} <= {path.name for path in folder.iterdir()}
