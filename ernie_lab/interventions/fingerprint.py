"""One number for everything that a result depends on, so that a saved part is never mistaken.

Equal fingerprints mean equal inputs. Where that cannot be promised (an object of which nobody
knows whether it is the same), there is an error, not a guess.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import types
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.weight_sums import weight_sums
from ernie_lab.trace.provenance import Provenance


class CannotFingerprint(TypeError):
    """A value of which it cannot be told whether it is the same as in an earlier session."""


def fingerprint(*values: Any) -> str:
    """SHA-256 of plain values, tensors, models, dataclasses of them, and functions.

    A function counts by its code, its constants and what it closes over; a model by name, shape
    and sums of its parameters.
    """
    digest = _Digest()
    for value in values:
        digest.feed(value)
    return digest.hash.hexdigest()


class _Digest:
    def __init__(self) -> None:
        self.hash = hashlib.sha256()
        # By id, the objects themselves: so that none is freed and its id used again.
        self.open: dict[int, Any] = {}

    def say(self, *parts: object) -> None:
        self.hash.update(("\x1f".join(map(str, parts)) + "\x1e").encode("utf-8", "surrogatepass"))

    def feed(self, value: Any) -> None:
        if value is None or isinstance(value, bool | int | float | complex | str | Path):
            self.say(type(value).__name__, repr(value))
        elif isinstance(value, bytes):
            self.say("bytes", len(value))
            self.hash.update(value)
        elif isinstance(value, torch.dtype | torch.device | np.dtype | np.generic | range | slice):
            self.say(type(value).__name__, repr(value))
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, np.ndarray) and value.dtype != object:
            self.say("ndarray", value.dtype, value.shape)
            self.hash.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, Provenance):
            pass  # when something was made does not change what it is
        elif id(value) in self.open:
            self.say("again", list(self.open).index(id(value)))
        else:
            self.open[id(value)] = value
            self._compound(value)

    def _compound(self, value: Any) -> None:
        owned = getattr(value, "model", None)
        if isinstance(value, nn.Module):
            self._model(value)
        elif isinstance(owned, nn.Module):
            self._model(owned)
        elif isinstance(value, Mapping):
            self._all("mapping", [x for pair in value.items() for x in pair])
        elif isinstance(value, Set):
            self._all("set", sorted(value, key=repr))
        elif isinstance(value, list | tuple):
            self._all(type(value).__name__, value)
        elif isinstance(value, functools.partial):
            self._all("partial", [value.func, value.args, value.keywords])
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._all("method", [value.__func__, value.__self__])
        elif isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
            self.say("named", getattr(value, "__module__", ""), _name(value))
        elif isinstance(value, types.CodeType):
            self._code(value)
        elif dataclasses.is_dataclass(value):
            fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
            self._all(f"{type(value).__module__}.{type(value).__qualname__}", fields)
        elif callable(value) and hasattr(value, "__module__") and hasattr(value, "__qualname__"):
            self.say("named", value.__module__, value.__qualname__)
        else:
            raise CannotFingerprint(
                f"{value!r} ({type(value).__name__}): whether it is the same in another session "
                "cannot be told, so parts saved in a folder could not be trusted. Leave folder= "
                "out, or use numbers, tensors, dataclasses and plain functions"
            )

    def _all(self, what: str, values: Any) -> None:
        self.say(what, len(values))
        for value in values:
            self.feed(value)

    def _tensor(self, x: Tensor) -> None:
        self.say("tensor", x.dtype, tuple(x.shape))
        raw = x.detach().cpu().contiguous()
        self.hash.update(raw.flatten().view(torch.uint8).numpy().tobytes())

    def _model(self, model: nn.Module) -> None:
        self.say("model", type(model).__name__)
        for line in weight_sums(model.state_dict()):
            self.say(*line)
        for name, part in model.named_modules():
            if hasattr(part, "weights_elsewhere"):  # held by other ranks
                self.say(name, *part.weights_elsewhere())

    def _function(self, fn: types.FunctionType) -> None:
        cells = [cell.cell_contents for cell in fn.__closure__ or ()]
        self._code(fn.__code__)
        self._all("closure", [*cells, fn.__defaults__, fn.__kwdefaults__])
        used = sorted(set(_names(fn.__code__)) & fn.__globals__.keys())
        for name in used:
            self.say("global", name)
            self.feed(fn.__globals__[name])

    def _code(self, code: types.CodeType) -> None:
        self.say("code", code.co_names, code.co_varnames[: code.co_argcount])
        self.hash.update(code.co_code)
        for constant in code.co_consts:
            self.feed(tuple(sorted(constant, key=repr)) if isinstance(constant, Set) else constant)


def _names(code: types.CodeType) -> list[str]:
    """Names that a function and those inside it look up."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return [*code.co_names, *(name for c in inner for name in _names(c))]


def _name(value: Any) -> str:
    return str(getattr(value, "__qualname__", value.__name__))
