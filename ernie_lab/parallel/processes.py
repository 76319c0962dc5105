"""Ranks as processes of this machine, started by rank 0 and ended with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch

from ernie_lab.parallel.meeting import await_ranks, held_store
from ernie_lab.parallel.ranks import Ranks

ADDRESS = "127.0.0.1"
_LAST_WORDS = 4000


class Process:
    """One rank. It ends when its standard input does, so it cannot outlive this process."""

    def __init__(self, rank: int, n_ranks: int, port: int, n_threads: int) -> None:
        self.rank = rank
        self._owner = os.getpid()
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 it is its last words
        paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [
                sys.executable, "-m", "ernie_lab.parallel.worker",
                f"--rank={rank}", f"--ranks={n_ranks}", f"--port={port}", f"--threads={n_threads}",
            ],
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
            start_new_session=True,  # Ctrl-C in a terminal is for rank 0
        )  # fmt: skip

    @property
    def pid(self) -> int:
        return self._process.pid

    def epitaph(self, wait: float) -> str | None:
        try:
            status = self._process.wait(timeout=wait)
        except subprocess.TimeoutExpired:
            return None
        if self._said.closed:
            return f"process {self.pid} was ended"
        self._said.seek(0)
        said = self._said.read()[-_LAST_WORDS:].decode("utf-8", "replace").strip()
        how = f"exit status {status}" if status >= 0 else f"killed by signal {-status}"
        return f"process {self.pid}, {how}" + (f", after it said:\n{said}" if said else "")

    def stop(self) -> None:
        if os.getpid() != self._owner:
            return  # a fork of rank 0
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._said.close()


def start_processes(n_ranks: int) -> Ranks:
    """Rank 0 is this process; the others are started."""
    n_threads = max(1, torch.get_num_threads() // n_ranks)
    store = held_store(ADDRESS)
    with ExitStack() as if_it_fails:
        followers = []
        for rank in range(1, n_ranks):
            followers.append(Process(rank, n_ranks, store.port, n_threads))
            if_it_fails.callback(followers[-1].stop)
        ranks = Ranks(await_ranks(store, followers), followers)
        if_it_fails.pop_all()
    return ranks
