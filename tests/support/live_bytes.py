"""The most bytes of tensors that were alive at once while something ran, on any machine."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counted(TorchDispatchMode):
    def __init__(self, apart: set[int]) -> None:
        super().__init__()
        self.known, self.now, self.most = set(apart), 0, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self._see(x.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def most_alive(run: Callable[[], Any], apart: list[torch.Tensor]) -> int:
    """Of new tensors, without those `apart`; what a kernel takes inside itself is not seen."""
    with _Counted({x.untyped_storage()._cdata for x in apart}) as counted:
        held = run()
    del held
    return counted.most
