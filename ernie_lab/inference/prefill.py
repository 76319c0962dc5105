"""The first forward over a batch, for both kinds of model, and the step that taps are bound to."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie_lab.inputs.batch import Batch, Visual
from ernie_lab.inputs.errors import BatchError
from ernie_lab.model.cache import KVCache
from ernie_lab.model.kinds import Model
from ernie_lab.model.stack import Hidden
from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import Pictures
from ernie_lab.sites import Step, Tap


def bound(tap: Tap, step: Step) -> Tap:
    # Not `isinstance`, which looks through a protocol's members anew in each forward.
    bind = getattr(tap, "bind", None)
    return tap if bind is None else bind(step)


def prefill_step(batch: Batch) -> Step:
    """What taps may know of a batch before it runs."""
    if batch.visual is None:
        return Step("prefill", 0, batch.positions, batch.mask)
    layout = batch.visual.layout
    return Step(
        "prefill",
        0,
        batch.positions,
        batch.mask,
        modality=layout.modality_BS,
        bank=layout.bank_BS,
        grids=tuple(media.grid for media in batch.visual.media),
    )


def decode_step(index: int, positions_BS: Tensor, mask_BS: Tensor, *, banked: bool) -> Step:
    """A step of generation: every token is text, whatever its id (ernie-facts 3.4)."""
    text_BS = torch.zeros_like(mask_BS, dtype=torch.int64) if banked else None
    return Step("decode", index, positions_BS, mask_BS, modality=text_BS, bank=text_BS)


def prefill(model: Model, batch: Batch, tap: Tap, cache: KVCache | None = None) -> Hidden:
    """The trunk over the whole batch; `tap` is already bound."""
    mask = None if bool(batch.mask.all()) else batch.mask
    if isinstance(model, TextModel):
        return model.trunk(batch.input_ids, mask, batch.positions, cache, tap=tap)
    if batch.visual is None:
        raise BatchError(
            "this batch does not say which tokens are pictures; make it with lab.prepare(...), or "
            "give pad_batch the model's ids (pad_batch(..., ids=config.ids))."
        )
    return model.trunk(
        batch.input_ids,
        mask,
        past_key_values=cache,
        tap=tap,
        layout=batch.visual.layout,
        pictures=_pictures(batch.visual, batch.input_ids.device),
    )


def _pictures(visual: Visual, device: torch.device) -> Pictures | None:
    if not visual.media:
        return None
    patches_PQ = torch.cat([media.patches_PQ for media in visual.media]).to(device)
    return Pictures(patches_PQ, tuple(media.grid for media in visual.media))
