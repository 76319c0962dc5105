"""Loading a checkpoint, beside reading its bytes: time, and memory at its peak.

    python -m benchmarks.loading

Random weights of 2 GB are written in 10 shards, one tensor an expert as in the released files,
and deleted afterwards. `el.load` of them is timed against allocating one fresh tensor for each
stored one and `readinto` of the same bytes, each in processes of its own, in turn. The files are
in the page cache for both: compared are the ways to read, not the disk. Where the cache may be
dropped (as root), both are read once more from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks.shapes import ours_alone
from benchmarks.timing import THREADS, Paired, conditions, store, table
from ernie_lab.checkpoint import Reader

N_SHARDS = 10
# Wide enough that a matrix of an expert has 1.5 MiB; in bfloat16 2.0 GB.
SHAPE: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 7,
    "num_attention_heads": 16,
    "moe_intermediate_size": 768,
}
QUICK: dict[str, Any] = {"vocab_size": 512, "num_hidden_layers": 3, "moe_num_experts": 32}
_DROP = Path("/proc/sys/vm/drop_caches")
_STATUS = Path("/proc/self/status")


def write(folder: Path, shape: dict[str, Any], n_shards: int) -> dict[str, int]:
    """The checkpoint, and the bytes of its weights and of the largest parameter."""
    lab = ours_alone("bfloat16", **shape)
    sizes = [parameter.nbytes for parameter in lab.model.parameters()]
    room = shutil.disk_usage(folder).free
    if room < 2 * sum(sizes):
        raise OSError(f"{folder} has {room / 1e9:.1f} GB free; {2 * sum(sizes) / 1e9:.1f} needed")
    # Shards are cut before they are full: with room for one matrix of an expert, none is left over.
    one = 2 * lab.config.width * shape.get("moe_intermediate_size", 384)
    at_most = sum(sizes) // n_shards + one
    el.save_model(lab.model, lab.config, folder / "model", max_shard_bytes=at_most)
    found = len(list((folder / "model").glob("*.safetensors")))
    if found != n_shards:
        raise AssertionError(f"{found} shards of at most {at_most} bytes, wanted {n_shards}")
    return {"weights": sum(sizes), "largest": max(sizes)}


def loaded(folder: str) -> dict[str, float]:
    """Seconds of `el.load`, and of the finite check within it."""
    started = time.perf_counter()
    report = el.load(folder, device="cpu", progress=False).report
    seconds = time.perf_counter() - started
    assert report is not None
    return {"seconds": seconds, "checking": report.seconds_checking, "n_bytes": report.n_bytes}


def read_plainly(folder: str) -> dict[str, float]:
    """Seconds to allocate a tensor for each stored one, and to read its bytes into it."""
    tensors = Reader.open(Path(folder)).tensors
    in_order = sorted(tensors.values(), key=lambda info: (info.shard, info.begin))
    n_bytes: Counter[Path] = Counter()
    for info in in_order:
        n_bytes[info.shard] += info.n_bytes
    started, held = time.perf_counter(), []
    for shard, size in n_bytes.items():
        with shard.open("rb", buffering=0) as file:
            file.seek(-size, os.SEEK_END)
            for info in in_order:
                if info.shard == shard:
                    held.append(torch.empty(info.n_bytes, dtype=torch.uint8))
                    assert file.readinto(memoryview(held[-1].numpy())) == info.n_bytes
    return {"seconds": time.perf_counter() - started, "n_bytes": sum(n_bytes.values())}


def peak_of_load(folder: str) -> dict[str, float]:
    """Anonymous bytes that a load adds to what the imports took: at its peak, and in the end.

    Sampled all the while, because the kernel keeps a high-water mark of all resident pages
    alone, mapped files among them, and these are the file cache's.
    """
    done, seen = threading.Event(), [_anonymous()]

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(_anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    lab = el.load(folder, device="cpu", progress=False)
    held = _anonymous()
    done.set()
    watcher.join()
    assert lab.report is not None
    return {"peak": max(seen) - seen[0], "held": held - seen[0], "samples": len(seen)}


def _anonymous() -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def apart(what: str, folder: Path) -> dict[str, float]:
    """One of the functions above in a fresh process."""
    code = (
        f"import json, torch; torch.set_num_threads({THREADS})\n"
        f"from benchmarks.loading import {what}; print(json.dumps({what}({str(folder)!r})))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout.splitlines()[-1])
    return found


def timings(folder: Path, pairs: int) -> list[dict[str, Any]]:
    ours, theirs = [], []
    for number in range(-1, pairs):
        two = apart("loaded", folder), apart("read_plainly", folder)
        if number >= 0:  # the first pair warms the page cache
            ours.append(two[0])
            theirs.append(two[1])
    plain = tuple(one["seconds"] for one in theirs)
    unchecked = tuple(one["seconds"] - one["checking"] for one in ours)
    every = tuple(one["seconds"] for one in ours)
    share = float(np.median([one["checking"] for one in ours]))
    return [
        {"what": "load without its finite check / readinto"} | Paired(unchecked, plain).row(),
        {"what": f"load ({1000 * share:.0f} ms of it check) / readinto"}
        | Paired(every, plain).row(),
    ]


def from_disk(folder: Path) -> dict[str, Any] | None:
    """Seconds of both with an empty page cache, or None where it cannot be emptied."""
    found = {}
    for what in ("loaded", "read_plainly"):
        os.sync()
        try:
            _DROP.write_text("1")
        except OSError:
            return None
        found[what] = round(apart(what, folder)["seconds"], 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where to write the checkpoint; needs 4 GB")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    under = conditions()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        shape, n_shards = (QUICK, 2) if options.quick else (SHAPE, N_SHARDS)
        sizes = write(folder, shape, n_shards)
        model = folder / "model"
        rows = timings(model, 1 if options.quick else options.pairs)
        found = {
            "timings": rows,
            "bytes": sizes | {"shards": n_shards},
            "seconds_from_disk": None if options.quick else from_disk(model),
        }
        if _STATUS.exists():
            anonymous = apart("peak_of_load", model)
            bound = 1.1 * (sizes["weights"] + sizes["largest"])
            found["anonymous_bytes"] = anonymous | {
                "bound": round(bound),
                "peak_over_weights": round(anonymous["peak"] / sizes["weights"], 3),
            }
    print(table(rows))
    print({name: value for name, value in found.items() if name != "timings"})
    if not options.quick:
        print(store("loading", found | {"conditions": under}))


if __name__ == "__main__":
    main()
