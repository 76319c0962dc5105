"""Every parameter's name and shape from the config alone, without building the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ernie_lab.checkpoint.config import (
    AttentionConfig,
    ModelConfig,
    MoEConfig,
    TextConfig,
    VisionConfig,
    VLConfig,
)

Shape = tuple[int, ...]


def parameter_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """The parameters of the model; equal to the built module's, which a test checks."""
    if isinstance(config, TextConfig):
        return dict(_decoder(config))
    return dict(
        [
            *_decoder(config.text, vision_expert_hidden=config.vision_expert_hidden),
            *_tower("vision", config.vision),
            *_resampler("resampler", config),
        ]
    )


def _decoder(
    config: TextConfig, vision_expert_hidden: int | None = None
) -> Iterator[tuple[str, Shape]]:
    """With `vision_expert_hidden` the mixture layers have two banks."""
    yield "embed_VD", (config.vocab_size, config.width)
    for layer in range(config.n_layers):
        block = f"blocks.{layer}"
        yield f"{block}.norm1.gain_D", (config.width,)
        yield from _attention(f"{block}.attn", config.attention)
        yield f"{block}.norm2.gain_D", (config.width,)
        if config.moe is not None and config.is_moe(layer):
            moe = config.moe
            if vision_expert_hidden is None:
                yield from _bank(f"{block}.moe", moe, moe.expert_hidden)
            else:
                yield from _bank(f"{block}.moe.text", moe, moe.expert_hidden)
                yield from _bank(f"{block}.moe.vision", moe, vision_expert_hidden)
            if moe.n_shared:
                shared = f"{block}.moe.shared"
                yield from _mlp(shared, config.width, moe.shared_hidden, config.use_bias)
        else:
            yield from _mlp(f"{block}.mlp", config.width, config.dense_hidden, config.use_bias)
    yield "final_norm.gain_D", (config.width,)
    if not config.tied:
        yield "unembed_VD", (config.vocab_size, config.width)
    if config.head_bias:
        yield "unembed_bias_V", (config.vocab_size,)


def _attention(path: str, config: AttentionConfig) -> Iterator[tuple[str, Shape]]:
    queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    yield from _linear(f"{path}.q", config.width, queries, config.use_bias)
    yield from _linear(f"{path}.k", config.width, keys, config.use_bias)
    yield from _linear(f"{path}.v", config.width, keys, config.use_bias)
    yield from _linear(f"{path}.o", queries, config.width, config.use_bias)


def _bank(path: str, moe: MoEConfig, hidden: int) -> Iterator[tuple[str, Shape]]:
    n_experts, width = moe.router.n_experts, moe.router.width
    yield f"{path}.router.weight_ED", (n_experts, width)
    yield f"{path}.router.correction_bias_E", (n_experts,)
    yield f"{path}.experts.gate_up_E2FD", (n_experts, 2, hidden, width)
    yield f"{path}.experts.down_EDF", (n_experts, width, hidden)


def _mlp(path: str, width: int, hidden: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield from _linear(f"{path}.gate", width, hidden, bias)
    yield from _linear(f"{path}.up", width, hidden, bias)
    yield from _linear(f"{path}.down", hidden, width, bias)


def _tower(path: str, config: VisionConfig) -> Iterator[tuple[str, Shape]]:
    width, n_pixels = config.width, config.in_channels * config.patch_size**2
    yield from _linear(f"{path}.patch_embed", n_pixels, width, bias=False)
    for layer in range(config.depth):
        block = f"{path}.blocks.{layer}"
        yield from _layer_norm(f"{block}.norm1", width)
        yield from _linear(f"{block}.attn.qkv", width, 3 * width, bias=True)
        yield from _linear(f"{block}.attn.o", width, width, bias=True)
        yield from _layer_norm(f"{block}.norm2", width)
        yield from _linear(f"{block}.mlp.up", width, config.hidden, bias=True)
        yield from _linear(f"{block}.mlp.down", config.hidden, width, bias=True)
    yield from _layer_norm(f"{path}.final_norm", width)


def _resampler(path: str, config: VLConfig) -> Iterator[tuple[str, Shape]]:
    # The patches of one merged block side by side; of a pair of frames, two such blocks.
    merged = config.vision.width * config.vision.merge_size**2
    joined = {"spatial": merged, "temporal": merged * config.vision.temporal_merge_size}
    for stage, n_in in joined.items():
        yield from _linear(f"{path}.{stage}.up", n_in, merged, bias=True)
        yield from _linear(f"{path}.{stage}.down", merged, merged, bias=True)
        yield from _layer_norm(f"{path}.{stage}.norm", merged)
    yield from _linear(f"{path}.project", merged, config.text.width, bias=True)
    yield f"{path}.norm.gain_D", (config.text.width,)


def _layer_norm(path: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.weight", (width,)
    yield f"{path}.bias", (width,)


def _linear(path: str, n_in: int, n_out: int, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{path}.weight", (n_out, n_in)
    if bias:
        yield f"{path}.bias", (n_out,)
