"""`placement="auto"`: whole layers over the GPUs of this machine and its memory, in one process.

Which device a layer is on follows from sizes alone. Running such a model needs nothing of this
module: a block's values go where its weights are (`ernie_lab.model.placed`), its keys and values
stay there, and everything but the blocks is on one device, the lab's.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ernie_lab.checkpoint import NotEnoughMemory, count_parameters
from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.memory import HEADROOM, free_bytes, parameter_bytes
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.display import in_words


@dataclass(frozen=True, slots=True)
class Room:
    """A device, and the bytes that are free there; None where that cannot be told."""

    device: torch.device
    free: int | None

    @property
    def for_weights(self) -> float:
        """What activations, the cache and the loader's copies leave."""
        return math.inf if self.free is None else self.free / HEADROOM


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """The device of each block, by layer; `home` has all the rest. `n_bytes` are of weights."""

    home: torch.device
    layers: tuple[torch.device, ...]
    n_bytes: Mapping[torch.device, int]

    def device_of(self, name: str) -> torch.device:
        """Of the parameter of this name."""
        layer = layer_of(name)
        return self.home if layer is None else self.layers[layer]

    def __str__(self) -> str:
        by_device = ", ".join(
            f"{device} {_numbers(self.layers, device)} ({in_words(self.n_bytes[device])})"
            for device in dict.fromkeys((self.home, *self.layers))
        )
        return f"layers by device: {by_device}; all else on {self.home}"


def plan_layers(
    config: ModelConfig,
    dtype: torch.dtype,
    rooms: Sequence[Room],
    quantize: Quantisation | None = None,
) -> LayerPlan:
    """Layers in order, each on the first of `rooms` with place left, never back to an earlier one.

    So activations cross from device to device once each. The embedding, the unembedding, the last
    norm and the vision tower come first, to the first room that takes them.

    Raises:
        NotEnoughMemory: what is needed, what is free where, and what would help.
    """
    needed = bytes_by_layer(config, dtype, quantize)
    left = {room.device: room.for_weights for room in rooms}
    taken: Counter[torch.device] = Counter()
    remaining = iter(left)
    here = next(remaining, None)
    found: list[torch.device] = []
    for n_bytes in (needed[None], *(needed[n] for n in range(config.decoder.n_layers))):
        while here is not None and taken[here] + n_bytes > left[here]:
            here = next(remaining, None)
        if here is None:
            raise NotEnoughMemory(_no_room(config, dtype, rooms, quantize, needed, len(found) - 1))
        taken[here] += n_bytes
        found.append(here)
    return LayerPlan(found[0], tuple(found[1:]), dict(taken))


def bytes_by_layer(
    config: ModelConfig, dtype: torch.dtype, quantize: Quantisation | None = None
) -> dict[int | None, int]:
    """Of the weights of each layer; under None, of all that is in no layer."""
    total: Counter[int | None] = Counter({None: 0})
    for name, shape in parameter_shapes(config).items():
        total[layer_of(name)] += parameter_bytes(name, shape, dtype, quantize)
    return dict(total)


def local_rooms() -> tuple[Room, ...]:
    """The GPUs of this machine in their order, then its memory."""
    devices: Iterable[torch.device] = ()
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        numbers = range(torch.accelerator.device_count())
        devices = (torch.device(kind.type, number) for number in numbers)
    return tuple(Room(one, free_bytes(one)) for one in (*devices, torch.device("cpu")))


def layer_of(name: str) -> int | None:
    """Of the parameter of this name; None of what is in no block."""
    # `vision.blocks.3` is the tower's.
    match = re.match(r"blocks\.(\d+)\.", name)
    return int(match[1]) if match else None


def _numbers(layers: Sequence[torch.device], device: torch.device) -> str:
    mine = [n for n, one in enumerate(layers) if one == device]
    return f"{mine[0]}-{mine[-1]}" if mine else "none"


def _no_room(
    config: ModelConfig,
    dtype: torch.dtype,
    rooms: Sequence[Room],
    quantize: Quantisation | None,
    needed: Mapping[int | None, int],
    n_placed: int,
) -> str:
    free = ", ".join(f"{in_words(room.free or 0)} on {room.device}" for room in rooms)
    held = str(dtype).removeprefix("torch.") + (f", {quantize.scheme}" if quantize else "")
    total = math.ceil(sum(needed.values()) * HEADROOM)
    largest = max(n for layer, n in needed.items() if layer is not None)
    placed = f"layers 0-{n_placed - 1} of {config.decoder.n_layers} would" if n_placed > 0 else ""
    smaller = "" if quantize else ', quantize="int8" or "nf4"'
    smaller = smaller if dtype.itemsize == 2 else ', dtype="bfloat16"' + smaller
    return (
        f"{count_parameters(config).total / 1e9:.1f} B parameters as {held} need about "
        f"{in_words(total)} (weights and {HEADROOM - 1:.0%} room; {in_words(needed[None])} beside "
        f"the layers, a layer {in_words(largest)} at most, whole layers on a device); free are "
        f"{free}, where {placed or 'not one layer would'} fit. Take more devices"
        f'{smaller}, or placement="stream", which reads layer by layer from disk'
    )
