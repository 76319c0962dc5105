"""x W^T + b, by the fastest product that this machine has for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# oneDNN compiles a product for each new number of rows, which takes 0.7 ms. A small matrix never
# earns that back, so models of the built-in size stay with the BLAS.
_SMALLEST = 2**17


class Linear(nn.Linear):
    """`nn.Linear`, through `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """`functional.linear`: `[… d]` times `[f d]`, to `[… f]`.

    In float32 on a CPU, without gradients, oneDNN multiplies instead of the BLAS: 1.1 times as
    fast at 512 rows, 1.6 at 48 and at one (benchmarks/NOTES.md). bf16 goes there in any case.
    """
    if torch.compiler.is_compiling():
        return _compiled(x, weight_FD, bias_F)
    if _onednn_serves(x, weight_FD):
        return _onednn(x, weight_FD, bias_F)
    return functional.linear(x, weight_FD, bias_F)


def linear_into(out_NF: Tensor, x_ND: Tensor, weight_FD: Tensor) -> None:
    """Write x W^T into `out_NF`, which is part of a larger tensor. Without gradients."""
    if _onednn_serves(x_ND, weight_FD):
        out_NF.copy_(_onednn(x_ND, weight_FD, None))
    else:
        torch.mm(x_ND, weight_FD.t(), out=out_NF)


def _compiled(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    if x.device.type != "cpu" or x.shape[:-1].numel() > 2:
        return functional.linear(x, weight_FD, bias_F)
    # The product is never stored: weights stream through a reduction.
    sum_F = (x.unsqueeze(-2) * weight_FD).sum(-1)
    return sum_F if bias_F is None else sum_F + bias_F


def _onednn(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
    # What torch's own compiler calls for a linear layer.
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_FD, bias_F, "none", [], "")
    return out


def _onednn_serves(x: Tensor, weight_FD: Tensor) -> bool:
    return (
        x.dtype is torch.float32
        and weight_FD.dtype is torch.float32
        and weight_FD.numel() >= _SMALLEST
        and _HAS_ONEDNN
        and x.is_cpu
        and weight_FD.is_cpu
        and not (torch.is_grad_enabled() and (x.requires_grad or weight_FD.requires_grad))
        and not torch.is_autocast_enabled("cpu")
    )


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)
