"""One batch under one condition, against its base run: arrays by token and by sequence."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ernie_lab.experiments.passages import Passage, answers_of
from ernie_lab.inference.forward import LossNotFiniteWarning
from ernie_lab.inputs import Batch
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions import Edit, EditChangedNothingWarning
from ernie_lab.interventions.metrics import (
    at_predictors,
    banked_flips,
    kl_divergence,
    logit_difference,
)
from ernie_lab.lab import Lab
from ernie_lab.model.losses import IGNORED
from ernie_lab.results import NothingKept, Run

Array: TypeAlias = NDArray[Any]
Metric: TypeAlias = Callable[[Run, Run, Batch], Any]
Kernel: TypeAlias = Literal["default", "math"]

# Arrays with one value for each sequence of the batch have this before their name.
PER_SEQUENCE = "sequence:"


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """A run and its choices: for each routed layer L and real token T (in reading order) the
    experts `[l t k]` and the bank `[l t]` that they are of."""

    run: Run
    ids_LTK: Tensor
    bank_LT: Tensor


def routed_layers(lab: Lab) -> tuple[int, ...]:
    moe = lab.config.decoder.moe
    return moe.layers if moe else ()


def observe(
    lab: Lab,
    passages: Sequence[Passage],
    edits: Sequence[Edit] = (),
    *,
    keep: Sequence[Any] = (),
    kernel: Kernel = "default",
    filler: int | None = None,
) -> Outcome:
    """Run these sequences as one batch.

    `filler`: with one more sequence beside them, longer by as many tokens, which pads the others.
    """
    prompts = [list(passage.ids) for passage in passages]
    labels = [list(passage.labels) for passage in passages]
    media = [(passage.of_kind("image"), passage.of_kind("video")) for passage in passages]
    if filler is not None:
        prompts.append([_harmless(lab, prompts)] * (max(map(len, prompts)) + filler))
        labels.append([IGNORED] * len(prompts[-1]))
        media.append(([], []))
    pictures: dict[str, Any] = {}
    if any(images or clips for images, clips in media):
        pictures = {"images": [m[0] for m in media], "videos": [m[1] for m in media]}
    layers = routed_layers(lab)
    kept: list[Any] = [*keep, *(["blocks.*.moe.*expert_ids"] if layers else [])]
    with _kernel(kernel), warnings.catch_warnings():
        # Said once, of the whole comparison.
        for said in (EditChangedNothingWarning, LossNotFiniteWarning):
            warnings.simplefilter("ignore", said)
        warnings.filterwarnings("ignore", message="the text reaches")
        run = lab.run(prompts, edits=edits, labels=labels, keep=kept, **pictures)
    n_tokens = sum(len(passage.ids) for passage in passages)
    if not layers:
        return Outcome(run, torch.zeros(0, n_tokens, 1), torch.zeros(0, n_tokens))
    ids_LTK, bank_LT = _choices(run, layers)
    return Outcome(run, ids_LTK[:, :n_tokens], bank_LT[:, :n_tokens])


def _choices(run: Run, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    ids_L, bank_L = [], []
    values, n_tokens = run.trace.values, len(run.trace)
    for layer in layers:
        plain = f"blocks.{layer}.moe.expert_ids"
        paths = (
            {0: plain}
            if plain in values
            else {i: f"blocks.{layer}.moe.{bank}.expert_ids" for i, bank in enumerate(BANKS)}
        )
        parts = {i: values[path].parts[None] for i, path in paths.items()}
        ids_TK = torch.full((n_tokens, next(iter(parts.values())).values.shape[-1]), -1)
        bank_T = torch.full((n_tokens,), -1)
        for i, part in parts.items():
            ids_TK[part.rows_N], bank_T[part.rows_N] = part.values.to(ids_TK), i
        ids_L.append(ids_TK)
        bank_L.append(bank_T)
    return torch.stack(ids_L), torch.stack(bank_L)


def measure(
    base: Outcome,
    edited: Outcome,
    passages: Sequence[Passage],
    own: Mapping[str, Metric],
    *,
    without_trace: bool = False,
) -> dict[str, Array]:
    """By name: one value for each token T, for each sequence, or `[l t]` (`flips`).

    `without_trace`: metrics of one's own that read the edited run's trace are NaN.
    """
    run, batch = base.run, base.run.batch
    assert run.logits is not None
    assert edited.run.logits is not None
    assert run.token_loss is not None
    assert edited.run.token_loss is not None
    assert run.counted is not None
    real_BS = batch.mask
    counted_BS = run.counted
    found: dict[str, Array] = {
        "counted": counted_BS[real_BS].cpu().numpy(),
        "loss_base": run.token_loss[real_BS].float().cpu().numpy(),
        "loss": edited.run.token_loss[real_BS].float().cpu().numpy(),
    }
    scattered: dict[str, list[Tensor]] = {"kl": [], "top1_base": [], "top1": [], "logit_change": []}
    for base_NV, edited_NV in at_predictors(run.logits, edited.run.logits, counted_BS):
        scattered["kl"].append(kl_divergence(base_NV, edited_NV))
        scattered["top1_base"].append(base_NV.argmax(-1).float())
        scattered["top1"].append(edited_NV.argmax(-1).float())
        scattered["logit_change"].append((base_NV.float() - edited_NV.float()).abs().amax(-1))
    for name, pieces in scattered.items():
        value_BS = torch.full(counted_BS.shape, math.nan, dtype=torch.float64)
        if pieces:
            value_BS[counted_BS.cpu()] = torch.cat(pieces).double().cpu()
        found[name] = value_BS[real_BS.cpu()].numpy()
    # Of a row of NaN, argmax says where the NaN stands.
    for name, loss in (("top1_base", "loss_base"), ("top1", "loss")):
        found[name] = np.where(np.isnan(found[loss]), np.nan, found[name])
    agree = (found["top1"] == found["top1_base"]).astype(float)
    found["top1_agreement"] = np.where(np.isnan(found["kl"]), np.nan, agree)
    flips_L = [
        banked_flips(base.bank_LT[i], base.ids_LTK[i], edited.bank_LT[i], edited.ids_LTK[i])
        for i in range(len(base.ids_LTK))
    ]
    shape = (0, int(real_BS.sum()))
    found["flips"] = torch.stack(flips_L).numpy() if flips_L else np.zeros(shape, np.float32)
    answers_B2 = answers_of(passages, run.logits.device)
    if answers_B2 is not None:
        for name, one in (("logit_diff_base", run), ("logit_diff", edited.run)):
            assert one.logits is not None
            value_B = logit_difference(one.logits[:, -1], answers_B2)
            found[PER_SEQUENCE + name] = value_B.double().cpu().numpy()
    for name, metric in own.items():
        try:
            value = metric(run, edited.run, batch)
        except NothingKept:
            if not without_trace:
                raise
            continue
        found |= _own(name, value, batch)
    return found


def _own(name: str, value: Any, batch: Batch) -> dict[str, Array]:
    """A metric of one's own, by token or by sequence."""
    n, width = batch.mask.shape
    x = torch.as_tensor(value).detach().double().cpu()
    if x.shape == (n, width):
        return {name: x[batch.mask.cpu()].numpy()}
    if x.shape == (n,) or (x.ndim == 0 and n == 1):
        return {PER_SEQUENCE + name: x.reshape(n).numpy()}
    raise ValueError(
        f"metric {name!r} returned shape {tuple(x.shape)}; expected one value for each position "
        f"{(n, width)} (NaN where undefined) or for each sequence {(n,)}. A single number of a "
        "whole batch would depend on how the prompts are batched"
    )


@contextlib.contextmanager
def _kernel(kernel: Kernel) -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH) if kernel == "math" else contextlib.nullcontext():
        yield


def _harmless(lab: Lab, prompts: Sequence[Sequence[int]]) -> int:
    """A token that stands for no picture."""
    ids = getattr(lab.config, "ids", None)
    marks = set() if ids is None else {getattr(ids, f.name) for f in dataclasses.fields(ids)}
    return next((token for row in prompts for token in row if token not in marks), 0)


def reassembled(base: Outcome, groups: Sequence[tuple[Sequence[int], Outcome]]) -> Outcome:
    """The sequences of several runs on the grid of one: `groups` are (rows of base, their run)."""
    run = base.run
    assert run.logits is not None
    assert run.token_loss is not None
    logits_BSV = torch.zeros_like(run.logits)
    loss_BS = torch.full_like(run.token_loss, math.nan)
    ids_LTK, bank_LT = torch.full_like(base.ids_LTK, -1), torch.full_like(base.bank_LT, -1)
    lengths = run.batch.lengths
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for rows, other in groups:
        assert other.run.logits is not None
        assert other.run.token_loss is not None
        first = 0
        for place, row in enumerate(rows):
            n = lengths[row]
            logits_BSV[row, -n:] = other.run.logits[place, -n:]
            loss_BS[row, -n:] = other.run.token_loss[place, -n:]
            here = slice(int(starts[row]), int(starts[row]) + n)
            ids_LTK[:, here] = other.ids_LTK[:, first : first + n]
            bank_LT[:, here] = other.bank_LT[:, first : first + n]
            first += n
    whole = dataclasses.replace(run, logits=logits_BSV, token_loss=loss_BS, _trace=None)
    return Outcome(whole, ids_LTK, bank_LT)
