"""Inputs that every figure has to survive."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import xarray as xr

# Markup, mathtext, whitespace, stray bytes, Chinese, right-to-left, direction marks, emoji, empty.
HARD_TOKENS = [
    " the", "<script>alert(1)</script>", "$x^2$", "$", "\\frac", "\n", "\t", "  ", "<0xE4>",
    "\udce4", "植物", "שלום", " عليكم", "\u202eevil", "🙂", "", "\u0301", "\x00", "a" * 40, "&amp;",
]  # fmt: skip


def routing(n_layers=3, n_tokens=20, n_experts=16, k=4, bias=0.0, seed=0):
    """ids, weights, probs, bias: (layer, token, slot | expert)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (n_layers, n_tokens, n_experts))
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    bias_LE = rng.normal(0, bias, (n_layers, n_experts))
    ids = np.argsort(-(probs + bias_LE[:, None]), axis=-1)[..., :k]
    weights = np.take_along_axis(probs, ids, -1)
    return ids, weights / weights.sum(-1, keepdims=True), probs, bias_LE


def attention(n_heads=2, n_tokens=20, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.normal(0, 2, (n_heads, n_tokens, n_tokens))
    scores[:, *np.triu_indices(n_tokens, 1)] = -np.inf
    weights = np.exp(scores)
    return weights / weights.sum(-1, keepdims=True)


class Ledger:
    """The arrays of one bank, as a RoutingLedger gives them."""

    def __init__(self, tokens, layers, n_experts, k, seed):
        ids, weights, probs, bias = routing(len(layers), len(tokens), n_experts, k, 0.03, seed)
        coords = {name: ("token", tokens[name].to_numpy()) for name in ("sequence", "pos", "text")}
        coords["phase"] = ("token", tokens["phase"].to_numpy(object))
        coords["layer"] = layers

        def labelled(values, *last):
            return xr.DataArray(values, dims=("layer", "token", *last), coords=coords)

        self.expert_ids, self.expert_weights = labelled(ids, "slot"), labelled(weights, "slot")
        self.router_probs = labelled(probs, "expert")
        self.router_logits = labelled(np.log(probs), "expert")
        scores = np.sort(probs + bias[:, None], axis=-1)
        self.margin = labelled(scores[..., -k] - scores[..., -k - 1])
        self.correction_bias = xr.DataArray(
            bias, dims=("layer", "expert"), coords={"layer": layers}
        )


def scene(height, width, n_frames=1, seed=0):
    """A sky, a sun, a field and a house: something to recognise, with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    frames = []
    for i in range(n_frames):
        picture = np.empty((height, width, 3))
        picture[:] = np.where((y < 0.6)[..., None], (120, 180, 235), (96, 150, 70))
        picture[(x - 0.2 - 0.1 * i) ** 2 + (y - 0.2) ** 2 < 0.012] = (250, 220, 60)
        picture[(abs(x - 0.68) < 0.14) & (y > 0.42) & (y < 0.75)] = (176, 66, 50)
        picture[(abs(x - 0.68) < 0.18 - (0.42 - y)) & (y > 0.28) & (y < 0.42)] = (70, 50, 50)
        frames.append(np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255))
    return np.stack(frames).astype(np.uint8)


class VisionTrace:
    """A stand-in for the trace of a vision-language model: text, a picture, text, an answer."""

    banks = ("text", "vision")

    def __init__(
        self, rows=4, cols=4, n_experts=8, k=2, layers=(1, 2), n_frames=1, n_heads=3, seed=0
    ):
        self.n_experts, self.n_chosen = n_experts, k
        before, after = ["<s>", "User", ":", " "], ["\n", "What", " is", " this", "?", " A"]
        self.answer = [" house", "."]
        kind = "image" if n_frames == 1 else "video"
        pairs = max(1, n_frames // 2)
        records = [{"text": text, "content": "text"} for text in before]
        records.append({"text": "<|IMAGE_START|>", "content": "delimiter"})
        records += [
            {
                "text": "<|IMAGE_PLACEHOLDER|>", "content": kind, "image": 0,
                "frame": 2 * pair, "row": row, "col": col,
            }
            for pair in range(pairs) for row in range(rows) for col in range(cols)
        ]  # fmt: skip
        records.append({"text": "<|IMAGE_END|>", "content": "delimiter"})
        records += [{"text": text, "content": "text"} for text in after + self.answer]
        table = pd.DataFrame(records)
        for name in ("image", "frame", "row", "col"):
            table[name] = table[name].astype("Int64")
        table["sequence"] = 0
        table["pos"] = table["id"] = range(len(table))
        table["bank"] = np.where(table["content"] == "text", "text", "vision")
        table["modality"] = table["content"].replace("delimiter", "text")
        table["phase"] = ["prefill"] * (len(table) - 2) + ["decode"] * 2
        self.tokens = table
        self.first = len(before) + 1
        frames = scene(28 * rows, 28 * cols, n_frames)
        times = tuple(0.5 * i for i in range(n_frames)) if n_frames > 1 else ()
        self.media = (
            SimpleNamespace(
                kind=kind, grid=(n_frames, 2 * rows, 2 * cols), frames=frames,
                original_size=frames.shape[1:3], timestamps=times, sequence=0, start=self.first,
            ),
        )  # fmt: skip
        self.ledgers = {
            bank: Ledger(table[table["bank"] == bank], list(layers), n_experts, k, seed + i)
            for i, bank in enumerate(self.banks)
        }
        self.provenance = SimpleNamespace(model="stand-in")
        self.layers, self.n_heads, self.seed = layers, n_heads, seed

    def routing(self, bank=None):
        if bank is None:
            raise ValueError("two banks")
        return self.ledgers[bank]

    def __contains__(self, key):
        return key[1] in self.layers

    def pattern(self, layer, sequence=None):
        if layer not in self.layers:
            raise ValueError(f"layer {layer} was not kept")
        maps = attention(self.n_heads, len(self.tokens), self.seed + layer)
        coords = {}
        for axis in ("query", "key"):
            for name in ("sequence", "pos", "text", "phase"):
                coords[f"{axis}_{name}"] = (axis, self.tokens[name].to_numpy(object))
        return xr.DataArray(
            maps, dims=("head", "query", "key"), coords={"head": range(self.n_heads), **coords}
        )
