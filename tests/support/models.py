"""Small random models, big enough that every part does something visible."""

from typing import Any, TypeVar

import torch

from ernie_lab.checkpoint.config import (
    AttentionConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    TextConfig,
    VisionConfig,
    VisualIds,
    VLConfig,
)
from ernie_lab.model.initial import initialise
from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import VLModel

Model = TypeVar("Model", TextModel, VLModel)


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
    return _filled(TextModel(small_config(**overrides)), seed)


def small_vl_config(**overrides: Any) -> VLConfig:
    """`small_config` with two banks, the experts of the vision bank narrower, and a tower of 2."""
    fields: dict[str, Any] = {
        "text": small_config(
            rope=RopeConfig(theta=500000.0, max_positions=512, sections=(1, 1, 2))
        ),
        "vision": VisionConfig(
            depth=2,
            width=24,
            hidden=40,
            n_heads=2,
            patch_size=2,
            merge_size=2,
            temporal_merge_size=2,
        ),
        "ids": VisualIds(
            image=50, video=51, image_start=52, image_end=53, video_start=54, video_end=55
        ),
        "vision_expert_hidden": 12,
    }
    return VLConfig(**{**fields, **overrides})


def small_vl_model(seed: int = 0, **overrides: Any) -> VLModel:
    """As `small_model`, with pictures."""
    return _filled(VLModel(small_vl_config(**overrides)), seed)


def _filled(model: Model, seed: int) -> Model:
    initialise(model, seed, std=0.3)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()
