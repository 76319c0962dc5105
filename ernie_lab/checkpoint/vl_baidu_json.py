"""Baidu's own vision-language configs, read and written: all text fields at the top.

A field of a bank is one value for both, or a list of two: text, then vision. Where the files
leave a field out, the default of Baidu's own config class holds (ernie-facts 1.3).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ernie_lab.checkpoint.config import VisionConfig, VLConfig
from ernie_lab.checkpoint.fields import Raw, integer, number, refuse_unknown, size
from ernie_lab.checkpoint.text_config_json import (
    DECODER_FIELDS,
    MOE_FIELDS,
    mixture_layers,
    read_decoder,
    read_head_dim,
    read_moe,
    write_decoder,
    write_experts,
    write_layers,
)
from ernie_lab.checkpoint.vl_fields import (
    AXIAL_THETA,
    CLASS,
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

BAIDU_TYPE = "ernie4_5_moe_vl"

_VISUAL_FIELDS = frozenset(
    {
        "vision_config",
        "im_patch_id",
        "image_start_token_id",
        "image_end_token_id",
        "video_start_token_id",
        "video_end_token_id",
        "pixel_hidden_size",
        "spatial_conv_size",
        "freq_allocation",
        # First id that is no text; it splits the vocabulary only where mm_vocab_size > 0.
        "max_text_id",
    }
)
_TOWER_FIELDS = frozenset(
    {
        "depth",
        "embed_dim",
        "hidden_size",
        "num_heads",
        "mlp_ratio",
        "patch_size",
        "spatial_patch_size",
        "spatial_merge_size",
        "in_channels",
        "in_chans",
        "model_type",
    }
)


def read_baidu_vl(raw: Raw, ignore: Collection[str] = ()) -> VLConfig:
    refuse_unknown(raw, DECODER_FIELDS | MOE_FIELDS | _VISUAL_FIELDS, fixed=VL_FIXED, ignore=ignore)
    n_layers = size(raw, "num_hidden_layers")
    n_text, n_vision = pair(raw, "moe_num_experts")
    agree("moe_num_experts of the two banks", n_text, n_vision)
    text_hidden, vision_hidden = pair(raw, "moe_intermediate_size")
    interval = integer(raw, "moe_layer_interval", 1)
    text_layers, vision_layers = (
        mixture_layers(start, end, interval, n_layers)
        for start, end in zip(
            pair(raw, "moe_layer_start_index", 1),
            pair(raw, "moe_layer_end_index", -1),
            strict=True,
        )
    )
    agree("mixture layers of the two banks", text_layers, vision_layers)
    head_dim = read_head_dim(raw)
    moe = read_moe(
        {**raw, "moe_num_experts": n_text, "moe_intermediate_size": text_hidden}, text_layers
    )
    vision = _read_tower(raw, ignore)
    placeholder = integer(raw, "im_patch_id", IMAGE_ID)
    return VLConfig(
        text=read_decoder(raw, head_dim, read_rope_3d(raw, head_dim), moe, head_bias=False),
        vision=vision,
        ids=read_ids(raw, image=placeholder, video=placeholder),
        vision_expert_hidden=vision_hidden,
    )


def _read_tower(raw: Raw, ignore: Collection[str]) -> VisionConfig:
    tower = section(raw, "vision_config")
    refuse_unknown(tower, _TOWER_FIELDS, fixed=VISION_FIXED, ignore=ignore, within="vision_config")
    width = size(tower, "embed_dim", 1280)
    patch, merge = size(tower, "patch_size", 14), size(tower, "spatial_merge_size", 2)
    channels = size(tower, "in_channels", 3)
    agree("vision width", width, size(tower, "hidden_size", width))
    agree("vision width", width, integer(raw, "pixel_hidden_size", width))
    agree("patch size", patch, size(tower, "spatial_patch_size", patch))
    agree("spatial merge size", merge, integer(raw, "spatial_conv_size", merge))
    agree("channels", channels, size(tower, "in_chans", channels))
    return VisionConfig(
        depth=size(tower, "depth", 32),
        width=width,
        hidden=int(width * number(tower, "mlp_ratio", 4)),
        n_heads=size(tower, "num_heads", 16),
        patch_size=patch,
        merge_size=merge,
        temporal_merge_size=TEMPORAL_MERGE,
        in_channels=channels,
        norm_eps=NORM_EPS,
        rope_theta=AXIAL_THETA,
    )


def write_baidu_vl(config: VLConfig, dtype: str) -> dict[str, Any]:
    """Baidu's spelling. What it cannot say is left out: `write_config` compares."""
    text = config.text
    # VLConfig has checked both; they are optional of a text model alone.
    assert text.moe is not None
    assert text.rope.sections is not None
    banks = {name: [end, end] for name, end in write_layers(text.moe).items()}
    return {
        "architectures": [CLASS],
        "model_type": BAIDU_TYPE,
        "torch_dtype": dtype,
        **write_decoder(text),
        "max_position_embeddings": text.rope.max_positions,
        "rope_theta": text.rope.theta,
        "rope_3d": True,
        "rope_scaling": {"type": "default", "mrope_section": list(text.rope.sections)},
        "freq_allocation": text.rope.sections[-1],
        **write_experts(text.moe),
        **banks,
        "moe_num_experts": [text.moe.router.n_experts] * 2,
        "moe_intermediate_size": [text.moe.expert_hidden, config.vision_expert_hidden],
        "moe_layer_interval": banks["moe_layer_interval"][0],
        "router_aux_loss_coef": text.moe.aux_loss_coef,
        "im_patch_id": config.ids.image,
        **write_ids(config.ids),
        "pixel_hidden_size": config.vision.width,
        "spatial_conv_size": config.vision.merge_size,
        "temporal_conv_size": config.vision.temporal_merge_size,
        "vision_config": _write_tower(config.vision),
    }


def _write_tower(tower: VisionConfig) -> dict[str, Any]:
    whole = tower.hidden % tower.width == 0
    return {
        "depth": tower.depth,
        "embed_dim": tower.width,
        "hidden_size": tower.width,
        "hidden_act": tower.activation,
        "num_heads": tower.n_heads,
        "mlp_ratio": tower.hidden // tower.width if whole else tower.hidden / tower.width,
        "patch_size": tower.patch_size,
        "spatial_patch_size": tower.patch_size,
        "spatial_merge_size": tower.merge_size,
        "in_channels": tower.in_channels,
        "in_chans": tower.in_channels,
        "attn_sep": True,
    }
