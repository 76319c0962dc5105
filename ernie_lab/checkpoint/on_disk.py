"""Parameters that stay in the checkpoint: read anew whenever something is computed with them.

A model with such parameters never computes with the meta device. (On the CPU, torch 2.13's
`linear(x, weight)` with a weight on meta returns uninitialised memory and no error.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn


class Source(Protocol):
    """Where parameters are read from, and what becomes of them."""

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(
        self, parameters: Sequence[OnDisk], stopped: Callable[[], bool] = ..., /
    ) -> list[Tensor]: ...


# Weights that a forward pass has read for its present block, by the id of their parameter. Of
# the pass alone: another thread, or a pass within the pass, has its own.
_HELD: ContextVar[Mapping[int, Tensor]] = ContextVar("held", default=MappingProxyType({}))


class OnDisk(nn.Parameter):
    """A parameter by path in the model, shape and dtype, whose values are read when they are used.

    Reading weights for an analysis so gives what a loaded model gives, one tensor at a time.
    Writing to it and gradients through it raise `ValueError`. `detach` and copies of the model
    give the parameter itself, so `state_dict()` reads nothing.
    """

    source: Source
    path: str

    def __new__(cls, path: str, shape: Sequence[int], dtype: torch.dtype, source: Source) -> OnDisk:
        empty = torch.empty(shape, dtype=dtype, device="meta")
        new: OnDisk = torch.Tensor._make_subclass(cls, empty, False)
        new.path, new.source = path, source
        return new

    def __init__(self, *_: Any) -> None:
        # nn.Parameter has no state of its own; `__new__` did everything.
        pass

    def read(self) -> Tensor:
        """The values: those that this pass holds, else from the checkpoint."""
        held = _HELD.get().get(id(self))
        return self.source.read([self])[0] if held is None else held

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options, first = dict(kwargs or {}), args[0] if args else None
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **options)
        if isinstance(first, OnDisk):
            if func == Tensor.device.__get__:
                return first.source.device
            if func == Tensor.is_meta.__get__:  # type: ignore[attr-defined]
                return False
            if func in _ITSELF:
                return first
            if func in _ASKS_GRADIENT and not (args[1] if len(args) > 1 else True):
                return first
            if func in _ASKS_GRADIENT:
                raise _refused(first, "it takes no gradient")
            if _writes(func):
                raise _refused(first, "it is only read")
        if isinstance(options.get("out"), OnDisk):
            raise _refused(options["out"], "it is only read")
        result = func(*_with_values(args), **_with_values(options))
        if torch.is_grad_enabled() and any(x.requires_grad for x in _tensors(result)):
            raise _refused(_first([args, options]), "a graph would hold the weights of every layer")
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        """Whatever goes past `__torch_function__` ends here, not in a product with nothing."""
        raise RuntimeError(f"{func} was called on a parameter whose values are on disk")

    def __deepcopy__(self, memo: Any) -> OnDisk:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise _refused(self, "it cannot be sent to another process, which should load its own")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"{self.path} {list(self.shape)}, {self.dtype}, on disk"


@contextmanager
def held(parameters: Sequence[OnDisk], values: Sequence[Tensor]) -> Iterator[None]:
    """Within, these parameters are not read again."""
    token = _HELD.set({id(p): x for p, x in zip(parameters, values, strict=True)})
    try:
        yield
    finally:
        _HELD.reset(token)


def on_disk(module: nn.Module) -> list[OnDisk]:
    return [p for p in module.parameters() if isinstance(p, OnDisk)]


def is_streamed(module: nn.Module) -> bool:
    return any(isinstance(p, OnDisk) for p in module.parameters())


def _getters(*names: str) -> set[Any]:
    return {getattr(Tensor, name).__get__ for name in names}


# What is known without reading.
_ABOUT = _getters("shape", "dtype", "ndim", "nbytes", "itemsize", "layout", "requires_grad")
_ABOUT |= _getters("grad", "grad_fn", "is_leaf", "is_sparse", "is_quantized")
_ABOUT |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size}
_ABOUT |= {Tensor.__len__, Tensor.is_floating_point, Tensor.is_complex, Tensor.ndimension}
_ABOUT |= {torch.numel, torch.is_floating_point, torch.is_complex}
_ITSELF = {Tensor.detach, torch.detach}
_ASKS_GRADIENT = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_READS_LIKE_WRITES = ("__invert__", "__index__", "__int__", "__iter__")


def _writes(func: Callable[..., Any]) -> bool:
    name = func.__name__
    if name.startswith("__") and name.endswith("__"):
        in_place = name.startswith("__i") and name not in _READS_LIKE_WRITES
        return in_place or name in ("__set__", "__setitem__", "__delete__")
    return name.endswith("_")


def _with_values(value: Any) -> Any:
    match value:
        case OnDisk():
            return value.read()
        case dict():
            return {key: _with_values(one) for key, one in value.items()}
        case tuple() if hasattr(value, "_fields"):
            return type(value)(*map(_with_values, value))
        case list() | tuple():
            return type(value)(map(_with_values, value))
        case _:
            return value


def _tensors(value: Any) -> Iterator[Tensor]:
    match value:
        case Tensor():
            yield value
        case dict():
            yield from _tensors(list(value.values()))
        case list() | tuple():
            for one in value:
                yield from _tensors(one)


def _first(value: Any) -> OnDisk:
    return next(x for x in _tensors(value) if isinstance(x, OnDisk))


def _refused(parameter: OnDisk, why: str) -> ValueError:
    return ValueError(
        f"{parameter.path} is on disk (placement='stream'): {why}. Streamed models are for "
        "recording and for edits of values; load without placement= to change, move or save "
        "weights and for gradients"
    )
