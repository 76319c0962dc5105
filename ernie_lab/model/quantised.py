"""The quantised twins of a linear layer and of a bank of experts, and putting them in place.

Weights are dequantised where they multiply, a matrix at a time and of experts only those in
use, and let go. So the forward of the model, its sites and its numbers are those of a plain
model that holds the dequantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.on_disk import is_streamed
from ernie_lab.checkpoint.packing import packed_parameters
from ernie_lab.checkpoint.quantise import Quantisation, Scheme
from ernie_lab.model.experts import ExpertBank, ExpertSites, run_experts
from ernie_lab.model.linear import linear
from ernie_lab.model.packed import PackedMatrices
from ernie_lab.sites import Tap, idle

AnyModule = TypeVar("AnyModule", bound=nn.Module)


class QuantisedLinear(nn.Module):
    """`nn.Linear` with a packed weight. `weight` dequantises it anew each time it is read."""

    def __init__(self, twin: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features = twin.in_features, twin.out_features
        self.packed = PackedMatrices("weight", tuple(twin.weight.shape), scheme)
        self.bias = twin.bias

    @property
    def weight(self) -> Tensor:
        return self.packed.dequantised()

    def forward(self, x: Tensor) -> Tensor:
        _require_no_graph(x)
        return linear(x, self.weight, self.bias)


class QuantisedExpertBank(nn.Module):
    """`ExpertBank` with packed matrices, which dequantises those of the chosen experts alone.

    `gate_up_E2FD` and `down_EDF` are for looking at: they dequantise the whole bank.
    """

    def __init__(self, twin: ExpertBank, scheme: Scheme) -> None:
        super().__init__()
        shapes = tuple(twin.gate_up_E2FD.shape), tuple(twin.down_EDF.shape)
        self.packed_gate_up = PackedMatrices("gate_up_E2FD", shapes[0], scheme)
        self.packed_down = PackedMatrices("down_EDF", shapes[1], scheme)

    @property
    def gate_up_E2FD(self) -> Tensor:  # noqa: N802
        return self.packed_gate_up.dequantised()

    @property
    def down_EDF(self) -> Tensor:  # noqa: N802
        return self.packed_down.dequantised()

    def forward(
        self,
        x_ND: Tensor,
        expert_ids_NK: Tensor,
        expert_weights_NK: Tensor,
        at: ExpertSites,
        tap: Tap = idle,
    ) -> Tensor:
        _require_no_graph(x_ND)
        n_experts = len(self.packed_down.codes)
        gate_up = OnUse(n_experts, lambda e: self.packed_gate_up.dequantised(e).flatten(0, 1))
        down = OnUse(n_experts, self.packed_down.dequantised)
        return run_experts(x_ND, expert_ids_NK, expert_weights_NK, gate_up, down, at, tap)


@dataclass(frozen=True, slots=True)
class OnUse:
    """Matrices of experts that are made when they are asked for, and held by nobody."""

    n: int
    make: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, e: int) -> Tensor:
        return self.make(e)


def quantise(model: AnyModule, how: Quantisation) -> AnyModule:
    """Put the quantised twins in place, unfilled; in the model itself, which is returned.

    Use it under `torch.device("meta")`, before `fill`. All parameters that are left are frozen:
    the model cannot be trained.
    """
    for path, module in list(model.named_modules()):
        twin: nn.Module
        if isinstance(module, ExpertBank) and _taken(how, path, module):
            twin = QuantisedExpertBank(module, how.scheme)
        elif isinstance(module, nn.Linear) and _taken(how, path, module):
            twin = QuantisedLinear(module, how.scheme)
        else:
            continue
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, twin.train(module.training))
    return model.requires_grad_(False)


def _taken(how: Quantisation, path: str, module: nn.Module) -> bool:
    matrices = [(n, p) for n, p in module.named_parameters() if p.ndim >= 2]
    return all(how.takes(f"{path}.{name}", parameter.shape) for name, parameter in matrices)


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, and those that are packed as they multiply: dequantised, one at a time."""
    yield from module.named_parameters()
    for name, packed in packed_parameters(module):
        assert isinstance(packed, PackedMatrices)
        yield name, packed.dequantised()


def require_differentiable(model: nn.Module) -> None:
    """Refuse gradients through a model that is quantised, or streamed from disk.

    Raises:
        ValueError: it is.
    """
    if is_streamed(model):
        raise ValueError(
            "this model is streamed from disk, and gradients through it are refused: the graph "
            "would hold the weights of every layer, which is the model that did not fit. Load it "
            "without placement='stream' for gradients and training"
        )
    scheme = next((packed.scheme for _, packed in packed_parameters(model)), None)
    if scheme is not None:
        raise ValueError(_NO_GRADIENTS.format(scheme=scheme))


_NO_GRADIENTS = (
    "this model is quantised ({scheme}), and gradients through it are refused: the backward pass "
    "would hold every weight dequantised, which is the model that did not fit, and the levels "
    "have no derivative. Load it without quantize= for gradients and training"
)


def _require_no_graph(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(_NO_GRADIENTS.format(scheme="its weights are in few bits"))
