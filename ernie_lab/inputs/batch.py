"""Sequences of unequal length as one rectangle of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.dims import Positions, TokenIds, TokenMask
from ernie_lab.inputs.errors import BatchError
from ernie_lab.inputs.media import Grid, Kind, Media
from ernie_lab.inputs.visual_layout import (
    BANKS,
    PositionRule,
    VisualLayout,
    visual_layout,
)

Side: TypeAlias = Literal["left", "right"]


@dataclass(frozen=True, slots=True, eq=False)
class Visual:
    """Where the pictures of a batch are; `media` are all of them, in reading order.

    Block `i` of `layout.blocks` holds the tokens of `media[i]`.
    """

    layout: VisualLayout
    media: tuple[Media, ...]

    @property
    def images_PQ(self) -> Float[Tensor, "p q"] | None:  # noqa: N802
        """The patches of all images, joined; None without images."""
        return self._patches("image")

    @property
    def videos_PQ(self) -> Float[Tensor, "p q"] | None:  # noqa: N802
        """The patches of all clips, joined; None without clips."""
        return self._patches("video")

    @property
    def image_grids(self) -> tuple[Grid, ...]:
        return tuple(medium.grid for medium in self._of("image"))

    @property
    def video_grids(self) -> tuple[Grid, ...]:
        return tuple(medium.grid for medium in self._of("video"))

    def _of(self, kind: Kind) -> list[Media]:
        return [medium for medium in self.media if medium.kind == kind]

    def _patches(self, kind: Kind) -> Tensor | None:
        patches = [medium.patches_PQ for medium in self._of(kind)]
        return torch.cat(patches).to(self.layout.bank_BS.device) if patches else None


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """What the model reads.

    `mask` is True on real tokens. `positions` count from 0 at the first real token of each
    sequence and are 0 on padding; for VL models they are `[b s 3]`, those of `visual.layout`.
    `texts` holds what each sequence was made from, or None. `visual` is there for every prompt
    of a VL model, and for no other.
    """

    input_ids: TokenIds
    mask: TokenMask
    positions: Positions | Int[Tensor, "b s 3"]
    texts: tuple[str | None, ...]
    visual: Visual | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens in each sequence."""
        return tuple(int(length) for length in self.mask.sum(-1))

    @property
    def next_positions_B(self) -> Int[Tensor, " b"]:  # noqa: N802
        """The position of the token that would follow each sequence."""
        return self.mask.sum(-1) if self.visual is None else self.visual.layout.next_position_B


def pad_batch(
    sequences: Sequence[Sequence[int]],
    *,
    pad_id: int,
    vocab_size: int | None = None,
    side: Side = "left",
    device: torch.device | str | None = None,
    texts: Sequence[str | None] | None = None,
    media: Sequence[Sequence[Media]] | None = None,
    ids: VisualIds | None = None,
    positions: PositionRule = "reference",
) -> Batch:
    """One batch of `sequences`, padded with `pad_id` to the longest.

    `vocab_size` is the model's, which may exceed the tokenizer's; ids outside it are refused
    here, where the sequence and position can still be named. `ids` are those of a VL model, for
    which `media` holds the pictures of each sequence in reading order, and `positions` names
    the rule for their positions (see `visual_layout`).
    """
    if side not in ("left", "right"):
        raise BatchError(f'side={side!r}, expected "left" or "right".')
    if not sequences:
        raise BatchError("the batch has no sequence; pass at least one.")
    if texts is not None and len(texts) != len(sequences):
        raise BatchError(f"{len(texts)} texts for {len(sequences)} sequences; give one for each.")
    if media is not None and len(media) != len(sequences):
        raise BatchError(
            f"media of {len(media)} sequences for {len(sequences)} sequences; give one list for "
            "each, which may be empty."
        )
    if ids is None and media is not None and any(media):
        raise BatchError("pictures for a text model; only a VL model has ids for them.")
    for row, sequence in enumerate(sequences):
        _check(row, sequence, vocab_size)
    _check_id(pad_id, vocab_size, "pad_id")

    lengths = torch.tensor([len(sequence) for sequence in sequences])
    longest = int(lengths.max())
    offset = longest - lengths if side == "left" else torch.zeros_like(lengths)
    places_BS = torch.arange(longest) - offset[:, None]
    mask = (places_BS >= 0) & (places_BS < lengths[:, None])
    input_ids = torch.full(mask.shape, pad_id, dtype=torch.int64)
    input_ids[mask] = torch.tensor([i for sequence in sequences for i in sequence])
    visual = None
    if ids is not None:
        visual = _visual(input_ids, mask, media or [()] * len(sequences), ids, positions, device)
    return Batch(
        input_ids=input_ids.to(device),
        mask=mask.to(device),
        positions=(
            places_BS.masked_fill(~mask, 0).to(device)
            if visual is None
            else visual.layout.positions_BSR
        ),
        texts=tuple(texts) if texts is not None else (None,) * len(sequences),
        visual=visual,
    )


def visual_columns(batch: Batch) -> dict[str, list[list[Any]]]:
    """What every real token is, as columns: one list for each sequence.

    `content` is "text", "delimiter", "image" or "video", `bank` the experts it goes to, and
    `modality` what its position counts as (delimiters are text there). `image` is the index in
    `batch.visual.media`, and `frame`, `row`, `col` the token's cell of it; None for others.
    """
    columns: dict[str, list[list[Any]]] = {
        "content": [["text"] * length for length in batch.lengths],
        "bank": [["text"] * length for length in batch.lengths],
        "modality": [["text"] * length for length in batch.lengths],
        **{name: [[None] * n for n in batch.lengths] for name in ("image", "frame", "row", "col")},
    }
    if batch.visual is None:
        return columns
    layout = batch.visual.layout
    for sequence, real_S in enumerate(batch.mask):
        banks = layout.bank_BS[sequence, real_S].tolist()
        columns["bank"][sequence] = [BANKS[bank] for bank in banks]
        columns["content"][sequence] = ["delimiter" if bank else "text" for bank in banks]
    for index, (block, medium) in enumerate(zip(layout.blocks, batch.visual.media, strict=True)):
        for token, cell in enumerate(medium.cells(), start=block.start):
            known = {"content": block.kind, "modality": block.kind, "image": index}
            for name, value in {**known, **cell._asdict()}.items():
                columns[name][block.sequence][token] = value
    return columns


def _visual(
    input_ids_BS: Tensor,
    mask_BS: Tensor,
    media: Sequence[Sequence[Media]],
    ids: VisualIds,
    positions: PositionRule,
    device: torch.device | str | None,
) -> Visual:
    """The pictures of a batch, each in the sequence that it was given for."""
    every = [(row, medium) for row, mine in enumerate(media) for medium in mine]
    images, videos = (
        [medium.grid for _, medium in every if medium.kind == kind] for kind in ("image", "video")
    )
    layout = visual_layout(input_ids_BS, ids, images, videos, mask_BS, positions)
    given = [(row, medium.kind) for row, medium in every]
    found = [(block.sequence, block.kind) for block in layout.blocks]
    for number, (wanted, there) in enumerate(zip(given, found, strict=True)):
        if wanted != there:
            raise BatchError(
                f"picture {number} of the batch was given as {wanted[1]} of sequence {wanted[0]}, "
                f"but its placeholders are those of a {there[1]} in sequence {there[0]}. Give "
                "every sequence its own pictures, in reading order."
            )
    return Visual(layout.to(device), tuple(medium for _, medium in every))


def _check(row: int, sequence: Sequence[int], vocab_size: int | None) -> None:
    if not len(sequence):
        raise BatchError(
            f"sequence {row} has no token, so there is nothing to predict from. "
            "Start from at least one, for example the tokenizer's BOS."
        )
    for position, token_id in enumerate(sequence):
        _check_id(token_id, vocab_size, f"sequence {row}, position {position}")


def _check_id(token_id: int, vocab_size: int | None, where: str) -> None:
    if token_id < 0 or (vocab_size is not None and token_id >= vocab_size):
        bound = "non-negative" if vocab_size is None else f"in 0..{vocab_size - 1}"
        raise BatchError(
            f"{where}: token id {token_id} must be {bound}"
            f"{'' if vocab_size is None else f' (vocabulary of {vocab_size})'}. "
            "Was it made by another model's tokenizer?"
        )
