"""transformers as the oracle for pictures: random models, prompts, and what flows inside.

How it wants to be called (5.23):

- `mm_token_type_ids` and `moe_mm_token_type_ids` with every prompt. Without the second, all
  tokens silently go to the text experts.
- It keeps `rope_deltas` on the model, where a later call finds those of an earlier one:
  `theirs_sees` drops them first.
- One step of decoding needs `position_ids`. From `attention_mask` alone it makes positions of
  the whole past for the one new token, which then broadcasts to as many keys.
- Neighbouring pictures of one kind, with no token between, are one picture to its positions.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

from ernie_lab.checkpoint import Reader, VLConfig, detect, fill, read_config_file
from ernie_lab.inputs.media import Grid, Kind
from ernie_lab.model.vl import VLModel
from support.taps import Collect
from support.vl_inputs import Inputs

IMAGE, VIDEO = 90, 91
STARTS, ENDS = {"image": 92, "video": 94}, {"image": 93, "video": 95}
TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "moe_intermediate_size": [24, 16],
    "moe_k": 3,
    "moe_num_experts": 10,
    "moe_num_shared_experts": 2,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
TOWER: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "patch_size": 2,
}
# (height, width, time) shares of the rotary pairs.
SECTIONS, THETA = (1, 1, 2), 500000.0


@dataclass(frozen=True)
class Pair:
    """The same weights in transformers (`theirs`) and here (`ours`)."""

    theirs: Any
    ours: VLModel

    @property
    def config(self) -> VLConfig:
        return self.ours.config


def random_reference(
    seed: int = 0,
    text: dict[str, Any] | None = None,
    tower: dict[str, Any] | None = None,
    sections: Sequence[int] = SECTIONS,
    tied: bool = True,
    video_token_id: int = VIDEO,
) -> Any:
    """A model of transformers whose biases and gains are random too, so that each matters."""
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": THETA, "mrope_section": list(sections)}
    config = Ernie4_5_VLMoeConfig(
        text_config={**TEXT, "rope_parameters": rope, **(text or {})},
        vision_config={**TOWER, **(tower or {})},
        tie_word_embeddings=tied,
        image_token_id=IMAGE,
        video_token_id=video_token_id,
        **{f"{kind}_start_token_id": i for kind, i in STARTS.items()},
        **{f"{kind}_end_token_id": i for kind, i in ENDS.items()},
    )
    theirs = Ernie4_5_VLMoeForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            is_gain = re.search(r"(norm\d?|\bln)\.weight$", name)
            # Small enough that states stay near 10, where fp32 still tells 1e-5 apart.
            parameter.normal_(1.0 if is_gain else 0.0, 0.12)
    return theirs.eval()


def pair(folder: Path, seed: int = 0, native: bool = False, **overrides: Any) -> Pair:
    """Saved by transformers, in the released layout or (`native`) its own, loaded by us."""
    theirs = random_reference(seed, **overrides)
    theirs.save_pretrained(folder, save_original_format=not native)
    return Pair(theirs, load(folder))


def shared_placeholder_pair(folder: Path) -> Pair:
    """As released: one placeholder for both kinds, which transformers cannot run. There it is
    given another id; what stands in the place of a placeholder is a picture in any case."""
    both = pair(folder, video_token_id=IMAGE)
    both.theirs.config.video_token_id = VIDEO
    return both


def load(folder: Path, dtype: torch.dtype = torch.float32) -> VLModel:
    config = read_config_file(folder)
    assert isinstance(config, VLConfig)
    with torch.device("meta"):
        model = VLModel(config)
    reader = Reader.open(folder)
    fill(
        model,
        reader,
        detect(reader.tensors.keys()),
        device=torch.device("cpu"),
        dtype=dtype,
        progress=False,
    )
    return model.eval()


# transformers' modules, and our sites that hold what they return. `<l>` is the layer.
_DECODER = {
    "q_proj": "blocks.<l>.attn.q",
    "v_proj": "blocks.<l>.attn.v",
    "self_attn": "blocks.<l>.attn.attn_out",
    "mlp": "blocks.<l>.<mlp>",
    "mlp.shared_experts": "blocks.<l>.moe.shared_out",
    "": "blocks.<l>.resid_post",
}
_TOWER_BLOCK = {
    "attn": "vision.blocks.<l>.attn.attn_out",
    "mlp.act": "vision.blocks.<l>.mlp.act",
    "mlp": "vision.blocks.<l>.mlp.mlp_out",
    "": "vision.blocks.<l>.resid_post",
}
_RESAMPLER = {
    "spatial_linear": "resampler.spatial",
    "temporal_linear": "resampler.temporal",
    "mlp": "resampler.mlp",
    "after_norm": "resampler.out",
}


def _rows(site: str) -> Callable[[Grid], int]:
    if site.startswith("vision"):
        return lambda grid: grid.n_patches
    return lambda grid: grid.n_patches // 4 if site.endswith("spatial") else grid.n_tokens


@dataclass(frozen=True)
class Flow:
    """Values of one forward, under our names of sites. Rows of banks are flattened `(b s)`."""

    logits_BSV: Tensor
    positions_BSR: Tensor
    sites: dict[str, Tensor]
    output: Any


def given(inputs: Inputs) -> dict[str, Any]:
    """The arguments of transformers' model, whose placeholder of clips is `VIDEO`."""
    return {
        **inputs.given(),
        "input_ids": inputs.ids_BS.masked_fill(inputs.kinds_BS == 2, VIDEO),
        "mm_token_type_ids": inputs.kinds_BS,
        "moe_mm_token_type_ids": inputs.bank_BS,
    }


@torch.no_grad()
def theirs_sees(theirs: Any, inputs: Inputs, **more: Any) -> Flow:
    """One forward of transformers with hooks on every module that has a counterpart here."""
    core, handles = theirs.model, []
    found: dict[str, list[Tensor]] = defaultdict(list)

    def watch(module: Any, site: str, pick: Callable[[Any], Tensor] = _first) -> None:
        handles.append(
            module.register_forward_hook(lambda _m, _i, out: found[site].append(pick(out)))
        )

    layers = core.language_model.layers
    for number, layer in enumerate(layers):
        mlp = "moe.moe_out" if hasattr(layer.mlp, "text_moe") else "mlp.mlp_out"
        for name, site in _DECODER.items():
            if name != "mlp.shared_experts" or getattr(layer.mlp, "shared_experts", None):
                path = site.replace("<l>", str(number)).replace("<mlp>", mlp)
                for_q = layer.self_attn if name.endswith("_proj") else layer
                watch(for_q.get_submodule(name), path)
        for bank in ("text", "vision") if mlp == "moe.moe_out" else ():
            at, moe = f"blocks.{number}.moe.{bank}", getattr(layer.mlp, f"{bank}_moe")
            watch(moe, f"{at}.routed_out", lambda out: out[0].unflatten(0, (-1, width)))
            for i, name in enumerate(("router_logits", "expert_weights", "expert_ids")):
                watch(moe.gate, f"{at}.{name}", lambda out, i=i: out[i])
    width = core.config.text_config.hidden_size
    watch(core.vision_tower.patch_embed, "vision.patch_embed")
    watch(core.vision_tower.ln, "vision.out")
    for number, block in enumerate(core.vision_tower.blocks):
        for name, site in _TOWER_BLOCK.items():
            watch(block.get_submodule(name), site.replace("<l>", str(number)))
    for name, site in _RESAMPLER.items():
        watch(core.resampler_model.get_submodule(name), site)
    rotary, positions = core.language_model.rotary_emb, []
    handles.append(
        rotary.register_forward_pre_hook(
            lambda _m, args, kwargs: positions.append((*args, *kwargs.values())[1]),
            with_kwargs=True,
        )
    )
    core.rope_deltas = None
    try:
        output = theirs(**{**given(inputs), **more})
    finally:
        for handle in handles:
            handle.remove()
    sites = {}
    for site, values in found.items():
        if site.startswith(("vision", "resampler")):
            by_kind: dict[Kind, Tensor] = dict(zip(inputs.pixels, values, strict=True))
            sites[site] = inputs.in_reading_order(by_kind, _rows(site))
        else:
            (sites[site],) = values
    return Flow(output.logits, positions[0].movedim(0, -1), sites, output)


def _first(out: Any) -> Tensor:
    value = out[0] if isinstance(out, tuple) else out
    assert isinstance(value, Tensor)
    return value


@torch.no_grad()
def ours_sees(model: VLModel, inputs: Inputs, **more: Any) -> tuple[Tensor, Collect]:
    """Logits, and every value that is not on demand."""
    tap = Collect(lambda site: False)
    return model(**{**inputs.given(), **more}, tap=tap).logits, tap


def decode_positions(theirs: Any, mask_BT: Tensor) -> Tensor:
    """`[3 b 1]`: what transformers' `generate` gives a new token after the prompt it just read."""
    counted_B1 = mask_BT.long().sum(-1, keepdim=True) - 1
    deltas_B1 = theirs.model.rope_deltas
    return (counted_B1 + (0 if deltas_B1 is None else deltas_B1)).expand(3, -1, -1)
