"""The part of a model that a parameter belongs to, by its name."""

from __future__ import annotations

# First match wins: a mark in a parameter's name, and the part it belongs to.
_PARTS = (
    ("resampler.", "resampler"),
    (".moe.vision.router.", "vision_router"),
    (".moe.vision.experts.", "vision_experts"),
    (".moe.text.experts.", "text_experts"),
    ("unembed", "unembed"),
    ("embed", "embed"),
    (".attn.", "attention"),
    (".mlp.", "dense_mlp"),
    (".router.", "router"),
    (".experts.", "routed_experts"),
    (".shared.", "shared_experts"),
    ("gain_D", "norms"),
)


def part_of(name: str) -> str:
    """`routed_experts` of `blocks.3.moe.experts.down_EDF`; see `ParameterCounts` for the parts."""
    if name.startswith("vision."):
        return "vision_tower"
    return next(part for mark, part in _PARTS if mark in name)
