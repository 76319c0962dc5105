"""What the parts of a model wrote to the residual stream, read from a trace.

The stream after a layer is what entered the first block plus everything that was written since:

    embedding + heads + attention biases + dense MLPs + slots (weight x expert_out) + shared blocks

A shared block is one fused MLP, however many experts it is said to hold: it splits into neurons
and into nothing else. Its output and a dense MLP's include their biases.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.block import Block
from ernie_lab.model.kinds import Model
from ernie_lab.model.moe import MoE
from ernie_lab.model.stack import block_list
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.recorded import Part, Recorded
from ernie_lab.trace.trace import Trace

Kind: TypeAlias = Literal[
    "embed", "head", "attn_bias", "mlp", "slot", "shared", "head_bias", "neuron", "mlp_bias"
]

Place: TypeAlias = Literal["resid_pre", "resid_mid", "resid_post"]


@runtime_checkable
class HasModel(Protocol):
    """A `Lab`, say."""

    @property
    def model(self) -> Model: ...


@dataclass(frozen=True, slots=True)
class Component:
    """One summand of the stream. `index` is the head or the slot; None elsewhere."""

    kind: Kind
    layer: int | None = None
    index: int | None = None

    def __str__(self) -> str:
        if self.layer is None:
            return self.kind
        return f"{self.kind} {self.layer}" + ("" if self.index is None else f".{self.index}")


@dataclass(frozen=True, slots=True, eq=False)
class Written:
    """What one component wrote for every token, fp32. For a slot, `expert_N` is who was in it and
    `bank_N` the number of that expert's bank (0 in a text model)."""

    component: Component
    values_ND: Tensor
    expert_N: Tensor | None = None
    bank_N: Tensor | None = None


def model_of(model: Model | HasModel) -> Model:
    return model.model if isinstance(model, HasModel) else model


def needed_sites(model: Model, layer: int | None = None, *, slots: bool = True) -> list[str]:
    """The sites that the decomposition reads, up to `resid_mid` of a layer, or to the end."""
    paths = ["embed_in"]
    blocks = block_list(model.blocks)
    for block in blocks if layer is None else blocks[: layer + 1]:
        paths.append(f"blocks.{block.layer}.attn.result")
        if block.layer != layer:
            paths += _mlp_sites(block, slots)
    return paths


def _mlp_sites(block: Block, slots: bool) -> list[str]:
    at = f"blocks.{block.layer}"
    if block.moe is None:
        return [f"{at}.mlp.mlp_out"]
    shared = [f"{at}.moe.shared_out"] if block.moe.shared is not None else []
    if not slots:
        return [f"{at}.moe.routed_out", *shared]
    names = ("expert_ids", "slot_out")
    prefixes = [""] if isinstance(block.moe, MoE) else [f"{bank}." for bank in BANKS]
    return [f"{at}.moe.{prefix}{name}" for prefix in prefixes for name in names] + shared


def require(trace: Trace, paths: list[str], how: str) -> None:
    """Raise, with what to keep, unless all these sites are in the trace."""
    missing = [path for path in paths if path not in trace.values]
    if missing:
        raise NotKept(
            f"{len(missing)} of the {len(paths)} sites that this needs were not kept, first: "
            f"{missing[0]}. Run again with keep={how}"
        )


def at_kept(trace: Trace, path: str) -> Trace:
    """The trace at the tokens where this site was kept: all, or those of `positions=`."""
    return dataclasses.replace(trace, rows_N=trace.values[path].parts[None].rows_N)


def places_of(trace: Trace, rows_N: Tensor) -> Tensor:
    """Where some rows of the context stand among the trace's tokens."""
    place = torch.full((len(trace.context),), -1)
    place[trace.rows_N] = torch.arange(len(trace.rows_N))
    found_N = place[rows_N]
    if bool((found_N < 0).any()):
        raise ValueError(
            f"{int((found_N < 0).sum())} tokens of a bank are not among the {len(trace)} others; "
            "keep all sites of a decomposition with the same positions"
        )
    return found_N


def token_rows(trace: Trace, path: str) -> Tensor:
    """A site `[n …]` in the order of the trace's tokens, fp32 where it is floating."""
    part = _whole(trace.values[path])
    if not torch.equal(part.rows_N, trace.rows_N):
        raise ValueError(
            f"{path} was kept at {len(part.rows_N)} of the trace's {len(trace.rows_N)} tokens; "
            "keep all sites of a decomposition with the same positions"
        )
    values = part.values.detach()
    return values.float() if values.is_floating_point() else values


def _whole(kept: Recorded) -> Part:
    if kept.heads is not None:
        raise ValueError(
            f"{kept.site.path} was kept for heads {list(kept.heads)} alone; a sum needs them all"
        )
    return kept.parts[None]


def written(trace: Trace, model: Model, layer: int | None = None) -> Iterator[Written]:
    """Every component, in the order in which they write; up to `resid_mid` of `layer`, or all."""
    yield Written(Component("embed"), token_rows(trace, "embed_in"))
    blocks = block_list(model.blocks)
    for block in blocks if layer is None else blocks[: layer + 1]:
        yield from _of_attention(trace, block)
        if block.layer == layer:
            return
        yield from _of_mlp(trace, block)


def _of_attention(trace: Trace, block: Block) -> Iterator[Written]:
    number = block.layer
    result_NHD = token_rows(trace, f"blocks.{number}.attn.result")
    for head, values_ND in enumerate(result_NHD.unbind(1)):
        yield Written(Component("head", number, head), values_ND)
    if block.attn.o.bias is not None:
        bias_D = block.attn.o.bias.detach().float().to(result_NHD.device)
        bias_ND = bias_D.expand(len(result_NHD), -1)
        yield Written(Component("attn_bias", number), bias_ND)


def _of_mlp(trace: Trace, block: Block) -> Iterator[Written]:
    number, at = block.layer, f"blocks.{block.layer}"
    if block.moe is None:
        yield Written(Component("mlp", number), token_rows(trace, f"{at}.mlp.mlp_out"))
        return
    slot_NKD, ids_NK, bank_N = slots(trace, block.moe, number)
    for slot, values_ND in enumerate(slot_NKD.unbind(1)):
        yield Written(Component("slot", number, slot), values_ND, ids_NK[:, slot], bank_N)
    if block.moe.shared is not None:
        yield Written(Component("shared", number), token_rows(trace, f"{at}.moe.shared_out"))


def slots(
    trace: Trace, moe: MoE | BankedMoE, layer: int, name: str = "slot_out"
) -> tuple[Tensor, Tensor, Tensor]:
    """`slot_out` (or `expert_out`) `[n k d]`, the experts `[n k]` and the bank `[n]` of each
    token; both banks of a vision-language model put together."""
    at = f"blocks.{layer}.moe"
    if isinstance(moe, MoE):
        ids_NK = token_rows(trace, f"{at}.expert_ids")
        return token_rows(trace, f"{at}.{name}"), ids_NK, torch.zeros(len(ids_NK)).long()
    out: dict[str, Tensor] = {}
    bank_N = torch.full((len(trace.rows_N),), -1)
    for number, bank in enumerate(BANKS):
        for what in ("expert_ids", name):
            part = _whole(trace.values[f"{at}.{bank}.{what}"])
            where = places_of(trace, part.rows_N)
            values = part.values.detach()
            values = values.float() if values.is_floating_point() else values
            whole = out.setdefault(what, values.new_zeros(len(bank_N), *values.shape[1:]))
            whole[where] = values
            bank_N[where] = number
    if bool((bank_N < 0).any()):
        raise ValueError(
            f"{at}: {int((bank_N < 0).sum())} tokens are in no bank's rows; keep both banks with "
            "the same positions"
        )
    return out[name], out["expert_ids"], bank_N


def relative_error(sum_ND: Tensor, exact_ND: Tensor) -> float:
    """max over tokens of ||sum - x|| / ||x||."""
    difference_N = (sum_ND - exact_ND).norm(dim=-1)
    return float((difference_N / exact_ND.norm(dim=-1)).max())


def following(trace: Trace) -> list[int | None]:
    """The id after each token of the trace, None at the end of a sequence."""
    ids, sequence = trace.context.id, trace.context.sequence
    out: list[int | None] = []
    for row in trace.rows_N.tolist():
        after = row + 1
        there = after < len(ids) and sequence[after] == sequence[row]
        out.append(ids[after] if there else None)
    return out
