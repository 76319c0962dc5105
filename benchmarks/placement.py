"""A streamed forward pass beside that of a loaded model, and beside reading the same bytes.

    python -m benchmarks.placement [--quick]

Random bfloat16 weights are written in shards of 200 MB, one tensor an expert as in the released
files, and deleted afterwards. They stay in the page cache: what is timed is reading from it, not a
disk. `serial` streams without the thread that reads the next layer.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import ernie_lab as el
from benchmarks.loading import SHAPE
from benchmarks.shapes import ours_alone
from benchmarks.timing import THREADS, conditions, paired, store
from ernie_lab.checkpoint import save_model
from ernie_lab.checkpoint.on_disk import on_disk
from ernie_lab.model import placed
from ernie_lab.model.stack import block_list

LAYERS = 4


class OnAsking:
    """In the place of the thread: reads when the weights are asked for."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def submit(self, read: Callable[..., Any], *given: Any) -> Any:
        return type("Later", (), {"result": lambda _: read(*given)})()

    def shutdown(self, **_: Any) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller model, fewer pairs")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    layers = 2 if quick else LAYERS
    with tempfile.TemporaryDirectory() as scratch:
        made = ours_alone("bfloat16", **{**SHAPE, "num_hidden_layers": layers})
        folder = save_model(
            made.model, made.config, Path(scratch) / "model", max_shard_bytes=200_000_000
        )
        del made
        found = measured(folder, pairs=2 if quick else 3)
    store("placement", {"conditions": conditions(), **found})


def measured(folder: Path, pairs: int) -> dict[str, Any]:
    streamed = el.load(folder, placement="stream", device="cpu", progress=False)
    stays, peak = anonymous(), peak_of(lambda: streamed.run([list(range(8))]))
    sizes = [sum(p.nbytes for p in on_disk(b)) for b in block_list(streamed.model.blocks)]
    # Only now, because its weights would be in the same process.
    loaded = el.load(folder, device="cpu", progress=False)
    found: dict[str, Any] = {
        "bytes_on_disk": sum(sizes),
        "largest_layer": max(sizes),
        "peak_over_loaded": peak - stays,
        "peak_in_layers": round((peak - stays) / max(sizes), 2),
        "passes": {},
    }

    def serial(tokens: list[int]) -> None:
        pool, placed.ThreadPoolExecutor = placed.ThreadPoolExecutor, OnAsking  # type: ignore[misc, assignment]
        try:
            streamed.run([tokens], logits="last")
        finally:
            placed.ThreadPoolExecutor = pool  # type: ignore[misc]

    def read_all() -> None:
        for block in block_list(streamed.model.blocks):
            placed.read_each(on_disk(block), threading.Event())

    for n in (1, 256):
        tokens = [i % 1000 for i in range(n)]

        def stream(tokens: list[int] = tokens) -> None:
            streamed.run([tokens], logits="last")

        def plain(tokens: list[int] = tokens) -> None:
            loaded.run([tokens], logits="last")

        found["passes"][n] = {
            "beside loaded": paired(stream, plain, pairs, 1).row(),
            "beside serial": paired(stream, lambda t=tokens: serial(t), pairs, 1).row(),
            "beside reading": paired(stream, read_all, pairs, 1).row(),
        }
    return found


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_of(work: Callable[[], object]) -> int:
    seen, done = [anonymous()], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return max(seen)


if __name__ == "__main__":
    main()
