"""Filling modules that hold their weights otherwise than a checkpoint stores them.

This room knows nothing of models: what packs is told by what it can do (`Packs`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.layout import Layout, Piece
from ernie_lab.checkpoint.on_disk import OnDisk
from ernie_lab.checkpoint.parts import part_of
from ernie_lab.checkpoint.quantise import HeldBytes, Scheme


@runtime_checkable
class Packs(Protocol):
    """A module that stands for its owner's parameter `fills` of this shape, in other bits."""

    fills: str
    shape: tuple[int, ...]
    scheme: Scheme

    @property
    def n_bytes(self) -> int:
        """What its tensors hold."""
        ...

    def allocate(self, device: torch.device, dtype: torch.dtype) -> None:
        """Make room; `dtype` is what it will multiply in."""
        ...

    def take(self, index: tuple[int, ...], weights: Tensor) -> None:
        """Pack `weights` of shape `shape[len(index):]`, on any device and of any dtype."""
        ...


def packed_parameters(module: nn.Module) -> Iterator[tuple[str, Packs]]:
    """By the name that the parameter would have."""
    for path, part in module.named_modules():
        # The attribute first: to look through the protocol's members takes 30 us for each part.
        if hasattr(part, "fills") and isinstance(part, Packs):
            owner = path.rpartition(".")[0]
            yield f"{owner}.{part.fills}" if owner else part.fills, part


def held_bytes(module: nn.Module) -> HeldBytes:
    """What the weights of a model take in memory, by part."""
    packed: Counter[str] = Counter()
    kept: Counter[str] = Counter()
    scheme: Scheme | None = None
    for name, part in packed_parameters(module):
        packed[part_of(name)] += part.n_bytes
        scheme = part.scheme
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, OnDisk):
            kept[part_of(name)] += parameter.nbytes
    return HeldBytes(scheme, dict(packed), dict(kept))


def quantised_details(module: nn.Module) -> dict[str, Any]:
    """What a result has to tell of a model's quantisation; empty where there is none."""
    held = held_bytes(module)
    if held.scheme is None:
        return {}
    return {"quantize": held.scheme, "quantised_parts": sorted(held.packed)}


@dataclass(slots=True)
class PackedPlace:
    """Where one stored tensor goes, for `Reader.stream`: into a module that packs it.

    `views` are the extremes of what was packed, for the check that all of it was finite: in the
    packed bits a NaN could not be seen any more.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    into: Packs
    index: tuple[int, ...]
    dtype: torch.dtype
    views: tuple[Tensor, ...] = field(default=())

    @property
    def destination(self) -> PackedPlace:
        return self

    def copy_(self, stored: Tensor) -> None:
        self.views = (torch.stack(torch.aminmax(stored)).to(self.dtype),)
        # The stored tensor is our part of the parameter, reshaped at most (see `packed_places`).
        self.into.take(self.index, stored.view(self.into.shape[len(self.index) :]))


def packed_places(
    module: nn.Module, layout: Layout, dtype: torch.dtype
) -> Iterator[tuple[str, PackedPlace]]:
    """The place of each stored tensor that is packed, by key."""
    for name, part in packed_parameters(module):
        ours = torch.empty(part.shape, device="meta")
        for piece in layout.pieces(name, part.shape):
            yield piece.key, _place(name, part, piece, ours, dtype)


def _place(name: str, part: Packs, piece: Piece, ours: Tensor, dtype: torch.dtype) -> PackedPlace:
    view = piece.of(ours)
    # True of all layouts: only routers are stored transposed or several in one tensor.
    assert view.is_contiguous(), name
    assert piece.row is None, name
    assert not piece.either_way, name
    return PackedPlace((name,), tuple(view.shape), part, piece.index, dtype)
