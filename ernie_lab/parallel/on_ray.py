"""Ranks as Ray actors: on whatever nodes of a cluster have room, driven from a notebook.

Only the start differs from `processes`. Rank 0 stays the process that has the lab. Every node must
see the model's folder. Tested with actors on one machine; over several it is so in principle.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch

from ernie_lab.parallel.meeting import await_ranks, held_store, join
from ernie_lab.parallel.ranks import Ranks
from ernie_lab.parallel.serving import Server


class Actor:
    """One rank."""

    def __init__(self, ray: Any, remote: Any, *arguments: Any) -> None:
        self._ray, self._handle = ray, remote.remote()
        self._serving = self._handle.serve.remote(*arguments)

    def epitaph(self, wait: float) -> str | None:
        done, _ = self._ray.wait([self._serving], timeout=wait)
        if not done:
            return None
        try:
            self._ray.get(self._serving)
        except Exception as error:
            return f"its actor ended: {error}"
        return "its actor ended"

    def stop(self) -> None:
        if self._ray.is_initialized():
            self._ray.kill(self._handle)


class _Rank:
    """Runs in the actor's process."""

    def serve(self, address: str, port: int, rank: int, n_ranks: int, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        # Ray shows an actor the GPUs that it was given, and no others.
        Server(join(address, port, rank, n_ranks), place=0).serve()


def start_actors(ray: Any, n_ranks: int) -> Ranks:
    """Rank 0 is this process; each other rank is an actor, with a GPU of its own where this
    machine has any."""
    address = ray.util.get_node_ip_address()
    store = held_store(address)
    n_threads = max(1, torch.get_num_threads() // n_ranks)
    remote = ray.remote(num_cpus=1, num_gpus=1 if torch.cuda.is_available() else 0)(_Rank)
    with ExitStack() as if_it_fails:
        followers = []
        for rank in range(1, n_ranks):
            actor = Actor(ray, remote, address, store.port, rank, n_ranks, n_threads)
            followers.append(actor)
            if_it_fails.callback(actor.stop)
        ranks = Ranks(await_ranks(store, followers), followers)
        if_it_fails.pop_all()
    return ranks
