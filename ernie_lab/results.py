"""What `run` and `generate` return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ernie_lab.inference.generate import Settings
from ernie_lab.inputs.batch import Batch
from ernie_lab.inputs.thinking import Thought
from ernie_lab.interventions.edits import EditCount
from ernie_lab.trace.trace import Trace


class NothingKept(AttributeError):
    """A trace was asked of a run that recorded nothing."""


@dataclass(frozen=True, slots=True, repr=False)
class Run:
    """One forward pass.

    `logits` `[b s v]` (`[b 1 v]` under `logits="last"`, None under `"loss"`); padding is on the
    left, `mask` `[b s]` is True on real tokens. `token_loss` `[b s]`: nats of token s given
    those before it, NaN where nothing is predicted; `counted` `[b s]` is True on the others.
    `loss` is their mean, cross-entropy alone; NaN where one of them is.
    `aux_loss` is on transformers' scale (balanced = k) from the experts really chosen: one value,
    or in a vision-language model one for each bank. `aux_loss_transformers` is the bias-blind
    value that transformers reports, with both banks in one column.
    """

    batch: Batch
    logits: Tensor | None
    token_loss: Tensor | None
    counted: Tensor | None
    loss: Tensor | None
    aux_loss: Tensor | dict[str, Tensor] | None
    aux_loss_transformers: Tensor | None
    aux_loss_coef: float
    edits: tuple[EditCount, ...]
    _trace: Trace | None

    @property
    def mask(self) -> Tensor:
        return self.batch.mask

    @property
    def trace(self) -> Trace:
        return _kept(self._trace)

    @property
    def loss_with_aux(self) -> Tensor | None:
        """loss + coefficient x aux_loss (of every bank), the training objective; `loss` for a
        dense model."""
        if self.loss is None or self.aux_loss is None:
            return self.loss
        by_bank = self.aux_loss if isinstance(self.aux_loss, dict) else {"text": self.aux_loss}
        return self.loss + self.aux_loss_coef * torch.stack(list(by_bank.values())).sum()

    def _losses(self) -> dict[str, Tensor]:
        found = {} if self.loss is None else {"loss": self.loss}
        if isinstance(self.aux_loss, dict):
            return found | {f"aux_loss[{bank}]": value for bank, value in self.aux_loss.items()}
        return found if self.aux_loss is None else found | {"aux_loss": self.aux_loss}

    def __repr__(self) -> str:
        parts = [f"{len(self.batch.lengths)} sequences, {sum(self.batch.lengths)} tokens"]
        parts += [f"{name}={float(value):.4f}" for name, value in self._losses().items()]
        parts.append("nothing kept" if self._trace is None else f"kept {self._trace.keep}")
        return f"Run({', '.join(parts)})"


@dataclass(frozen=True, slots=True, repr=False)
class Generation:
    """A generation. `tokens` holds the new ids of each sequence, a stop id included.

    `texts` are the new texts without special tokens, cut before a stop string; `finish` says
    why each ended: `"stop"` (a stop id), `"stop string"`, or `"length"`. `thoughts` are the texts
    cut into thinking and answer. Without a tokenizer all of these texts are empty. `settings` are
    those in force, defaults of the checkpoint included, and `defaults` says where these came from.
    """

    prompts: tuple[tuple[int, ...], ...]
    tokens: list[list[int]]
    texts: list[str]
    finish: tuple[str, ...]
    settings: Settings
    defaults: str
    edits: tuple[EditCount, ...]
    single: bool
    thoughts: tuple[Thought, ...]
    _trace: Trace | None

    @property
    def text(self) -> str | list[str]:
        """The text of the one sequence, or a list for a batch."""
        return self.texts[0] if self.single else self.texts

    @property
    def thinking(self) -> str | list[str | None] | None:
        """What a thinking model wrote before its answer; None if it did not think."""
        found = [thought.thinking for thought in self.thoughts]
        return found[0] if self.single else found

    @property
    def answer(self) -> str | list[str]:
        """The text without the thinking; empty where the thinking never came to an end."""
        found = [thought.answer for thought in self.thoughts]
        return found[0] if self.single else found

    @property
    def trace(self) -> Trace:
        return _kept(self._trace)

    def __repr__(self) -> str:
        shown: Any = self.text
        kept = "nothing kept" if self._trace is None else f"kept {self._trace.keep}"
        return f"Generation({shown!r}, finish={list(self.finish)}, {kept})"


def _kept(trace: Trace | None) -> Trace:
    if trace is None:
        raise NothingKept('nothing was recorded; pass keep="routing" (or a site) to record')
    return trace
