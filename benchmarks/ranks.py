"""A forward pass over two ranks of this machine, beside one process, one thread each.

    python -m benchmarks.ranks [--quick]

What is told: the ratio of the two for several lengths, the time to start, and the bytes that each
rank holds. On one machine the ranks share its memory and its cores, so this is the cost of the
messages and what a second core gives back, not what two machines would.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import ernie_lab as el
from benchmarks.shapes import ours_alone
from benchmarks.timing import conditions, paired, store, table
from ernie_lab.checkpoint import save_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer lengths and pairs")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    found: dict[str, Any] = {"conditions": conditions()}
    with tempfile.TemporaryDirectory() as scratch:
        sources: dict[str, Any] = {"tiny-text": "tiny-text"}
        if not quick:
            made = ours_alone()
            sources["46 M active"] = save_model(made.model, made.config, Path(scratch) / "model")
        for name, source in sources.items():
            found[name] = measured(source, (1, 128) if quick else (1, 128, 1024), 2 if quick else 7)
            print(name, {key: x for key, x in found[name].items() if key != "passes"})
            print(table(found[name]["passes"]))
    if not quick:
        store("ranks", found)


def measured(source: str | Path, lengths: tuple[int, ...], pairs: int) -> dict[str, Any]:
    one = el.load(source, device="cpu", dtype="float32", progress=False)
    started = time.perf_counter()
    split = el.load(source, device="cpu", dtype="float32", placement="ep:2", progress=False)
    seconds = time.perf_counter() - started
    assert one.report is not None
    assert split.report is not None
    assert one.report.held is not None
    assert split.report.held is not None
    passes = []
    for n in lengths:
        ids = torch.randint(3, 600, (n,), generator=torch.Generator().manual_seed(n)).tolist()
        assert torch.equal(one.run([ids]).logits, split.run([ids]).logits)  # type: ignore[arg-type]

        def run(lab: el.Lab, ids: list[int] = ids) -> None:
            lab.run([ids], logits="last")

        both = paired(lambda run=run: run(split), lambda run=run: run(one), pairs)  # type: ignore[misc]
        passes.append({"tokens": n, **both.row()})
    split.close()
    return {
        "seconds_to_load": round(seconds, 2),
        "bytes_of_one_process": one.report.held.total,
        "bytes_of_rank_0": split.report.held.total,
        "passes": passes,
    }


if __name__ == "__main__":
    main()
