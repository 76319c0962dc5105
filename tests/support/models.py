"""Small random models, big enough that every part does something visible."""

from typing import Any

import torch

from ernie_lab.checkpoint.config import (
    AttentionConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    TextConfig,
)
from ernie_lab.model.initial import initialise
from ernie_lab.model.text import TextModel


def small_config(**overrides: Any) -> TextConfig:
    """3 layers (first dense), 4 query heads over 2, 8 experts top-2, 2 shared."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "width": 32,
        "n_layers": 3,
        "dense_hidden": 48,
        "attention": AttentionConfig(width=32, n_heads=4, n_kv_heads=2, head_dim=8),
        "rope": RopeConfig(theta=500000.0, max_positions=512),
        "moe": MoEConfig(
            layers=(1, 2),
            router=RouterConfig(width=32, n_experts=8, n_chosen=2),
            expert_hidden=16,
            n_shared=2,
        ),
    }
    return TextConfig(**{**fields, **overrides})


def small_model(seed: int = 0, **overrides: Any) -> TextModel:
    """Weights of deviation 0.3, so that softmaxes are peaked; a bias that changes choices."""
    model = TextModel(small_config(**overrides))
    initialise(model, seed, std=0.3)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
