"""The two kinds of model, by their config."""

from __future__ import annotations

from typing import TypeAlias

from ernie_lab.checkpoint.config import ModelConfig, TextConfig
from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import VLModel

Model: TypeAlias = TextModel | VLModel


def build(config: ModelConfig) -> Model:
    """An unfilled model: use it under `torch.device("meta")` and let `fill` give it weights."""
    return TextModel(config) if isinstance(config, TextConfig) else VLModel(config)
