"""Models of the released shapes with random weights, made on the device that is to run them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import ernie_lab as el
from ernie_lab.checkpoint.config_json import read_config
from ernie_lab.model.kinds import build

Shape = dict[str, Any]

# ERNIE-4.5-21B-A3B: the fields of its config.json that shape it.
TEXT_21B: Shape = {
    "vocab_size": 103424,
    "hidden_size": 2560,
    "intermediate_size": 12288,
    "num_hidden_layers": 28,
    "num_attention_heads": 20,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "moe_intermediate_size": 1536,
    "moe_k": 6,
    "moe_num_experts": 64,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# ERNIE-4.5-VL-28B-A3B.
VL_28B: Shape = {
    **{k: v for k, v in TEXT_21B.items() if k not in ("rope_theta", "moe_layer_start_index")},
    "rope_theta": 500000.0,
    "rope_3d": True,
    "rope_scaling": {"type": "default", "mrope_section": [22, 22, 20]},
    "moe_num_experts": [64, 64],
    "moe_intermediate_size": [1536, 512],
    "moe_layer_start_index": [1, 1],
    "moe_layer_end_index": [29, 28],
    "im_patch_id": 100295,
    "image_start_token_id": 101304,
    "image_end_token_id": 101305,
    "video_start_token_id": 101306,
    "video_end_token_id": 101307,
    "pixel_hidden_size": 1280,
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1280,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_patch_size": 14,
        "spatial_merge_size": 2,
        "in_channels": 3,
        "in_chans": 3,
        "hidden_act": "quick_gelu",
    },
}
# The same, small: does it run?
_TOY: Shape = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe_num_experts": 8,
    "moe_k": 2,
}
TEXT_TOY: Shape = {**TEXT_21B, **_TOY, "moe_intermediate_size": 32}
VL_TOY: Shape = {
    **VL_28B,
    **_TOY,
    "moe_num_experts": [8, 8],
    "moe_intermediate_size": [32, 16],
    "rope_scaling": {"type": "default", "mrope_section": [2, 2, 4]},
    "im_patch_id": 500,
    "image_start_token_id": 501,
    "image_end_token_id": 502,
    "video_start_token_id": 503,
    "video_end_token_id": 504,
    "pixel_hidden_size": 32,
    "vision_config": {
        **VL_28B["vision_config"],
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 2,
        "patch_size": 4,
        "spatial_patch_size": 4,
    },
}
# Of released checkpoints; near it, states neither grow nor vanish over the layers.
STD = 0.01


def random_lab(shape: Shape, kind: str, device: torch.device) -> el.Lab:
    """`kind` is the model type. Weights bf16, routers float32, drawn where they lie."""
    with torch.device("meta"):
        model = build(read_config({"model_type": kind, **shape}))
    # On `meta` this takes nothing; routers stay float32, as in `load`.
    model = model.to(torch.bfloat16).to_empty(device=device)
    fill_randomly(model)
    return el.Lab(model=model.requires_grad_(False).eval(), model_id="random")


@torch.no_grad()
def fill_randomly(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if re.search(r"gain_D$|norm\d?\.weight$|\bln\.weight$", name):
            parameter.fill_(1.0)
        elif "bias" in name:
            parameter.zero_()
        else:
            parameter.normal_(0.0, STD)


@dataclass(frozen=True)
class Active:
    """What a decoded token needs of the weights: all but the experts it does not take.

    `table` are the parameters of the unembedding, which a prefill multiplies once; of an
    embedding table that is none, one row is read, which is left out.
    """

    n_bytes: int
    parameters: int
    table: int


def active(lab: el.Lab) -> Active:
    config, shares = lab.config.decoder, []
    for name, parameter in lab.model.named_parameters():
        if name.startswith(("vision.", "resampler.")) or ".moe.vision." in name:
            continue
        if name == "embed_VD" and not config.tied:
            continue
        share = 1.0
        if ".experts." in name:
            assert config.moe is not None
            share = config.moe.router.n_chosen / len(parameter)
        shares.append((int(parameter.nbytes * share), int(parameter.numel() * share)))
    table = lab.config.decoder.vocab_size * lab.config.decoder.width
    return Active(sum(n for n, _ in shares), sum(n for _, n in shares), table)


def model_bytes(shape: Shape, n_layers: int) -> int:
    """In bf16, about and never too low: the embedding, and layers that all have experts."""
    width, hidden = shape["hidden_size"], shape["moe_intermediate_size"]
    banks = zip(
        *(one if isinstance(one, list) else [one] for one in (shape["moe_num_experts"], hidden)),
        strict=True,
    )
    experts = sum(n * 3 * width * each for n, each in banks)
    rest = 4 * width**2 + 3 * width * shape["moe_num_shared_experts"] * 1536
    return 2 * (shape["vocab_size"] * width + n_layers * (experts + rest))


# transformers' names within a layer, and ours.
_THEIRS = {
    "self_attn.q_proj.weight": "attn.q.weight",
    "self_attn.k_proj.weight": "attn.k.weight",
    "self_attn.v_proj.weight": "attn.v.weight",
    "self_attn.o_proj.weight": "attn.o.weight",
    "mlp.gate_proj.weight": "mlp.gate.weight",
    "mlp.up_proj.weight": "mlp.up.weight",
    "mlp.down_proj.weight": "mlp.down.weight",
    "mlp.gate.weight": "moe.router.weight_ED",
    "mlp.gate.moe_statics.e_score_correction_bias": "moe.router.correction_bias_E",
    "mlp.experts.gate_up_proj": "moe.experts.gate_up_E2FD",
    "mlp.experts.down_proj": "moe.experts.down_EDF",
    "mlp.shared_experts.gate_proj.weight": "moe.shared.gate.weight",
    "mlp.shared_experts.up_proj.weight": "moe.shared.up.weight",
    "mlp.shared_experts.down_proj.weight": "moe.shared.down.weight",
    "input_layernorm.weight": "norm1.gain_D",
    "post_attention_layernorm.weight": "norm2.gain_D",
}


def in_transformers(lab: el.Lab, shape: Shape, experts: str = "grouped_mm") -> Any:
    """transformers' text model over the very tensors of ours, so it takes no memory of its own."""
    from transformers import Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM

    rope = {"rope_type": "default", "rope_theta": shape["rope_theta"]}
    plain = {k: v for k, v in shape.items() if k != "rope_theta"}
    config = Ernie4_5_MoeConfig(**plain, rope_parameters=rope)
    with torch.device("meta"):
        theirs = Ernie4_5_MoeForCausalLM(config)
    ours = dict(lab.model.named_parameters())
    for name, empty in list(theirs.named_parameters()):
        shared = ours[_our_name(name)].detach().view(empty.shape)
        owner, _, last = name.rpartition(".")
        setattr(theirs.get_submodule(owner), last, nn.Parameter(shared, requires_grad=False))
    theirs.tie_weights()
    # Its buffers are made when it is built, so on the device, small as they are.
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config).to(lab.device)
    theirs.set_experts_implementation(experts)
    return theirs.eval()


def _our_name(theirs: str) -> str:
    if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", theirs):
        return f"blocks.{layer.group(1)}.{_THEIRS[layer.group(2)]}"
    return {
        "model.embed_tokens.weight": "embed_VD",
        "model.norm.weight": "final_norm.gain_D",
        "lm_head.weight": "unembed_VD",
    }[theirs]
