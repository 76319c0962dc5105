"""Recording a corpus: against a plain loop of forwards, memory, bytes per token, query times.

    python -m benchmarks.corpus [--tokens 100000 1000000]

The built-in tiny-text on its own training texts. The plain loop runs `lab.model` over the same
batches, without logits, and keeps nothing. Ratios are of CPU time, of both in turn in one process,
since a shared machine makes wall time mean little; peak memory is of a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks.timing import conditions, store, table
from ernie_lab.corpus.record import batches
from ernie_lab.corpus.units import units, windows
from ernie_lab.inputs import pad_batch
from ernie_lab.organisms.documents import documents

CORPUS = Path(__file__).parents[1] / "training/tiny_text/corpus"
SETTINGS: dict[str, Any] = {"max_length": 2048, "batch_tokens": 8192}


def texts(n_tokens: int) -> Iterator[dict[str, str]]:
    """Enough documents, the corpus again and again; about 350 tokens each."""
    return islice(cycle(islice(documents(CORPUS, "train"), 2000)), n_tokens // 350)


def plain(lab: el.Lab, corpus: list[dict[str, str]]) -> None:
    """Tokenise, batch alike, run, keep nothing."""
    for unit in units(windows(lab, el.corpus.read_documents(corpus), 2048), 10**9):
        for members in batches(unit.windows, SETTINGS["batch_tokens"]):
            batch = pad_batch(
                [unit.windows[i].ids for i in members], pad_id=0,
                vocab_size=lab.config.decoder.vocab_size, device=lab.device,
            )  # fmt: skip
            with torch.no_grad():
                lab.model(
                    batch.input_ids,
                    attention_mask=None if bool(batch.mask.all()) else batch.mask,
                    position_ids=batch.positions,
                    logits_to_keep=1,
                )


def recorded(lab: el.Lab | str, corpus: Any, folder: str, **how: Any) -> el.RoutingStore:
    plan = el.RecordPlan(model=lab, corpus=corpus, folder=folder, **SETTINGS | how)
    return plan.run(progress=False)


def cpu_seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def throughput(lab: el.Lab, n_tokens: int, pairs: int) -> list[dict[str, Any]]:
    corpus = list(texts(n_tokens))
    ways: dict[str, dict[str, Any]] = {
        "statistics": {"rows": None},
        "statistics and ids": {"rows": "ids"},
        "statistics, ids and weights": {"rows": "ids+weights"},
    }

    def way(how: dict[str, Any]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            recorded(lab, corpus, folder, unit_tokens=n_tokens, **how)

    plain(lab, corpus)
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    base: list[float] = []
    for _ in range(pairs):
        for name, how in ways.items():
            base.append(cpu_seconds(lambda: plain(lab, corpus)))
            ratios[name].append(cpu_seconds(lambda how=how: way(how)) / base[-1])
    loop = float(np.median(base))
    return [
        {
            "way": name,
            "ratio": round(float(np.median(found)), 3),
            "least": round(min(found), 3),
            "most": round(max(found), 3),
            "pairs": pairs,
            "plain_tokens_per_cpu_second": round(n_tokens / loop),
        }
        for name, found in ratios.items()
    ]


def memory(n_tokens: int, rows: str | None) -> dict[str, Any]:
    """Peak resident MiB of a process that records so many tokens, and of the store it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import torch; torch.set_num_threads(1)\n"
            "from benchmarks.corpus import recorded, texts\n"
            f"store = recorded('tiny-text', texts({n_tokens}), {folder!r}, rows={rows!r},\n"
            "                 unit_tokens=50_000)\n"
            "peak = next(int(l.split()[1]) for l in open('/proc/self/status') if 'VmHWM' in l)\n"
            "print(store.statistics().n_tokens, peak)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        counted, peak = (int(x) for x in done.stdout.split())
        size = {
            suffix: sum(file.stat().st_size for file in Path(folder).rglob(f"*.{suffix}"))
            for suffix in ("parquet", "safetensors")
        }
        row = {
            "tokens": counted,
            "rows": rows or "none",
            "peak_mib": round(peak / 1024),
            "rows_bytes_per_token": round(size["parquet"] / counted, 2),
            "statistics_kb": round(size["safetensors"] / 1000),
        }
        return row | ({} if rows is None else queries(el.RoutingStore(folder)))


def queries(kept: el.RoutingStore) -> dict[str, float]:
    """Seconds of wall time; each store opened anew, files in the cache of the system."""
    sql = "select domain, l3s0 e, count(*) n from tokens group by all"
    asked: dict[str, Callable[[el.RoutingStore], Any]] = {
        "counts_s": lambda s: s.counts("domain"),
        "coactivation_s": lambda s: el.analysis.coactivation(s.coactivation()),
        "search_s": lambda s: s.search(3, 5),
        "sql_s": lambda s: s.sql(sql),
        "sample_s": lambda s: s.sample(10_000),
    }
    found = {}
    for name, ask in asked.items():
        fresh = el.RoutingStore(kept.path)
        start = time.perf_counter()
        ask(fresh)
        found[name] = round(time.perf_counter() - start, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--tokens", type=int, nargs="+", default=[100_000, 1_000_000])
    options = parser.parse_args()
    torch.set_num_threads(1)
    under = conditions()
    lab = el.load("tiny-text")
    speed = throughput(lab, 3_500 if options.quick else 35_000, 1 if options.quick else 5)
    sizes = [3_500] if options.quick else options.tokens
    # Weights at the smallest size alone: their bytes per token do not depend on it.
    held = [memory(sizes[0], "ids+weights"), *(memory(n, "ids") for n in sizes)]
    print(table(speed), table(held), sep="\n\n")
    if not options.quick:
        store("corpus", {"conditions": under, "throughput": speed, "sizes": held})


if __name__ == "__main__":
    main()
