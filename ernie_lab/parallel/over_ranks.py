"""`load(placement="ep:N")`: the experts of a model over N ranks."""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from ernie_lab.checkpoint import LoadReport, Reader, detect, fill, require_memory
from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.model.kinds import Model, build
from ernie_lab.model.placed import OVER_RANKS
from ernie_lab.parallel.attention import SplitAttention, require_heads
from ernie_lab.parallel.experts import SplitExpertBank
from ernie_lab.parallel.messages import FOREVER, Kind, Message
from ernie_lab.parallel.on_ray import start_actors
from ernie_lab.parallel.placement import Placement
from ernie_lab.parallel.processes import start_processes
from ernie_lab.parallel.ranks import Ranks
from ernie_lab.parallel.serving import PARTS, device_here, require_room, split
from ernie_lab.parallel.torchrun import (
    join_torchrun,
    local_rank,
    rank_of_torchrun,
    under_torchrun,
)

_models = count()


def serve_if_not_first(n_ranks: int) -> None:
    """Under torchrun, ranks other than 0 stay here until rank 0 has ended."""
    if under_torchrun() and rank_of_torchrun() > 0:
        join_torchrun(n_ranks)


def require_experts(config: ModelConfig, n_ranks: int) -> None:
    """
    Raises:
        ValueError: a model without experts, or with fewer of them than ranks.
    """
    moe = config.decoder.moe
    if moe is None:
        raise ValueError(f'placement="ep:{n_ranks}": this model is dense, it has no experts')
    if n_ranks > moe.router.n_experts:
        raise ValueError(
            f'placement="ep:{n_ranks}": there are {moe.router.n_experts} experts in a bank, and '
            "every rank needs one"
        )


def open_over_ranks(
    config: ModelConfig,
    folder: Path,
    placement: Placement,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ignore: Sequence[str] = (),
    progress: bool = True,
) -> tuple[Model, LoadReport]:
    """The model with the parts of rank 0, and what rank 0 read. All ranks load at once.

    Raises:
        ValueError: a model whose experts, or heads, cannot be given to so many ranks.
        NotEnoughMemory: on some rank, told before it reads.
        RankError: another rank failed, with its traceback.
    """
    n_ranks, heads = placement.n_ranks, placement.heads
    require_experts(config, n_ranks)
    if heads:
        require_heads(config.decoder.attention, n_ranks)
    if device.type == "cpu" and not (under_torchrun() or on_ray()):
        require_memory(config, dtype, device)  # all ranks together
    ranks = gather(n_ranks)
    number = next(_models)
    what = {
        "heads": heads,
        "folder": str(folder.resolve()),
        "ignore": list(ignore),
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
    }
    question = Message.of_facts(Kind.LOAD, what, number)
    reader = Reader.open(folder)
    with torch.device("meta"):
        model = build(config)
        banks, layers = split(model, 0, n_ranks, heads=heads)
    here = device_here(device, local_rank())
    require_room(model.parameters(), 0, dtype, here)
    with ranks.talk() as talk:
        loaded = talk.ask(dict.fromkeys(ranks.others, question), FOREVER)
        layout = detect(reader.tensors.keys())
        report = fill(model, reader, layout, device=here, dtype=dtype, progress=progress)
        ranks.reports |= {rank: reply.facts for rank, reply in loaded.result().items()}
    parts: list[SplitExpertBank | SplitAttention] = [*banks, *layers]
    for part in parts:
        part.number, part.ranks = number * PARTS + part.number, ranks
    setattr(model.blocks[0], OVER_RANKS, _in_words(ranks, banks, heads))
    # At the end of Python the ranks end, and need not be told.
    weakref.finalize(model, ranks.tell, Message(Kind.FORGET, number)).atexit = False
    return model, report


def _in_words(ranks: Ranks, banks: Sequence[SplitExpertBank], heads: bool) -> str:
    held = {len(held) for bank in banks for held in bank.held}
    each = " or ".join(map(str, sorted(held)))
    where = Counter(f"{report['device']} of {report['host']}" for report in ranks.reports.values())
    others = ", ".join(f"{n} on {place}" for place, n in where.items())
    what = "experts and heads" if heads else "experts"
    return f"{what} over {ranks.n_ranks} ranks, {each} of a bank on each; beside this one {others}"


def is_over_ranks(model: Model) -> bool:
    return any(isinstance(part, SplitExpertBank) for part in model.modules())


def close(model: Model) -> None:
    """End the other ranks of a model, if it has any that were started for it."""
    for part in model.modules():
        if isinstance(part, SplitExpertBank) and part.ranks is not None:
            part.ranks.close()


def gather(n_ranks: int) -> Ranks:
    """The ranks: those of torchrun; actors where Ray is connected; else processes, started here."""
    if under_torchrun():
        return join_torchrun(n_ranks)
    return start_actors(sys.modules["ray"], n_ranks) if on_ray() else start_processes(n_ranks)


def on_ray() -> bool:
    """Is Ray connected? It is not imported to ask."""
    return "ray" in sys.modules and bool(sys.modules["ray"].is_initialized())
