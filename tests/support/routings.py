"""Routings made by hand: anything with expert_ids (layer, token, slot) and token coordinates."""

from types import SimpleNamespace

import numpy as np
import xarray as xr


def routing(ids, *, layers=None, sequence=None, text=None, weights=None, n_experts=None, **coords):
    """`ids` `[l n k]`; `sequence`, `text` and others have one value for each token."""
    ids = np.asarray(ids)
    n_layers, n_tokens, k = ids.shape
    sequence = np.zeros(n_tokens, int) if sequence is None else np.asarray(sequence)
    own = {
        "layer": list(range(1, n_layers + 1)) if layers is None else layers,
        "sequence": ("token", sequence),
        "pos": ("token", np.array([(sequence[:i] == one).sum() for i, one in enumerate(sequence)])),
        "text": ("token", np.array(["x"] * n_tokens if text is None else text, dtype=object)),
    }
    own |= {name: ("token", np.array(values)) for name, values in coords.items()}
    values = np.full(ids.shape, 1 / k) if weights is None else np.asarray(weights)

    def labelled(array):
        return xr.DataArray(array, dims=("layer", "token", "slot"), coords=own)

    return SimpleNamespace(
        expert_ids=labelled(ids),
        expert_weights=labelled(values),
        n_experts=int(ids.max()) + 1 if n_experts is None else n_experts,
    )


def by_lot(n_layers, n_tokens, n_experts, k, *, n_documents=8, seed=0, **coords):
    """Every token chooses uniformly, in every layer anew."""
    rng = np.random.default_rng(seed)
    ids = rng.random((n_layers, n_tokens, n_experts)).argsort(-1)[..., :k]
    sequence = np.sort(np.arange(n_tokens) % n_documents)
    return routing(ids, sequence=sequence, n_experts=n_experts, **coords)
