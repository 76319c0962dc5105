"""Transformers-native vision-language configs, read and written: text and vision nested.

Absent fields take the defaults of its classes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ernie_lab.checkpoint.config import ConfigError, TextConfig, VisionConfig, VLConfig
from ernie_lab.checkpoint.fields import Raw, integer, number, refuse_unknown, size
from ernie_lab.checkpoint.rope_json import rope_block
from ernie_lab.checkpoint.text_config_json import (
    DECODER_FIELDS,
    MOE_FIELDS,
    read_decoder,
    read_head_dim,
    read_moe,
    without_aliases,
    write_decoder,
    write_experts,
)
from ernie_lab.checkpoint.vl_fields import (
    AXIAL_THETA,
    CLASS,
    DELIMITER_IDS,
    IMAGE_ID,
    NORM_EPS,
    TEMPORAL_MERGE,
    VISION_FIXED,
    VL_FIXED,
    agree,
    pair,
    read_ids,
    read_rope_3d,
    section,
    write_ids,
)

TRANSFORMERS_TYPE = "ernie4_5_vl_moe"
_VIDEO_ID = 103367
_N_SHARED = 2
_LOOP_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def read_transformers_vl(raw: Raw, ignore: Collection[str] = ()) -> VLConfig:
    known = {"model_type", "text_config", "vision_config", "tie_word_embeddings", *DELIMITER_IDS}
    known |= {"image_token_id", "video_token_id", *_LOOP_IDS}
    refuse_unknown(raw, known, ignore=ignore)
    text = without_aliases(section(raw, "text_config"))
    refuse_unknown(
        text,
        DECODER_FIELDS | MOE_FIELDS | {"mlp_layer_types"},
        fixed=VL_FIXED,
        ignore=ignore,
        within="text_config",
    )
    text.setdefault("moe_num_shared_experts", _N_SHARED)
    # The outer class is the one that ties and generates.
    text["tie_word_embeddings"] = raw.get("tie_word_embeddings")
    text |= {name: raw[name] for name in _LOOP_IDS if raw.get(name) is not None}
    text_hidden, vision_hidden = pair(text, "moe_intermediate_size")
    head_dim = read_head_dim(text)
    moe = read_moe({**text, "moe_intermediate_size": text_hidden}, _sparse_layers(text))
    return VLConfig(
        text=read_decoder(text, head_dim, read_rope_3d(text, head_dim), moe, head_bias=False),
        vision=_read_tower(section(raw, "vision_config"), ignore),
        ids=read_ids(
            raw,
            image=integer(raw, "image_token_id", IMAGE_ID),
            video=integer(raw, "video_token_id", _VIDEO_ID),
        ),
        vision_expert_hidden=vision_hidden,
    )


def _sparse_layers(text: Raw) -> tuple[int, ...]:
    n_layers = size(text, "num_hidden_layers")
    kinds = text.get("mlp_layer_types") or ["dense"] + ["sparse"] * (n_layers - 1)
    if len(kinds) != n_layers or not set(kinds) <= {"dense", "sparse"}:
        raise ConfigError(
            f"mlp_layer_types={kinds!r} must be 'dense' or 'sparse' for each of {n_layers} layers"
        )
    return tuple(i for i, kind in enumerate(kinds) if kind == "sparse")


def _read_tower(tower: Raw, ignore: Collection[str]) -> VisionConfig:
    known = {
        "model_type",
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "spatial_merge_size",
        "temporal_merge_size",
        "in_channels",
        "rms_norm_eps",
        "rope_parameters",
    }
    refuse_unknown(tower, known, fixed=VISION_FIXED, ignore=ignore, within="vision_config")
    rope = rope_block(tower)
    if rope.get("rope_type", "axial") not in ("axial", "default"):
        raise ConfigError(f"vision rope type {rope['rope_type']!r} is not supported: axial is")
    height, width = pair(tower, "patch_size", 14)
    agree("height and width of a patch", height, width)
    return VisionConfig(
        depth=size(tower, "depth", 32),
        width=size(tower, "hidden_size", 1280),
        hidden=size(tower, "intermediate_size", 5120),
        n_heads=size(tower, "num_heads", 16),
        patch_size=height,
        merge_size=size(tower, "spatial_merge_size", 2),
        temporal_merge_size=size(tower, "temporal_merge_size", TEMPORAL_MERGE),
        in_channels=size(tower, "in_channels", 3),
        norm_eps=number(tower, "rms_norm_eps", NORM_EPS),
        rope_theta=number(rope, "rope_theta", AXIAL_THETA),
    )


def write_transformers_vl(config: VLConfig, dtype: str) -> dict[str, Any]:
    """Transformers' spelling. What it cannot say is left out: `write_config` compares."""
    return {
        "architectures": [CLASS],
        "model_type": TRANSFORMERS_TYPE,
        "dtype": dtype,
        "tie_word_embeddings": config.text.tied,
        "image_token_id": config.ids.image,
        "video_token_id": config.ids.video,
        **write_ids(config.ids),
        "text_config": _write_text(config.text, config.vision_expert_hidden),
        "vision_config": _write_tower(config.vision),
    }


def _write_text(text: TextConfig, vision_expert_hidden: int) -> dict[str, Any]:
    # VLConfig has checked both; they are optional of a text model alone.
    assert text.moe is not None
    assert text.rope.sections is not None
    return {
        "model_type": f"{TRANSFORMERS_TYPE}_text",
        **write_decoder(text),
        "max_position_embeddings": text.rope.max_positions,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": text.rope.theta,
            "mrope_section": list(text.rope.sections),
        },
        **write_experts(text.moe),
        "moe_intermediate_size": [text.moe.expert_hidden, vision_expert_hidden],
        "mlp_layer_types": ["sparse" if text.is_moe(i) else "dense" for i in range(text.n_layers)],
        "router_aux_loss_coef": text.moe.aux_loss_coef,
    }


def _write_tower(tower: VisionConfig) -> dict[str, Any]:
    return {
        "model_type": f"{TRANSFORMERS_TYPE}_vision",
        "depth": tower.depth,
        "hidden_size": tower.width,
        "intermediate_size": tower.hidden,
        "hidden_act": tower.activation,
        "num_heads": tower.n_heads,
        "patch_size": tower.patch_size,
        "spatial_merge_size": tower.merge_size,
        "temporal_merge_size": tower.temporal_merge_size,
        "in_channels": tower.in_channels,
        "rms_norm_eps": tower.norm_eps,
        "rope_parameters": {"rope_type": "axial", "rope_theta": tower.rope_theta},
    }
