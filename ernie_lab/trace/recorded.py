"""What was recorded of one site: values, and which tokens or patches their rows belong to."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ernie_lab.sites import Site
from ernie_lab.trace.keep import KeptSite
from ernie_lab.trace.pieces import Piece


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Values with an index back: `rows_N[i]` is the row of the tokens table.

    For patches and blocks of patches it is their number in the packed order of all pictures.
    The row axis comes first (`[n …]`), but in a map, which is of one sequence or one frame, it
    is the query axis of `[h s t]` or `[h p u]`.
    """

    values: Tensor
    rows_N: Tensor

    def take(self, index_N: Tensor, axis: int, new_rows_N: Tensor) -> Part:
        return Part(self.values.index_select(axis, index_N.to(self.values.device)), new_rows_N)


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """One site's parts: a single one under None, or one for each sequence of a ragged site, or
    one for each frame (counted over all pictures) of attention in the vision tower."""

    site: Site
    parts: Mapping[int | None, Part]
    heads: tuple[int, ...] | None = None

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts.values())

    @property
    def n_rows(self) -> int:
        return sum(len(part.rows_N) for part in self)

    @property
    def n_bytes(self) -> int:
        return sum(part.values.nbytes for part in self)

    def select(self, new_row: Tensor, sequences: Collection[int]) -> Recorded:
        """The rows whose token survives; `new_row[old]` is its new row, or -1 where it does not.

        `sequences` are those of which any token survives.
        """
        axis = 1 if self.site.ragged else 0
        parts = {}
        for sequence, part in self.parts.items():
            if sequence is None or sequence in sequences:
                moved_N = new_row[part.rows_N]
                index_N = (moved_N >= 0).nonzero().squeeze(1)
                parts[sequence] = part.take(index_N, axis, moved_N[index_N])
        return Recorded(self.site, parts, self.heads)

    def of_cells(self, survives: Tensor) -> Recorded:
        """The patches or blocks that survive, under their old numbers; frames whole or not."""
        if self.site.row == "i":
            maps = {i: part for i, part in self.parts.items() if survives[part.rows_N].all()}
            return Recorded(self.site, maps, self.heads)
        part = self.parts[None]
        index_N = survives[part.rows_N].nonzero().squeeze(1)
        narrowed = part.take(index_N, 0, part.rows_N[index_N])
        return Recorded(self.site, {None: narrowed}, self.heads)

    def detached(self) -> Recorded:
        """The same values without their graph."""
        parts = {key: Part(part.values.detach(), part.rows_N) for key, part in self.parts.items()}
        return Recorded(self.site, parts, self.heads)


def join(
    rule: KeptSite,
    pieces: Sequence[Piece],
    starts: Sequence[int],
    lengths: Sequence[int],
    fill: float,
) -> Recorded:
    """All forwards' pieces as one value, rows in the order of the tokens table.

    `starts[i]` is the first row of sequence i in that table. In a ragged site the keys that
    came after a query get `fill`.
    """
    taken = [piece.rows for piece in pieces if piece.rows is not None]
    if not taken:
        return Recorded(rule.site, _of_patches(rule, pieces), rule.heads)
    if not rule.site.ragged:
        sequence_N = torch.cat([rows.sequence_N for rows in taken])
        rows_N = torch.tensor(starts)[sequence_N] + torch.cat([rows.pos_N for rows in taken])
        values = _cat([piece.values[0] for piece in pieces], axis=0)
        parts: dict[int | None, Part] = {None: _in_order(values, rows_N)}
        return Recorded(rule.site, parts, rule.heads)
    parts = {}
    for sequence, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        pos_N = torch.cat([rows.pos_N[rows.sequence_N == sequence] for rows in taken])
        maps = [_widened(piece.values[sequence], length, fill) for piece in pieces]
        parts[sequence] = Part(_cat(maps, axis=1), start + pos_N)
    return Recorded(rule.site, parts, rule.heads)


def _of_patches(rule: KeptSite, pieces: Sequence[Piece]) -> dict[int | None, Part]:
    """Patches, blocks or frames: of the one forward that saw pictures."""
    (piece,) = pieces
    if rule.site.row != "i":
        (values,) = piece.values
        return {None: Part(values, torch.arange(len(values)))}
    parts: dict[int | None, Part] = {}
    start = 0
    for frame, map_HPU in enumerate(piece.values):
        stop = start + map_HPU.shape[-1]
        parts[frame] = Part(map_HPU, torch.arange(start, stop))
        start = stop
    return parts


def _widened(map_HST: Tensor, n_keys: int, fill: float) -> Tensor:
    missing = n_keys - map_HST.shape[-1]
    return pad(map_HST, (0, missing), value=fill) if missing else map_HST


def _cat(pieces: Sequence[Tensor], axis: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), dim=axis)


def _in_order(values: Tensor, rows_N: Tensor) -> Part:
    if bool((rows_N[1:] > rows_N[:-1]).all()):
        return Part(values, rows_N)
    order_N = rows_N.argsort()
    return Part(values.index_select(0, order_N.to(values.device)), rows_N[order_N])
