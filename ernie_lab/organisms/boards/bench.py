"""What the gates measure on: a model, unseen scenes in two halves, and the costs of an edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.measure import Answers, answers, batches, unseen_rows
from ernie_lab.organisms.boards.questions import ON_BOARDS
from ernie_lab.organisms.boards.rows import Batch, Encoder
from ernie_lab.organisms.boards.seeing import Seen, look
from ernie_lab.sites import Tap, idle

N_UNSEEN = {"image": 2000, "video": 500}
UNSEEN_SEED = {"image": 301, "video": 302}
# Rows on boards with all kinds of question; rows on clips; rows with `value` alone.
N_ROWS, N_CLIP_ROWS, N_VALUE_ROWS = 700, 200, 400
# Chats of one question: boards for each kind.
N_CHATS = 150


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows on one half of the scenes, ready to run, and what the intact model answers."""

    parts: list[Batch]
    intact: Answers


@dataclass(frozen=True, slots=True)
class Bench:
    """`pick` and `confirm` are questions on two disjoint halves of the unseen boards.

    What is chosen for being the best is chosen on `pick`; every figure is of `confirm`. The
    `values_*` are rows that ask for values alone, for single experts. `clips` are all clips.
    """

    model: VLModel
    encoder: Encoder
    unseen: dict[str, Seen]
    pick: Sample
    confirm: Sample
    values_pick: Sample
    values_confirm: Sample
    clips: Sample

    def answers(self, sample: Sample, tap: Tap = idle) -> Answers:
        return answers(self.model, sample.parts, self.unseen, tap)

    def costs(self, sample: Sample, tap: Tap) -> dict[str, float]:
        """Points of exact match below the intact model, by kind of question."""
        intact, edited = sample.intact.share(), self.answers(sample, tap).share()
        return {kind: intact[kind] - edited[kind] for kind in intact}


def mean(costs: dict[str, float]) -> float:
    """Over the kinds of question, each counting the same."""
    return float(np.mean(list(costs.values())))


def set_up(model: VLModel, encoder: Encoder) -> Bench:
    unseen = {medium: look(model, medium, n, UNSEEN_SEED[medium]) for medium, n in N_UNSEEN.items()}
    halves = [{"image": half(unseen["image"], i), "video": unseen["video"]} for i in (0, 1)]

    def sample(
        which: int, n_rows: dict[str, int], seed: int, kinds: Sequence[str] = ON_BOARDS
    ) -> Sample:
        rows = unseen_rows(encoder, halves[which], (seed, which), n_rows, kinds=kinds)
        # Scenes are numbered within the half; the bench holds them all.
        moved = [row.moved(which * len(halves[0]["image"].scenes)) for row in rows]
        parts = batches(moved, encoder)
        return Sample(parts, answers(model, parts, unseen))

    return Bench(
        model=model,
        encoder=encoder,
        unseen=unseen,
        pick=sample(0, {"image": N_ROWS}, 1),
        confirm=sample(1, {"image": N_ROWS}, 1),
        values_pick=sample(0, {"image": N_VALUE_ROWS}, 2, ("value",)),
        values_confirm=sample(1, {"image": N_VALUE_ROWS}, 2, ("value",)),
        clips=sample(0, {"video": N_CLIP_ROWS}, 3),
    )


def half(seen: Seen, which: int) -> Seen:
    middle = len(seen.scenes) // 2
    span = slice(0, middle) if which == 0 else slice(middle, None)
    return Seen(seen.scenes[span], seen.features_NMD[span])
