"""Decode steps put aside as they pass, to be sorted out many at a time.

Which rows of a step are real tokens, and where they stand, takes some forty small operations on
the CPU; converting what flowed takes a few more for each site, and waits for a GPU. A step of one
token a sequence has no time for that. Put side by side, n of them have the layout of one forward
over n tokens, and are sorted out as such.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ernie_lab.sites import Step
from ernie_lab.trace.rows import Subset

# Put aside at most. More gain nothing: at 64, sorting out is a tenth of what passing costs.
MOST_STEPS = 64
MOST_BYTES = 2**26


class Aside:
    """What flows in one step, by path."""

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def put(self, path: str, x: Tensor) -> None:
        """Keep a copy."""
        if path in self.values:
            raise fired_twice(path)
        self.values[path] = x.detach().clone() if x.requires_grad else x.clone()

    def put_own(self, values: Mapping[str, Tensor]) -> None:
        """Keep copies that somebody else has made."""
        for path in values.keys() & self.values.keys():
            raise fired_twice(path)
        self.values.update(values)


class Pending:
    """Steps of one token a sequence, one after the other, and copies of what flowed in them."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.values: list[dict[str, Tensor]] = []
        self._n_bytes = 0  # of all but the last, to which more may come

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def _last(self) -> int:
        return sum(x.nbytes for x in self.values[-1].values()) if self.values else 0

    def takes(self, step: Step) -> bool:
        """Is there room, and is it like the ones put aside?"""
        if not self.steps:
            return True
        # The last one has ended, and the next is taken to be as large.
        full = len(self) >= MOST_STEPS or self._n_bytes + 2 * self._last > MOST_BYTES
        return not full and _kind(step) == _kind(self.steps[0])

    def begin(self, step: Step) -> Aside:
        """Put a step aside, and what will flow in it."""
        modality, bank = step.modality, step.bank
        self.steps.append(
            Step(
                step.phase,
                step.index,
                step.positions,
                step.mask.clone(),
                None if modality is None else modality.clone(),
                None if bank is None else bank.clone(),
            )
        )
        self._n_bytes += self._last
        aside = Aside()
        self.values.append(aside.values)
        return aside

    def as_one(self) -> Step:
        """All of them as one forward over as many positions."""
        first, steps = self.steps[0], self.steps
        modality = [step.modality for step in steps if step.modality is not None]
        bank = [step.bank for step in steps if step.bank is not None]
        return Step(
            first.phase,
            first.index,
            torch.cat([step.positions for step in steps], dim=1),
            torch.cat([step.mask for step in steps], dim=1),
            torch.cat(modality, dim=1) if modality else None,
            torch.cat(bank, dim=1) if bank else None,
        )

    def value(self, path: str, member: Subset | None = None) -> Tensor:
        """What flowed at a site, as one forward over all positions would have had it.

        `member` tells the rows of a bank: they stand step by step here, and sequence by sequence
        in one forward.
        """
        pieces = [values[path] for values in self.values]
        if member is None:
            shape = self.steps[0].mask.shape
            self._require(path, pieces, [shape for _ in pieces])
            return torch.cat(pieces, dim=1)
        member_SB = member.member_N.view(-1, len(self)).T
        self._require(path, pieces, [(n,) for n in member_SB.sum(1).tolist()])
        place_SB = (member_SB.flatten().cumsum(0) - 1).view_as(member_SB)
        x_N = torch.cat(pieces)
        return x_N[place_SB.T[member_SB.T].to(x_N.device)]

    def _require(
        self, path: str, pieces: Sequence[Tensor], begins: Sequence[tuple[int, ...]]
    ) -> None:
        """Raise where a piece has not the rows of its step: too many in one would hide too few in
        another. `begins` is how each shape has to begin."""
        first = pieces[0]
        for step, x, begin in zip(self.steps, pieces, begins, strict=True):
            n = len(begin)
            if x.shape[:n] != begin or x.shape[n:] != first.shape[n:] or x.dtype != first.dtype:
                raise ValueError(
                    f"{path} has shape {list(x.shape)} and {x.dtype} in forward {step.index}; "
                    f"expected {[*begin, *first.shape[n:]]} and {first.dtype}, by its mask, by the "
                    f"bank of each token, and as in forward {self.steps[0].index}"
                )


def _kind(step: Step) -> tuple[object, ...]:
    return step.phase, step.positions.shape, step.modality is None, step.bank is None


def fired_twice(path: str) -> RuntimeError:
    return RuntimeError(
        f"{path} fired twice in one forward; bind the recorder anew for each forward"
    )
