"""A bank of routed experts: tokens sorted by expert, one pair of products for each.

In bf16 and without gradients one grouped product serves all experts: on a GPU the host never
waits to learn how many rows each has, on a CPU there is one call instead of one an expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.functional import silu

from ernie_lab.model.linear import linear, linear_into
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


@dataclass(frozen=True)
class Dispatch:
    """The (token, slot) rows of a batch, in the order of their experts, and the way back.

    `N` are the tokens: `[b s]` in a text model, `[n]` in a bank of a vision-language one.
    Rows are numbered token-major: row = token * k + slot. `order_J[i]` is the row that stands
    at place i once sorted, `place_J` its inverse, and `expert_J[i]` the expert at place i.
    """

    expert_J: Tensor
    order_J: Tensor
    place_J: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, expert_ids_NK: Tensor) -> Dispatch:
        expert_J, order_J = expert_ids_NK.flatten().sort(stable=True)
        return cls(expert_J, order_J, order_J.argsort(), expert_ids_NK.shape)

    @property
    def experts(self) -> list[int]:
        """Those with rows, rising. To ask makes the host wait for a GPU."""
        return self._on_host[0]

    @property
    def counts(self) -> list[int]:
        """How many rows each of `experts` has."""
        return self._on_host[1]

    @cached_property
    def _on_host(self) -> tuple[list[int], list[int]]:
        experts, counts = self.expert_J.unique_consecutive(return_counts=True)
        return experts.tolist(), counts.tolist()

    def ends(self, n_experts: int) -> Tensor:
        """`[e]` int32: behind which row each expert's rows end. The host does not wait."""
        # Not `bincount`, which asks a GPU for the largest id.
        each_E = torch.arange(n_experts, device=self.expert_J.device)
        return torch.searchsorted(self.expert_J, each_E, right=True, out_int32=True)

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
        if torch.compiler.is_compiling() and _are_few(x_ND):
            args = expert_ids_NK, expert_weights_NK, self.gate_up_E2FD, self.down_EDF
            return gather_experts(x_ND, *args, at, tap)
        gate_up_E = rearrange(self.gate_up_E2FD, "e two f d -> e (two f) d")
        gate_up: Matrices = gate_up_E
        down: Matrices = self.down_EDF
        if torch.is_grad_enabled():
            # Indexing per expert would make the backward pass add E full-sized gradients.
            gate_up, down = gate_up_E.unbind(), self.down_EDF.unbind()
        return run_experts(x_ND, expert_ids_NK, expert_weights_NK, gate_up, down, at, tap)


# With more, a matrix would be read more often than expert by expert.
FEW_TOKENS = 8


def _are_few(x_ND: Tensor) -> bool:
    return x_ND.shape[:-1].numel() <= FEW_TOKENS and not torch.is_grad_enabled()


def gather_experts(
    x_ND: Tensor,
    expert_ids_NK: Tensor,
    expert_weights_NK: Tensor,
    gate_up_E2FD: Tensor,
    down_EDF: Tensor,
    at: ExpertSites,
    tap: Tap = idle,
) -> Tensor:
    """The forward of a bank for few rows, to be compiled: each row reads its experts' matrices.

    The same sites as `run_experts`. Not for eager use, which would copy every chosen matrix.
    """
    x_N11D = rearrange(x_ND, "... d -> ... 1 1 1 d")
    gate_up_NK2F = (gate_up_E2FD[expert_ids_NK] * x_N11D).sum(-1)
    gate_NKF, up_NKF = gate_up_NK2F.unbind(-2)
    gate_NKF, up_NKF = _tapped(tap, at.gate, gate_NKF), _tapped(tap, at.up, up_NKF)
    act_NKF = _tapped(tap, at.act, silu(gate_NKF) * up_NKF)
    out_NKD = (down_EDF[expert_ids_NK] * rearrange(act_NKF, "... f -> ... 1 f")).sum(-1)
    return weighted(out_NKD, expert_weights_NK, at, tap)


def _tapped(tap: Tap, site: Site, x: Tensor) -> Tensor:
    return tap(site, x) if tap.wants(site) else x


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
    rows = Dispatch.of(expert_ids_NK)
    act_JF = _neurons(x_ND, gate_up, rows, at, tap)
    out_NKD = rows.by_token(grouped_linear(act_JF, down, rows))
    return weighted(out_NKD, expert_weights_NK, at, tap)


def weighted(
    out_NKD: Tensor, expert_weights_NK: Tensor, at: ExpertSites, tap: Tap = idle
) -> Tensor:
    """`[… d]`: the experts' outputs, each times its weight, summed over the slots."""
    out_NKD = _tapped(tap, at.out, out_NKD)
    slot_NKD = out_NKD * rearrange(expert_weights_NK, "... k -> ... k 1")
    return _tapped(tap, at.slot_out, slot_NKD).sum(-2)


def _neurons(
    x_ND: Tensor, gate_up: Matrices, rows: Dispatch, at: ExpertSites, tap: Tap
) -> Float[Tensor, "j f"]:
    """silu(gate) * up of the rows. By itself, so that what it needs is let go before `down`."""
    # Row // k is the row's token, so no copy of x per slot is ever made in token order.
    token_J = rows.order_J // rows.shape[-1]
    x_JD = rearrange(x_ND, "... d -> (...) d").index_select(0, token_J)
    gate_up_J2F = grouped_linear(x_JD, gate_up, rows).unflatten(-1, (2, -1))
    gate_JF = rows.tap(tap, at.gate, gate_up_J2F[:, 0])
    up_JF = rows.tap(tap, at.up, gate_up_J2F[:, 1])
    return rows.tap(tap, at.act, silu(gate_JF) * up_JF)


def grouped_linear(
    x_JD: Float[Tensor, "j d"], matrices: Matrices, rows: Dispatch
) -> Float[Tensor, "j f"]:
    """Rows sorted by expert, each times its expert's `[f d]`."""
    if isinstance(matrices, Tensor) and _one_product_serves(x_JD, matrices):
        return one_product(x_JD, matrices, rows)
    by_expert = zip(x_JD.split(rows.counts), rows.experts, strict=True)
    if torch.is_grad_enabled() or len(rows.experts) < 2:
        parts = [linear(own_ND, matrices[e]) for own_ND, e in by_expert]
        return torch.cat(parts) if parts else x_JD.new_empty(0, len(matrices[0]))
    # Each product goes to its place while it is in the cache, and its memory to the next one.
    own_ND, e = next(by_expert)
    first_NF = linear(own_ND, matrices[e])
    out_JF = first_NF.new_empty(len(x_JD), first_NF.shape[1])
    places = iter(out_JF.split(rows.counts))
    next(places).copy_(first_NF)
    for out_NF, (own_ND, e) in zip(places, by_expert, strict=True):
        linear_into(out_NF, own_ND, matrices[e])
    return out_JF


def one_product(
    x_JD: Float[Tensor, "j d"], matrices_EFD: Float[Tensor, "e f d"], rows: Dispatch
) -> Float[Tensor, "j f"]:
    """`grouped_linear` as one grouped product. Without gradients; torch 2.10 or later.

    On the CPU it agrees with the loop (tests/model/test_experts.py). On a GPU it has not been run.
    """
    n_experts, hidden, _ = matrices_EFD.shape
    if not len(x_JD):
        return x_JD.new_empty(0, hidden)
    # A view: the kernel asks for the second operand by columns, as the matrices lie.
    weight_EDF = rearrange(matrices_EFD, "e f d -> e d f")
    out_JF: Tensor = _grouped_mm(x_JD, weight_EDF, offs=rows.ends(n_experts))
    return out_JF


def _one_product_serves(x_JD: Tensor, matrices_EFD: Tensor) -> bool:
    return (
        x_JD.dtype is torch.bfloat16
        and matrices_EFD.dtype is torch.bfloat16
        and not torch.is_grad_enabled()
        and _grouped_mm is not None
        # The kernel reads 16 bytes at a time.
        and x_JD.shape[-1] % 8 == 0
        and matrices_EFD.shape[-2] % 8 == 0
        and x_JD.is_contiguous()
        and matrices_EFD.is_contiguous()
        and (x_JD.is_cpu or _is_recent(x_JD.device))
    )


def _is_recent(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


_grouped_mm = cast("Any", getattr(functional, "grouped_mm", None))
