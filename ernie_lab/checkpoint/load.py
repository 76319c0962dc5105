"""Filling a model from a checkpoint: every parameter exactly once, or an error with its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.allocator import keep_freed_memory
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout, Stored
from ernie_lab.checkpoint.names import kind_of, stays_float32
from ernie_lab.checkpoint.packing import PackedPlace, held_bytes, packed_parameters, packed_places
from ernie_lab.checkpoint.progress import Progress, count_bytes
from ernie_lab.checkpoint.quantise import HeldBytes
from ernie_lab.checkpoint.reader import FLOATS, Reader
from ernie_lab.checkpoint.slices import SlicedPlace, sliced_parameters, sliced_places

Place: TypeAlias = Stored | PackedPlace | SlicedPlace
# One for all, or the device of each parameter, told by its name.
Devices: TypeAlias = torch.device | str | Callable[[str], torch.device]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a load did. `unused` are keys of parts the model does not have (MTP heads).

    `n_bytes` were read; `held` are the bytes that the weights take now, quantised and not.
    """

    layout: str
    n_tensors: int
    n_bytes: int
    unused: tuple[str, ...]
    seconds_reading: float
    seconds_checking: float
    held: HeldBytes | None = None


@torch.no_grad()
def fill(
    module: nn.Module,
    reader: Reader,
    layout: Layout,
    *,
    device: Devices,
    dtype: torch.dtype,
    progress: Progress = True,
    leave: Collection[str] = (),
) -> LoadReport:
    """Give a module that was built on the meta device its weights, at `device` and `dtype`.

    The parameters named in `leave` are checked against the checkpoint as all others, but not
    read: they stay on the meta device, and no product may use them there (see `on_disk`).

    Router weights and correction biases are created as fp32, whatever `dtype`. Names and
    shapes are settled before anything is allocated. Each stored tensor is then copied from the
    mapped file into its place in the parameter, experts into their rows of the stack, so memory
    beside the weights stays at one tensor. Modules that hold weights in other bits (`Packs`) pack
    each stored tensor as it is read. After an error the module is unusable: build anew.

    Of what the module holds a slice of (`Sliced`) only that is read; the rest is checked alike.

    Raises:
        CheckpointError: weights of another kind of model; tensors missing, left over, of a wrong
            shape or dtype, or with NaN or infinite values; a second copy of a tied tensor that
            differs from the first.
    """
    _require_kind(module, layout)
    plan = _plan(module, dict(module.named_parameters()), layout, reader, dtype)
    unused = tuple(sorted(key for key in reader.tensors if layout.is_unused(key)))
    copies = {
        copy: of
        for copy, of in layout.copies.items()
        if copy in reader.tensors.keys() - plan.keys()
    }
    _check(plan, reader, passed_over={*unused, *copies})
    for name, buffer in module.named_buffers():
        if buffer.is_meta and name not in _packed_buffers(module):
            raise CheckpointError(f"buffer {name!r} is on the meta device and in no checkpoint")

    parameters = _allocate(module, device, dtype, leave)
    targets = {
        key: place
        for key, place in _plan(module, parameters, layout, reader, dtype).items()
        if not any(view.is_meta for view in place.views)  # what other ranks hold
    }
    sizes = {key: _bytes_read(place, reader.tensors[key].n_bytes) for key, place in targets.items()}
    n_bytes = sum(sizes.values())
    started, checking = time.perf_counter(), 0.0
    with count_bytes(n_bytes, "loading weights", progress) as advance:
        for key, seconds in _read(targets, reader):
            checking += seconds
            advance(sizes[key])
    for copy, of in copies.items():
        if of in targets:
            _check_copy(copy, of, reader)
    keep_freed_memory()  # not before: what loading frees in between would stay
    return LoadReport(
        layout=layout.name,
        n_tensors=len(targets),
        n_bytes=n_bytes,
        unused=unused,
        seconds_reading=time.perf_counter() - started - checking,
        seconds_checking=checking,
        held=held_bytes(module),
    )


@torch.no_grad()
def read_tensors(
    shapes: Mapping[str, tuple[int, ...]],
    reader: Reader,
    layout: Layout,
    *,
    device: torch.device,
    dtype: torch.dtype,
    check: bool = True,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Tensor]:
    """Parameters of ours by name, as `fill` reads them: those of a model that `fill` has checked.

    `check` is for NaN and infinite values. `stopped` is asked after each tensor.

    Raises:
        CheckpointError: a NaN or an infinite value.
        InterruptedError: it was stopped.
    """
    tensors = {
        name: torch.empty(shape, dtype=kept_dtype(name, dtype), device=device)
        for name, shape in shapes.items()
    }
    for _ in _read(_plain(tensors, layout, reader), reader, check):
        if stopped():
            raise InterruptedError("reading weights was stopped")
    return tensors


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Of the parameter of this name in a model of this dtype."""
    return torch.float32 if stays_float32(name) else dtype


def _read(
    targets: Mapping[str, Place], reader: Reader, check: bool = True
) -> Iterator[tuple[str, float]]:
    """Each key once its tensor is in its place and found finite; the seconds that this took."""
    for key in reader.stream({key: target.destination for key, target in targets.items()}):
        before = time.perf_counter()
        if check and not all(map(is_finite, targets[key].views)):
            raise CheckpointError(_not_finite(key, targets[key], reader))
        yield key, time.perf_counter() - before


def _require_kind(module: nn.Module, layout: Layout) -> None:
    kind = kind_of(name for name, _ in module.named_parameters())
    if kind != layout.kind:
        raise CheckpointError(
            f"config.json describes a {kind} model, but the tensors are named as in a "
            f"{layout.kind} model; take config.json and weights of the same model"
        )


def _plan(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    layout: Layout,
    reader: Reader,
    dtype: torch.dtype,
) -> dict[str, Place]:
    """Where every stored tensor goes, by key."""
    sliced = sliced_parameters(module)
    whole = {name: parameter for name, parameter in parameters.items() if name not in sliced}
    return {
        **_plain(whole, layout, reader),
        **dict(sliced_places(sliced, parameters, layout)),
        **dict(packed_places(module, layout, dtype)),
    }


def _bytes_read(place: Place, n_bytes: int) -> int:
    return place.read_of(n_bytes) if isinstance(place, SlicedPlace) else n_bytes


def _plain(parameters: Mapping[str, Tensor], layout: Layout, reader: Reader) -> dict[str, Stored]:
    found = reader.tensors
    return {
        key: stored.fitted(found[key].shape) if key in found else stored
        for key, stored in layout.stored(parameters).items()
    }


def _packed_buffers(module: nn.Module) -> set[str]:
    """Buffers that are filled with packed weights."""
    packing = {id(packs) for _, packs in packed_parameters(module)}
    return {
        f"{path}.{name}"
        for path, part in module.named_modules()
        if id(part) in packing
        for name, _ in part.named_buffers()
    }


def _check(plan: Mapping[str, Place], reader: Reader, passed_over: set[str]) -> None:
    stored = reader.tensors
    wrong_shape = [
        f"{key} is {list(stored[key].shape)}, expected {list(target.shape)} for "
        f"{' and '.join(target.names)}"
        for key, target in plan.items()
        if key in stored and stored[key].shape != target.shape
    ]
    wrong_dtype = [
        f"{key} is {stored[key].dtype}"
        for key in plan
        if key in stored and stored[key].dtype not in FLOATS
    ]
    complaints = [
        _listed("missing from the checkpoint", [key for key in plan if key not in stored]),
        _listed(
            "in the checkpoint and not in the model",
            sorted(stored.keys() - plan.keys() - passed_over),
        ),
        _listed("of another shape", wrong_shape),
        _listed(f"not floating point ({', '.join(FLOATS)}), so quantised perhaps", wrong_dtype),
    ]
    if any(complaints):
        raise CheckpointError(
            "the weights do not fit the model that config.json describes: "
            + "; ".join(filter(None, complaints))
            + ". Are config.json and the weights of the same model?"
        )


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"{len(items)} tensors {what}: {', '.join(items[:3])}{more}"


def _allocate(
    module: nn.Module, device: Devices, dtype: torch.dtype, leave: Collection[str]
) -> dict[str, nn.Parameter]:
    """Put an unfilled parameter in place of each one of the module, but for those to leave."""
    at = device if callable(device) else lambda _: torch.device(device)
    parameters = {}
    for name, old in list(module.named_parameters()):
        if name in leave:
            continue
        empty = torch.empty(old.shape, dtype=kept_dtype(name, dtype), device=at(name))
        new = nn.Parameter(empty, requires_grad=old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner).register_parameter(leaf, new)
        parameters[name] = new
    for name, packs in packed_parameters(module):
        packs.allocate(at(name), dtype)
    return parameters


def is_finite(x: Tensor) -> bool:
    """No NaN and no infinity. The extremes carry both and need no temporary, unlike isfinite."""
    if x.numel() == 0:
        return True
    low, high = torch.aminmax(x)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _not_finite(key: str, target: Place, reader: Reader) -> str:
    stored, names = reader.read(key), " and ".join(target.names)
    if is_finite(stored):
        return (
            f"tensor {key!r} ({names}) has values that overflow {target.views[0].dtype}; "
            "load with dtype='bfloat16' or 'float32'"
        )
    bad = int((~torch.isfinite(stored)).sum())
    return (
        f"tensor {key!r} ({names}) has {bad} NaN or infinite values of {stored.numel()} in "
        f"{reader.tensors[key].shard.name}; the file is damaged or the training diverged"
    )


def _check_copy(copy: str, of: str, reader: Reader) -> None:
    if not _equal(reader.read(copy), reader.read(of)):
        raise CheckpointError(
            f"config.json ties the embeddings, but {copy!r} differs from {of!r}; set "
            "tie_word_embeddings to false if the model was trained untied"
        )


def _equal(one: Tensor, other: Tensor, n_rows: int = 4096) -> bool:
    """Equality by blocks of rows, so that comparing needs no tensor of the same size."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    blocks = zip(one.split(n_rows), other.split(n_rows), strict=True)
    return all(torch.equal(a, b) for a, b in blocks)
