"""Paired timings and what they were made under. Ratios are quoted, never single times.

Two ways are run in turn, A B A B …, so that a machine that gets slower slows both; the ratio is
taken pair by pair and its median reported, with the quartiles as a measure of how quiet it was.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
# What the stored figures were made with; fewer where OMP_NUM_THREADS says so.
THREADS = min(2, torch.get_num_threads())


@dataclass(frozen=True)
class Paired:
    """Seconds of both ways, run in turn."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """Median of ours / theirs over the pairs."""
        return float(np.median(np.divide(self.ours, self.theirs)))

    def row(self) -> dict[str, float]:
        low, high = np.quantile(np.divide(self.ours, self.theirs), [0.25, 0.75])
        return {
            "ours_ms": round(1000 * float(np.median(self.ours)), 3),
            "theirs_ms": round(1000 * float(np.median(self.theirs)), 3),
            "ratio": round(self.ratio, 3),
            "ratio_p25": round(float(low), 3),
            "ratio_p75": round(float(high), 3),
            "pairs": len(self.ours),
        }


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, warm: int = 2
) -> Paired:
    """Both in turn, which one first changing from pair to pair, after `warm` uncounted pairs."""
    times: tuple[list[float], list[float]] = ([], [])
    ways = (ours, theirs)
    for number in range(-warm, pairs):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = timed(ways[which])
            if number >= 0:
                times[which].append(seconds)
    return Paired(tuple(times[0]), tuple(times[1]))


def timed(call: Callable[[], object]) -> float:
    _settle()
    start = time.perf_counter()
    call()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def conditions() -> dict[str, Any]:
    """The machine, the versions and the threads; load says whether others were at work."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("ernie-lab", "torch", "transformers", "numpy")},
    }


def store(name: str, found: Any) -> Path:
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]]) -> str:
    """Columns of the first row, numbers to the right."""
    heads = list(rows[0])
    cells = [[str(row.get(head, "")) for head in heads] for row in rows]
    widths = [max(len(head), *(len(line[i]) for line in cells)) for i, head in enumerate(heads)]
    lines = [heads, *cells]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
