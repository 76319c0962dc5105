"""What a forward takes beside the weights: keys and values of the past, and activations."""

from __future__ import annotations

import math

import torch

from ernie_lab.checkpoint.config import ModelConfig, VLConfig
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.checkpoint.shapes import parameter_shapes


def cache_bytes(
    config: ModelConfig, context: int, batch: int, dtype: torch.dtype, n_kv_heads: int | None = None
) -> int:
    """Of one layer: keys and values `[b t g a]`. While a generation grows it, up to twice that."""
    attention = config.decoder.attention
    groups = attention.n_kv_heads if n_kv_heads is None else n_kv_heads
    return 2 * batch * context * groups * attention.head_dim * dtype.itemsize


def activation_bytes(
    config: ModelConfig,
    context: int,
    batch: int,
    dtype: torch.dtype,
    how: Quantisation | None = None,
) -> int:
    """The most that is alive at once in a forward of `batch` x `context` tokens, logits of all.

    Nothing recorded but the routing, no gradients, attention by the fused kernel. Counted tensor
    by tensor as `ernie_lab.model` makes them; tests hold it to what is alive on small models.
    Unseen are what kernels take inside themselves, and what an allocator leaves between tensors.
    """
    per_token = (
        dtype.itemsize * 7 * config.decoder.width  # the residual stream and its neighbours
        + max(_attention(config, dtype), dtype.itemsize * _widest(config))
        + _routing(config)
    )
    # More sequences than one are padded, and padding needs a mask: booleans, and as a summand.
    masks = batch * context**2 * (1 + dtype.itemsize) if batch > 1 else 0
    return batch * context * per_token + masks + _dequantised(config, dtype, how)


def _attention(config: ModelConfig, dtype: torch.dtype) -> int:
    attention = config.decoder.attention
    heads, groups = (
        attention.n_heads * attention.head_dim,
        attention.n_kv_heads * attention.head_dim,
    )
    return dtype.itemsize * (3 * heads + 4 * groups) + 8 * heads  # positions turn it in float32


def _widest(config: ModelConfig) -> int:
    """Numbers of one token in the widest of MLPs, experts, tower and logits."""
    text = config.decoder
    found = [text.vocab_size, 4 * text.dense_hidden if _has_dense(config) else 0]
    if text.moe is not None:
        k, moe = text.moe.router.n_chosen, text.moe
        hidden = max(moe.expert_hidden, *_vision_hidden(config))
        # Of all slots: inputs, gate, up, silu of the gate and the neurons; or the neurons, and
        # outputs by expert and by token.
        found.append(k * max(text.width + 4 * hidden, 2 * text.width + hidden))
        found.append(4 * moe.shared_hidden)
    if isinstance(config, VLConfig):
        vision = config.vision
        found.append(vision.merge_size**2 * (8 * vision.width + 2 * vision.hidden))
    return max(found)


def _vision_hidden(config: ModelConfig) -> tuple[int, ...]:
    return (config.vision_expert_hidden,) if isinstance(config, VLConfig) else (0,)


def _has_dense(config: ModelConfig) -> bool:
    text = config.decoder
    return text.moe is None or len(text.moe.layers) < text.n_layers


def _routing(config: ModelConfig) -> int:
    """Bytes a token: each layer's probabilities, experts and weights are kept for the losses."""
    moe = config.decoder.moe
    if moe is None:
        return 0
    n_experts, k = moe.router.n_experts, moe.router.n_chosen
    return len(moe.layers) * (4 * n_experts + 12 * k) + 12 * n_experts


def _dequantised(config: ModelConfig, dtype: torch.dtype, how: Quantisation | None) -> int:
    """The largest matrix that is made to multiply, with what it is made from, in float32."""
    if how is None:
        return 0
    shapes = [shape for name, shape in parameter_shapes(config).items() if how.takes(name, shape)]
    # Gate and up of an expert are made together.
    together = max(
        (math.prod(shape[1:] if len(shape) > 2 else shape) for shape in shapes), default=0
    )
    return together * dtype.itemsize + max((math.prod(s[-2:]) for s in shapes), default=0) * 8
