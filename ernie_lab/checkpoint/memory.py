"""Parameters and bytes of a model from its config alone, and whether it would fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie_lab.checkpoint.config import ModelConfig, VLConfig
from ernie_lab.checkpoint.errors import NotEnoughMemory
from ernie_lab.checkpoint.names import stays_float32
from ernie_lab.checkpoint.parts import part_of
from ernie_lab.checkpoint.quantise import Quantisation, Scheme
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.display import in_words

# Room beside the weights for activations, the key/value cache and the loader's copies.
HEADROOM = 1.1


@dataclass(frozen=True, slots=True)
class ParameterCounts:
    """How many parameters, in all, in use for one token, and by part.

    `active` counts what multiplies for one text token: the chosen experts of each layer,
    everything else of the decoder whole, the unembedding included, the embedding table not (one
    row of it is looked up). By this count 300B-A47B has 47 billion. Of a vision-language model
    it leaves out what no text token meets: the vision bank with its routers, the vision tower
    and the resampler.

    The parts of a text model are `embed`, `unembed`, `attention`, `dense_mlp`, `router`,
    `routed_experts`, `shared_experts` and `norms`, those it has. A vision-language model has
    `text_experts` and `vision_experts` instead of routed ones, `vision_router` beside `router`,
    which is the text bank's, `vision_tower` and `resampler`.
    """

    total: int
    active: int
    by_part: Mapping[str, int]


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """By the formulae of the shapes."""
    by_part: Counter[str] = Counter()
    for name, shape in parameter_shapes(config).items():
        by_part[part_of(name)] += math.prod(shape)
    total, decoder = sum(by_part.values()), config.decoder
    idle = sum(by_part[part] for part in _NEVER_FOR_TEXT) if isinstance(config, VLConfig) else 0
    if decoder.moe is not None:
        router = decoder.moe.router
        routed = by_part["text_experts" if isinstance(config, VLConfig) else "routed_experts"]
        idle += routed - routed * router.n_chosen // router.n_experts
    looked_up = 0 if decoder.tied else by_part["embed"]
    return ParameterCounts(total, total - idle - looked_up, dict(by_part))


_NEVER_FOR_TEXT = ("vision_tower", "resampler", "vision_router", "vision_experts")


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantize: Quantisation | Scheme | None = None
) -> int:
    """Bytes of all weights at `dtype`, the routers' being fp32 at any dtype.

    With `quantize`, of those it takes the codes and scales.
    """
    how = Quantisation(quantize) if isinstance(quantize, str) else quantize
    shapes = parameter_shapes(config)
    return sum(parameter_bytes(name, shape, dtype, how) for name, shape in shapes.items())


def parameter_bytes(
    name: str, shape: Sequence[int], dtype: torch.dtype, how: Quantisation | None = None
) -> int:
    """Of one parameter, or of the piece of it that has this shape."""
    if how is not None and how.takes(name, shape):
        return how.n_bytes(shape)
    kept = torch.float32 if stays_float32(name) else dtype
    return math.prod(shape) * kept.itemsize


def require_memory(
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    quantize: Quantisation | Scheme | None = None,
    free: int | None = None,
) -> int:
    """The estimated bytes, or `NotEnoughMemory` where they exceed what the device has free.

    The message says which smaller dtype, or which quantisation, would fit. `free` replaces the
    measured figure; where it cannot be measured, nothing is refused.
    """
    how = Quantisation(quantize) if isinstance(quantize, str) else quantize
    available = free_bytes(torch.device(device)) if free is None else free
    needed = math.ceil(weight_bytes(config, dtype, how) * HEADROOM)
    if available is None or needed <= available:
        return needed
    fitting = ", ".join(_fitting(config, dtype, how, available))
    advice = (
        f"would fit: {fitting}"
        if fitting
        else "no dtype or quantisation would fit; take a larger device or a smaller model"
    )
    held = _name(dtype) + (f" with quantize={how.scheme!r}" if how else "")
    raise NotEnoughMemory(
        f"{count_parameters(config).total / 1e9:.1f} B parameters as {held} need about "
        f"{in_words(needed)} on {device} (weights and {HEADROOM - 1:.0%} room), "
        f"{in_words(available)} are free; {advice}"
    )


def _fitting(
    config: ModelConfig, dtype: torch.dtype, how: Quantisation | None, available: int
) -> Iterator[str]:
    """What would fit: smaller dtypes, then fewer bits, each with as little else as it needs."""

    def fits(smaller: torch.dtype, other: Quantisation | None) -> bool:
        return weight_bytes(config, smaller, other) * HEADROOM <= available

    for smaller in (torch.float32, torch.bfloat16):
        if smaller.itemsize < dtype.itemsize and fits(smaller, how):
            yield f'dtype="{_name(smaller)}"'
    schemes: dict[Scheme | None, tuple[Scheme, ...]] = {None: ("int8", "nf4"), "int8": ("nf4",)}
    for scheme in schemes.get(how.scheme if how else None, ()):
        other = Quantisation(scheme, how.also if how else ())
        if fits(dtype, other):
            yield f'quantize="{scheme}"'
        elif fits(torch.bfloat16, other):
            yield f'quantize="{scheme}" and dtype="bfloat16"'


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on the device, or None where that cannot be told."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    limits = [free for free in (_host_free(), _container_free()) if free is not None]
    return min(limits, default=None)


def _host_free(path: Path = Path("/proc/meminfo")) -> int | None:
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _container_free(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Room under the control group's limit (v2). File cache counts as room: it is reclaimable."""
    try:
        limit = (root / "memory.max").read_text().strip()
        used = int((root / "memory.current").read_text())
        stat = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + int(stat.get("file", 0))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
