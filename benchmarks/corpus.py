"""Recording a corpus: against a plain loop of forwards, memory, bytes per token, query times.

    python -m benchmarks.corpus [--tokens 100000 1000000]
    python -m benchmarks.corpus --flat 100000 1000000 10000000

The built-in tiny-text on its own training texts. The plain loop runs `lab.model` over the same
batches, without logits, and keeps nothing. Ratios are of CPU time, of both in turn in one process,
since a shared machine makes wall time mean little; peak memory is of a process of its own.

`--flat` records statistics alone, in one process, and notes its memory on the way; 10 million
tokens take twenty minutes of a core. `--random` does so with a random model of two layers on random
ids, which is faster. Both leave the other results as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks.timing import RESULTS, conditions, store, table
from ernie_lab.checkpoint.config import (
    AttentionConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    TextConfig,
)
from ernie_lab.corpus.record import batches
from ernie_lab.corpus.units import units, windows
from ernie_lab.inputs import pad_batch
from ernie_lab.model.initial import initialise
from ernie_lab.model.text import TextModel
from ernie_lab.organisms.documents import documents

CORPUS = Path(__file__).parents[1] / "training/tiny_text/corpus"
UNIT = 50_000
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
            f"                 unit_tokens={UNIT})\n"
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


def flat(marks: Sequence[int], lab: el.Lab | str, given: Iterator[Any]) -> list[dict[str, Any]]:
    """Memory of this process when it has recorded so many tokens; and of the merged answer.

    The corpus notes it: it is read no further than the unit at work.
    """
    found: list[dict[str, Any]] = []

    def watched(folder: Path) -> Iterator[Any]:
        for number, document in enumerate(given):
            yield document
            if number % 100 == 0 and len(found) < len(marks) - 1:
                tokens = UNIT * len(list(folder.glob("units/*.safetensors")))
                if tokens >= marks[len(found)]:
                    found.append(_memory_now(tokens))

    with tempfile.TemporaryDirectory() as name:
        start = time.process_time()
        kept = recorded(lab, watched(Path(name)), name, unit_tokens=UNIT)
        end = _memory_now(0) | {"cpu_seconds": round(time.process_time() - start)}
        # Without pandas, whose import takes 50 MiB.
        n_tokens = kept.statistics().n_tokens
        merged = _memory_now(n_tokens) | {"of": f"{len(kept.units)} units merged"}
        found += [end | {"tokens": n_tokens}, merged]
    return found


def random_model() -> el.Lab:
    """Two mixture layers of 8 experts, of width 32."""
    config = TextConfig(
        vocab_size=512, width=32, n_layers=2, dense_hidden=32,
        attention=AttentionConfig(width=32, n_heads=2, n_kv_heads=1, head_dim=16),
        rope=RopeConfig(theta=500000.0, max_positions=2048),
        moe=MoEConfig(
            layers=(0, 1), router=RouterConfig(width=32, n_experts=8, n_chosen=2),
            expert_hidden=16, n_shared=0,
        ),
    )  # fmt: skip
    model = TextModel(config)
    initialise(model, seed=0)
    return el.Lab(model=model.eval(), model_id="random")


def random_ids(n_tokens: int) -> Iterator[dict[str, Any]]:
    """Documents of 350 tokens of 8 domains."""
    rng = np.random.default_rng(0)
    for number in range(n_tokens // 350 + 1):
        yield {"ids": rng.integers(3, 512, 350), "domain": f"domain {number % 8}"}


def _memory_now(tokens: int) -> dict[str, Any]:
    """MiB of this process: now, and at most until now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    now, peak = (int(fields[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM"))
    return {"tokens": tokens, "resident_mib": now, "peak_mib": peak}


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
    parser.add_argument("--flat", type=int, nargs="+", metavar="TOKENS", help="memory on the way")
    parser.add_argument(
        "--random", action="store_true", help="of a small random model, with --flat"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    under = conditions()
    if options.flat:
        marks = sorted(options.flat)
        name, lab, given = ("flat", el.load("tiny-text"), texts(marks[-1]))
        if options.random:
            name, lab, given = ("flat_random", random_model(), random_ids(marks[-1]))
        held = flat(marks, lab, given)
        print(table(held))
        _store(**{name: {"conditions": under, "unit_tokens": UNIT, "held": held}})
        return
    lab = el.load("tiny-text")
    speed = throughput(lab, 3_500 if options.quick else 35_000, 1 if options.quick else 5)
    sizes = [3_500] if options.quick else options.tokens
    # Weights at the smallest size alone: their bytes per token do not depend on it.
    held = [memory(sizes[0], "ids+weights"), *(memory(n, "ids") for n in sizes)]
    print(table(speed), table(held), sep="\n\n")
    if not options.quick:
        _store(conditions=under, throughput=speed, sizes=held)


def _store(**found: Any) -> None:
    """Beside what other measurements left there."""
    path = RESULTS / "corpus.json"
    there = json.loads(path.read_text()) if path.exists() else {}
    store("corpus", there | found)


if __name__ == "__main__":
    main()
