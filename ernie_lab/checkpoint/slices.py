"""Filling modules that hold a slice of a parameter: some experts of a bank, some heads of a layer.

This room knows nothing of models: what holds a slice is told by what it says (`Sliced`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.layout import Layout, Piece, Stored, same, stacked


@dataclass(frozen=True, slots=True)
class Slice:
    """`held` along `axis` of a parameter that is called `fills` and has the shape `whole`."""

    fills: str
    whole: tuple[int, ...]
    axis: int
    held: range

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is held."""
        before, after = self.whole[: self.axis], self.whole[self.axis + 1 :]
        return (*before, len(self.held), *after)


@runtime_checkable
class Sliced(Protocol):
    """A module of which some parameters are slices, by the name they have below it.

    `fills` is below it too: `down_EDF` for the parameter `own.down_EDF`, say.
    """

    slices: Mapping[str, Slice]


@dataclass(frozen=True, slots=True)
class SlicedPlace:
    """Where a slice of one stored tensor goes, for `Reader.stream`.

    `shape` is that of the whole. What is stored is memory-mapped, so the rest is not read.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    view: Tensor
    axis: int
    held: range

    @property
    def views(self) -> tuple[Tensor, ...]:
        return (self.view,)

    @property
    def destination(self) -> SlicedPlace:
        return self

    def copy_(self, stored: Tensor) -> None:
        self.view.copy_(stored.narrow(self.axis, self.held.start, len(self.held)))

    def read_of(self, n_bytes: int) -> int:
        """Of the bytes of the whole."""
        return n_bytes * len(self.held) // self.shape[self.axis]


def sliced_parameters(module: nn.Module) -> dict[str, tuple[str, Slice]]:
    """By the parameter's name: the name it has where nothing is sliced, and the slice."""
    found = {}
    for path, part in module.named_modules():
        if isinstance(part, Sliced):
            below = f"{path}." if path else ""
            for name, cut in part.slices.items():
                found[below + name] = (below + cut.fills, cut)
    return found


def sliced_places(
    sliced: Mapping[str, tuple[str, Slice]], parameters: Mapping[str, Tensor], layout: Layout
) -> Iterator[tuple[str, Stored | SlicedPlace]]:
    """The place of each stored tensor that fills a slice, by key; for slices among `parameters`.

    Tensors that hold nothing of the slice have a place too, on the meta device: their names and
    shapes are checked, and they are not read.
    """
    for name in sliced.keys() & parameters.keys():
        whole_name, cut = sliced[name]
        whole = torch.empty(cut.whole, device="meta")
        for piece in layout.pieces(whole_name, cut.whole):
            yield piece.key, _place(piece, whole_name, whole, parameters[name], cut)


def _place(
    piece: Piece, name: str, whole: Tensor, ours: Tensor, cut: Slice
) -> Stored | SlicedPlace:
    # True of all layouts: these views keep the first axes, and slices are of no router.
    assert piece.view in (same, stacked), name
    assert piece.row is None, name
    if not piece.index:
        return SlicedPlace(
            (name,), tuple(piece.of(whole).shape), piece.of(ours), cut.axis, cut.held
        )
    assert cut.axis == 0, name
    first, *rest = piece.index
    if first not in cut.held:
        return Stored((name,), (piece.of(whole),))
    here = dataclasses.replace(piece, index=(first - cut.held.start, *rest))
    return Stored((name,), (here.of(ours),))
