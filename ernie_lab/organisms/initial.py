"""Initial weights. With a seed they are also the untrained twin that every comparison needs."""

from __future__ import annotations

import math

import torch

from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import VLModel

# Routers start small, undecided, so that the balancing rule has time to act. Embeddings start about
# as large as what the first layer adds to them, or the token itself would drown in its context.
ROUTER_STD, EMBEDDING_STD = 0.02, 0.1


@torch.no_grad()
def initialise(model: TextModel | VLModel, seed: int, std: float) -> None:
    """Normal weights; what writes to the residual stream is divided by sqrt(2 x layers)."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("gain_D"):
            parameter.fill_(1.0)
        elif "bias" in name:
            parameter.zero_()
        else:
            parameter.normal_(
                0.0, deviation(name, model.config.decoder.n_layers, std), generator=generator
            )


def deviation(name: str, n_layers: int, std: float) -> float:
    if "embed" in name:
        return EMBEDDING_STD
    if "router" in name:
        return ROUTER_STD
    writes = "down" in name or ".o." in name
    return std / math.sqrt(2 * n_layers) if writes else std
