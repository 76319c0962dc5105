"""Units shared out over a cluster: a pool of Ray actors, each with the model of its own.

Ray hands a unit to another actor when one dies (at least once); that a unit is never counted
twice follows from its name and its atomic commit, not from Ray. The driver tokenises, so at most
two units a worker are in flight and memory stays constant. Totals come from committed files.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from ernie_lab.corpus.committing import record
from ernie_lab.corpus.folder import CorpusError, Folder
from ernie_lab.corpus.record import Wanted
from ernie_lab.corpus.units import Unit
from ernie_lab.interventions import storing

# Units that wait beside the one at work, so that no worker waits for the driver.
_AHEAD = 2


def record_on_ray(
    units: Iterator[Unit],
    how: Mapping[str, Any],
    folder: Folder,
    wanted: Wanted,
    workers: int,
    gpus_per_worker: float,
) -> Iterator[Unit]:
    """Commit these units; yields each as it is done."""
    ray = _ray()
    if workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False, num_cpus=max(workers, 1))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            edits = storing.to_json(wanted.edits)
            _require_plain(storing.save(wanted.edits, scratch))
            yield from _pooled(ray, units, how, folder, (edits, wanted), workers, gpus_per_worker)
    finally:
        if started:
            ray.shutdown()


def _pooled(
    ray: Any,
    units: Iterator[Unit],
    how: Mapping[str, Any],
    folder: Folder,
    asked: tuple[str, Wanted],
    workers: int,
    gpus_per_worker: float,
) -> Iterator[Unit]:
    edits, wanted = asked
    # Restarted as often as it dies, and its unit tried again: a commit may be repeated.
    remote = ray.remote(max_restarts=-1, max_task_retries=-1, num_gpus=gpus_per_worker)(_Worker)
    threads = max(1, (os.cpu_count() or 1) // workers)
    plain = (wanted.statistics, wanted.rows, wanted.batch_tokens, edits)
    pool = [remote.remote(dict(how), str(folder.path), plain, threads) for _ in range(workers)]
    busy: dict[Any, tuple[int, Unit]] = {}
    try:
        free = [number for number in range(workers) for _ in range(_AHEAD)]
        for unit in units:
            if not free:
                yield _finished(ray, busy, free)
            number = free.pop()
            busy[pool[number].record.remote(unit)] = number, unit
        while busy:
            yield _finished(ray, busy, free)
    finally:
        for actor in pool:
            ray.kill(actor)


def _finished(ray: Any, busy: dict[Any, tuple[int, Unit]], free: list[int]) -> Unit:
    (done,), _ = ray.wait(list(busy), num_returns=1)
    number, unit = busy.pop(done)
    free.append(number)
    ray.get(done)  # raises what the worker raised: trouble with the disk, or with loading
    return unit


class _Worker:
    """One process of the pool."""

    def __init__(
        self, how: dict[str, Any], folder: str, plain: tuple[Any, ...], threads: int
    ) -> None:
        from pathlib import Path

        import torch

        from ernie_lab.loading import load

        torch.set_num_threads(threads)
        self.lab = load(how["source"], progress=False, **how["options"])
        self.folder = Folder(Path(folder))
        statistics, rows, batch_tokens, edits = plain
        self.wanted = Wanted(statistics, rows, batch_tokens, storing.from_json(edits))

    def record(self, unit: Unit) -> int:
        if not self.folder.holds(unit.number, self.wanted.rows is not None):
            # Otherwise done by one that died before it said so.
            record(self.lab, self.folder, unit, self.wanted)
        return unit.n_tokens


def _require_plain(folder: Any) -> None:
    if (folder / storing.TENSORS).exists():
        raise CorpusError(
            "an edit holds tensors (a mean, a patch, a replay), which runner='ray' does not ship; "
            "use runner='local' or 'torchrun'"
        )


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ImportError("runner='ray' needs ray: pip install 'ernie-lab[cluster]'") from None
    return ray
