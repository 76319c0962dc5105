"""What both styles of vision-language configs share."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from ernie_lab.checkpoint.config import ConfigError, RopeConfig, VisualIds
from ernie_lab.checkpoint.fields import FIXED, Fixed, Raw, integer, size
from ernie_lab.checkpoint.rope_json import (
    DEFAULT_MAX_POSITIONS,
    rope_block,
    rope_kind,
    rope_theta,
)

_FREQUENCY_SHARE = 20
TEMPORAL_MERGE = 2
NORM_EPS = 1e-6
AXIAL_THETA = 10_000.0

DELIMITER_IDS = MappingProxyType(
    {
        "image_start_token_id": 101304,
        "image_end_token_id": 101305,
        "video_start_token_id": 101306,
        "video_end_token_id": 101307,
    }
)
IMAGE_ID = 100295
# Named alike by Baidu and by transformers, whose model types differ.
CLASS = "Ernie4_5_VLMoeForConditionalGeneration"


VL_FIXED: Fixed = MappingProxyType(
    {
        **FIXED,
        "rope_3d": ((True,), "positions have a time, a height and a width"),
        "moe_use_hard_gate": ((True,), "a token's modality decides its bank"),
        "moe_dense_experts_token_type_id": ((3,), "no token type 3 is ever made"),
        "mm_vocab_size": ((0,), "images are not predicted, so they have no vocabulary"),
        "use_temporal_conv": ((True,), "the resampler merges pairs of frames"),
        "temporal_conv_size": ((TEMPORAL_MERGE,), "the resampler merges pairs of frames"),
        "modality_detach": ((False,), "both modalities share one graph"),
    }
)
VISION_FIXED: Fixed = MappingProxyType(
    {
        **FIXED,
        "hidden_act": (("quick_gelu",), "the tower's MLPs are computed with quick_gelu"),
        "attn_sep": ((True,), "attention stays within a frame"),
    }
)


def read_rope_3d(raw: Raw, head_dim: int) -> RopeConfig:
    block, n_pairs = rope_block(raw), head_dim // 2
    kind = rope_kind(block, extra=frozenset({"mrope_section"}))
    if kind != "default":
        raise ConfigError(f"rope type {kind!r} is not supported with 3-D positions: default is")
    sections = block.get("mrope_section")
    if sections is None:
        time = integer(raw, "freq_allocation", _FREQUENCY_SHARE)
        sections = ((n_pairs - time) // 2, (n_pairs - time) // 2, time)
    # Below 1 in the files of very narrow heads that leave the share of time at its default.
    possible = len(sections) == 3 and sum(sections) == n_pairs and min(sections) >= 1
    if not possible or sections[0] != sections[1]:
        raise ConfigError(
            f"mrope_section={list(sections)} must be (height, width, time) with equal height and "
            f"width, each at least 1, and sum to the {n_pairs} pairs of a head"
        )
    height, width, time = map(int, sections)
    agree("time's share of the rotary pairs", time, integer(raw, "freq_allocation", time))
    return RopeConfig(
        theta=rope_theta(raw, block),
        max_positions=size(raw, "max_position_embeddings", DEFAULT_MAX_POSITIONS),
        sections=(height, width, time),
    )


def write_ids(ids: VisualIds) -> dict[str, int]:
    """The delimiters, which both styles spell alike."""
    return {
        "image_start_token_id": ids.image_start,
        "image_end_token_id": ids.image_end,
        "video_start_token_id": ids.video_start,
        "video_end_token_id": ids.video_end,
    }


def read_ids(raw: Raw, image: int, video: int) -> VisualIds:
    ids = {name: integer(raw, name, default) for name, default in DELIMITER_IDS.items()}
    return VisualIds(
        image=image,
        video=video,
        image_start=ids["image_start_token_id"],
        image_end=ids["image_end_token_id"],
        video_start=ids["video_start_token_id"],
        video_end=ids["video_end_token_id"],
    )


def section(raw: Raw, name: str) -> Raw:
    section: Any = raw.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"config field {name}={section!r} must be an object")
    return section


def pair(raw: Raw, name: str, default: int | None = None) -> tuple[int, int]:
    """(text, vision) from a list of two or from one value for both."""
    value = raw.get(name)
    if not isinstance(value, list | tuple):
        both = integer(raw, name, default)
        return both, both
    if len(value) != 2:
        raise ConfigError(f"config field {name}={value!r} must be one value or two")
    first, second = (integer({name: item}, name, default) for item in value)
    return first, second


def agree(what: str, one: object, other: object) -> None:
    if one != other:
        raise ConfigError(f"{what}: {one} and {other} must be equal")
