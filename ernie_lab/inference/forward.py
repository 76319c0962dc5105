"""One forward pass over a batch, with its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import cross_entropy

from ernie_lab.inference.prefill import bound, prefill, prefill_step
from ernie_lab.inputs.batch import Batch
from ernie_lab.model.kinds import Model
from ernie_lab.model.losses import IGNORED
from ernie_lab.model.quantised import require_differentiable
from ernie_lab.model.stack import Hidden
from ernie_lab.model.text import TextModel
from ernie_lab.sites import Tap, idle

LogitsWanted = Literal["all", "last", "loss"]

# Positions whose fp32 logits exist at one time while the loss is computed.
_CHUNK = 512


class LossNotFiniteWarning(UserWarning):
    """A token that counts has a loss of NaN or infinity."""


@dataclass(frozen=True, slots=True)
class Forward:
    """`logits` `[b s v]` ("all"), `[b 1 v]` ("last") or None ("loss"); `token_loss` `[b s]`.

    `token_loss[b, s]` is the cross-entropy in nats of token s given those before it, NaN where
    nothing was predicted: the first token, padding, pictures, and labels of -100. `counted` is
    True on the others. Both are None under "last". `loss` is the mean over all that is counted,
    so NaN where one of these is. `aux_loss` is one value in a text model, one for each bank in a
    vision-language model.
    """

    logits: Tensor | None
    token_loss: Tensor | None
    counted: Tensor | None
    loss: Tensor | None
    aux_loss: Tensor | dict[str, Tensor] | None
    aux_loss_transformers: Tensor | None


def forward(
    model: Model,
    batch: Batch,
    tap: Tap = idle,
    *,
    labels: Tensor | None = None,
    logits: LogitsWanted = "all",
    grad: bool = False,
) -> Forward:
    """Run the batch once. `labels` `[b s]` are the batch's own tokens unless given.

    Gradients are off unless `grad`; `no_grad`, not `inference_mode`, so that what was recorded
    may be used in a later computation with gradients.
    """
    if logits not in ("all", "last", "loss"):
        raise ValueError(f'logits={logits!r} must be "all", "last" or "loss"')
    if grad:
        require_differentiable(model)
    tap = bound(tap, prefill_step(batch))
    with torch.set_grad_enabled(grad):
        hidden = prefill(model, batch, tap)
        kept_BSV = None
        if logits != "loss":
            last = hidden.normed_BSD if logits == "all" else hidden.normed_BSD[:, -1:]
            kept_BSV = model.unembed(last, tap)
        token_loss = counted_BS = loss = None
        if logits != "last":
            targets_BS = predicted(batch, batch.input_ids if labels is None else labels)
            token_loss = _token_loss(model, hidden, kept_BSV, targets_BS)
            counted_BS = targets_BS != IGNORED
            # By the targets: a loss may be NaN without being one that does not count.
            loss = token_loss[counted_BS].mean()
        aux: Tensor | dict[str, Tensor] | None = None
        aux_transformers = None
        if hidden.routings:
            by_bank = hidden.aux_losses()
            aux = by_bank["text"] if isinstance(model, TextModel) else by_bank
            aux_transformers = hidden.aux_loss_transformers()
    return Forward(kept_BSV, token_loss, counted_BS, loss, aux, aux_transformers)


def predicted(batch: Batch, labels_BS: Tensor) -> Tensor:
    """`labels` with -100 wherever no real token stands before a real token to predict it.

    Placeholders are not predicted either: what stands there is a picture (ernie-facts 5).
    """
    real_BS = batch.mask.clone()
    real_BS[:, 0] = False
    real_BS[:, 1:] &= batch.mask[:, :-1]
    if batch.visual is not None:
        real_BS &= batch.visual.layout.modality_BS == 0
    return labels_BS.masked_fill(~real_BS, IGNORED)


def not_finite(n: int, n_counted: int, sequence: int, pos: int) -> str:
    """How many of the counted losses, and the first of them; `pos` without padding."""
    have = "has" if n == 1 else "have"
    return (
        f"{n} of {n_counted} counted tokens {have} a loss that is not finite, the first at "
        f"position {pos} of sequence {sequence}"
    )


def _token_loss(
    model: Model, hidden: Hidden, logits_BSV: Tensor | None, targets_BS: Tensor
) -> Tensor:
    """Cross-entropy of each target from the position before it, in pieces."""
    n_sequences, n_tokens = targets_BS.shape
    pieces = [hidden.normed_BSD.new_full((n_sequences, 1), math.nan, dtype=torch.float32)]
    for start in range(0, n_tokens - 1, _CHUNK):
        end = min(start + _CHUNK, n_tokens - 1)
        piece_BSV = (
            model.unembed(hidden.normed_BSD[:, start:end])
            if logits_BSV is None
            else logits_BSV[:, start:end]
        )
        targets_N = targets_BS[:, start + 1 : end + 1].flatten()
        loss_N = cross_entropy(
            rearrange(piece_BSV, "b s v -> (b s) v").float(),
            targets_N,
            ignore_index=IGNORED,
            reduction="none",
        ).masked_fill(targets_N == IGNORED, math.nan)
        pieces.append(rearrange(loss_N, "(b s) -> b s", b=n_sequences))
    return torch.cat(pieces, dim=1)


def aligned_labels(
    labels: Tensor | Sequence[Sequence[int]] | Sequence[int], batch: Batch, vocab_size: int
) -> Tensor:
    """Labels as the user gives them (one list per sequence) on the batch's padded grid."""
    given: list[Any] = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    rows: list[list[int]] = (
        [list(row) for row in given] if given and isinstance(given[0], Sequence) else [given]
    )
    if (found := tuple(map(len, rows))) != batch.lengths:
        raise ValueError(
            f"labels have lengths {found}, the prompts {batch.lengths}; give one label for each "
            "token, -100 for those that should not count"
        )
    wrong = [i for row in rows for i in row if not (0 <= i < vocab_size or i == IGNORED)]
    if wrong:
        raise ValueError(
            f"label {wrong[0]} must be in 0..{vocab_size - 1}, or {IGNORED} for one not counted"
        )
    grid_BS = torch.full_like(batch.input_ids, IGNORED)
    grid_BS[batch.mask] = torch.tensor(
        [label for row in rows for label in row], device=grid_BS.device
    )
    return grid_BS
