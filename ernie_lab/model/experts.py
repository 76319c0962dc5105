"""A bank of routed experts: tokens sorted by expert, one pair of products for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class ExpertSites:
    """`rows` are the dims of the rows: `b s` in a text model, `n` in a bank."""

    gate: Site
    up: Site
    act: Site
    out: Site
    slot_out: Site

    @classmethod
    def under(cls, path: str, rows: str = "b s") -> ExpertSites:
        def site(name: str, last: str, meaning: str) -> Site:
            return Site(f"{path}.{name}", f"{rows} k {last}", meaning, on_demand=True)

        return cls(
            gate=site("expert_gate", "f", "gate of the chosen expert, before silu"),
            up=site("expert_up", "f", "up projection of the chosen expert"),
            act=site("expert_act", "f", "neurons of the chosen expert: silu(gate) * up"),
            out=site("expert_out", "d", "output of the chosen expert, before its weight"),
            slot_out=site("slot_out", "d", "expert_out x expert_weights"),
        )


@dataclass(frozen=True, slots=True)
class Dispatch:
    """The (token, slot) rows of a batch, in the order of their experts, and the way back.

    `N` are the tokens: `[b s]` in a text model, `[n]` in a bank of a vision-language one.
    Rows are numbered token-major: row = token * k + slot. `order_J[i]` is the row that stands
    at place i once sorted, `place_J` its inverse, `counts` how many rows each expert has.
    """

    order_J: Tensor
    place_J: Tensor
    counts: list[int]
    shape: torch.Size

    @classmethod
    def of(cls, expert_ids_NK: Tensor, n_experts: int) -> Dispatch:
        rows_J = expert_ids_NK.flatten()
        order_J = rows_J.argsort(stable=True)
        place_J = torch.empty_like(order_J)
        place_J[order_J] = torch.arange(len(order_J), device=order_J.device)
        counts = torch.bincount(rows_J, minlength=n_experts).tolist()
        return cls(order_J, place_J, counts, expert_ids_NK.shape)

    def by_expert(self, rows_NKX: Tensor) -> Tensor:
        return rows_NKX.flatten(0, -2).index_select(0, self.order_J)

    def by_token(self, sorted_JX: Tensor) -> Tensor:
        width = sorted_JX.shape[-1]  # named, because nothing can be inferred of no rows
        return sorted_JX.index_select(0, self.place_J).reshape(*self.shape, width)

    def tap(self, tap: Tap, site: Site, sorted_JX: Tensor) -> Tensor:
        """Show an on-demand site its per-token view, and put what it returns back in order."""
        if not tap.wants(site):
            return sorted_JX
        shown_NKX = self.by_token(sorted_JX)
        used_NKX = tap(site, shown_NKX)
        # Left alone, the rows go on as they are: another memory layout may round otherwise.
        if used_NKX is shown_NKX and not used_NKX.requires_grad:
            return sorted_JX
        return self.by_expert(used_NKX)


class ExpertBank(nn.Module):
    """sum over slots of weight * down_e(silu(gate_e x) * up_e x), e the expert in the slot.

    `gate_up_E2FD` holds gate (0) and up (1) of every expert side by side, so that one product
    serves both. Experts have no biases, also where `use_bias` is set.
    """

    def __init__(self, n_experts: int, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up_E2FD = nn.Parameter(torch.empty(n_experts, 2, hidden, width))
        self.down_EDF = nn.Parameter(torch.empty(n_experts, width, hidden))

    def forward(
        self,
        x_ND: Tensor,
        expert_ids_NK: Tensor,
        expert_weights_NK: Tensor,
        at: ExpertSites,
        tap: Tap = idle,
    ) -> Tensor:
        # Unbound once: indexing per expert would make the backward pass add E full-sized gradients.
        gate_up = rearrange(self.gate_up_E2FD, "e two f d -> e (two f) d").unbind()
        down = self.down_EDF.unbind()
        return run_experts(x_ND, expert_ids_NK, expert_weights_NK, gate_up, down, at, tap)


@runtime_checkable
class Matrices(Protocol):
    """One matrix for each expert: a tuple, or what makes a matrix when it is asked for."""

    def __len__(self) -> int: ...
    def __getitem__(self, e: int, /) -> Tensor: ...


def run_experts(
    x_ND: Tensor,
    expert_ids_NK: Tensor,
    expert_weights_NK: Tensor,
    gate_up: Matrices,
    down: Matrices,
    at: ExpertSites,
    tap: Tap = idle,
) -> Tensor:
    """The forward of a bank. `gate_up[e]` is `[(2 f) d]`, `down[e]` is `[d f]`."""
    k = expert_ids_NK.shape[-1]
    rows = Dispatch.of(expert_ids_NK, len(down))
    # Row // k is the row's token, so no copy of x per slot is ever made in token order.
    x_JD = rearrange(x_ND, "... d -> (...) d").index_select(0, rows.order_J // k)
    gate_up_J2F = grouped_linear(x_JD, gate_up, rows.counts).unflatten(-1, (2, -1))
    gate_JF = rows.tap(tap, at.gate, gate_up_J2F[:, 0])
    up_JF = rows.tap(tap, at.up, gate_up_J2F[:, 1])
    act_JF = rows.tap(tap, at.act, silu(gate_JF) * up_JF)
    out_NKD = rows.by_token(grouped_linear(act_JF, down, rows.counts))
    if tap.wants(at.out):
        out_NKD = tap(at.out, out_NKD)
    slot_NKD = out_NKD * rearrange(expert_weights_NK, "... k -> ... k 1")
    if tap.wants(at.slot_out):
        slot_NKD = tap(at.slot_out, slot_NKD)
    return slot_NKD.sum(-2)


def grouped_linear(
    x_JD: Float[Tensor, "j d"], matrices: Matrices, counts: list[int]
) -> Float[Tensor, "j f"]:
    """Rows sorted by expert, each times its expert's `[f d]`; `counts[e]` rows are expert e's."""
    parts = [linear(rows, matrices[e]) for e, rows in enumerate(x_JD.split(counts)) if len(rows)]
    return torch.cat(parts) if parts else x_JD.new_empty(0, len(matrices[0]))
