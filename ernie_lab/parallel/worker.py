"""`python -m ernie_lab.parallel.worker`: one rank, started by `processes`."""

from __future__ import annotations

import argparse
import os
import sys
import threading

import torch

from ernie_lab.parallel.meeting import join
from ernie_lab.parallel.processes import ADDRESS
from ernie_lab.parallel.serving import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("rank", "ranks", "port", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    threading.Thread(target=_end_with_rank_0, daemon=True).start()
    torch.set_num_threads(options.threads)
    link = join(ADDRESS, options.port, options.rank, options.ranks)
    Server(link, options.rank).serve()


def _end_with_rank_0() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
