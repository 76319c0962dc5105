"""A line for each tensor that tells its weights from others: name, dtype, shape, two sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor


def weight_sums(tensors: Mapping[str, Tensor]) -> Iterator[tuple[object, ...]]:
    """Name, dtype, shape, sum and sum of sizes of each; sums in fp64 up to a million numbers."""
    for name, x in tensors.items():
        wide = x.detach().double() if x.numel() < 1 << 20 else x.detach().float()
        yield name, x.dtype, tuple(x.shape), float(wide.sum()), float(wide.abs().sum())
