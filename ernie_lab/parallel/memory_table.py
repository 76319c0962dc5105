"""Memory plans for the eye: a table, and what to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from ernie_lab.checkpoint import ModelConfig
from ernie_lab.checkpoint.memory import HEADROOM, weight_bytes
from ernie_lab.checkpoint.quantise import Scheme
from ernie_lab.display import in_words, ranges
from ernie_lab.parallel.devices import devices_in_words
from ernie_lab.parallel.memory import (
    GROUPS,
    Asked,
    MemoryPlan,
    Need,
    memory_plans,
    over_ranks,
    whole_layers,
)

Plans: TypeAlias = Mapping[Scheme | None, Sequence[MemoryPlan]]

# No more devices are tried for the advice.
_MOST = 64
_SIZES = (("GB", 10**9), ("MB", 10**6), ("kB", 10**3))
_LABEL = 22


def plan_lines(
    config: ModelConfig,
    source: str,
    devices: Sequence[int],
    asked: Asked,
    schemes: Sequence[Scheme] = (),
) -> Iterator[str]:
    """Plain, and with each of `schemes`: the table, what its words mean, and what to take."""
    tables = {s: memory_plans(config, devices, asked.quantised(s)) for s in (None, *schemes)}
    several = "s" if asked.batch > 1 else ""
    yield f"{'devices':14}{devices_in_words(devices)} (GB = 10^9 bytes; a GiB is 2^30, 1.07 GB)"
    yield (
        f"{'asked':14}{asked.batch} sequence{several} of {asked.context:,} tokens, "
        f"{str(asked.dtype)[6:]}"
    )
    yield ""
    yield from _table([plan for table in tables.values() for plan in table])
    yield ""
    yield from _legend(tables[None])
    yield ""
    yield from _recommended(config, source, devices, asked, tables)


def _table(plans: Sequence[MemoryPlan]) -> Iterator[str]:
    needs = [need for plan in plans for need in plan.needs]
    groups = [name for name in GROUPS if any(need.weights.get(name) for need in needs)]
    unit, size = next((one for one in _SIZES if max(n.needed for n in needs) >= one[1]), _SIZES[-1])
    width = max(map(len, groups)) + 1
    heads = [*groups, "cache", "activ.", "needed", "of"]
    yield f"{unit:{_LABEL}}" + "".join(f"{head:>{width}}" for head in heads)
    for plan in plans:
        label = (plan.placement or "one device") + (f", {plan.scheme}" if plan.scheme else "")
        if plan.refused:
            yield f"{label:{_LABEL}}  no: {plan.refused}"
        for need, where in _shown(plan):
            numbers = [*(need.weights.get(name, 0) for name in groups), need.cache]
            sizes = [*numbers, need.activations, need.needed]
            cells = "".join(f"{n / size:>{width}.1f}" for n in sizes)
            of = f"{'' if need.available is None else f'{need.available / size:.1f}':>{width}}"
            yield f"{label + where:{_LABEL}}{cells}{of}  {_verdict(need, unit, size)}"


def _shown(plan: MemoryPlan) -> Iterator[tuple[Need, str]]:
    """Of a placement the fullest device; rank 0 and the fullest other; what is in memory."""
    if plan.refused:
        return
    if (plan.placement or "").startswith("ep:"):
        first, *others = plan.needs
        yield first, ", rank 0"
        yield _fullest(others), ", others"
    else:
        on_devices = [need for need in plan.needs if need.available is not None]
        if on_devices:
            yield _fullest(on_devices), ""
        for need in plan.needs:
            if need.available is None:
                yield need, ", memory"


def _fullest(needs: Sequence[Need]) -> Need:
    return max(needs, key=lambda need: (need.missing, need.needed / (need.available or 1)))


def _verdict(need: Need, unit: str, size: int) -> str:
    if need.available is None:
        return "in the memory of the machine"
    return f"{need.missing / size:.1f} {unit} missing" if need.missing else "fits"


def _legend(plans: Sequence[MemoryPlan]) -> Iterator[str]:
    yield (
        f"needed: weights with cache and activations, and at least {HEADROOM - 1:.0%} of the "
        "weights as room, which load() asks for."
    )
    yield "cache: keys and values of a generation; while it grows, up to twice that."
    for plan in plans:
        name = plan.placement or ""
        if name == "auto":
            layers = "; ".join(f"{need.where} {ranges(need.layers)}" for need in plan.needs)
            yield f"auto: whole layers, one device filled after the other: {layers}."
        elif name.startswith("ep:") and not name.endswith("+tp"):
            yield (
                f"{name}: each rank has a device and its share of the experts, rank 0 all else; "
                "+tp: heads of attention shared too."
            )
        elif name == "stream":
            yield "stream: reads the layers from disk in every pass, two in memory at a time."


def _recommended(
    config: ModelConfig, source: str, devices: Sequence[int], asked: Asked, tables: Plans
) -> Iterator[str]:
    """What to call; where nothing but streaming fits, also what would help."""
    fitting = [plan for table in tables.values() for plan in table if plan.fits]
    resident = [plan for plan in fitting if plan.placement != "stream"]
    if resident:
        yield from _of_resident(source, devices, resident)
        return
    if fitting:
        yield (
            f"On these devices only {_call(source, fitting[0])}: for recording many tokens in a "
            "pass, since each pass reads the whole model."
        )
    else:
        yield "On these devices nothing fits, streaming neither."
    spilt = next((plan for table in tables.values() for plan in table if plan.in_memory), None)
    if spilt is not None:
        yield (
            f"With {in_words(spilt.in_memory)} of the machine's memory also "
            f"{_call(source, spilt)}: its CPU then computes the layers that are there."
        )
    if would := "; ".join(_what_would_help(config, source, devices, asked, tables)):
        yield f"Would fit: {would}."


def _of_resident(
    source: str, devices: Sequence[int], fitting: Sequence[MemoryPlan]
) -> Iterator[str]:
    first = fitting[0]
    yield f"Take {_call(source, first)}."
    if first.placement is None and len(devices) > 1:
        yield (
            'One device is enough; for a corpus, a copy on each: RecordPlan(…).run(runner="ray", '
            f"workers={len(devices)}, gpus_per_worker=1)."
        )
    ranks = [plan for plan in fitting if (plan.placement or "").startswith("ep:")]
    if first.placement == "auto" and ranks:
        yield f"One device at a time computes there; experts of {_call(source, ranks[0])} all do."


def _what_would_help(
    config: ModelConfig, source: str, devices: Sequence[int], asked: Asked, tables: Plans
) -> Iterator[str]:
    schemes: tuple[Scheme, ...] = ("int8", "nf4")
    for scheme in schemes:
        for plan in memory_plans(config, devices, asked.quantised(scheme)):
            if plan.fits and scheme not in tables:
                yield _call(source, plan)
                break
    largest = max(devices)
    fewest = weight_bytes(config, asked.dtype) // largest + 1
    for place in (whole_layers, over_ranks):
        for n in range(max(2, fewest), _MOST + 1):
            plan = place(config, [largest] * n, asked)
            if plan.fits:
                yield f'placement="{plan.placement}" on {n} x {in_words(largest)}'
                break


def _call(source: str, plan: MemoryPlan) -> str:
    options = f', placement="{plan.placement}"' if plan.placement else ""
    if plan.scheme:
        options += f', quantize="{plan.scheme}"'
    return f'load("{source}"{options})'
