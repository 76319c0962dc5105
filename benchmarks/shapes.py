"""The random models that are timed: ours, and transformers' with the same weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import ernie_lab as el
from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.checkpoint.config_json import read_config
from ernie_lab.model.initial import initialise
from ernie_lab.model.text import TextModel

# Issue 6, section 1: 45.8 M of its parameters are active for a token.
CPU_SHAPE: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "moe_intermediate_size": 384,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Pair:
    """The same random weights here and in transformers, whose experts run as it is told."""

    ours: el.Lab
    theirs: Any


def pair(dtype: str, experts: str = "grouped_mm", **changed: Any) -> Pair:
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    torch.manual_seed(0)
    shape = {**CPU_SHAPE, **changed}
    theirs = Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**shape)).to(getattr(torch, dtype)).eval()
    theirs.set_experts_implementation(experts)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(Path(folder), save_original_format=True)
        ours = el.load(folder, device="cpu", dtype=dtype, progress=False)
    return Pair(ours, theirs)


def ours_alone(dtype: str = "float32", **changed: Any) -> el.Lab:
    """Random weights of our own, without transformers and without a file."""
    config = read_config({"model_type": "ernie4_5_moe", **CPU_SHAPE, **changed})
    assert isinstance(config, TextConfig)
    model = TextModel(config).to(getattr(torch, dtype))
    initialise(model, seed=0)
    return el.Lab(model=model, model_id="random")
