"""What a model is: in a few lines of words, for a `Lab`'s own picture and `ernie-lab info`; the
table of its sites."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, get_args

import torch

from ernie_lab.checkpoint import TextConfig, VLConfig, count_parameters, weight_bytes
from ernie_lab.checkpoint.packing import held_bytes
from ernie_lab.checkpoint.quantise import Scheme
from ernie_lab.display import in_words
from ernie_lab.model.placed import placement_of
from ernie_lab.model.stack import block_list
from ernie_lab.session import Opened
from ernie_lab.sites import Site
from ernie_lab.trace.keep import Keep, Names

if TYPE_CHECKING:
    import pandas as pd


def lab_facts(lab: Opened) -> dict[str, str]:
    """The lines of a `Lab`."""
    config, counts = lab.config, count_parameters(lab.config)
    decoder = config.decoder
    facts = {
        "model": lab.model_id + (f" @ {lab.revision[:12]}" if lab.revision else ""),
        "parameters": f"{counts.total / 1e6:,.3g} M, {counts.active / 1e6:,.3g} M active",
        "layers": f"{decoder.n_layers}, width {decoder.width}",
        "attention": _attention(decoder),
        "experts": _experts(config),
    }
    if isinstance(config, VLConfig):
        facts["vision"] = _tower(config)
    facts["vocabulary"] = f"{decoder.vocab_size:,}" + (
        "" if lab.tokenizer else " (no tokenizer: prompts are token ids)"
    )
    facts["weights"] = f"{str(lab.dtype).removeprefix('torch.')} on {lab.device}"
    if (placement := placement_of(block_list(lab.model.blocks))) is not None:
        facts["placement"] = placement
    held = held_bytes(lab.model)
    if held.scheme is not None:
        facts["quantised"] = str(held)
    return facts


def config_facts(config: TextConfig | VLConfig) -> dict[str, str]:
    """The lines of a config: nothing that needs weights."""
    counts, decoder = count_parameters(config), config.decoder
    facts = {
        "parameters": f"{counts.total:,} in all, {counts.active:,} multiply for one token",
        "of which": ", ".join(f"{part} {n:,}" for part, n in counts.by_part.items() if n),
        "weights": ", ".join(
            f"{in_words(weight_bytes(config, dtype))} as {str(dtype)[6:]}"
            for dtype in (torch.float32, torch.bfloat16)
        ),
        "quantised": ", ".join(
            f"{in_words(weight_bytes(config, torch.bfloat16, scheme))} as {scheme}"
            for scheme in get_args(Scheme)
        )
        + ", the rest bfloat16",
        "layers": f"{decoder.n_layers} of width {decoder.width}, dense MLPs {decoder.dense_hidden}",
        "attention": _attention(decoder),
        "positions": f"{decoder.rope.max_positions:,}, theta {decoder.rope.theta:g}, "
        f"scaling {decoder.rope.scaling or 'none'}",
        "vocabulary": f"{decoder.vocab_size:,}, {'tied' if decoder.tied else 'untied'}",
    }
    if decoder.moe is not None:
        facts["experts"] = _experts(config)
    if isinstance(config, VLConfig):
        facts["vision"] = _tower(config)
    return facts


def site_table(sites: Sequence[Site], keep: Names | None = None) -> pd.DataFrame:
    """One row for each site, or for each that `keep=` would take."""
    import pandas as pd

    columns = ["path", "dims", "dtype", "on_demand", "meaning"]
    found = sites if keep is None else [rule.site for rule in Keep.of(keep, sites).kept]
    rows = [[getattr(site, column) for column in columns] for site in found]
    return pd.DataFrame(rows, columns=pd.Index(columns)).set_index("path")


def as_lines(facts: Mapping[str, str], width: int = 12) -> str:
    return "\n".join(f"{name:{width}}{value}" for name, value in facts.items())


def as_table(facts: Mapping[str, str]) -> str:
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _attention(config: TextConfig) -> str:
    attention = config.attention
    return (
        f"{attention.n_heads} heads over {attention.n_kv_heads} key/value heads of width "
        f"{attention.head_dim}"
    )


def _experts(config: TextConfig | VLConfig) -> str:
    moe = config.decoder.moe
    if moe is None:
        return "none (dense)"
    widths = f"{moe.router.n_experts} of width {moe.expert_hidden}"
    if isinstance(config, VLConfig):
        widths = (
            f"{moe.router.n_experts} for text, of width {moe.expert_hidden}, and "
            f"{moe.router.n_experts} for pictures, of width {config.vision_expert_hidden}"
        )
    return (
        f"{widths}; {moe.router.n_chosen} chosen, {moe.n_shared} shared; in "
        f"{layers_in_words(moe.layers)}"
    )


def _tower(config: VLConfig) -> str:
    vision = config.vision
    size = vision.patch_size * vision.merge_size
    return (
        f"{vision.depth} layers of width {vision.width}, {vision.n_heads} heads; patches of "
        f"{vision.patch_size} pixels, {size} x {size} pixels a token"
    )


def layers_in_words(layers: tuple[int, ...]) -> str:
    """`layers 1 to 27`, `layers 3 to 27 by 4`; each by its number where there is no such rule."""
    first, last = layers[0], layers[-1]
    step = layers[1] - first if len(layers) > 1 else 1
    if len(layers) < 3 or layers != tuple(range(first, last + 1, step)):
        return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
    return f"layers {first} to {last}" + (f" by {step}" if step > 1 else "")
