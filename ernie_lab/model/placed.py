"""Blocks on several devices, or on disk: how a forward pass goes from one to the next."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from threading import Event
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from ernie_lab.checkpoint.on_disk import OnDisk, held, on_disk
from ernie_lab.display import in_words
from ernie_lab.model.banks import BankRows
from ernie_lab.model.block import Block

Value = TypeVar("Value")
# A block of a streamed model says so here, because looking through its parameters takes longer.
STREAMED = "streamed"
# So does a block of a model over several ranks: in words, what is where.
OVER_RANKS = "over_ranks"


def moved(value: Value, device: torch.device) -> Value:
    """A tensor, or a tuple or the `BankRows` of such values, at a device; None stays None."""
    found: Any = value
    if isinstance(value, Tensor):
        found = value.to(device)
    elif isinstance(value, BankRows):
        found = BankRows(moved(value.bank_BS, device), moved(value.rows, device))
    elif isinstance(value, tuple):
        parts = [moved(one, device) for one in value]
        found = type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return found  # type: ignore[no-any-return]


def device_of(block: Block) -> torch.device:
    """A block lies on one device, whole."""
    return block.norm1.gain_D.device


def placement_of(blocks: Sequence[Block]) -> str | None:
    """Where the blocks are, in words; None where they are in memory, on one device."""
    if blocks and OVER_RANKS in blocks[0].__dict__:
        return str(blocks[0].__dict__[OVER_RANKS])
    if blocks and STREAMED in blocks[0].__dict__:
        n_bytes = sum(parameter.nbytes for block in blocks for parameter in on_disk(block))
        return f"{in_words(n_bytes)} of {len(blocks)} layers on disk, read in every pass"
    runs: list[tuple[torch.device, list[int]]] = []
    for block in blocks:
        if not runs or runs[-1][0] != device_of(block):
            runs.append((device_of(block), []))
        runs[-1][1].append(block.layer)
    if len(runs) < 2:
        return None
    return "layers " + ", ".join(f"{run[0]} to {run[-1]} on {device}" for device, run in runs)


def placement_details(blocks: Sequence[Block]) -> dict[str, str]:
    """What a result has to tell of it."""
    words = placement_of(blocks)
    return {} if words is None else {"placement": words}


def in_turn(blocks: Sequence[Block]) -> AbstractContextManager[Iterable[Block]]:
    """The blocks in their order. Of a streamed model each is in memory during its turn alone."""
    if blocks and STREAMED in blocks[0].__dict__:
        return Turns(blocks)
    return nullcontext(blocks)


class Turns:
    """Reads the next block's weights in a thread while one runs: two blocks are in memory.

    They are those of the blocks that are given, so of a block with an exchanged part the donor's.
    Left for whatever reason, it lets go of all weights, and the thread has ended.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self._waiting = [on_disk(block) for block in blocks]
        self._blocks = list(blocks)
        self._stop = Event()
        self._next: Future[list[Tensor]] | None = None

    def __enter__(self) -> Turns:
        self._turn = ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._begin(0)
        return self

    def __iter__(self) -> Iterator[Block]:
        for i, block in enumerate(self._blocks):
            self._turn.close()  # the last block's weights go before there is room for a third
            assert self._next is not None
            values, self._next = self._next.result(), None
            self._turn.enter_context(held(self._waiting[i], values))
            del values
            self._begin(i + 1)
            yield block
        self._turn.close()

    def _begin(self, i: int) -> None:
        if i < len(self._blocks):
            self._next = self._thread.submit(read_each, self._waiting[i], self._stop)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._next = None
        self._turn.close()


def read_each(parameters: Sequence[OnDisk], stop: Event) -> list[Tensor]:
    """Their values in order; parameters of one source are read in one go."""
    by_source: dict[int, list[int]] = {}
    for i, parameter in enumerate(parameters):
        by_source.setdefault(id(parameter.source), []).append(i)
    values: dict[int, Tensor] = {}
    for numbers in by_source.values():
        mine = [parameters[i] for i in numbers]
        values |= zip(numbers, mine[0].source.read(mine, stop.is_set), strict=True)
    return [values[i] for i in range(len(parameters))]
