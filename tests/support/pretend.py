"""Devices that are not there: CPU tensors that say they are elsewhere, and never meet unmoved.

    with PretendDevices():
        x = torch.ones(2, device="pretend:1")   # holds CPU memory, says pretend:1
        x + torch.ones(2)                   # raises, as on real devices

Arithmetic is the CPU's, so what moves is tested and what a device computes is not. `setup` tells
torch of the kind of device for as long as the process lives: use it in one of its own.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
CPU = torch.device("cpu")
# On a real device too, an index may be on the CPU.
_TAKES_CPU_INDEX = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


class Elsewhere(torch.Tensor):
    """A tensor on a device that is not there; `numbers` has them."""

    numbers: Tensor

    def __new__(cls, real: Tensor, device: torch.device) -> "Elsewhere":
        new = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=device,
        )
        new.numbers = real
        return new  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:  # torch's own refuses subclasses
        return self.numbers.tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Elsewhere({self.numbers}, {self.device})"


_LIBRARY = torch.library.Library("aten", "IMPL", "PrivateUse1")


def _empty_strided(size: Any, stride: Any, *, device: Any, dtype: Any = None, **_: Any) -> Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype), torch.device(device))


def _copy_from(source: Any, into: Any, non_blocking: bool = False) -> Any:
    del non_blocking
    getattr(into, "numbers", into).copy_(getattr(source, "numbers", source))
    return into


class _Module(backend_registration._DummyBackendModule):  # type: ignore[misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def setup() -> None:
    backend_registration._setup_privateuseone_for_python_backend("pretend", _Module())
    _LIBRARY.impl("empty_strided", _empty_strided)  # a number written to an index, say
    _LIBRARY.impl("_copy_from", _copy_from)
    made = torch.tensor  # copies to a device below what a dispatch mode sees

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        return made(*args, **kwargs) if device is None else made(*args, **kwargs).to(device)

    torch.tensor = tensor


class PretendDevices(TorchDispatchMode):
    """Within, tensors can be made on `pretend:0`, `pretend:1`, …"""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # plain arithmetic: fused kernels are chosen by a device's name
    asked = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
    if asked is not None and asked.type == "pretend":
        kwargs = {**kwargs, "device": CPU}
    given = list(_elsewhere((args, kwargs)))
    if func is aten._to_copy.default or func is aten.copy_.default or asked is not None:
        where = asked or (args[0].device if args else CPU)
    else:
        where = _common_device(func, args, kwargs)
    real_args, real_kwargs = tree_map_only(Elsewhere, lambda x: x.numbers, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    if where.type != "pretend":
        return result
    known = {id(x.numbers): x for x in given}
    return tree_map_only(
        Tensor, lambda x: known[id(x)] if id(x) in known else Elsewhere(x, where), result
    )


def _common_device(func: Any, args: Any, kwargs: Any) -> torch.device:
    found = {x.device for x in _elsewhere((args, kwargs))}
    if not found:
        return CPU
    plain = [x for x in tree_leaves((args, kwargs)) if _is_plain(x)]
    if func in _TAKES_CPU_INDEX:
        plain = [x for x in tree_leaves((args[:1], args[2:])) if _is_plain(x)]
    if len(found) > 1 or any(x.ndim for x in plain):
        raise RuntimeError(f"{func}: tensors on {found | {x.device for x in plain}}, unmoved")
    return found.pop()


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, Elsewhere)


def _elsewhere(value: Any) -> Iterator[Elsewhere]:
    return (x for x in tree_leaves(value) if isinstance(x, Elsewhere))
