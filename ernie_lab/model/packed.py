"""Weight matrices held in 4 or 8 bits. What multiplies is what these bits stand for."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import cache
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.quantise import NF4_BLOCK, Scheme


class PackedMatrices(nn.Module):
    """The weights `[… f d]` of its owner's parameter `fills`, each matrix packed by itself.

    `codes` and `scales` are buffers: no gradient reaches them. Under `.to(dtype)` the scales stay
    float32 and only `dtype`, in which the weights multiply, changes.
    """

    def __init__(self, fills: str, shape: tuple[int, ...], scheme: Scheme) -> None:
        super().__init__()
        self.fills, self.shape, self.scheme = fills, shape, scheme
        self.dtype = torch.float32
        *stack, rows, columns = shape
        if scheme == "nf4":
            n_bytes, n_scales = math.ceil(rows * columns / 2), math.ceil(rows * columns / NF4_BLOCK)
            codes = torch.empty(*stack, n_bytes, dtype=torch.uint8)
        else:
            n_scales = rows
            codes = torch.empty(*stack, rows, columns, dtype=torch.int8)
        self.codes: Tensor
        self.scales: Tensor
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.empty(*stack, n_scales, dtype=torch.float32))

    @property
    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        self.to_empty(device=device)
        self.dtype = dtype

    @torch.no_grad()
    def take(self, index: tuple[int, ...], weights: Tensor) -> None:
        """From float32 whatever the model's dtype, so that the bits do not depend on it."""
        for inner in product(*map(range, weights.shape[:-2])):
            matrix = weights[inner].to(self.codes.device, torch.float32).contiguous()
            pack = _pack_nf4 if self.scheme == "nf4" else _pack_int8
            codes, scales = pack(matrix)
            self.codes[(*index, *inner)].copy_(codes)
            self.scales[(*index, *inner)].copy_(scales)

    @torch.no_grad()
    def dequantised(self, *index: int) -> Tensor:
        """A new tensor: the weights, or those under an index of the leading axes."""
        shape = self.shape[len(index) :]
        if len(shape) == 2:
            return self._matrix(index)
        out = torch.empty(shape, dtype=self.dtype, device=self.codes.device)
        for inner in product(*map(range, shape[:-2])):
            out[inner] = self._matrix((*index, *inner))
        return out

    def _matrix(self, index: tuple[int, ...]) -> Tensor:
        codes, scales = self.codes[index], self.scales[index]
        if self.scheme == "int8":
            return _unpack_int8(codes, scales).to(self.dtype)
        kind = torch.float32 if self.dtype == torch.float64 else self.dtype
        return _unpack_nf4(codes, scales, self.shape[-2:], kind).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedMatrices:
        exact = self.scales
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        if self.scales.dtype != torch.float32:
            self.scales = exact.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.fills} {list(self.shape)}, {self.scheme}, multiplies in {self.dtype}"


def _pack_int8(matrix_FD: Tensor) -> tuple[Tensor, Tensor]:
    """`[f d]` int8 and the scale of each row `[f]`: value = code * scale / 127."""
    scale_F = matrix_FD.abs().amax(-1)
    steps_F = torch.where(scale_F > 0, 127 / scale_F, 0.0)
    return (matrix_FD * steps_F.unsqueeze(-1)).round().to(torch.int8), scale_F


def _unpack_int8(codes_FD: Tensor, scale_F: Tensor) -> Tensor:
    return codes_FD.float() * (scale_F / 127).unsqueeze(-1)


def _pack_nf4(matrix_FD: Tensor) -> tuple[Tensor, Tensor]:
    """Two codes a byte, and the largest magnitude of each block."""
    codes, state = _bitsandbytes().quantize_4bit(
        matrix_FD, blocksize=NF4_BLOCK, compress_statistics=False, quant_type="nf4"
    )
    return codes.flatten(), state.absmax


def _unpack_nf4(
    codes: Tensor, scales: Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    functional = _bitsandbytes()
    state = functional.QuantState(
        scales, shape=torch.Size(shape), blocksize=NF4_BLOCK, quant_type="nf4", dtype=dtype
    )
    matrix_FD: Tensor = functional.dequantize_4bit(codes.unsqueeze(-1), state)
    return matrix_FD.reshape(shape)


@cache
def _bitsandbytes() -> Any:
    """Its functions. Without their say on kernels for products in 4 bits, which are not used."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_says_no_kernels)
    import bitsandbytes.functional

    return bitsandbytes.functional


def _says_no_kernels(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in record.getMessage()
