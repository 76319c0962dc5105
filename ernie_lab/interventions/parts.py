"""A model with some of its modules exchanged; every other tensor is shared, none is copied."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.config import RouterConfig
from ernie_lab.model.quantised import named_weights
from ernie_lab.model.router import Router

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def with_parts(model: AnyModule, parts: Mapping[str, nn.Module]) -> AnyModule:
    """The model with other modules at these paths. The given model is not touched.

    Only the objects on the way to a part are new; all of them hold the same parameters. The
    owner of a part passes it the sites, so a donor's weights fire under the receiver's names.
    """
    if not parts:
        return model
    root = shallow(model)
    new: dict[str, nn.Module] = {}
    for path, part in parts.items():
        owner: nn.Module = root
        *way, name = path.split(".")
        for depth, step in enumerate(way, start=1):
            walked = ".".join(way[:depth])
            if walked not in new:
                child = owner._modules[step]
                assert child is not None
                new[walked] = owner._modules[step] = shallow(child)
            owner = new[walked]
        if name not in owner._modules:
            raise KeyError(f"the model has no part {path!r}")
        owner._modules[name] = part
    return root


def shallow(module: AnyModule) -> AnyModule:
    """Another object with the same parameters, buffers and children."""
    twin = copy.copy(module)
    twin._modules = dict(module._modules)
    twin._parameters = dict(module._parameters)
    return twin


def part_at(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path)


def beside(part: nn.Module, own: nn.Module) -> nn.Module:
    """The part, or a copy of it on the device of another part, in whose place it is to stand."""
    theirs, mine = next(part.parameters(), None), next(own.parameters(), None)
    if theirs is None or mine is None or theirs.device == mine.device:
        return part
    return copy.deepcopy(part).to(mine.device)


def differ(one: nn.Module, other: nn.Module) -> bool:
    """Have they other weights, or another config?"""
    if one is other:
        return False
    if getattr(one, "config", None) != getattr(other, "config", None):
        return True
    mine, theirs = dict(named_weights(one)), dict(named_weights(other))
    if mine.keys() != theirs.keys():
        return True
    return any(not _equal(mine[name], theirs[name].to(mine[name].device)) for name in mine)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def router_with(
    router: Router,
    *,
    weight_ED: Tensor | None = None,
    bias_E: Tensor | None = None,
    config: RouterConfig | None = None,
) -> Router:
    """A router with another gate, correction bias or config; what is not given is shared."""
    twin = shallow(router)
    if weight_ED is not None:
        twin._parameters["weight_ED"] = nn.Parameter(weight_ED, requires_grad=False)
    if bias_E is not None:
        twin._parameters["correction_bias_E"] = nn.Parameter(bias_E, requires_grad=False)
    if config is not None:
        twin.config = config
    return twin
