"""Measure every gate on an exported folder and write its card: `… ernie_lab.organisms.check`.

In fp32 on the stored bf16 weights, the precision in which `load("tiny-text")` runs them. Writes
`README.md` and `gates.json` into the folder; exits with 1 if a gate is not met.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from ernie_lab.loading import load
from ernie_lab.model.text import TextModel
from ernie_lab.organisms.bench import Bench, set_up
from ernie_lab.organisms.builtin import BUILTIN, HERE, WEIGHTS
from ernie_lab.organisms.card import card
from ernie_lab.organisms.gates import Gate, measure
from ernie_lab.organisms.train import CORPUS, prepare


def open_bench(folder: Path, corpus: Path = CORPUS) -> Bench:
    """Opened by path, not by name: these figures decide whether its SHA-256 is worth entering."""
    model = load(folder, device="cpu", dtype="float32", progress=False).model
    if not isinstance(model, TextModel):
        raise ValueError(f"{folder} holds no text model; see organisms.boards.check")
    tokens = prepare(corpus, folder / "tokenizer.json")
    return set_up(model, tokens["train"], tokens["held_out"])


def size_gate(folder: Path) -> Gate:
    total = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    weights = (folder / WEIGHTS).stat().st_size / 1e6
    measured = f"{total:.1f} MB, of which weights {weights:.1f}"
    return Gate("size of the folder", "<= 8 MB", measured, total <= 8)


def main() -> int:
    shipped = HERE / BUILTIN["tiny-text"].folder
    parser = argparse.ArgumentParser(description="Measure the gates of tiny-text.")
    parser.add_argument("folder", type=Path, nargs="?", default=shipped)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    gates = [size_gate(args.folder), *measure(open_bench(args.folder, args.corpus))]
    for gate in gates:
        print(
            f"{'met' if gate.passed else 'NOT MET':8}{gate.name}: {gate.measured} ({gate.target})"
        )
    results = json.dumps([asdict(gate) for gate in gates], indent=2, ensure_ascii=False)
    (args.folder / "gates.json").write_text(results + "\n", encoding="utf-8")
    (args.folder / "README.md").write_text(card(gates), encoding="utf-8")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
