"""How a layout's table is read both ways. The tables themselves stand in `names`.

A `Layout` maps a parameter of ours to `Piece`s: a key, the part of our tensor it holds, and the
view of that part which has the key's shape. Loading copies into the view, saving copies out of
it, so neither needs a rule of its own, and a piece that is stored transposed is a view like any
other. Where one stored tensor holds several parameters, one a row, each is a piece of that key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from ernie_lab.checkpoint.errors import CheckpointError

View: TypeAlias = Callable[[Tensor], Tensor]
Kind: TypeAlias = Literal["text", "vision-language"]


def same(ours: Tensor) -> Tensor:
    return ours


def leading_one(ours_E: Tensor) -> Tensor:
    """`[e]` as `[1, e]`: the statistics of the one group of experts there is."""
    return ours_E.unsqueeze(0)


def transposed(ours_ED: Tensor) -> Tensor:
    """`[e, d]` as `[d, e]`."""
    return ours_ED.T


def stacked(ours_E2FD: Tensor) -> Tensor:
    """`[e, 2, f, d]` as `[e, 2f, d]`: all rows of the gate, then all of up."""
    # `view`, because `flatten` may copy, and what is filled must be ours.
    return ours_E2FD.view(len(ours_E2FD), -1, ours_E2FD.shape[-1])


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor, or one row of it: `view(ours[index])` has the shape it has there.

    `row` is the row of the tensor under `key`, None for the whole of it. `either_way` accepts a
    matrix that a file stores transposed, where its shape shows that.
    """

    key: str
    index: tuple[int, ...] = ()
    view: View = same
    row: int | None = None
    either_way: bool = False

    def of(self, ours: Tensor) -> Tensor:
        """The part of our tensor that this piece fills, shaped as it is stored; no copy."""
        return self.view(ours[self.index])


@dataclass(frozen=True, slots=True)
class Rule:
    """The pieces of all parameters called `ours`, a pattern whose groups fill the `keys`.

    `{e}` in a key stands for an expert: such a key gives one piece per row of our first axis,
    numbered after those of `banks_before` other banks, which are as many each. Several keys
    share our next axis between them, in their order.
    """

    ours: str
    keys: tuple[str, ...]
    view: View = same
    row: int | None = None
    either_way: bool = False
    banks_before: int = 0

    def pieces(self, name: str, shape: tuple[int, ...]) -> Iterator[Piece] | None:
        match = re.fullmatch(self.ours, name)
        return self._pieces(match.groupdict(), shape) if match else None

    def _pieces(self, groups: Mapping[str, str], shape: tuple[int, ...]) -> Iterator[Piece]:
        per_expert = "{e}" in self.keys[0]
        first = self.banks_before * shape[0] if per_expert else 0
        for e in range(shape[0] if per_expert else 1):
            for part, key in enumerate(self.keys):
                index = ((e,) if per_expert else ()) + ((part,) if len(self.keys) > 1 else ())
                named = key.format(e=first + e, **groups)
                yield Piece(named, index, self.view, self.row, self.either_way)


@dataclass(frozen=True, slots=True)
class Stored:
    """The tensor under one key: the view it fills; or several, one a row (`by_row`).

    `names` are the parameters that `views` are of.
    """

    names: tuple[str, ...]
    views: tuple[Tensor, ...]
    by_row: bool = False
    either_way: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        shape = tuple(self.views[0].shape)
        return (len(self.views), *shape) if self.by_row else shape

    @property
    def destination(self) -> Tensor | tuple[Tensor, ...]:
        """What `Reader.stream` fills."""
        return self.views if self.by_row else self.views[0]

    def fitted(self, shape: tuple[int, ...]) -> Stored:
        """As it has to be read from a tensor of this shape: turned, if only that fits.

        A square matrix fits both ways; of it the layout's word is taken.
        """
        if not self.either_way or shape == self.shape or shape != self.shape[::-1]:
            return self
        return Stored(self.names, tuple(view.T for view in self.views), self.by_row)

    def assembled(self) -> Tensor:
        """The tensor to store; a copy only where it has rows of several parameters."""
        return torch.stack(self.views) if self.by_row else self.views[0]


@dataclass(frozen=True, slots=True)
class Layout:
    """How one family of files names the tensors.

    `unused` are keys of parts we do not build; `copies` are keys that repeat another and must
    equal it.
    """

    name: str
    kind: Kind
    rules: tuple[Rule, ...]
    unused: tuple[str, ...] = ()
    copies: Mapping[str, str] = field(default_factory=dict)

    def pieces(self, name: str, shape: tuple[int, ...]) -> tuple[Piece, ...]:
        """The stored tensors that together are our parameter `name` of this shape."""
        for rule in self.rules:
            pieces = rule.pieces(name, shape)
            if pieces is not None:
                return tuple(pieces)
        raise CheckpointError(f"layout {self.name!r} has no rule for our parameter {name!r}")

    def stored(self, parameters: Mapping[str, Tensor]) -> dict[str, Stored]:
        """All tensors of a checkpoint by key, as views of these parameters."""
        found: dict[str, Stored] = {}
        rows: dict[str, dict[int, tuple[str, Tensor]]] = {}
        for name, parameter in parameters.items():
            for piece in self.pieces(name, tuple(parameter.shape)):
                view = piece.of(parameter)
                if piece.row is None:
                    found[piece.key] = Stored((name,), (view,), either_way=piece.either_way)
                else:
                    # Holds the place of the key in the order of the parameters.
                    found.setdefault(piece.key, Stored((), (), by_row=True))
                    rows.setdefault(piece.key, {})[piece.row] = (name, view)
        for key, by_row in rows.items():
            names, views = zip(*(by_row[row] for row in sorted(by_row)), strict=True)
            found[key] = Stored(names, views, by_row=True)
        return found

    def is_unused(self, key: str) -> bool:
        return any(re.match(pattern, key) for pattern in self.unused)
