"""Small vision-language models of transformers, and what they hold under our names."""

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from ernie_lab.checkpoint.config import VLConfig
from ernie_lab.checkpoint.config_json import read_config, read_config_file
from ernie_lab.checkpoint.load import LoadReport, fill
from ernie_lab.checkpoint.names import detect
from ernie_lab.checkpoint.reader import Reader
from ernie_lab.model.vl import VLModel

IDS = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(3))

_TEXT: dict[str, Any] = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": [16, 8],
    "moe_num_experts": 6,
    "moe_k": 2,
    "moe_num_shared_experts": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 500000.0,
        "mrope_section": [1, 1, 2],
    },
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# 424B has no shared experts and is untied. A square gate has no orientation to tell.
VARIANTS = MappingProxyType(
    {
        "shared, tied": {},
        "as 424B": {"moe_num_shared_experts": 0, "tie_word_embeddings": False},
        "biases, wide heads": {
            "use_bias": True,
            "head_dim": 12,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "mrope_section": [2, 2, 2],
            },
        },
        "square gates": {"moe_num_experts": 32, "moe_intermediate_size": [4, 2]},
    }
)
_TOWER = {"depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "patch_size": 4}
# Baidu's files have one placeholder for images and videos.
_PLACEHOLDERS = {"image_token_id": 60, "video_token_id": 60}
_DELIMITERS = {
    "image_start_token_id": 62,
    "image_end_token_id": 63,
    "video_start_token_id": 64,
    "video_end_token_id": 65,
}


def reference(variant: str = "shared, tied") -> Any:
    """A model of transformers in which every value differs from every other."""
    fields = VARIANTS[variant]
    tied = fields.get("tie_word_embeddings", True)
    theirs = Ernie4_5_VLMoeForConditionalGeneration(
        Ernie4_5_VLMoeConfig(
            text_config={**_TEXT, **fields},
            vision_config=_TOWER,
            tie_word_embeddings=tied,
            **_PLACEHOLDERS,
            **_DELIMITERS,
        )
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


def baidu_json(variant: str = "shared, tied") -> dict[str, Any]:
    """The same model as Baidu's own files describe it: lists for two banks, or one value."""
    text = {**_TEXT, **VARIANTS[variant]}
    sections = text["rope_parameters"]["mrope_section"]
    as_424b = variant == "as 424B"
    raw = {
        **text,
        "model_type": "ernie4_5_moe_vl",
        "use_bias": text.get("use_bias", False),
        "tie_word_embeddings": text.get("tie_word_embeddings", True),
        "rope_theta": 500000,
        "rope_3d": True,
        "rope_scaling": {"type": "default", "mrope_section": sections},
        "moe_num_experts": [text["moe_num_experts"]] * 2,
        "moe_layer_start_index": 1 if as_424b else [1, 1],
        "moe_layer_end_index": [4, 3],
        "moe_layer_interval": 1,
        "im_patch_id": 60,
        **_DELIMITERS,
        "vision_config": {
            "depth": 2,
            "embed_dim": 24,
            "num_heads": 2,
            "mlp_ratio": 40 / 24,
            "patch_size": 4,
        },
    }
    absent = {"rope_parameters", "mlp_layer_types"}
    if as_424b:
        absent |= {"moe_num_shared_experts", "moe_layer_end_index"}
    return {name: value for name, value in raw.items() if name not in absent}


def config_of(variant: str = "shared, tied") -> VLConfig:
    config = read_config(baidu_json(variant))
    assert isinstance(config, VLConfig)
    return config


def save_reference(theirs: Any, folder: Path, layout: str, variant: str) -> Path:
    """By transformers; and for the released layout, which it does not write, renamed by hand."""
    theirs.save_pretrained(folder, save_original_format=layout != "transformers")
    if layout == "released":
        tensors = read_all(folder)
        renamed = {
            key.replace("model.vision_model.", "vision_model."): t for key, t in tensors.items()
        }
        write_all(folder, renamed)
        (folder / "config.json").write_text(json.dumps(baidu_json(variant)))
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write_all(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[VLModel, LoadReport]:
    config = read_config_file(folder)
    assert isinstance(config, VLConfig)
    with torch.device("meta"):
        model = VLModel(config)
    reader = Reader.open(folder)
    layout = detect(reader.tensors)
    report = fill(model, reader, layout, device="cpu", dtype=dtype, progress=False)
    return model.eval(), report


_RENAMED = (
    ("model.language_model.", ""),
    ("model.vision_tower.", "vision."),
    ("model.resampler_model.", "resampler."),
    ("embed_tokens.weight", "embed_VD"),
    ("lm_head.weight", "unembed_VD"),
    ("input_layernorm.weight", "norm1.gain_D"),
    ("post_attention_layernorm.weight", "norm2.gain_D"),
    ("resampler.after_norm.weight", "resampler.norm.gain_D"),
    ("resampler.mlp", "resampler.project"),
    ("_linear.fc1", ".up"),
    ("_linear.fc2", ".down"),
    ("_linear.ln", ".norm"),
    ("patch_embed.proj", "patch_embed"),
    ("vision.ln", "vision.final_norm"),
    ("fc1", "up"),
    ("fc2", "down"),
    ("attn.proj", "attn.o"),
    ("self_attn.", "attn."),
    ("layers.", "blocks."),
    ("mlp.text_moe.gate.", "moe.text.router."),
    ("mlp.vision_moe.gate.", "moe.vision.router."),
    ("mlp.text_moe.", "moe.text."),
    ("mlp.vision_moe.", "moe.vision."),
    ("mlp.shared_experts.", "moe.shared."),
    ("router.weight", "router.weight_ED"),
    ("moe_statics.e_score_correction_bias", "correction_bias_E"),
    ("experts.gate_up_proj", "experts.gate_up_E2FD"),
    ("experts.down_proj", "experts.down_EDF"),
    ("_proj.", "."),
)


def under_our_names(theirs: Any) -> dict[str, Tensor]:
    """Its parameters as ours should be, by a second table that shares nothing with the first."""
    found = {}
    for key, parameter in theirs.named_parameters():
        name, value = key, parameter.detach()
        for old, new in _RENAMED:
            name = name.replace(old, new)
        if name == "norm.weight":
            name = "final_norm.gain_D"
        if name.endswith("correction_bias_E"):
            value = value[0]
        if name.endswith("gate_up_E2FD"):
            value = value.unflatten(1, (2, -1))
        found[name] = value
    return found


def same_values(model: nn.Module, expected: dict[str, Tensor]) -> bool:
    ours = dict(model.named_parameters())
    assert ours.keys() == expected.keys()
    return all(torch.equal(ours[name], expected[name]) for name in ours)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """On text alone; pictures are the parity tests' subject."""
    out = model(input_ids=IDS).logits
    assert isinstance(out, Tensor)
    return out
