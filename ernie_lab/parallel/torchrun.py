"""Ranks as processes that torchrun started, on one machine or several.

All of them run the same script. Rank 0 goes on with it after `load`; the others stay in `load`,
serve, and leave Python when rank 0 does. So a script is written for one process, prints once and
writes each file once:

    torchrun --nproc-per-node 8 script.py
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 script.py

The second, over machines that all see the model's folder, is so in principle: it was run on one
machine alone. GLOO_SOCKET_IFNAME names the network to use, where a machine has several.
"""

from __future__ import annotations

import os
from functools import cache

from ernie_lab.parallel.meeting import meet_by_environment
from ernie_lab.parallel.ranks import Ranks
from ernie_lab.parallel.serving import Server


def under_torchrun() -> bool:
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def join_torchrun(n_ranks: int) -> Ranks:
    """Returns on rank 0 alone; the others leave Python from here (`SystemExit`).

    Raises:
        ValueError: torchrun started another number of processes.
    """
    started = int(os.environ["WORLD_SIZE"])
    if started != n_ranks:
        raise ValueError(
            f'placement="ep:{n_ranks}" needs {n_ranks} processes, and torchrun started {started} '
            f"(WORLD_SIZE): use torchrun --nproc-per-node {n_ranks} …, or ep:{started}. Without "
            "torchrun (no WORLD_SIZE in the environment) the processes are started by load"
        )
    return _joined()


@cache
def _joined() -> Ranks:
    """One group for all models of the script."""
    link = meet_by_environment()
    if link.rank > 0:
        Server(link, local_rank()).serve()
        raise SystemExit(0)
    return Ranks(link)


def rank_of_torchrun() -> int:
    return int(os.environ["RANK"])


def local_rank() -> int:
    """Which process of its machine, and so which GPU; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))
