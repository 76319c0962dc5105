"""How the ranks of a model find each other: by a store of torch.distributed that rank 0 holds."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch.distributed

from ernie_lab.parallel.messages import Link
from ernie_lab.parallel.ranks import Follower, RankError

# `dist.Store`; torch's stubs leave out much of what is documented.
Store: TypeAlias = Any
_dist: Any = torch.distributed

# A process imports torch first; on a busy machine that takes its time.
STARTING = datetime.timedelta(minutes=5)


def held_store(address: str) -> Store:
    """Of rank 0; `port` is any that is free."""
    return _dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=STARTING)


def join(address: str, port: int, rank: int, n_ranks: int) -> Link:
    """What a rank other than 0 does first."""
    store = _dist.TCPStore(address, port, timeout=STARTING)
    store.set(_present(rank), "yes")
    return Link(store, rank, n_ranks)


def await_ranks(store: Store, followers: Sequence[Follower]) -> Link:
    """Of rank 0, once all have joined.

    Raises:
        RankError: one ended before it did, or needs too long.
    """
    deadline = time.monotonic() + STARTING.total_seconds()
    for rank, follower in enumerate(followers, start=1):
        while not store.check([_present(rank)]):
            if (epitaph := follower.epitaph(wait=0.05)) is not None:
                raise RankError(f"rank {rank} ended before it was ready: {epitaph}")
            if time.monotonic() > deadline:
                raise RankError(f"rank {rank} was not ready within {STARTING}")
    return Link(store, 0, len(followers) + 1)


def meet_by_environment() -> Link:
    """Of processes that were told of each other by RANK, WORLD_SIZE and MASTER_ADDR, as torchrun
    tells them."""
    store, rank, n_ranks = next(_dist.rendezvous("env://", timeout=STARTING))
    return Link(_dist.PrefixStore("ernie_lab", store), rank, n_ranks)


def _present(rank: int) -> str:
    return f"rank {rank} is there"
