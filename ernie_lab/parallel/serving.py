"""What ranks other than 0 do: hold parts of models, and compute with them when they are asked."""

from __future__ import annotations

import math
import os
import socket
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint import NotEnoughMemory, Reader, detect, fill, read_config_file
from ernie_lab.checkpoint.memory import HEADROOM, free_bytes
from ernie_lab.checkpoint.weight_sums import weight_sums
from ernie_lab.display import in_words
from ernie_lab.model.attention import Attention
from ernie_lab.model.experts import ExpertBank
from ernie_lab.model.kinds import Model, build
from ernie_lab.parallel.attention import (
    Caches,
    SplitAttention,
    attended,
    complete,
    split_attention,
)
from ernie_lab.parallel.experts import SplitExpertBank, answered, split_experts
from ernie_lab.parallel.messages import FOREVER, Kind, Link, Message


class Aborted(Exception):
    """Rank 0 has no use for what is being computed."""


@dataclass(slots=True)
class Held:
    """This rank's part of one model: experts of each bank, heads of each layer."""

    banks: list[ExpertBank]
    layers: list[Attention]
    caches: Caches


@dataclass(slots=True)
class Server:
    """One rank that serves rank 0, until the connection ends.

    `place` is its number on its machine, and so its GPU where each rank has one.
    """

    link: Link
    place: int
    models: dict[int, Held] = field(default_factory=dict)

    @torch.no_grad()
    def serve(self) -> None:
        while True:
            try:
                question = self.link.receive(0, FOREVER)
            except RuntimeError:
                return  # rank 0 is gone: with its work done, or with its own word on why not
            self.link.send({0: self._reply(question)})

    def _reply(self, question: Message) -> Message:
        try:
            match question.kind:
                case Kind.LOAD:
                    return Message.of_facts(Kind.DONE, self._load(question))
                case Kind.FORGET:
                    self._forget(question)
                case Kind.EXPERTS | Kind.ATTEND:
                    return Message(Kind.DONE, tensors=(self._computed(question),))
                case Kind.SUMS:
                    return Message.of_text(Kind.DONE, self._sums(question))
                case _:
                    pass  # ABORT of what is done already
        except Aborted:
            pass
        except Exception:
            return Message.of_text(Kind.FAILED, traceback.format_exc())
        return Message(Kind.DONE)

    def _computed(self, question: Message) -> Tensor:
        model, part = divmod(question.number, PARTS)
        held = self.models[model]
        if question.kind is Kind.EXPERTS:
            return answered(held.banks[part], question, self._show)
        return attended(held.layers[part], part, question, held.caches, self._show)

    def _sums(self, question: Message) -> str:
        model, part = divmod(question.number, PARTS)
        held = self.models[model]
        asked = held.layers[part] if question.flags else held.banks[part]
        return "\n".join(" ".join(map(str, line)) for line in weight_sums(asked.state_dict()))

    def _forget(self, question: Message) -> None:
        if question.flags:  # a cache; which model's, its number does not say
            for held in self.models.values():
                held.caches.held.pop(question.number, None)
        else:
            self.models.pop(question.number, None)

    def _show(self, x: Tensor) -> Tensor:
        self.link.send({0: Message(Kind.SHOWN, tensors=(x,))})
        reply = self.link.receive(0, FOREVER)
        if reply.kind is not Kind.ANSWER:
            raise Aborted
        return reply.tensors[0].to(x.device).view_as(x) if reply.tensors else x

    def _load(self, question: Message) -> dict[str, Any]:
        facts, started = question.facts, time.perf_counter()
        folder = Path(facts["folder"])
        device = device_here(torch.device(facts["device"]), self.place)
        dtype: torch.dtype = getattr(torch, facts["dtype"])
        config = read_config_file(folder, facts["ignore"])
        reader = Reader.open(folder)
        with torch.device("meta"):
            model = build(config)
            banks, layers = split(model, self.link.rank, self.link.n_ranks, heads=facts["heads"])
        parts: list[nn.Module] = [*(bank.own for bank in banks), *(own.own for own in layers)]
        mine = {id(p): p for part in parts for p in part.parameters()}
        leave = {name for name, p in model.named_parameters() if id(p) not in mine}
        require_room(mine.values(), self.link.rank, dtype, device)
        report = fill(
            model, reader, detect(reader.tensors.keys()), device=device, dtype=dtype,
            progress=False, leave=leave,
        )  # fmt: skip
        # The rest of the model is on the meta device, and goes with this name.
        n_bytes = sum(parameter.nbytes for part in parts for parameter in part.parameters())
        complete(layers)
        self.models[question.number] = Held(
            [bank.own.eval() for bank in banks],
            [layer.own.eval() for layer in layers],
            Caches(len(layers)),
        )
        return {
            "rank": self.link.rank,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "device": str(device),
            "bytes_read": report.n_bytes,
            "bytes_held": n_bytes,
            "seconds": time.perf_counter() - started,
        }


# Banks of all models are numbered through, and so are layers: so many numbers for each model.
PARTS = 1 << 20


def split(
    model: Model, rank: int, n_ranks: int, *, heads: bool
) -> tuple[list[SplitExpertBank], list[SplitAttention]]:
    """Leave a model with the parts of one rank; unfilled, under `torch.device("meta")`."""
    banks = split_experts(model, rank, n_ranks)
    return banks, split_attention(model, rank, n_ranks) if heads else []


def device_here(device: torch.device, place: int) -> torch.device:
    """`cuda` without a number is a GPU for each rank; with one, that one for all.

    Raises:
        ValueError: there are not so many.
    """
    if device.type == "cpu" or ":" in str(device):
        return device
    if place >= (found := torch.accelerator.device_count()):
        raise ValueError(
            f"device={device.type!r} is one device for each rank, and this machine has {found}; "
            f'take fewer ranks, device="{device.type}:0" to let all share one, or device="cpu"'
        )
    return torch.device(device.type, place)


def require_room(
    parameters: Iterable[Tensor], rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise `NotEnoughMemory` where the parts of one rank do not fit on its device."""
    needed = math.ceil(sum(x.numel() for x in parameters) * dtype.itemsize * HEADROOM)
    free = free_bytes(device)
    if free is not None and needed > free:
        raise NotEnoughMemory(
            f"the part of rank {rank} needs about {in_words(needed)} on {device} (weights and "
            f"{HEADROOM - 1:.0%} room), {in_words(free)} are free; take more ranks, or a smaller "
            "dtype"
        )
