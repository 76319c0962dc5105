"""Measure the gates of an exported model: `python -m ernie_lab.organisms.boards.check FOLDER`.

The folder is the one that users get. Writes `README.md` and `gates.json` into it; exits with 1
if a gate is not met. What other seeds gave stands in the card if `seeds.json` is in the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ernie_lab.checkpoint.config import VLConfig
from ernie_lab.checkpoint.config_json import read_config_file
from ernie_lab.checkpoint.load import fill
from ernie_lab.checkpoint.names import detect
from ernie_lab.checkpoint.reader import Reader
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.bench import set_up
from ernie_lab.organisms.boards.card import card
from ernie_lab.organisms.boards.gates import measure
from ernie_lab.organisms.boards.recipe import WIDE
from ernie_lab.organisms.boards.rows import Encoder
from ernie_lab.organisms.check import size_gate
from ernie_lab.organisms.gates import Gate


def open_model(folder: Path) -> VLModel:
    """Opened by path, not by name: these figures decide whether its SHA-256 is worth entering."""
    config = read_config_file(folder)
    if not isinstance(config, VLConfig):
        raise ValueError(f"{folder} holds a text model; give the folder of a glyph-board model")
    reader = Reader.open(folder)
    with torch.device("meta"):
        model = VLModel(config)
    layout = detect(reader.tensors.keys())
    fill(model, reader, layout, device="cpu", dtype=torch.float32, progress=False)
    return model.eval()


def read_gates(path: Path) -> list[Gate]:
    return [Gate(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]


def write_gates(gates: Sequence[Gate], path: Path) -> None:
    entries = [asdict(gate) for gate in gates]
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shipped_card(folder: Path) -> str:
    """The card that the figures in `folder` make."""
    stored = folder / "seeds.json"
    others = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else {}
    runs = {run: [Gate(**entry) for entry in entries] for run, entries in others.items()}
    config = read_config_file(folder)
    assert isinstance(config, VLConfig)
    return card(read_gates(folder / "gates.json"), config, runs)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the gates of a glyph-board model.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--card-only", action="store_true", help="of the gates that are there")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.card_only:
        model = open_model(args.folder)
        tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
        idle_twin = model.config.text.dense_hidden == WIDE
        measured = measure(set_up(model, Encoder(tokenizer)), idle_twin)
        write_gates([size_gate(args.folder), *measured], args.folder / "gates.json")
    gates = read_gates(args.folder / "gates.json")
    for gate in gates:
        met = "met" if gate.passed else "NOT MET"
        print(f"{met:8}{gate.name}: {gate.measured} ({gate.target})")
    (args.folder / "README.md").write_text(shipped_card(args.folder), encoding="utf-8")
    return 0 if all(gate.passed for gate in gates) else 1


if __name__ == "__main__":
    sys.exit(main())
