"""Which answers are right: every token of an answer the likeliest one, its end included."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.questions import KINDS, ON_BOARDS, ON_CLIPS
from ernie_lab.organisms.boards.rows import (
    Batch,
    Encoder,
    Row,
    draw_row,
    embeddings,
    encode_rows,
    mix_of,
)
from ernie_lab.organisms.boards.seeing import Seen
from ernie_lab.sites import Tap, idle

ROWS_AT_ONCE = 100


@dataclass(frozen=True, slots=True)
class Answers:
    """One entry for each question. `nats_Q` is the mean over the tokens of the answer."""

    right_Q: np.ndarray
    nats_Q: np.ndarray
    kind_Q: np.ndarray
    facts_Q2: np.ndarray

    def share(self, kinds: Iterable[str] = KINDS) -> dict[str, float]:
        """Percent right, by kind."""
        return {
            kind: 100 * float(self.right_Q[self.kind_Q == KINDS.index(kind)].mean())
            for kind in kinds
            if (self.kind_Q == KINDS.index(kind)).any()
        }


def unseen_rows(
    encoder: Encoder,
    seen: dict[str, Seen],
    seed: tuple[int, ...],
    n_rows: dict[str, int],
    *,
    test: bool = True,
    kinds: Sequence[str] = ON_BOARDS,
    length: int = 88,
    think_share: float = 0.25,
    most: int = 40,
) -> list[Row]:
    """Rows on unseen scenes, all kinds of question equally likely; `test` picks the pairs."""
    rng = np.random.default_rng(seed)
    mixes = {
        "image": mix_of(dict.fromkeys(kinds, 1.0)),
        "video": mix_of(dict.fromkeys(ON_CLIPS, 1.0)),
    }
    rows = []
    for medium, n in n_rows.items():
        for index in rng.integers(len(seen[medium].scenes), size=n).tolist():
            scene = seen[medium].scenes[index]
            row = draw_row(
                rng,
                encoder,
                scene,
                index,
                mixes[medium],
                test=test,
                length=length,
                think_share=think_share,
                most=most,
            )
            rows.append(row)
    return rows


def batches(rows: Sequence[Row], encoder: Encoder) -> list[Batch]:
    return [
        encode_rows(rows[i : i + ROWS_AT_ONCE], encoder) for i in range(0, len(rows), ROWS_AT_ONCE)
    ]


@torch.no_grad()
def answers(
    model: VLModel, parts: Sequence[Batch], seen: dict[str, Seen], tap: Tap = idle
) -> Answers:
    """Every answer scored with the true ones before it in the row."""
    features = {medium: looks.features_NMD for medium, looks in seen.items()}
    right, nats, kinds, facts = [], [], [], []
    for batch in parts:
        hidden = model.trunk(
            inputs_embeds=embeddings(model.embed_VD, batch, features),
            position_ids=batch.positions_BSR,
            bank=batch.bank_BS,
            tap=tap,
        )
        logits_TV = model.unembed(hidden.normed_BSD[batch.token_row, batch.token_place])
        of_question, n = batch.token_question.numpy(), len(batch.kind_Q)
        wrong_T = (logits_TV.argmax(-1) != batch.token_id).numpy()
        nats_T = cross_entropy(logits_TV, batch.token_id, reduction="none").numpy()
        right.append(np.bincount(of_question, wrong_T, n) == 0)
        nats.append(np.bincount(of_question, nats_T, n) / np.bincount(of_question, minlength=n))
        kinds.append(batch.kind_Q)
        facts.append(batch.facts_Q2)
    return Answers(*(np.concatenate(part) for part in (right, nats, kinds, facts)))
