"""The untrained twin of a model: what the architecture alone gives, before any training."""

from __future__ import annotations

import dataclasses

import torch

from ernie_lab.lab import Lab
from ernie_lab.model.kinds import build
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.seeing import eye
from ernie_lab.organisms.initial import initialise


@torch.no_grad()
def untrained_twin(lab: Lab, seed: int = 0, *, std: float = 0.06) -> Lab:
    """A lab of the same config, tokenizer and preprocessing, with random weights.

    Of a vision-language model the tower and the resampler stay as they are: the built-in models
    were trained with their eye ready and frozen, so that pictures enter the twin as they enter
    the model, and what differs is the decoder. `std` is that of the built-in recipes (with
    seed 0 the twin is where `tiny-vl` began); a released model began from another.
    """
    model = build(lab.config)
    initialise(model, seed, std)
    if isinstance(model, VLModel):
        assert isinstance(lab.model, VLModel)
        kept = dict(eye(lab.model))
        for name, parameter in eye(model):
            parameter.copy_(kept[name])
    model = model.to(device=lab.device, dtype=lab.dtype).eval()
    return dataclasses.replace(lab, model=model, model_id=f"{lab.model_id}, untrained", report=None)
