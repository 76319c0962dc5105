"""Record the routing of a million tokens of the training texts: statistics alone, for notebook 10.

    python training/tiny_text/record.py

Two to three minutes on one quiet core, no more than one unit lost when it is stopped: run again, it
goes on. Its result, `recording/`, is committed.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch

import ernie_lab as el
from ernie_lab.organisms.documents import documents

HERE = Path(__file__).parent
# The first so many documents, the eight kinds in turn: a million tokens.
N_DOCUMENTS = 3000


def main() -> None:
    torch.set_num_threads(1)
    corpus = list(islice(documents(HERE / "corpus", "train"), N_DOCUMENTS))
    plan = el.RecordPlan(
        model="tiny-text",
        corpus=corpus,
        folder=HERE / "recording",
        unit_tokens=125_000,
        max_length=2048,
        batch_tokens=8192,
    )
    print(plan.run())  # noqa: T201


if __name__ == "__main__":
    main()
