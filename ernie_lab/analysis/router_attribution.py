"""Why this expert: the router's preference as an exact sum over upstream components."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ernie_lab.analysis.attribution import Attribution, component_table, slot_columns
from ernie_lab.analysis.components import (
    HasModel,
    at_kept,
    model_of,
    needed_sites,
    places_of,
    require,
    token_rows,
    written,
)
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.kinds import Model
from ernie_lab.model.moe import MoE
from ernie_lab.model.router import Router
from ernie_lab.model.stack import block_list
from ernie_lab.trace.trace import Trace

# An expert, or one for each token of the bank.
Which: TypeAlias = "int | Sequence[int]"


def router_attribution_sites(model: Model | HasModel, layer: int) -> list[str]:
    """What to pass as `keep=` for `router_attribution` of this layer."""
    own = model_of(model)
    prefixes = _routers(own, layer)
    names = ("router_logits", "expert_ids")
    own_sites = [f"{prefix}.{name}" for prefix in prefixes.values() for name in names]
    return [*needed_sites(own, layer), f"blocks.{layer}.norm2.scale", *own_sites]


def router_attribution(
    trace: Trace,
    model: Model | HasModel,
    layer: int,
    bank: str | None = None,
    *,
    slot: int | None = 0,
    expert: Which | None = None,
    against: Which | None = None,
) -> Attribution:
    """logit_e - logit_runner-up of one layer's router, over everything written before it.

    contribution = scale * c . (gain * (w_e - w_r)) with the gate's rows w, and scale and gain of
    norm2; the scale is the recorded one and is held fixed, which makes the sum exact. The
    components are those of `decompose(trace, model, layer)`: an expert of an earlier layer can be
    seen choosing one of this layer.

    The runner-up is the first that was not chosen: of all others the one with the highest
    selection score. What is explained is the difference of router *logits*. The choice is by
    softmax(logits) + correction bias, so an expert chosen for its bias has a negative
    difference; `targets` has both sides: `value` (logits), `prob_advantage` and `bias_advantage`.

    Args:
        bank: `"text"` or `"vision"` in a vision-language model; the tokens are those it read.
        slot: whose expert is explained, 0 the best; None for every slot, one below the other.
        expert: this expert instead, chosen or not, or one for each token.
        against: this one in the place of the runner-up.
    """
    own = model_of(model)
    prefixes = _routers(own, layer)
    prefix, router = _router(own, layer, bank)
    needed = [
        path
        for path in router_attribution_sites(own, layer)
        if not path.startswith(tuple(p for p in prefixes.values() if p != prefix))
    ]
    require(trace, needed, f"el.analysis.router_attribution_sites(lab, {layer})")

    part = trace.values[f"{prefix}.router_logits"].parts[None]
    logits_NE = part.values.detach().double().cpu()
    ids_NK = trace.values[f"{prefix}.expert_ids"].parts[None].values.cpu()
    bias_E = router.correction_bias_E.detach().double().cpu()
    scores_NE = _scores(trace, prefix, logits_NE, bias_E)
    row_R, expert_R, slot_R = _explained(ids_NK, slot, expert, router.config.n_experts)
    if against is None:
        others_NE = scores_NE.scatter(1, ids_NK, -torch.inf)
        if expert is not None:  # an expert is no runner-up to itself
            others_NE = others_NE.scatter(1, expert_R[:, None], -torch.inf)
        against_R = others_NE.argmax(1)[row_R]
    else:
        against_R = _per_row(against, len(ids_NK), router.config.n_experts, "against")[row_R]

    trace = at_kept(trace, "embed_in")
    place_N = places_of(trace, part.rows_N)[row_R]
    direction_RD = _direction(own, layer, router, expert_R, against_R)
    scale_R = token_rows(trace, f"blocks.{layer}.norm2.scale")[place_N].double().cpu()
    direction_RD = direction_RD * scale_R[:, None]
    parts = list(written(trace, own, layer))
    values = torch.stack(
        [(one.values_ND[place_N].double().cpu() * direction_RD).sum(-1) for one in parts], 1
    )
    probs_NE = logits_NE.softmax(-1)
    targets = trace.tokens.iloc[place_N.tolist()].reset_index(drop=True)
    targets = targets[["sequence", "pos", "id", "text"]].assign(
        layer=layer,
        bank=bank or "text",
        slot=slot_R.numpy(),
        expert=expert_R.numpy(),
        against=against_R.numpy(),
        value=_difference(logits_NE, row_R, expert_R, against_R),
        prob_advantage=_difference(probs_NE, row_R, expert_R, against_R),
        bias_advantage=(bias_E[expert_R] - bias_E[against_R]).numpy(),
    )
    experts, banks = slot_columns(parts, place_N.numpy())
    return Attribution(
        title=f"Router logits of {prefix}, explained expert minus runner-up",
        targets=targets,
        components=component_table([one.component for one in parts]),
        values=values.numpy(),
        experts=experts,
        banks=banks,
    )


def _routers(model: Model, layer: int) -> dict[str, str]:
    """The prefix of the sites of each bank's router."""
    blocks = block_list(model.blocks)
    if not 0 <= layer < len(blocks):
        raise ValueError(f"layer {layer} does not exist; the model has layers 0..{len(blocks) - 1}")
    moe = blocks[layer].moe
    if isinstance(moe, MoE):
        return {"text": f"blocks.{layer}.moe"}
    if isinstance(moe, BankedMoE):
        return {bank: f"blocks.{layer}.moe.{bank}" for bank in ("text", "vision")}
    raise ValueError(f"layer {layer} is dense: it has no router")


def _router(model: Model, layer: int, bank: str | None) -> tuple[str, Router]:
    prefixes, moe = _routers(model, layer), block_list(model.blocks)[layer].moe
    if isinstance(moe, MoE):
        if bank not in (None, "text"):
            raise ValueError(f"bank={bank!r}: a text model has one bank of experts; leave it out")
        return prefixes["text"], moe.router
    assert isinstance(moe, BankedMoE)
    if bank not in prefixes:
        raise ValueError(f"bank={bank!r}: this model has two; take bank='text' or bank='vision'")
    return prefixes[bank], moe.text.router if bank == "text" else moe.vision.router


def _scores(trace: Trace, prefix: str, logits_NE: Tensor, bias_E: Tensor) -> Tensor:
    """The selection scores that flowed, if kept, else what the logits and the bias make."""
    path = f"{prefix}.selection_scores"
    if path in trace.values:
        return trace.values[path].parts[None].values.detach().double().cpu()
    return logits_NE.softmax(-1) + bias_E


def _explained(
    ids_NK: Tensor, slot: int | None, expert: Which | None, n_experts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each number: its row among the bank's tokens, its expert, and the slot this is in."""
    n, k = ids_NK.shape
    if n == 0:
        raise ValueError("this bank read no token of the trace, so there is nothing to explain")
    rows_N = torch.arange(n)
    if expert is not None:
        expert_N = _per_row(expert, n, n_experts, "expert")
        is_in_NK = ids_NK == expert_N[:, None]
        slot_N = torch.where(is_in_NK.any(1), is_in_NK.int().argmax(1), -1)
        return rows_N, expert_N, slot_N
    if slot is None:
        slots = torch.arange(k).repeat_interleave(n)
        return rows_N.repeat(k), ids_NK.T.reshape(-1), slots
    if not 0 <= slot < k:
        raise ValueError(f"slot={slot} must be in 0..{k - 1}, or None for all")
    return rows_N, ids_NK[:, slot], torch.full((n,), slot)


def _per_row(which: Which, n: int, n_experts: int, name: str) -> Tensor:
    listed = [which] * n if isinstance(which, int) else [int(one) for one in which]
    if len(listed) != n:
        raise ValueError(f"{name}: {len(listed)} given for {n} tokens of this bank")
    if wrong := [one for one in listed if not 0 <= one < n_experts]:
        raise ValueError(f"{name}={wrong[0]} must be in 0..{n_experts - 1}")
    return torch.tensor(listed)


def _direction(
    model: Model, layer: int, router: Router, expert_R: Tensor, against_R: Tensor
) -> Tensor:
    gain_D = block_list(model.blocks)[layer].norm2.gain_D.detach().double().cpu()
    weight_ED = router.weight_ED.detach().double().cpu()
    return gain_D * (weight_ED[expert_R] - weight_ED[against_R])


def _difference(
    values_NE: Tensor, row_R: Tensor, expert_R: Tensor, against_R: Tensor
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    difference_R: Tensor = values_NE[row_R, expert_R] - values_NE[row_R, against_R]
    return np.asarray(difference_R.numpy(), dtype=np.float64)
