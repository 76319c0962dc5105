"""The mixture layers of a model, by layer number."""

from __future__ import annotations

from ernie_lab.model.block import Block
from ernie_lab.model.moe import MoE
from ernie_lab.model.text import TextModel


def mixtures(model: TextModel) -> dict[int, MoE]:
    found = {}
    for layer, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        if isinstance(block.moe, MoE):
            found[layer] = block.moe
    return found
