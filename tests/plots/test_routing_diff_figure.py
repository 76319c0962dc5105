"""The figure of a routing diff: what stands where, hard tokens, sizes, and what is refused."""

import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import PathCollection
from plots.cases import HARD_TOKENS, routing

from ernie_lab import plots
from ernie_lab.analysis.routing_diff import routing_diff

# xarray takes no stray bytes; `tokens=` does.
WORDS = [token for token in HARD_TOKENS if token.isascii() or token.isprintable()]


class Made:
    """As a RoutingLedger, of several sequences."""

    def __init__(self, n_layers=3, length=10, n_sequences=2, noise=0.0, **sizes):
        n = length * n_sequences
        ids, weights, probs, _ = routing(n_layers, n, **sizes)
        if noise:
            logits = np.log(probs) + np.random.default_rng(1).normal(0, noise, probs.shape)
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            ids = np.argsort(-probs, axis=-1)[..., : ids.shape[-1]]
            weights = np.take_along_axis(probs, ids, -1)
            weights /= weights.sum(-1, keepdims=True)
        scores, k = np.sort(probs, -1), ids.shape[-1]
        words = [WORDS[i % len(WORDS)] for i in range(n)]
        coords = {
            "layer": range(1, n_layers + 1),
            "sequence": ("token", np.arange(n) // length),
            "pos": ("token", np.arange(n) % length),
            "text": ("token", np.array(words, dtype=object)),
        }
        self.n_experts = probs.shape[-1]
        self.expert_ids, self.expert_weights = (
            xr.DataArray(x, dims=("layer", "token", "slot"), coords=coords) for x in (ids, weights)
        )
        self.margin = xr.DataArray(
            scores[..., -k] - scores[..., -k - 1], dims=("layer", "token"), coords=coords
        )


def diff(**given):
    return routing_diff(Made(**given), Made(**given, noise=0.3), n_draws=50)


def test_every_panel_shows_the_numbers():
    found = diff()
    view = plots.plot_routing_diff(found, called=("float32", "bfloat16"), model="m", sequence=1)
    above, _, layer, margin = view.figure.axes
    (image,) = above.images
    np.testing.assert_allclose(image.get_array(), found.flips.values[:, 10:])
    assert [t.get_text() for t in above.get_yticklabels()] == ["1", "2", "3"]
    np.testing.assert_allclose(layer.lines[0].get_ydata(), 100 * found.by_layer["flips"])
    assert [t.get_text() for t in layer.get_xticklabels()] == ["1", "2", "3"]
    heights = [bar.get_height() for bar in margin.patches]
    np.testing.assert_allclose(heights, 100 * found.by_margin["flips"])
    assert margin.get_xlabel() == "margin in float32 (probability)"
    marks = [c for c in above.collections if isinstance(c, PathCollection)]
    first = found.first_layer.values[10:]
    assert len(marks[0].get_offsets()) == np.isfinite(first).sum()
    assert "bfloat16 against float32, 20 tokens of 2 documents" in view.caption
    assert "sequence 1 of 2" in view.caption and "No noise floor" in view.caption
    n = int(np.isfinite(found.first_layer).sum())
    assert f"{n} of 20 tokens diverge in some of 3 layers" in view.alt
    assert view.png().startswith(b"\x89PNG")


def test_the_noise_floor_is_drawn_where_there_is_one():
    same = [Made() for _ in range(8)]
    found = routing_diff(Made(), Made(noise=0.3), equivalent=same, n_draws=50)
    view = plots.plot_routing_diff(found)
    assert "Orange: the noise floor, which 8 runs" in view.caption
    floors = [c for c in view.figure.axes[2].collections if len(c.get_segments()) == 3]
    assert len(floors) == 2  # intervals and floors


def test_hard_tokens_can_be_drawn():
    found = diff(length=len(HARD_TOKENS), n_sequences=1)
    view = plots.plot_routing_diff(found, tokens=HARD_TOKENS)
    drawn = [t.get_text() for t in view.figure.axes[0].get_xticklabels()]
    assert drawn[1].startswith("<scrip") and "⏎" in drawn
    assert view.png().startswith(b"\x89PNG")


def test_no_difference_is_said():
    view = plots.plot_routing_diff(routing_diff(Made(), Made(), n_draws=50))
    words = [text.get_text() for text in view.figure.axes[0].texts]
    assert words == ["no token of this sequence has another expert in any layer"]
    assert "0 of 20 tokens diverge" in view.alt


def test_without_margins_and_with_far_apart_routings():
    a = Made(n_experts=8, k=2)
    other = Made(n_experts=8, k=2, seed=3)
    a.margin = None
    view = plots.plot_routing_diff(routing_diff(a, other, n_draws=50))
    assert [t.get_text() for t in view.figure.axes[3].texts] == ["a has no margins"]
    assert [t.get_text() for t in view.figure.axes[2].texts] == ["two lots"]


def test_as_large_as_a_released_model():
    found = diff(n_layers=28, length=160, n_sequences=1, n_experts=64, k=6)
    view = plots.plot_routing_diff(found)
    assert view.figure.get_size_inches()[0] < 18
    assert len(view.png()) < 400_000
    assert "One document, so no intervals." in view.caption


def test_what_is_refused():
    found = diff(length=200, n_sequences=1)
    with pytest.raises(ValueError, match=r"200 tokens to draw.*window=\(0, 160\)"):
        plots.plot_routing_diff(found)
    view = plots.plot_routing_diff(found, window=(20, 30))
    assert view.figure.axes[0].images[0].get_array().shape == (3, 10)
    with pytest.raises(ValueError, match=r"sequence=7: the diff has sequences 0"):
        plots.plot_routing_diff(found, sequence=7)
    with pytest.raises(ValueError, match="70 layers, at most 64"):
        plots.plot_routing_diff(diff(n_layers=70, length=4))
