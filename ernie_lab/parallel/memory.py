"""Which placement of a model fits which devices, from its config alone.

Bytes of weights are those of `ernie_lab.checkpoint.memory`, parameter by parameter, and so the
figures of `load`, which also asks for a tenth of them as room.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from ernie_lab.checkpoint import ModelConfig
from ernie_lab.checkpoint.memory import HEADROOM, parameter_bytes
from ernie_lab.checkpoint.parts import part_of
from ernie_lab.checkpoint.quantise import Quantisation, Scheme
from ernie_lab.checkpoint.shapes import Shape, parameter_shapes
from ernie_lab.parallel.activations import activation_bytes, cache_bytes
from ernie_lab.parallel.auto import Room, layer_of, plan_layers
from ernie_lab.parallel.experts import held_by
from ernie_lab.parallel.stream import is_left

# Parts of a model as the plan shows them.
GROUPS: Mapping[str, tuple[str, ...]] = {
    "experts": ("routed_experts", "text_experts", "vision_experts"),
    "attention": ("attention",),
    "MLPs": ("dense_mlp", "shared_experts"),
    "embedding": ("embed", "unembed"),
    "pictures": ("vision_tower", "resampler"),
    "routers": ("router", "vision_router", "norms"),
}
_GROUP_OF = {part: group for group, parts in GROUPS.items() for part in parts}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to run: sequences of `context` tokens, `batch` at once."""

    dtype: torch.dtype
    context: int = 4096
    batch: int = 1
    scheme: Scheme | None = None

    def __post_init__(self) -> None:
        for name in ("context", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")

    @property
    def how(self) -> Quantisation | None:
        return Quantisation(self.scheme) if self.scheme else None

    def quantised(self, scheme: Scheme | None) -> Asked:
        return replace(self, scheme=scheme)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on one device: `weights` by group of `GROUPS`, the cache, activations.

    `available` is None for the memory of the machine, of which the devices say nothing.
    """

    where: str
    weights: Mapping[str, int]
    cache: int
    activations: int
    available: int | None
    layers: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        return sum(self.weights.values())

    @property
    def needed(self) -> int:
        """With what `load` asks for beside the weights, where cache and activations are less."""
        return max(self.held + self.cache + self.activations, math.ceil(self.held * HEADROOM))

    @property
    def missing(self) -> int:
        return 0 if self.available is None else max(0, self.needed - self.available)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """One placement, as `load(placement=…)` names it; `needs` has the devices it uses in order.

    `refused` says why there can be no such placement of this model, and then there are no needs.
    """

    placement: str | None
    scheme: Scheme | None
    needs: tuple[Need, ...] = ()
    refused: str = ""

    @property
    def fits(self) -> bool:
        """On the devices alone."""
        return not self.refused and not self.in_memory and not any(n.missing for n in self.needs)

    @property
    def in_memory(self) -> int:
        """Bytes that go to the memory of the machine, since no device has room for them."""
        return sum(need.needed for need in self.needs if need.available is None)


def memory_plans(
    config: ModelConfig, devices: Sequence[int], asked: Asked
) -> tuple[MemoryPlan, ...]:
    """One device, whole layers over all, experts over all, attention too, and streaming.

    One device is the largest of those given, and the only one where a single one is given.

    Raises:
        ValueError: a context longer than the model has positions.
    """
    if asked.context > (most := config.decoder.rope.max_positions):
        raise ValueError(f"context={asked.context}: this model has positions for {most:,} tokens")
    several, largest = len(devices) > 1, max(devices)
    alone = one_device(config, largest, asked)
    over_ranks_too = (
        over_ranks(config, devices, asked),
        over_ranks(config, devices, asked, heads=True),
    )
    return (
        alone,
        *((whole_layers(config, devices, asked),) if several or not alone.fits else ()),
        *(over_ranks_too if several else ()),
        streamed(config, largest, asked),
    )


def one_device(config: ModelConfig, available: int, asked: Asked) -> MemoryPlan:
    weights = _weights(config, asked, lambda _: None)[None]
    layers = range(config.decoder.n_layers)
    return _planned(None, asked, [_need(config, asked, "", weights, available, layers)])


def whole_layers(config: ModelConfig, devices: Sequence[int], asked: Asked) -> MemoryPlan:
    """`placement="auto"`: what `ernie_lab.parallel.auto` makes of empty devices of these sizes."""
    rooms = [Room(torch.device("cuda", i), size) for i, size in enumerate(devices)]
    memory = Room(torch.device("cpu"), None)
    plan = plan_layers(config, asked.dtype, [*rooms, memory], asked.how)
    weights = _weights(config, asked, plan.device_of)
    needs = []
    for room in (*rooms, memory):
        if room.device in weights:
            layers = [layer for layer, there in enumerate(plan.layers) if there == room.device]
            where = "memory" if room is memory else f"device {room.device.index}"
            held = weights[room.device]
            needs.append(_need(config, asked, where, held, room.free, layers))
    return _planned("auto", asked, needs)


def over_ranks(
    config: ModelConfig, devices: Sequence[int], asked: Asked, heads: bool = False
) -> MemoryPlan:
    """`placement="ep:N"`: experts over the ranks, everything else on rank 0; `+tp`: heads too.

    Activations of other ranks are bounded as if all tokens chose the experts of that rank.
    """
    n = len(devices)
    name = f"ep:{n}" + ("+tp" if heads else "")
    if refused := _refusal(config, n, heads, asked):
        return MemoryPlan(name, asked.scheme, refused=refused)
    moe, groups = config.decoder.moe, config.decoder.attention.n_kv_heads
    assert moe is not None
    layers, n_groups = range(config.decoder.n_layers), groups // (n if heads else 1)

    @cache
    def weights(first: bool, n_experts: int) -> Counter[str]:
        local = _local(n_experts, n if heads else 1, first)
        return _weights(config, asked, lambda _: None, local)[None]

    needs = []
    for rank, available in enumerate(devices):
        held = weights(rank == 0, len(held_by(rank, moe.router.n_experts, n)))
        cached = layers if heads or rank == 0 else ()
        where = f"rank {rank}"
        needs.append(_need(config, asked, where, held, available, cached, n_groups))
    return _planned(name, asked, needs)


def streamed(config: ModelConfig, available: int, asked: Asked) -> MemoryPlan:
    """`placement="stream"`: matrices of the layer at work and of the next, and all that stays."""
    if asked.scheme is not None:
        refused = "load() packs nothing that it reads in every pass"
        return MemoryPlan("stream", asked.scheme, refused=refused)
    shapes = parameter_shapes(config)
    weights = _weights(
        config, asked, lambda name: layer_of(name) if is_left(name, shapes[name]) else None
    )
    sizes = [sum(weights[layer].values()) for layer in range(config.decoder.n_layers)]
    first = max(range(max(1, len(sizes) - 1)), key=lambda n: sum(sizes[n : n + 2]))
    held = sum((weights[layer] for layer in range(len(sizes))[first : first + 2]), weights[None])
    layers = range(config.decoder.n_layers)
    return _planned("stream", asked, [_need(config, asked, "", held, available, layers)])


def _planned(placement: str | None, asked: Asked, needs: Sequence[Need]) -> MemoryPlan:
    return MemoryPlan(placement, asked.scheme, tuple(needs))


def _weights(
    config: ModelConfig,
    asked: Asked,
    place: Callable[[str], Hashable],
    local: Callable[[str, Shape], Shape | None] = lambda _, shape: shape,
) -> dict[Hashable, Counter[str]]:
    """Bytes by place and group; of each parameter the `local` part, None where there is none."""
    found: dict[Hashable, Counter[str]] = {}
    for name, whole in parameter_shapes(config).items():
        if (shape := local(name, whole)) is not None:
            size = parameter_bytes(name, shape, asked.dtype, asked.how)
            found.setdefault(place(name), Counter())[_GROUP_OF[part_of(name)]] += size
    return found


def _need(
    config: ModelConfig,
    asked: Asked,
    where: str,
    weights: Mapping[str, int],
    available: int | None,
    cached: Sequence[int],
    n_kv_heads: int | None = None,
) -> Need:
    how_many = asked.context, asked.batch, asked.dtype
    return Need(
        where,
        dict(weights),
        len(cached) * cache_bytes(config, *how_many, n_kv_heads),
        activation_bytes(config, *how_many, asked.how),
        available,
        tuple(cached),
    )


def _refusal(config: ModelConfig, n: int, heads: bool, asked: Asked) -> str:
    text = config.decoder
    if asked.scheme is not None:
        return "load() slices no packed weights"
    if text.moe is None:
        return "a dense model has no experts to share out"
    if n > text.moe.router.n_experts:
        return f"{text.moe.router.n_experts} experts for {n} ranks"
    if heads and text.attention.n_kv_heads % n:
        return f"{text.attention.n_kv_heads} key/value heads cannot be shared equally by {n} ranks"
    return ""


def _local(n_experts: int, n_heads_in: int, first: bool) -> Callable[[str, Shape], Shape | None]:
    """The part that a rank holds: so many experts of a bank, one in `n_heads_in` of the heads."""

    def local(name: str, shape: Shape) -> Shape | None:
        if ".experts." in name:
            return n_experts, *shape[1:]
        if n_heads_in == 1 or ".attn." not in name or name.startswith("vision."):
            return shape if first else None
        if name.endswith(".o.bias"):
            return shape if first else None
        axis = 1 if ".attn.o." in name else 0
        return *shape[:axis], shape[axis] // n_heads_in, *shape[axis + 1 :]

    return local
