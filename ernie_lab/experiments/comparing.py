"""`el.compare`: what edits do to predictions and routing, over many prompts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ernie_lab.checkpoint import TextConfig
from ernie_lab.checkpoint.packing import quantised_details
from ernie_lab.experiments.conditions import (
    Condition,
    Metrics,
    Named,
    check_sites,
    named_conditions,
    own_metrics,
    refuse_sequences,
)
from ernie_lab.experiments.measuring import Metric, routed_layers
from ernie_lab.experiments.noise import Variant, sampled, variants
from ernie_lab.experiments.parts import Parts
from ernie_lab.experiments.passages import Continuations, Passages, Rows, require_lab
from ernie_lab.experiments.work import Work
from ernie_lab.inference.forward import LossNotFiniteWarning, not_finite
from ernie_lab.inputs import Prompt
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions import EditChangedNothingWarning
from ernie_lab.interventions.bootstrap import draws_of
from ernie_lab.interventions.comparison import Comparison, metric_names
from ernie_lab.interventions.saying import times
from ernie_lab.interventions.summary import (
    Layout,
    Measured,
    averages,
    condition_row,
    flips_by_layer,
    floor_of,
    floors,
    routing_rows,
    sequence_rows,
    token_rows,
)
from ernie_lab.lab import Lab
from ernie_lab.preparing import Images, Videos
from ernie_lab.session import config_hash
from ernie_lab.trace.keep import Names
from ernie_lab.trace.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd

# The logits of two runs and what their losses take, at the same time.
_LOGITS_AT_ONCE, _BYTES_ON_CPU, _MOST_TOKENS = 3, 1_000_000_000, 4096
# Of what is saved in parts; another number makes old parts unknown.
SCHEMA = 2


def compare(
    lab: Lab,
    prompts: Prompt,
    conditions: Mapping[str, Condition],
    *,
    controls: Mapping[str, Condition] | None = None,
    metrics: Metrics = (),
    labels: Rows | None = None,
    loss_mask: Rows | None = None,
    continuations: Continuations | None = None,
    answers: Sequence[Any] | None = None,
    documents: Sequence[Hashable] | None = None,
    images: Images | None = None,
    videos: Videos | None = None,
    chat: Mapping[str, Any] | None = None,
    keep: Names = (),
    noise: int = 8,
    noise_tokens: int = 2048,
    n_draws: int = 1000,
    seed: int = 0,
    batch_tokens: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Comparison:
    """Every condition against the unedited model, on the same tokens.

    - loss change: mean over counted tokens of loss(edited) - loss(base), in nats
    - KL(base || edited): sum_v p_v (log p_v - log q_v), in nats, from fp32 log-softmax, where
      those tokens are predicted
    - top-1 agreement: how often both find the same token most likely
    - logit difference: logit(right) - logit(wrong) after the last token, and its change
    - set flips: 1 - |S and S'| / k at every token, by layer, with all that happened upstream; a
      token that changed its bank counts 1

    Each comes with a paired bootstrap over documents and with the noise floor: the 95th
    percentile of the same metric over `noise` equivalent runs (other batches, padding, attention
    kernel; same dtype). The floor is taken on whole batches, drawn at random, of
    `noise_tokens` tokens at most in all, but on one at least, however large. On fewer tokens
    than the comparison has it is, if anything, too high.

    Args:
        conditions: by name, edits, applied in their order. Edits that name sequences mean those
            of one batch; where there are several, give a function of the numbers of a batch's
            sequences that returns edits.
        controls: the same, marked as controls in every table.
        metrics: one's own, `fn(base, edited, batch)` of two `Run`s; one value for each position
            `[b s]` or each sequence `[b]`. By name, or functions, which lend theirs.
        labels, loss_mask: one list for each prompt, one entry for each token: what to predict
            in the place of that token, from those before it (-100: nothing), and whether it
            counts. So a label stands where the token that it replaces stands, one place after
            the position that predicts it, and the first one is never used.
        continuations: what follows each prompt (its pictures and chat template included) and
            alone counts: one for all prompts or one for each, text or ids. Text is encoded as it
            is, so a space before it makes another token; `tokens` of a generation are what the
            model itself would write. Not together with labels, loss_mask or answers.
        answers: (right, wrong), one pair for all prompts or one for each: ids, or texts of
            one token. Their logits are compared after the last token of the prompt.
        documents: the document of each prompt. Windows of one document stay together in the
            bootstrap; without it every prompt is a document.
        images, videos, chat: as in `lab.run`.
        keep: more sites to record, for metrics that read `base.trace` and `edited.trace`.
        batch_tokens: the most tokens of a batch, padding included; chosen by memory if absent.
        folder: where finished parts are saved. Calling again goes on from there; changed
            inputs are noticed and computed anew.

    Warns `EditChangedNothingWarning` about edits that changed nothing in the whole comparison, and
    `LossNotFiniteWarning` where a token that counts has a loss that is not finite. Where it is NaN
    the condition has no averages.
    """
    require_lab(lab)
    named = named_conditions(conditions, controls or {})
    own = own_metrics(metrics)
    metric_names(own)
    check_sites(lab, named)
    passages = Passages.read(
        lab,
        prompts,
        images=images,
        videos=videos,
        chat=chat,
        labels=labels,
        loss_mask=loss_mask,
        continuations=continuations,
        answers=answers,
        documents=documents,
    )
    settings = Settings(noise, noise_tokens, n_draws, seed, batch_tokens, folder, progress)
    kept = (keep,) if isinstance(keep, str) or not isinstance(keep, Iterable) else tuple(keep)
    found = compared(lab, named, passages, settings, own, kept)
    warn_of_losses(found)
    warn_if_idle(found)
    return found


@dataclass(frozen=True, slots=True)
class Settings:
    """How an experiment is run; see `compare`."""

    noise: int = 8
    noise_tokens: int = 2048
    n_draws: int = 1000
    seed: int = 0
    batch_tokens: int | None = None
    folder: str | os.PathLike[str] | None = None
    progress: bool = True


def compared(
    lab: Lab,
    named: Mapping[str, Named],
    passages: Passages,
    how: Settings,
    own: dict[str, Metric],
    keep: tuple[Any, ...],
) -> Comparison:
    """`compare`, with everything made definite and without its warnings."""
    work = Work(
        lab,
        passages,
        passages.batches(how.batch_tokens or batch_tokens_for(lab)),
        own,
        keep,
        Parts(how.folder, SCHEMA, lab, str(lab.dtype), str(lab.device), own, keep),
    )
    if len(work.batches) > 1:
        refuse_sequences(named)
    equivalents = variants(how.noise, how.seed)
    on_noise = (
        sampled(work.batches, lambda i: len(passages.all[i].ids), how.noise_tokens, how.seed)
        if how.noise
        else []
    )
    work.run(named, equivalents, on_noise, how.progress)

    layers = routed_layers(lab)
    layout = passages.layout(layers, ("text",) if isinstance(lab.config, TextConfig) else BANKS)
    measured = [work.measured(name, condition) for name, condition in named.items()]
    noisy = [work.noise(i, variant, on_noise) for i, variant in enumerate(equivalents)]
    details = {
        "conditions": {m.name: [edit.edit for edit in m.edits] for m in measured},
        "controls": [m.name for m in measured if m.control],
        "metrics": list(own),
    }
    settings = {
        "n_draws": how.n_draws,
        "seed": how.seed,
        "noise": how.noise,
        "noise_tokens": int(
            sum(len(passages.all[i].ids) for b in on_noise for i in work.batches[b])
        ),
        "n_batches": len(work.batches),
        "parts_found": work.parts.n_found,
    }
    provenance = Provenance.now(
        lab.model_id,
        revision=lab.revision,
        config_hash=config_hash(lab),
        dtype=str(lab.dtype).removeprefix("torch."),
        device=str(lab.device),
        seed=how.seed,
        **quantised_details(lab.model),
        **details,
    )
    return _tables(measured, noisy, equivalents, layout, provenance, settings)


def _tables(
    measured: Sequence[Measured],
    noisy: Sequence[Measured],
    equivalents: Sequence[Variant],
    layout: Layout,
    provenance: Provenance,
    settings: Mapping[str, Any],
) -> Comparison:
    import pandas as pd

    draws = draws_of(int(layout.document_M.max()) + 1, settings["n_draws"], settings["seed"])
    noise = pd.DataFrame(
        [variant.row() | averages(m) for variant, m in zip(equivalents, noisy, strict=True)]
    )
    floor = floors(noise)
    by_layer = [flips_by_layer(m, layout) for m in noisy]
    flips = {
        place: floor_of("flips", [found[place] for found in by_layer])
        for place in (by_layer[0] if by_layer else ())
    }
    rows = {m.name: condition_row(m, layout, draws, floor) for m in measured}
    return Comparison(
        tokens=pd.concat([token_rows(m, layout) for m in measured], ignore_index=True),
        sequences=pd.concat([sequence_rows(m, layout) for m in measured], ignore_index=True),
        conditions=pd.DataFrame.from_dict(rows, orient="index").rename_axis("condition"),
        routing=pd.DataFrame([r for m in measured for r in routing_rows(m, layout, draws, flips)]),
        edits=pd.DataFrame(
            [
                (m.name, edit.edit, edit.n_fired, edit.n_changed, "; ".join(edit.after))
                for m in measured
                for edit in m.edits
            ],
            columns=pd.Index(["condition", "edit", "n_fired", "n_changed", "after"]),
        ),
        figures=pd.DataFrame(
            [
                (m.name, edit.edit, name, value)
                for m in measured
                for edit in m.edits
                for name, value in edit.measured.items()
            ],
            columns=pd.Index(["condition", "edit", "figure", "value"]),
        ),
        noise=noise,
        provenance=provenance,
        settings=settings,
    )


def warn_if_idle(found: Comparison, only: str | None = None) -> None:
    """An edit that changed nothing anywhere, or whose changes reached no prediction."""
    for name in found.conditions.index:
        if only not in (None, name):
            continue
        largest = _largest_change(found, str(name))
        figure = f"the largest change of any logit is {largest:.3g}"
        edits = found.edits[found.edits["condition"] == name]
        for row in edits[edits["n_changed"] == 0].itertuples():
            warnings.warn(
                f"condition {name!r}: {row.edit} was applied {times(int(row.n_fired))} and "
                f"changed nothing; {figure}",
                EditChangedNothingWarning,
                stacklevel=3,
            )
        if largest == 0 and edits["n_changed"].any():
            warnings.warn(
                f"condition {name!r}: its edits changed values, but no prediction that counts; "
                f"{figure}",
                EditChangedNothingWarning,
                stacklevel=3,
            )


def warn_of_losses(found: Comparison) -> None:
    """Losses that are not finite: of the base run, and of conditions beyond these."""
    for number, (name, rows) in enumerate(found.tokens.groupby("condition", sort=False)):
        if not number:
            warn_if_not_finite("the unedited model", rows, "loss_base")
        edits = dict.fromkeys(found.edits.loc[found.edits["condition"] == name, "edit"])
        whose = f" (edits: {'; '.join(edits)})" if edits else ""
        warn_if_not_finite(f"condition {name!r}{whose}", rows, "loss", beyond="loss_base")


def warn_if_not_finite(
    who: str, tokens: pd.DataFrame, column: str, beyond: str | None = None
) -> None:
    """`beyond`: a column whose losses that are not finite were told of before."""
    rows = tokens[tokens["counted"]]
    bad = ~np.isfinite(rows[column])
    if not (bad if beyond is None else bad & np.isfinite(rows[beyond])).any():
        return
    first = rows[bad].iloc[0]
    told = not_finite(int(bad.sum()), len(rows), int(first["sequence"]), int(first["pos"]))
    unknown = "; there are no averages over the others" if rows[column].isna().any() else ""
    warnings.warn(f"{who}: {told}{unknown}", LossNotFiniteWarning, stacklevel=4)


def _largest_change(found: Comparison, condition: str) -> float:
    """Of any logit where a counted token is predicted or answers were asked; NaN without these."""
    tokens = found.tokens[found.tokens["condition"] == condition]
    changes = tokens.loc[tokens["counted"], "logit_change"].tolist()
    if "logit_diff" in found.sequences:
        rows = found.sequences[found.sequences["condition"] == condition]
        changes += (rows["logit_diff"] - rows["logit_diff_base"]).abs().tolist()
    # Of NaN among them, NaN: what is no number is not known to be unchanged.
    return float(np.max(changes)) if changes else float("nan")


def batch_tokens_for(lab: Lab) -> int:
    """By what the logits of a base and an edited run take."""
    budget: float = _BYTES_ON_CPU
    if lab.device.type == "cuda":
        budget = torch.cuda.mem_get_info(lab.device)[0] / 4
    per_token = lab.config.decoder.vocab_size * _LOGITS_AT_ONCE * lab.dtype.itemsize
    return max(1, min(_MOST_TOKENS, int(budget / per_token)))
