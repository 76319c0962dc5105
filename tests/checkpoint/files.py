"""Small checkpoints written to disk for the tests, without the code under test."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from support.models import small_config
from torch import Tensor, nn

from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.names import RELEASED
from ernie_lab.checkpoint.shapes import parameter_shapes


def bare_module(config: ModelConfig) -> nn.Module:
    """A module with the model's parameters, on the meta device, and no forward."""
    root = nn.Module()
    for name, shape in parameter_shapes(config).items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_parameter(leaf, nn.Parameter(torch.empty(shape, device="meta")))
    return root


def random_tensors(config: ModelConfig, layout: Layout = RELEASED) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by key, drawn apart from each other."""
    generator = torch.Generator().manual_seed(7)
    ours = {name: torch.empty(shape) for name, shape in parameter_shapes(config).items()}
    return {
        key: torch.randn(stored.shape, generator=generator)
        for key, stored in layout.stored(ours).items()
    }


def write_single(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file(dict(tensors), folder / "model.safetensors")
    return folder


def write_sharded(folder: Path, tensors: Mapping[str, Tensor], n_shards: int) -> Path:
    weight_map = {}
    for i in range(n_shards):
        name = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        shard = dict(list(tensors.items())[i::n_shards])
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


CONFIG = small_config()
