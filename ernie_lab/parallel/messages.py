"""What ranks say to each other: a few numbers and tensors, over a gloo group of torch.distributed.

A message is a first piece of fixed size, which begins with a header and has room for the tensors of
a few tokens, and a second one where these do not fit. Tensors of a GPU travel through the
memory of the host, so every device will do; NCCL is not used (two GPUs with a link between them
could pass the buffer on directly, here in `Link`). Nothing is pickled.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
import torch.distributed
from torch import Tensor

# A rank that ends is noticed at once, by its closed connection. This is for one that stands still.
TIMEOUT = datetime.timedelta(minutes=5)
FOREVER = datetime.timedelta(days=365)

_dist: Any = torch.distributed  # its stubs leave out much of what is documented
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool,
    torch.uint8,
)  # fmt: skip
_ALIGNED = 16
_MOST_TENSORS, _MOST_DIMS = 6, 4
_PER_TENSOR = 2 + _MOST_DIMS
_HEADER = 4 + _MOST_TENSORS * _PER_TENSOR
# Handing over a message takes longer than so many bytes do.
_FIRST = 1 << 15
_ROOM = _FIRST - 8 * _HEADER


class Kind(IntEnum):
    """The first are asked by rank 0, the others are what a rank replies."""

    LOAD = 1  # `text` says what
    EXPERTS = 2  # rows through the experts that a rank holds
    ATTEND = 3  # a layer's attention for the heads that a rank holds
    FORGET = 4  # a model, or with flags 1 a cache, that rank 0 has no more
    ANSWER = 5  # to SHOWN: what is to flow on; no tensor where nothing was changed
    ABORT = 6  # to SHOWN: nobody is interested any more
    SUMS = 7  # of the weights of a bank, or with flags 1 of a layer's heads
    DONE = 10
    SHOWN = 11  # a value at a site, in the midst of a computation that waits for ANSWER
    FAILED = 12  # `text` is the traceback


@dataclass(frozen=True, slots=True)
class Message:
    """`number` says which part of a model, `flags` what is wanted of it."""

    kind: Kind
    number: int = 0
    flags: int = 0
    tensors: tuple[Tensor, ...] = ()

    @classmethod
    def of_text(cls, kind: Kind, text: str, number: int = 0) -> Message:
        raw = bytearray(text.encode("utf-8", "backslashreplace")) or bytearray(b" ")
        return cls(kind, number, tensors=(torch.frombuffer(raw, dtype=torch.uint8),))

    @classmethod
    def of_facts(cls, kind: Kind, facts: Mapping[str, Any], number: int = 0) -> Message:
        return cls.of_text(kind, json.dumps(facts), number)

    @property
    def text(self) -> str:
        return bytes(self.tensors[0].tolist()).decode("utf-8")

    @property
    def facts(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text)
        return found


class Link:
    """The connections of one rank with the others."""

    def __init__(self, store: Any, rank: int, n_ranks: int) -> None:
        self.rank, self.n_ranks = rank, n_ranks
        # A group of its own, not the process's default one: that may be somebody else's.
        self._group: Any = _dist.ProcessGroupGloo(store, rank, n_ranks, TIMEOUT)

    def send(self, messages: Mapping[int, Message]) -> None:
        """To several ranks at once."""
        works, alive = [], []
        for rank, message in messages.items():
            pieces = _packed(message)
            alive.append(pieces)  # until it is sent
            works += [self._group.send([piece], rank, 0) for piece in pieces]
        for work in works:
            work.wait(TIMEOUT)

    def receive(self, rank: int, timeout: datetime.timedelta = TIMEOUT) -> Message:
        first = torch.empty(_FIRST, dtype=torch.uint8)
        self._group.recv([first], rank, 0).wait(timeout)
        kind, number, flags, n_tensors, *rest = first[: 8 * _HEADER].view(torch.int64).tolist()
        outlines = [_outline(rest[i * _PER_TENSOR :][:_PER_TENSOR]) for i in range(n_tensors)]
        sizes = [_padded(dtype, shape) for dtype, shape in outlines]
        payload = first[8 * _HEADER :][: sum(sizes)]
        if sum(sizes) > _ROOM:
            payload = torch.empty(sum(sizes), dtype=torch.uint8)
            self._group.recv([payload], rank, 0).wait(timeout)
        tensors = [
            _unpacked(part, dtype, shape)
            for part, (dtype, shape) in zip(payload.split(sizes), outlines, strict=True)
        ]
        return Message(Kind(kind), number, flags, tuple(tensors))


def _packed(message: Message) -> list[Tensor]:
    header = [message.kind, message.number, message.flags, len(message.tensors)]
    parts = []
    for x in message.tensors:
        shape = tuple(x.shape)
        header += [_DTYPES.index(x.dtype), len(shape), *shape, *[0] * (_MOST_DIMS - len(shape))]
        raw = x.detach().cpu().contiguous().view(-1).view(torch.uint8)
        parts += [raw, raw.new_zeros(_padded(x.dtype, shape) - len(raw))]
    header += [0] * (_HEADER - len(header))
    begin = torch.tensor(header, dtype=torch.int64).view(torch.uint8)
    size = sum(map(len, parts))
    if size > _ROOM:
        return [torch.cat([begin, begin.new_empty(_ROOM)]), torch.cat(parts)]
    return [torch.cat([begin, *parts, begin.new_empty(_ROOM - size)])]


def _outline(numbers: list[int]) -> tuple[torch.dtype, tuple[int, ...]]:
    dtype, n_dims, *shape = numbers
    return _DTYPES[dtype], tuple(shape[:n_dims])


def _padded(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes in the buffer, up to where any dtype may begin."""
    return math.ceil(math.prod(shape) * dtype.itemsize / _ALIGNED) * _ALIGNED


def _unpacked(raw: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return raw[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
