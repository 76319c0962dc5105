"""Text configs as the released and the transformers-native files write them, and back.

Absent fields take transformers' defaults, with one exception that the released 300B needs:
no `moe_num_shared_experts` means no shared experts. Sizes have no default.
"""

from __future__ import annotations

from collections.abc import Collection
from types import MappingProxyType
from typing import Any

from ernie_lab.checkpoint.config import (
    AttentionConfig,
    ConfigError,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    SpecialIds,
    TextConfig,
)
from ernie_lab.checkpoint.fields import Raw, flag, integer, number, refuse_unknown, size
from ernie_lab.checkpoint.rope_json import ROPE_FIELDS, read_rope, write_rope

MOE_TYPE = "ernie4_5_moe"
DENSE_TYPE = "ernie4_5"
_CLASSES = MappingProxyType(
    {MOE_TYPE: "Ernie4_5_MoeForCausalLM", DENSE_TYPE: "Ernie4_5ForCausalLM"}
)

# transformers gives the dense class this width of a head where its field is absent.
_DENSE_HEAD_DIM = 128

# Names transformers accepts for the same fields.
_ALIASES = MappingProxyType({"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"})

DECODER_FIELDS = ROPE_FIELDS | {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_bias",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
}
MOE_FIELDS = frozenset(
    {
        "moe_num_experts",
        "moe_k",
        "moe_intermediate_size",
        "moe_num_shared_experts",
        "moe_layer_start_index",
        "moe_layer_end_index",
        "moe_layer_interval",
        "moe_norm_min",
        "router_aux_loss_coef",
    }
)


def read_moe_text(raw: Raw, ignore: Collection[str] = ()) -> TextConfig:
    raw = without_aliases(raw)
    refuse_unknown(raw, DECODER_FIELDS | MOE_FIELDS, ignore=ignore)
    n_layers = size(raw, "num_hidden_layers")
    layers = mixture_layers(
        start=integer(raw, "moe_layer_start_index", 1),
        end=integer(raw, "moe_layer_end_index", -1),
        interval=integer(raw, "moe_layer_interval", 1),
        n_layers=n_layers,
    )
    head_dim = read_head_dim(raw)
    return read_decoder(
        raw,
        head_dim,
        read_rope(raw, head_dim),
        read_moe(raw, layers),
        head_bias=flag(raw, "use_bias", False),
    )


def read_dense_text(raw: Raw, ignore: Collection[str] = ()) -> TextConfig:
    refuse_unknown(raw, DECODER_FIELDS, ignore=ignore)
    head_dim = read_head_dim({"head_dim": _DENSE_HEAD_DIM, **raw})
    return read_decoder(raw, head_dim, read_rope(raw, head_dim), None, head_bias=False)


def without_aliases(raw: Raw) -> dict[str, Any]:
    """The fields under their released names; an alias that disagrees with one is refused."""
    named = dict(raw)
    for alias, name in _ALIASES.items():
        value = named.pop(alias, None)
        if value is not None and named.setdefault(name, value) != value:
            raise ConfigError(f"{alias}={value!r} disagrees with {name}={named[name]!r}; keep one")
    return named


def mixture_layers(start: int, end: int, interval: int, n_layers: int) -> tuple[int, ...]:
    """Layers i with (i + 1) % interval == 0 and start <= i <= end; -1 ends at the last layer.

    An end beyond the last layer is no error: 28B says 29 of its 28 layers, because two were
    dropped after training.
    """
    if interval < 1 or end < -1 or start < 0:
        raise ConfigError(
            f"mixture layers from {start} to {end} by {interval}: expected a start >= 0, "
            "an end >= 0 or -1 for the last layer, and an interval >= 1"
        )
    last = n_layers - 1 if end == -1 else end
    return tuple(i for i in range(n_layers) if (i + 1) % interval == 0 and start <= i <= last)


def read_moe(raw: Raw, layers: tuple[int, ...]) -> MoEConfig:
    return MoEConfig(
        layers=layers,
        router=RouterConfig(
            width=size(raw, "hidden_size"),
            n_experts=size(raw, "moe_num_experts"),
            n_chosen=size(raw, "moe_k"),
            min_weight_sum=number(raw, "moe_norm_min", 1e-12),
        ),
        expert_hidden=size(raw, "moe_intermediate_size"),
        n_shared=integer(raw, "moe_num_shared_experts", 0),
        aux_loss_coef=number(raw, "router_aux_loss_coef", 0.001),
    )


def read_head_dim(raw: Raw) -> int:
    width, n_heads = size(raw, "hidden_size"), size(raw, "num_attention_heads")
    if raw.get("head_dim") is None and width % n_heads:
        raise ConfigError(
            f"hidden_size={width} is not a multiple of num_attention_heads={n_heads}; such a "
            "config must give head_dim"
        )
    return size(raw, "head_dim", width // n_heads)


def read_decoder(
    raw: Raw, head_dim: int, rope: RopeConfig, moe: MoEConfig | None, head_bias: bool
) -> TextConfig:
    """What all text decoders share. `head_bias` depends on transformers' class, not on a field."""
    n_heads = size(raw, "num_attention_heads")
    if "num_key_value_heads" not in raw:
        raise ConfigError(
            "config lacks 'num_key_value_heads'; give it, or null for one per query head"
        )
    use_bias = flag(raw, "use_bias", False)
    return TextConfig(
        vocab_size=size(raw, "vocab_size"),
        width=size(raw, "hidden_size"),
        n_layers=size(raw, "num_hidden_layers"),
        dense_hidden=size(raw, "intermediate_size"),
        attention=AttentionConfig(
            width=size(raw, "hidden_size"),
            n_heads=n_heads,
            n_kv_heads=size(raw, "num_key_value_heads", n_heads),
            head_dim=head_dim,
            use_bias=use_bias,
        ),
        rope=rope,
        moe=moe,
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tied=flag(raw, "tie_word_embeddings", True),
        head_bias=head_bias,
        ids=_read_ids(raw),
    )


def _read_ids(raw: Raw) -> SpecialIds:
    """Absent ids take the defaults of the text classes; null means that there is no such id."""
    return SpecialIds(
        pad=_one_id(raw, "pad_token_id", 0),
        bos=_one_id(raw, "bos_token_id", 1),
        eos=_several_ids(raw, "eos_token_id", 2),
    )


def _one_id(raw: Raw, name: str, default: int) -> int | None:
    ids = _several_ids(raw, name, default)
    if len(ids) > 1:
        raise ConfigError(f"config field {name}={list(ids)} must be one id or null")
    return ids[0] if ids else None


def _several_ids(raw: Raw, name: str, default: int) -> tuple[int, ...]:
    value = raw.get(name, default)
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in ids):
        raise ConfigError(f"config field {name}={value!r} must be token ids or null")
    return ids


def write_text(config: TextConfig, dtype: str) -> dict[str, Any]:
    """The released spelling of a text config; reading it gives `config` back."""
    model_type = DENSE_TYPE if config.moe is None else MOE_TYPE
    expected_bias = config.use_bias and config.moe is not None
    if config.head_bias != expected_bias:
        raise ConfigError(
            f"head_bias={config.head_bias} cannot be written: a {model_type} checkpoint with "
            f"use_bias={config.use_bias} has head_bias={expected_bias}"
        )
    if config.rope.sections is not None:
        raise ConfigError("a text config cannot carry rope sections; they belong to VL models")
    return {
        "architectures": [_CLASSES[model_type]],
        "model_type": model_type,
        "torch_dtype": dtype,
        **write_decoder(config),
        **write_rope(config.rope),
        **(_write_moe(config.moe) if config.moe else {}),
    }


def write_decoder(config: TextConfig) -> dict[str, Any]:
    """What `read_decoder` reads, rope and experts aside."""
    attention, eos = config.attention, config.ids.eos
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.dense_hidden,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": attention.n_heads,
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "use_bias": config.use_bias,
        "pad_token_id": config.ids.pad,
        "bos_token_id": config.ids.bos,
        "eos_token_id": (eos[0] if len(eos) == 1 else list(eos)) if eos else None,
    }


def _write_moe(moe: MoEConfig) -> dict[str, Any]:
    return {
        **write_experts(moe),
        **write_layers(moe),
        "router_aux_loss_coef": moe.aux_loss_coef,
    }


def write_experts(moe: MoEConfig) -> dict[str, Any]:
    return {
        "moe_num_experts": moe.router.n_experts,
        "moe_k": moe.router.n_chosen,
        "moe_norm_min": moe.router.min_weight_sum,
        "moe_intermediate_size": moe.expert_hidden,
        "moe_num_shared_experts": moe.n_shared,
    }


def write_layers(moe: MoEConfig) -> dict[str, int]:
    """Start, end and interval of the mixture layers, or `ConfigError` where there are none."""
    first, last, step = moe.layers[0], moe.layers[-1], 1
    if len(moe.layers) > 1:
        step = moe.layers[1] - first
    if moe.layers != mixture_layers(first, last, step, last + 1):
        raise ConfigError(
            f"mixture layers {moe.layers} have no start, end and interval: such files mean the "
            "layers i with (i + 1) % interval == 0"
        )
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": step,
    }
