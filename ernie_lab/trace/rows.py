"""Which rows of a batch are real tokens, and where they stand in their sequences.

A batch is padded and a finished sequence goes on decoding padding; the masks of all steps so
far, side by side, are the columns of the key/value cache. Everything here runs once per
forward, on the CPU, outside the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_lab.inputs.media import Grid
from ernie_lab.inputs.visual_layout import BANKS, TEXT
from ernie_lab.sites import Phase, Step
from ernie_lab.trace.positions import Positions


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some real tokens of one forward, sequence by sequence.

    `flat_N` indexes the rows of a value: the forward's `(b s)`, or those of a `Subset`;
    `sequence_N` and `pos_N` say which token each row is. `columns` are the same rows again as
    one index per sequence. `is_all`: they are all of a forward, in their order.
    """

    flat_N: Tensor
    sequence_N: Tensor
    pos_N: Tensor
    columns: tuple[Tensor, ...] = ()
    is_all: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Subset:
    """Some of a forward's `(b s)` rows, padding included, that a value has packed in their order.

    The rows of one bank of experts, or the image tokens.
    """

    member_N: Tensor

    @classmethod
    def of(cls, member_BS: Tensor) -> Subset:
        return cls(member_BS.detach().cpu().flatten())

    def __len__(self) -> int:
        return int(self.member_N.sum())

    def among(self, rows: Rows) -> Rows:
        """Those of `rows` that are in here, as indices into the packed value."""
        place_N = self.member_N.cumsum(0) - 1
        flat_N = rows.flat_N.cpu()
        mine_N = self.member_N[flat_N]
        return Rows(
            flat_N=place_N[flat_N[mine_N]].to(rows.flat_N.device),
            sequence_N=rows.sequence_N[mine_N],
            pos_N=rows.pos_N[mine_N],
        )


NO_TOKENS = Subset(torch.zeros(0, dtype=torch.bool))


def bank_members(bank_BS: Tensor) -> dict[str, Subset]:
    """The rows of each bank, given where every token of a layer really went."""
    on_cpu_BS = bank_BS.detach().cpu()
    return {bank: Subset.of(on_cpu_BS == number) for number, bank in enumerate(BANKS)}


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """One forward, or some decode steps as one: its rows under every positions filter, and the
    real columns of the cache.

    Indices into activations lie on the mask's device, the rest on the CPU. `keys` and
    `Rows.columns` are empty unless asked for. `modality_BS` and `bank_BS` are those of the step;
    `grids` are its pictures and `image_tokens` their tokens.
    """

    phase: Phase
    index: int
    shape: tuple[int, int]
    rows: Mapping[Positions | None, Rows]
    keys: tuple[Tensor, ...]
    n_keys: int
    modality_BS: Tensor | None
    bank_BS: Tensor | None
    grids: tuple[Grid, ...]
    image_tokens: Subset

    @property
    def frame_lengths(self) -> list[int]:
        """How many patches each frame has."""
        return [grid.h * grid.w for grid in self.grids for _ in range(grid.t)]


def step_rows(
    step: Step, columns_BT: Tensor | None, filters: Iterable[Positions | None], ragged: bool
) -> tuple[StepRows, Tensor]:
    """The rows of a forward that follows `columns_BT`, and the columns after it."""
    mask_BS = step.mask.detach().cpu().bool()
    if mask_BS.ndim != 2:
        raise ValueError(f"step.mask must be [b s], not {list(mask_BS.shape)}")
    if columns_BT is None:
        columns_BT = mask_BS[:, :0]
    if len(columns_BT) != len(mask_BS):
        raise ValueError(
            f"this forward has {len(mask_BS)} sequences, the ones before had {len(columns_BT)}; "
            "use a new recorder for a new batch"
        )
    pos_BS = columns_BT.sum(1, keepdim=True) + mask_BS.cumsum(1) - 1
    columns_BT = torch.cat([columns_BT, mask_BS], dim=1)
    lengths, device = columns_BT.sum(1).tolist(), step.mask.device
    rows = {
        wanted: _rows(mask_BS & _among(pos_BS, wanted, lengths), pos_BS, device, ragged)
        for wanted in {None, *filters}
    }
    keys = tuple(_where(column_T, device) for column_T in columns_BT) if ragged else ()
    modality_BS = _like_mask("modality", step.modality, mask_BS)
    grids = tuple(Grid(*grid) for grid in step.grids)
    made = StepRows(
        step.phase,
        step.index,
        (mask_BS.shape[0], mask_BS.shape[1]),
        rows,
        keys,
        columns_BT.shape[1],
        modality_BS,
        _like_mask("bank", step.bank, mask_BS),
        grids,
        _image_tokens(modality_BS, mask_BS, grids),
    )
    return made, columns_BT


def _like_mask(name: str, given: Tensor | None, mask_BS: Tensor) -> Tensor | None:
    if given is not None and given.shape != mask_BS.shape:
        raise ValueError(
            f"step.{name} has shape {list(given.shape)}, expected that of the mask, "
            f"{list(mask_BS.shape)}"
        )
    return None if given is None else given.detach().cpu()


def _image_tokens(modality_BS: Tensor | None, mask_BS: Tensor, grids: tuple[Grid, ...]) -> Subset:
    if modality_BS is None and not grids:
        return NO_TOKENS
    none_BS = torch.zeros_like(mask_BS)
    tokens = Subset.of(none_BS if modality_BS is None else (modality_BS != TEXT) & mask_BS)
    if len(tokens) != (needed := sum(grid.n_tokens for grid in grids)):
        raise ValueError(
            f"step.modality has {len(tokens)} image tokens, but the {len(grids)} pictures of "
            f"step.grids make {needed}; give both, from one layout"
        )
    return tokens


def _rows(real_BS: Tensor, pos_BS: Tensor, device: torch.device, ragged: bool) -> Rows:
    sequence_N, column_N = real_BS.nonzero(as_tuple=True)
    return Rows(
        flat_N=(sequence_N * real_BS.shape[1] + column_N).to(device),
        sequence_N=sequence_N,
        pos_N=pos_BS[real_BS],
        columns=tuple(_where(real_S, device) for real_S in real_BS) if ragged else (),
        is_all=len(sequence_N) == real_BS.numel(),
    )


def _among(pos_BS: Tensor, wanted: Positions | None, lengths: list[int]) -> Tensor:
    if wanted is None:
        return torch.ones_like(pos_BS, dtype=torch.bool)
    return torch.stack(
        [
            torch.isin(pos_S, torch.tensor(wanted.among(length), dtype=torch.int64))
            for pos_S, length in zip(pos_BS, lengths, strict=True)
        ]
    )


def _where(real_S: Tensor, device: torch.device) -> Tensor:
    return real_S.nonzero().squeeze(1).to(device)
