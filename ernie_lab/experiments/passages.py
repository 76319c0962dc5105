"""The prompts of an experiment, read once: ids, pictures, what counts, which document."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.inputs import Batch, Media, Prompt
from ernie_lab.inputs.batch import visual_columns
from ernie_lab.interventions.summary import Layout
from ernie_lab.lab import Lab
from ernie_lab.model.losses import IGNORED
from ernie_lab.preparing import Images, Videos
from ernie_lab.session import real_ids, warn_if_long

Answer: TypeAlias = "int | str"
Rows: TypeAlias = "Tensor | Sequence[Any]"
# A text or ids for all prompts, or one of these for each.
Continuations: TypeAlias = "str | Sequence[int] | Sequence[str | Sequence[int]]"


@dataclass(frozen=True, slots=True, eq=False)
class Passage:
    """One sequence. `labels` are its ids or the caller's, -100 where nothing is counted;
    `answers` are the ids of the two whose logits are compared at its end."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    media: tuple[Media, ...] = ()
    answers: tuple[int, int] | None = None

    def of_kind(self, kind: str) -> list[Media]:
        return [medium for medium in self.media if medium.kind == kind]


@dataclass(frozen=True, slots=True, eq=False)
class Passages:
    """All sequences of an experiment. `documents` names that of each."""

    all: tuple[Passage, ...]
    documents: tuple[Any, ...]
    columns: Mapping[str, list[list[Any]]]
    texts: tuple[tuple[str, ...], ...]
    visual: bool

    @classmethod
    def read(
        cls,
        lab: Lab,
        prompts: Prompt,
        *,
        images: Images | None = None,
        videos: Videos | None = None,
        chat: Mapping[str, Any] | None = None,
        labels: Rows | None = None,
        loss_mask: Rows | None = None,
        continuations: Continuations | None = None,
        answers: Sequence[Any] | None = None,
        documents: Sequence[Hashable] | None = None,
    ) -> Passages:
        batch = lab.prepare(prompts, chat, images=images, videos=videos)
        if continuations is not None:
            _refuse_beside(labels=labels, loss_mask=loss_mask, answers=answers)
            batch, loss_mask = _continued(lab, batch, continuations)
        warn_if_long(lab, max(batch.lengths))
        ids = real_ids(batch)
        given = ids if labels is None else _rows(labels, ids, "labels")
        counted = None if loss_mask is None else _rows(loss_mask, ids, "loss_mask")
        media = _media(batch)
        pairs = _answers(lab, answers, len(ids))
        if documents is not None and len(documents) != len(ids):
            raise ValueError(
                f"{len(documents)} documents for {len(ids)} prompts; name one for each"
            )
        if answers is None and max(batch.lengths) < 2:
            raise ValueError(
                "no prompt has a second token, so nothing is predicted; give longer prompts, "
                "continuations= or answers="
            )
        passages = []
        for i, row in enumerate(ids):
            kept = (
                given[i]
                if counted is None
                else [
                    label if counts else IGNORED
                    for label, counts in zip(given[i], counted[i], strict=True)
                ]
            )
            labelled = tuple(int(label) for label in kept)
            passages.append(Passage(tuple(row), labelled, media[i], pairs[i]))
        texts = [
            lab.tokenizer.token_strings(row) if lab.tokenizer else map(str, row) for row in ids
        ]
        columns = {name: visual_columns(batch)[name] for name in ("content", "bank")}
        return cls(
            tuple(passages),
            tuple(range(len(ids))) if documents is None else tuple(documents),
            columns,
            tuple(tuple(row) for row in texts),
            not isinstance(lab.config, TextConfig),
        )

    def __len__(self) -> int:
        return len(self.all)

    @property
    def n_tokens(self) -> int:
        return sum(len(passage.ids) for passage in self.all)

    def batches(self, max_tokens: int) -> list[list[int]]:
        """Sequences of like length together, each batch of at most `max_tokens` with padding
        (one sequence may exceed it alone). In a batch they stand in reading order, and so they
        do as a whole where one batch holds all."""
        order = sorted(range(len(self)), key=lambda i: -len(self.all[i].ids))
        batches: list[list[int]] = []
        for i in order:
            widest = len(self.all[batches[-1][0]].ids) if batches else 0
            if batches and widest * (len(batches[-1]) + 1) <= max_tokens:
                batches[-1].append(i)
            else:
                batches.append([i])
        return [sorted(batch) for batch in batches]

    def layout(self, layers: tuple[int, ...], banks: tuple[str, ...]) -> Layout:
        import pandas as pd

        numbers = {name: i for i, name in enumerate(dict.fromkeys(self.documents))}
        document_M = np.array([numbers[name] for name in self.documents])
        lengths = [len(passage.ids) for passage in self.all]
        sequence_N = np.repeat(np.arange(len(self)), lengths)
        names = pd.Series(list(self.documents), dtype=object).infer_objects()
        tokens: dict[str, Any] = {
            "sequence": sequence_N,
            "document": names.to_numpy()[sequence_N],
            "pos": np.concatenate([np.arange(n) for n in lengths]),
            "id": np.concatenate([passage.ids for passage in self.all]),
            "text": pd.Series([t for row in self.texts for t in row], dtype=object),
        }
        if self.visual:
            tokens |= {
                name: pd.Series([x for row in rows for x in row], dtype=object)
                for name, rows in self.columns.items()
            }
        sequences = pd.DataFrame(
            {"sequence": np.arange(len(self)), "document": names, "n_tokens": lengths}
        )
        return Layout(
            pd.DataFrame(tokens), sequences, document_M[sequence_N], document_M, layers, banks
        )

    def starts(self) -> list[int]:
        """The first row of each sequence among all tokens."""
        return [0, *np.cumsum([len(passage.ids) for passage in self.all])[:-1].tolist()]


def require_lab(*labs: object) -> None:
    """Raise for what is given in the place of a lab, such as its name."""
    for given in labs:
        if not isinstance(given, Lab):
            known = f"el.load({given!r})" if isinstance(given, str) else "what el.load returns"
            raise TypeError(f"{given!r} is a {type(given).__name__}, expected a Lab: {known}")


def _refuse_beside(**given: Any) -> None:
    if there := [name for name, value in given.items() if value is not None]:
        raise ValueError(
            f"continuations= with {there[0]}=: the tokens of a continuation are what counts, and "
            "they come after the prompt, where answers are compared. Leave one of the two out"
        )


def _continued(lab: Lab, batch: Batch, given: Continuations) -> tuple[Batch, list[list[bool]]]:
    """Every prompt with its continuation behind it, and which tokens are of continuations."""
    prompts, media = real_ids(batch), _media(batch)
    # Encoded by themselves, so that no token of a prompt is another one than without them.
    ends = [_ids_of(lab, one) for one in _one_each(given, len(prompts))]
    pictures: dict[str, Any] = {}
    if any(media):
        pictures = {
            f"{kind}s": [[medium for medium in mine if medium.kind == kind] for mine in media]
            for kind in ("image", "video")
        }
    whole = lab.prepare([a + b for a, b in zip(prompts, ends, strict=True)], **pictures)
    counts = [[False] * len(a) + [True] * len(b) for a, b in zip(prompts, ends, strict=True)]
    return whole, counts


def _one_each(given: Continuations, n: int) -> list[str | Sequence[int]]:
    if isinstance(given, str) or (len(given) and isinstance(given[0], int)):
        return [given] * n  # type: ignore[list-item]
    if len(given) != n:
        raise ValueError(f"{len(given)} continuations for {n} prompts; give one for each")
    return list(given)  # type: ignore[arg-type]


def _ids_of(lab: Lab, continuation: str | Sequence[int]) -> list[int]:
    if isinstance(continuation, str):
        if lab.tokenizer is None:
            raise ValueError(f"continuation {continuation!r} needs a tokenizer; give token ids")
        ids = lab.tokenizer.encode(continuation)
    else:
        ids = [int(i) for i in continuation]
    if not ids:
        raise ValueError(f"continuation {continuation!r} has no token, so nothing would count")
    return ids


def _media(batch: Batch) -> list[tuple[Media, ...]]:
    mine: list[list[Media]] = [[] for _ in batch.lengths]
    if batch.visual is not None:
        for block, medium in zip(batch.visual.layout.blocks, batch.visual.media, strict=True):
            mine[block.sequence].append(medium)
    return [tuple(media) for media in mine]


def _rows(given: Rows, ids: list[list[int]], name: str) -> list[list[Any]]:
    """One list for each sequence, one entry for each token; a single sequence may stand bare."""
    listed = given.tolist() if isinstance(given, Tensor | np.ndarray) else list(given)
    rows = [list(r) for r in listed] if listed and _is_row(listed[0]) else [listed]
    lengths, wanted = [len(row) for row in rows], [len(row) for row in ids]
    if lengths != wanted:
        raise ValueError(
            f"{name} have lengths {lengths[:5]}, the prompts {wanted[:5]} tokens; give one list "
            "for each prompt with one entry for each of its tokens"
        )
    return rows


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence | Tensor | np.ndarray) and not isinstance(value, str)


def _answers(lab: Lab, answers: Sequence[Any] | None, n: int) -> list[tuple[int, int] | None]:
    """Two ids for each sequence, from one pair for all or a pair for each."""
    if answers is None:
        return [None] * n
    one_pair = len(answers) == 2 and all(isinstance(x, int | str) for x in answers)
    pairs = [answers] * n if one_pair else list(answers)
    if len(pairs) != n or any(len(pair) != 2 for pair in pairs):
        raise ValueError(
            f"answers need one pair (right, wrong), or one for each of {n} prompts; got {answers!r}"
        )
    return [(_answer(lab, first), _answer(lab, second)) for first, second in pairs]


def _answer(lab: Lab, answer: Answer) -> int:
    if isinstance(answer, str):
        if lab.tokenizer is None:
            raise ValueError(f"answer {answer!r} needs a tokenizer; give token ids")
        ids = lab.tokenizer.encode(answer)
        if len(ids) != 1:
            pieces = lab.tokenizer.token_strings(ids)
            raise ValueError(
                f"answer {answer!r} is {len(ids)} tokens {pieces}, expected one; does it need a "
                "space before it? Or give the id of its first token"
            )
        return ids[0]
    if not 0 <= answer < lab.config.decoder.vocab_size:
        raise ValueError(f"answer {answer} must be in 0..{lab.config.decoder.vocab_size - 1}")
    return int(answer)


def answers_of(passages: Sequence[Passage], device: torch.device) -> Tensor | None:
    """`[b 2]`, or None where none were given."""
    pairs = [passage.answers for passage in passages if passage.answers is not None]
    return torch.tensor(pairs, device=device) if len(pairs) == len(passages) else None
