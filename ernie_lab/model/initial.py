"""Random weights."""

from __future__ import annotations

import re

import torch
from torch import nn


@torch.no_grad()
def initialise(model: nn.Module, seed: int, std: float = 0.02) -> None:
    """Fill every parameter: gains 1, biases 0, all else normal with deviation `std`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("gain_D") or re.search(r"norm\d?\.weight$", name):
            parameter.fill_(1.0)
        elif "bias" in name:
            parameter.zero_()
        else:
            drawn = torch.empty(parameter.shape).normal_(0.0, std, generator=generator)
            parameter.copy_(drawn)
