"""Where each parameter of ours stands in a checkpoint: one table per layout.

The only file that spells a checkpoint's keys. `layout` says how the tables are read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Kind, Layout, Rule, leading_one, stacked, transposed

_BLOCK = r"blocks\.(?P<l>\d+)\."
_WEIGHT = r"\.(?P<kind>weight|bias)"
_EXPERT = "mlp.experts.{e}."
_STATICS = "moe_statics.e_score_correction_bias"


def _decoder(root: str) -> tuple[Rule, ...]:
    """What every layout has of a text decoder, below `root`: all but its routed experts."""
    layer = root + "layers.{l}."
    return (
        Rule(r"embed_VD", (root + "embed_tokens.weight",)),
        Rule(_BLOCK + r"norm1\.gain_D", (layer + "input_layernorm.weight",)),
        Rule(_BLOCK + r"norm2\.gain_D", (layer + "post_attention_layernorm.weight",)),
        Rule(_BLOCK + r"attn\.(?P<p>[qkvo])" + _WEIGHT, (layer + "self_attn.{p}_proj.{kind}",)),
        Rule(_BLOCK + r"mlp\.(?P<p>gate|up|down)" + _WEIGHT, (layer + "mlp.{p}_proj.{kind}",)),
        Rule(
            _BLOCK + r"moe\.shared\.(?P<p>gate|up|down)" + _WEIGHT,
            (layer + "mlp.shared_experts.{p}_proj.{kind}",),
        ),
        Rule(r"final_norm\.gain_D", (root + "norm.weight",)),
        Rule(r"unembed_VD", ("lm_head.weight",)),
        Rule(r"unembed_bias_V", ("lm_head.bias",)),
    )


def _single_experts(moe: str, banks_before: int = 0) -> tuple[Rule, ...]:
    """Experts stored one by one, as in the released files, under our `moe`."""
    layer = "model.layers.{l}." + _EXPERT
    return (
        Rule(
            _BLOCK + moe + r"experts\.gate_up_E2FD",
            (layer + "gate_proj.weight", layer + "up_proj.weight"),
            banks_before=banks_before,
        ),
        Rule(
            _BLOCK + moe + r"experts\.down_EDF",
            (layer + "down_proj.weight",),
            banks_before=banks_before,
        ),
    )


def _stacked_experts(moe: str, theirs: str) -> tuple[Rule, ...]:
    """Experts stored as one tensor, as transformers holds them."""
    return (
        Rule(_BLOCK + moe + r"experts\.gate_up_E2FD", (theirs + "experts.gate_up_proj",), stacked),
        Rule(_BLOCK + moe + r"experts\.down_EDF", (theirs + "experts.down_proj",)),
    )


# Multi-token-prediction heads; rotary frequencies, which follow from the config.
_UNUSED = (r"(model\.)?(language_model\.)?mtp_", r".*\.rotary(_pos)?_emb\.inv_freq$")


def _tied_copies(root: str) -> Mapping[str, str]:
    return MappingProxyType({"lm_head.weight": root + "embed_tokens.weight"})


_TEXT_ROUTER = Rule(_BLOCK + r"moe\.router\.weight_ED", ("model.layers.{l}.mlp.gate.weight",))

RELEASED = Layout(
    name="released",
    kind="text",
    rules=(
        *_decoder("model."),
        _TEXT_ROUTER,
        Rule(
            _BLOCK + r"moe\.router\.correction_bias_E",
            ("model.layers.{l}.mlp." + _STATICS,),
            leading_one,
        ),
        *_single_experts(r"moe\."),
    ),
    unused=_UNUSED,
    copies=_tied_copies("model."),
)

TRANSFORMERS = Layout(
    name="transformers",
    kind="text",
    rules=(
        *_decoder("model."),
        _TEXT_ROUTER,
        Rule(
            _BLOCK + r"moe\.router\.correction_bias_E",
            ("model.layers.{l}.mlp.gate." + _STATICS,),
            leading_one,
        ),
        *_stacked_experts(r"moe\.", "model.layers.{l}.mlp."),
    ),
    unused=_UNUSED,
    copies=_tied_copies("model."),
)


def _tower(root: str) -> tuple[Rule, ...]:
    """The vision tower below `root`, alike in every layout."""
    block, ours = root + "blocks.{l}.", r"vision\." + _BLOCK
    return (
        Rule(r"vision\.patch_embed\.weight", (root + "patch_embed.proj.weight",)),
        Rule(ours + r"(?P<n>norm[12])" + _WEIGHT, (block + "{n}.{kind}",)),
        Rule(ours + r"attn\.qkv" + _WEIGHT, (block + "attn.qkv.{kind}",)),
        Rule(ours + r"attn\.o" + _WEIGHT, (block + "attn.proj.{kind}",)),
        Rule(ours + r"mlp\.up" + _WEIGHT, (block + "mlp.fc1.{kind}",)),
        Rule(ours + r"mlp\.down" + _WEIGHT, (block + "mlp.fc2.{kind}",)),
        Rule(r"vision\.final_norm" + _WEIGHT, (root + "ln.{kind}",)),
    )


def _resampler(up: str, down: str, norm: str) -> tuple[Rule, ...]:
    """The resampler; the layouts differ in what they call the parts of its two MLPs."""
    root = "model.resampler_model."
    stages = r"resampler\.(?P<stage>spatial|temporal)\."
    return (
        Rule(stages + "up" + _WEIGHT, (root + "{stage}_linear." + up + ".{kind}",)),
        Rule(stages + "down" + _WEIGHT, (root + "{stage}_linear." + down + ".{kind}",)),
        Rule(stages + "norm" + _WEIGHT, (root + "{stage}_linear." + norm + ".{kind}",)),
        Rule(r"resampler\.project" + _WEIGHT, (root + "mlp.{kind}",)),
        Rule(r"resampler\.norm\.gain_D", (root + "after_norm.weight",)),
    )


def _released_bank(bank: str, number: int, gate: str) -> tuple[Rule, ...]:
    """One of two banks: experts numbered through, gates transposed, biases in one tensor."""
    moe = rf"moe\.{bank}\."
    layer = "model.layers.{l}.mlp."
    return (
        Rule(_BLOCK + moe + r"router\.weight_ED", (layer + gate,), transposed, either_way=True),
        Rule(_BLOCK + moe + r"router\.correction_bias_E", (layer + _STATICS,), row=number),
        *_single_experts(moe, banks_before=number),
    )


def _released_vl(name: str, tower: str) -> Layout:
    return Layout(
        name=name,
        kind="vision-language",
        rules=(
            *_decoder("model."),
            *_released_bank("text", 0, "gate.weight"),
            *_released_bank("vision", 1, "gate.weight_1"),
            *_tower(tower),
            *_resampler(up="0", down="2", norm="3"),
        ),
        unused=_UNUSED,
        copies=_tied_copies("model."),
    )


VL_RELEASED = _released_vl("released", tower="vision_model.")
# What transformers' `save_pretrained` writes unless told otherwise.
VL_TRANSFORMERS_RELEASED = _released_vl("transformers-released", tower="model.vision_model.")

_NATIVE = "model.language_model."
_BANKS = r"moe\.(?P<bank>text|vision)\."
_NATIVE_BANK = _NATIVE + "layers.{l}.mlp.{bank}_moe."

VL_TRANSFORMERS = Layout(
    name="transformers",
    kind="vision-language",
    rules=(
        *_decoder(_NATIVE),
        Rule(_BLOCK + _BANKS + r"router\.weight_ED", (_NATIVE_BANK + "gate.weight",)),
        Rule(
            _BLOCK + _BANKS + r"router\.correction_bias_E",
            (_NATIVE_BANK + "gate." + _STATICS,),
            leading_one,
        ),
        *_stacked_experts(_BANKS, _NATIVE_BANK),
        *_tower("model.vision_tower."),
        *_resampler(up="fc1", down="fc2", norm="ln"),
    ),
    unused=_UNUSED,
    copies=_tied_copies(_NATIVE),
)


def _by_name(*layouts: Layout) -> Mapping[str, Layout]:
    return MappingProxyType({layout.name: layout for layout in layouts})


LAYOUTS = _by_name(RELEASED, TRANSFORMERS)
VL_LAYOUTS = _by_name(VL_RELEASED, VL_TRANSFORMERS_RELEASED, VL_TRANSFORMERS)

# Keys that only one layout has. Dense text checkpoints have none and are alike in both; the
# first layout is taken where none is found.
_SIGNS = (
    (RELEASED, r".*\.mlp\.experts\.\d+\."),
    (RELEASED, r".*\.mlp\.moe_statics\."),
    (TRANSFORMERS, r".*\.mlp\.experts\.(gate_up|down)_proj$"),
    (TRANSFORMERS, r".*\.mlp\.gate\.moe_statics\."),
)
_VL_SIGNS = (
    (VL_RELEASED, r"vision_model\."),
    (VL_TRANSFORMERS_RELEASED, r"model\.vision_model\."),
    (VL_TRANSFORMERS, r"model\.vision_tower\."),
    (VL_TRANSFORMERS, r"model\.language_model\."),
)
_VL_KEY = (
    r"(model\.)?(vision_model|vision_tower|resampler_model|language_model)\.|.*\.gate\.weight_1$"
)
_FOREIGN = (
    (r"ernie\.", "Paddle's layout, with fused and transposed projections; take the -PT repository"),
    (r".*\.(qweight|weight_scale|weight_packed|absmax)", "quantised; take the original weights"),
)


def detect(keys: Collection[str]) -> Layout:
    """The layout these keys belong to.

    Raises:
        CheckpointError: a layout that is known and not supported, or signs of two layouts.
    """
    for pattern, what in _FOREIGN:
        found = next((key for key in sorted(keys) if re.match(pattern, key)), None)
        if found:
            raise CheckpointError(f"cannot load this checkpoint: tensor {found!r} shows {what}")
    is_vl = any(re.match(_VL_KEY, key) for key in keys)
    table, signs = (VL_LAYOUTS, _VL_SIGNS) if is_vl else (LAYOUTS, _SIGNS)
    shown = {
        layout.name: key for layout, sign in signs for key in sorted(keys) if re.match(sign, key)
    }
    if len(shown) > 1:
        raise CheckpointError(f"the checkpoint mixes two layouts: {shown}; convert it to one")
    return table[next(iter(shown), "released")]


def kind_of(names: Iterable[str]) -> Kind:
    """Of a model with parameters of these names, which are ours."""
    return "vision-language" if any(name.startswith("vision.") for name in names) else "text"


def stays_float32(name: str) -> bool:
    """Parameters of ours kept in fp32 at any dtype: those that decide who is chosen."""
    return name.endswith((".router.weight_ED", ".router.correction_bias_E"))
