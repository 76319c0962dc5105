"""How well each localisation method finds the vision experts that store a planted fact.

    python -m benchmarks.planted_facts

Of `tiny-vl`. A fact is the value of a (shape, colour) glyph; its question is `Value of red?`.
Truth: what switching a single vision expert off (its slots zeroed at every token) costs the
answers to the questions about that fact, on one set of boards. Every method gives a score to each
(fact, expert) from another set of boards. See benchmarks/README.md for what this can show.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from benchmarks.planted.asking import TURNS, ask, per_fact
from benchmarks.planted.methods import Sizes, all_scores, effects
from benchmarks.planted.scoring import HOLDS, METRICS, among_chosen, measured, rounded, spearman
from benchmarks.planted.taps import LAYERS, silenced
from ernie_lab.interventions.bootstrap import draws_of
from ernie_lab.organisms.boards.check import open_model
from ernie_lab.organisms.boards.recipe import N_EXPERTS
from ernie_lab.organisms.boards.rows import Encoder
from ernie_lab.organisms.boards.seeing import look
from ernie_lab.organisms.builtin import BUILTIN, builtin_path

RESULTS = Path(__file__).parent / "results" / "planted_facts.json"
OFTEN = 0.5  # of a fact's occurrences are routed to the expert
N_DRAWS = 2000
HEADINGS = {
    "all": "24 experts of layers 1 to 3",
    "layer 1": "8 experts of layer 1",
    "chosen": "layer 1, pairs often chosen",
}


def benchmark(sizes: Sizes) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    folder = builtin_path("tiny-vl")
    model = open_model(folder).requires_grad_(False)
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    asked = ask(encoder, look(model, "image", sizes.truth, sizes.truth_seed), TURNS, 0)
    true = effects(model, asked, silenced)
    nats_FE, points_FE = per_fact(true.nats_QE, asked), per_fact(true.points_QE, asked)
    seen = look(model, "image", sizes.methods, sizes.methods_seed)
    scores, rows = all_scores(model, encoder, seen, sizes)
    known_F = np.all([np.isfinite(x).all(1) for x in (*scores.values(), nats_FE)], axis=0)
    held_F = known_F & (points_FE >= HOLDS).any(1)
    draws = draws_of(int(held_F.sum()), N_DRAWS, 0)
    held = {"all": slice(None), "layer 1": slice(0, N_EXPERTS)}
    tables = {
        among: {
            name: measured(
                x[held_F, these], nats_FE[held_F, these], points_FE[held_F, these] >= HOLDS, draws
            )
            for name, x in scores.items()
        }
        for among, these in held.items()
    }
    own = np.flatnonzero(known_F)[:, None], np.arange(N_EXPERTS)
    often_FE = scores["routing frequency"][own] > OFTEN
    tables["chosen"] = {
        name: among_chosen(x[own], nats_FE[own], points_FE[own], often_FE, sizes.pooled_draws)
        for name, x in scores.items()
    }
    halves = [per_fact(true.nats_QE, asked, asked.board_Q % 2 == half) for half in (0, 1)]
    both_F = held_F & np.all([np.isfinite(half).all(1) for half in halves], axis=0)
    agreement = {
        among: rounded(spearman(*(half[both_F, these] for half in halves)).mean())
        for among, these in held.items()
    }
    return {
        "tables": tables,
        "truth": {
            "facts asked about": int(known_F.sum()),
            f"facts with a holder (>= {HOLDS:.0f} points)": int(held_F.sum()),
            "holders": holders(points_FE[known_F]),
            "points of exact match, by layer and expert": true.points_QE.mean(0)
            .reshape(len(LAYERS), -1)
            .round(2)
            .tolist(),
            "split-half Spearman of the truth (half the boards each)": agreement,
        },
        "routing as a predictor, layer 1": as_predictor(
            scores["routing frequency"][known_F, :N_EXPERTS], points_FE[known_F, :N_EXPERTS]
        ),
        "conditions": {
            "model": "tiny-vl",
            "sha256": BUILTIN["tiny-vl"].sha256,
            "sizes": asdict(sizes),
            "questions": {"truth": len(asked.fact_Q), "methods": len(rows.fact_Q)},
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ernie-lab", "torch", "numpy", "scipy")},
            },
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": {
                "wall": round(time.perf_counter() - wall, 1),
                "cpu": round(time.process_time() - cpu, 1),
            },
        },
    }


def holders(points_FE: np.ndarray) -> dict[str, int]:
    """How many (fact, expert) pairs hold, by layer."""
    holds_FL = (points_FE >= HOLDS).reshape(len(points_FE), len(LAYERS), -1).sum((0, 2))
    return {f"layer {layer}": int(n) for layer, n in zip(LAYERS, holds_FL, strict=True)}


def as_predictor(frequency_FE: np.ndarray, points_FE: np.ndarray) -> dict[str, float]:
    """An expert chosen in more than half of a fact's occurrences: does the fact need it?"""
    often, holds = frequency_FE > OFTEN, points_FE >= HOLDS
    return {
        "pairs chosen in more than half": int(often.sum()),
        "of these, holders (%)": round(100 * float(holds[often].mean()), 1),
        "of these, cost below 1 point (%)": round(100 * float((points_FE[often] < 1).mean()), 1),
        "mean cost of these (points)": round(float(points_FE[often].mean()), 1),
        "mean cost of the others (points)": round(float(points_FE[~often].mean()), 2),
        "of the holders, chosen in more than half (%)": round(100 * float(often[holds].mean()), 1),
    }


def printed(found: dict[str, Any]) -> str:
    lines = []
    for among, table in found["tables"].items():
        metrics = [metric for metric in METRICS if metric in table["random"]]
        lines.append(f"{HEADINGS[among]:34}" + "".join(f"{metric:>20}" for metric in metrics))
        for name, row in table.items():
            cells = [
                f"{row[m]['mean']:.2f} [{row[m]['low']:.2f}, {row[m]['high']:.2f}]" for m in metrics
            ]
            lines.append(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append("")
    for part in ("truth", "routing as a predictor, layer 1", "conditions"):
        lines += [f"{part}:", *(f"  {name}: {value}" for name, value in found[part].items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Localisation methods on planted facts.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = benchmark(Sizes())
    print(printed(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
