"""Routings made by hand: labelled arrays as a trace gives them, and nothing else."""

from types import SimpleNamespace

import numpy as np
import xarray as xr


def routing(probs, k, bias=None, *, layers=None, sequence=None, scores=None, ids=None):
    """Choices that follow from `probs` `[l n e]` and `bias` `[l e]`; logits are log(probs)."""
    probs = np.asarray(probs, dtype=float)
    n_layers, n_tokens, n_experts = probs.shape
    bias = np.zeros((n_layers, n_experts)) if bias is None else np.asarray(bias, dtype=float)
    layers = list(range(1, n_layers + 1)) if layers is None else layers
    sequence = np.zeros(n_tokens, int) if sequence is None else np.asarray(sequence)
    pos = np.concatenate([np.arange((sequence == s).sum()) for s in dict.fromkeys(sequence)])
    coords = {
        "layer": layers,
        "sequence": ("token", sequence),
        "pos": ("token", pos),
        "id": ("token", 10 + np.arange(n_tokens)),
        "phase": ("token", np.where(pos < 2, "prefill", "decode").astype(object)),
    }

    def labelled(values, *last):
        return xr.DataArray(values, dims=("layer", "token", *last), coords=coords)

    scores = probs + bias[:, None] if scores is None else np.asarray(scores, dtype=float)
    ids = np.argsort(-scores, axis=-1, kind="stable")[..., :k] if ids is None else np.asarray(ids)
    weights = np.take_along_axis(probs, ids, -1)
    ordered = -np.sort(-scores, axis=-1)
    return SimpleNamespace(
        expert_ids=labelled(ids, "slot"),
        expert_weights=labelled(weights / weights.sum(-1, keepdims=True), "slot"),
        router_probs=labelled(probs, "expert"),
        router_logits=labelled(np.log(probs), "expert"),
        selection_scores=labelled(scores, "expert"),
        margin=labelled(ordered[..., k - 1] - ordered[..., k])
        if k < n_experts
        else labelled(np.full(probs.shape[:2], np.nan)),
        correction_bias=xr.DataArray(bias, dims=("layer", "expert"), coords={"layer": layers}),
    )


def random_probs(n_layers=2, n_tokens=60, n_experts=8, seed=0):
    logits = np.random.default_rng(seed).normal(0, 1, (n_layers, n_tokens, n_experts))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
