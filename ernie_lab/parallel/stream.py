"""`placement="stream"`: the blocks stay in the checkpoint and are read in every forward pass.

What is in memory all the time: embedding and unembedding, all norms, biases and routers, the vision
tower and the resampler. Of the blocks, whose matrices are 9 bytes in 10 of a large model, two
are there at a time: one runs while the next is read (`ernie_lab.model.placed.Turns`). A pass so
costs as many bytes of disk as the blocks have, whatever its number of tokens: give it many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from ernie_lab.checkpoint import Layout, LoadReport, NotEnoughMemory, Reader, fill
from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.load import kept_dtype, read_tensors
from ernie_lab.checkpoint.memory import HEADROOM, free_bytes, parameter_bytes
from ernie_lab.checkpoint.names import stays_float32
from ernie_lab.checkpoint.on_disk import OnDisk
from ernie_lab.checkpoint.packing import held_bytes
from ernie_lab.checkpoint.progress import Progress
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.display import in_words
from ernie_lab.model.kinds import Model, build
from ernie_lab.model.placed import STREAMED
from ernie_lab.model.stack import block_list
from ernie_lab.parallel.auto import layer_of


@dataclass(frozen=True, slots=True, eq=False)
class Shelf:
    """The checkpoint that parameters are read from, and what they become: a `Source`."""

    reader: Reader
    layout: Layout
    device: torch.device
    dtype: torch.dtype
    # Found finite once; a file does not change under a mapped model.
    _finite: set[str] = field(default_factory=set)

    def read(
        self, parameters: Sequence[OnDisk], stopped: Callable[[], bool] = lambda: False, /
    ) -> list[Tensor]:
        shapes = {parameter.path: tuple(parameter.shape) for parameter in parameters}
        found = read_tensors(
            shapes,
            self.reader,
            self.layout,
            device=self.device,
            dtype=self.dtype,
            check=not shapes.keys() <= self._finite,
            stopped=stopped,
        )
        self._finite.update(shapes)
        return [found[parameter.path] for parameter in parameters]


def is_left(name: str, shape: Sequence[int]) -> bool:
    """Does a parameter stay on disk? The matrices of the blocks do, but for routers."""
    return layer_of(name) is not None and len(shape) >= 2 and not stays_float32(name)


def stream_bytes(config: ModelConfig, dtype: torch.dtype) -> tuple[int, tuple[int, ...]]:
    """What stays in memory, and what of each block does not."""
    stays, left = 0, [0] * config.decoder.n_layers
    for name, shape in parameter_shapes(config).items():
        n_bytes, layer = parameter_bytes(name, shape, dtype), layer_of(name)
        if layer is not None and is_left(name, shape):
            left[layer] += n_bytes
        else:
            stays += n_bytes
    return stays, tuple(left)


def require_room(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, free: int | None = None
) -> None:
    """Raise `NotEnoughMemory` where even two blocks and what stays do not fit."""
    stays, left = stream_bytes(config, dtype)
    available = free_bytes(device) if free is None else free
    two = max(map(sum, zip(left, (*left[1:], 0), strict=True)))
    needed = math.ceil((stays + two) * HEADROOM)
    if available is not None and needed > available:
        smaller = "" if dtype.itemsize == 2 else ', or dtype="bfloat16"'
        raise NotEnoughMemory(
            f"streaming as {str(dtype).removeprefix('torch.')} needs about {in_words(needed)} on "
            f"{device}: {in_words(stays)} that stay, {in_words(two)} for two layers, and "
            f"{HEADROOM - 1:.0%} room; {in_words(available)} are free. Take a device with more "
            f"memory{smaller}"
        )


def open_streamed(
    config: ModelConfig,
    reader: Reader,
    layout: Layout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    progress: Progress = True,
) -> tuple[Model, LoadReport]:
    """A model whose blocks are on disk. All keys and shapes are checked now, values when read.

    Raises:
        CheckpointError: as `fill`.
        NotEnoughMemory: with what two blocks need.
    """
    require_room(config, dtype, device)
    with torch.device("meta"):
        model = build(config)
    left = {name: p.shape for name, p in model.named_parameters() if is_left(name, p.shape)}
    report = fill(
        model, reader, layout, device=device, dtype=dtype, progress=progress, leave=left.keys()
    )
    _put_on_disk(model, left, Shelf(reader, layout, device, dtype))
    return model, replace(report, held=held_bytes(model))


def _put_on_disk(model: Model, left: Mapping[str, Sequence[int]], shelf: Shelf) -> None:
    for name, shape in left.items():
        owner, _, leaf = name.rpartition(".")
        parameter = OnDisk(name, shape, kept_dtype(name, shelf.dtype), shelf)
        model.get_submodule(owner).register_parameter(leaf, parameter)
    for block in block_list(model.blocks):
        block.__dict__[STREAMED] = True
    # All of it or nothing: without this the parts in memory would move before the first refusal.
    model.__dict__["_apply"] = _refuse_moving
    model.requires_grad_(False)


def _refuse_moving(*_: Any, **__: Any) -> NoReturn:
    raise ValueError(
        "a streamed model is neither moved nor cast, because its blocks are on disk: load it "
        'again with load(..., placement="stream", device=…, dtype=…)'
    )
