"""Safetensors files, single or sharded: what is in them at once, the numbers when asked.

Only headers are read on opening. Data is memory-mapped, so a tensor that is copied out costs
the copy alone; the mapped pages are the file cache's and can be reclaimed at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ernie_lab.checkpoint.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
    }
)

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pdparams")
# The format's own limit; a longer header is not a header.
_MAX_HEADER_BYTES = 100_000_000


class Takes(Protocol):
    """What a stored tensor can be copied into: a tensor, or something that packs it."""

    def copy_(self, stored: Tensor, /) -> object: ...


Destination: TypeAlias = Takes | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor. `dtype` is the format's word for it, such as `BF16`."""

    shard: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Reader:
    """The tensors of one checkpoint folder, by key."""

    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, folder: Path) -> Reader:
        """Read and check all headers.

        Raises:
            CheckpointError: no safetensors, a shard missing or truncated, an index that names
                a file outside the folder or a tensor that its shard lacks.
        """
        single = folder / WEIGHTS_NAME
        if single.is_file():  # preferred to an index, as in transformers
            return cls(read_header(single))
        if (folder / INDEX_NAME).is_file():
            return cls(_read_sharded(folder))
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            return cls(read_header(found[0]))
        raise CheckpointError(_no_weights(folder, found))

    def stream(self, destinations: Mapping[str, Destination]) -> Iterator[str]:
        """Copy each tensor into its destination, yielding its key once it is there.

        The destination has the stored shape, or is a tuple of one tensor a row; dtype and device
        are its own. Tensors come in the order of the files, each file being mapped once and only
        while it is read.
        """
        keys = sorted(destinations, key=lambda k: (self.tensors[k].shard, self.tensors[k].begin))
        for shard, in_shard in groupby(keys, key=lambda k: self.tensors[k].shard):
            mapped = _map(shard)
            for key in in_shard:
                stored, into = mapped.get_tensor(key), destinations[key]
                if isinstance(into, tuple):
                    for row, part in zip(into, stored, strict=True):
                        row.copy_(part)
                else:
                    into.copy_(stored)
                yield key

    def read(self, key: str) -> Tensor:
        """One tensor as it is stored, memory-mapped."""
        return _map(self.tensors[key].shard).get_tensor(key)  # type: ignore[no-any-return]

    @property
    def main_dtype(self) -> torch.dtype:
        """The floating dtype most bytes are stored in; float32 where nothing is floating."""
        totals = dict.fromkeys(FLOATS, 0)
        for info in self.tensors.values():
            if info.dtype in totals:
                totals[info.dtype] += info.n_bytes
        most = max(totals, key=lambda dtype: totals[dtype])
        return FLOATS[most] if totals[most] else torch.float32


def _map(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{shard} is not a valid safetensors file: {error}") from error


def read_header(path: Path) -> Mapping[str, TensorInfo]:
    """The tensors of one file, once its length is known to be what its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            raise CheckpointError(
                f"{path} is a git-lfs pointer instead of the weights; run `git lfs pull` there"
            )
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(
                f"{path} is no safetensors file or is truncated: {size} bytes cannot hold its "
                "header; download it again"
            )
        try:
            header: dict[str, Any] = json.loads(file.read(length))
            header.pop("__metadata__", None)
            tensors = {key: _info(path, entry) for key, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{path} has a damaged header; download it again") from error
    expected = 8 + length + max((info.end for info in tensors.values()), default=0)
    if size != expected:
        what = "truncated" if size < expected else "longer than it should be"
        raise CheckpointError(
            f"{path} is {what}: {size} bytes, its header promises {expected}; download it again"
        )
    return MappingProxyType(tensors)


def _info(path: Path, entry: Mapping[str, Any]) -> TensorInfo:
    begin, end = map(int, entry["data_offsets"])
    info = TensorInfo(path, entry["dtype"], tuple(map(int, entry["shape"])), begin, end)
    if info.dtype in FLOATS and info.n_bytes != math.prod(info.shape) * FLOATS[info.dtype].itemsize:
        raise ValueError("offsets do not fit the shape")
    return info


def _read_sharded(folder: Path) -> Mapping[str, TensorInfo]:
    index = folder / INDEX_NAME
    try:
        shard_of: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{index} is damaged or has no 'weight_map'") from error
    names = sorted(set(shard_of.values()))
    for name in names:
        path = PurePosixPath(name)
        # By name alone: in the hub's cache the files themselves are links to elsewhere.
        if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
            raise CheckpointError(
                f"{index} names {name!r}, which lies outside its folder; refusing to read it"
            )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{len(missing)} of {len(names)} shards are missing from {folder}: "
            f"{', '.join(missing[:3])}; download them again"
        )
    headers = {name: read_header(folder / name) for name in names}
    absent = [key for key, name in shard_of.items() if key not in headers[name]]
    if absent:
        raise CheckpointError(
            f"{len(absent)} tensors are not in the shard the index names, first: {absent[0]!r} "
            f"in {shard_of[absent[0]]!r}; download both again"
        )
    return MappingProxyType({key: headers[name][key] for key, name in shard_of.items()})


def _no_weights(folder: Path, found: list[Path]) -> str:
    if found:
        return f"{folder} holds {len(found)} safetensors files and no {INDEX_NAME} to join them"
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds only pickled weights ({pickles[0]}); loading a pickle can run any "
            "code, so they are refused. Convert them to safetensors with a tool you trust, or "
            "take a repository that has safetensors"
        )
    return f"{folder} holds no weights: expected {WEIGHTS_NAME} or {INDEX_NAME}"
