"""`el.compare_labs`: two models on the same tokens, each beside its own noise."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ernie_lab.checkpoint import TextConfig
from ernie_lab.checkpoint.packing import quantised_details
from ernie_lab.experiments.comparing import (
    SCHEMA,
    Settings,
    batch_tokens_for,
    warn_if_not_finite,
)
from ernie_lab.experiments.conditions import BatchRun, Metrics, Named, own_metrics
from ernie_lab.experiments.lab_comparison import LabComparison
from ernie_lab.experiments.measuring import Metric, Outcome, observe, routed_layers
from ernie_lab.experiments.noise import sampled, variants
from ernie_lab.experiments.parts import Parts
from ernie_lab.experiments.passages import Continuations, Passages, Rows, require_lab
from ernie_lab.experiments.work import Work
from ernie_lab.inputs import Prompt
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.comparison import metric_names
from ernie_lab.lab import Lab
from ernie_lab.preparing import Images, Videos
from ernie_lab.session import config_hash
from ernie_lab.trace.provenance import Provenance

_OTHER = "b"


def compare_labs(
    a: Lab,
    b: Lab,
    prompts: Prompt,
    *,
    names: tuple[str, str] | None = None,
    metrics: Metrics = (),
    labels: Rows | None = None,
    loss_mask: Rows | None = None,
    continuations: Continuations | None = None,
    answers: Sequence[Any] | None = None,
    documents: Sequence[Hashable] | None = None,
    images: Images | None = None,
    videos: Videos | None = None,
    chat: Mapping[str, Any] | None = None,
    noise: int = 8,
    noise_tokens: int = 2048,
    n_draws: int = 1000,
    seed: int = 0,
    batch_tokens: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> LabComparison:
    """What model `b` does otherwise than model `a`, on the same tokens.

    For checkpoints of one family (Base and PT, two steps of a training, trained and untrained) or
    one checkpoint twice (bfloat16 and float32, quantised and not). All numbers are of `compare`,
    with `a` in the place of the base run: loss(b) - loss(a), KL(a || b), top-1 agreement, and set
    flips 1 - |S and S'| / k by layer and bank, each with a paired bootstrap over documents.

    Each has two noise floors beside it, one of each model: the 95th percentile of the same metric
    between its own equivalent runs (other batches, padding, kernel; same dtype). A difference
    inside either of them is not one. Another dtype is an effect and in no floor.

    Set flips are of experts by number. Two trainings number theirs as they like, and then the
    flips come near those of two lots, 1 - k / E, which stand below the table:
    `analysis.match_experts` looks for the numbering. Models with other routers (layers, number of
    experts or of those chosen) are compared without flips.

    Args:
        names: what to call the two; their ids, with dtypes where the ids are equal, if absent.
        prompts: read by both. Their token ids, and the texts of these, must be equal.

    The other arguments are those of `compare`.

    Raises:
        ValueError: other token ids, or other vocabularies.
    """
    require_lab(a, b)
    own = own_metrics(metrics)
    metric_names(own)
    mine, theirs = (
        Passages.read(
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
        for lab in (a, b)
    )
    called = _names(a, b) if names is None else names
    _require_same(a, b, mine, theirs, called)
    how = Settings(noise, noise_tokens, n_draws, seed, batch_tokens, folder, progress)
    found = _compared(a, b, mine, theirs, how, own, called)
    for name, column in zip(called, ("loss_a", "loss_b"), strict=True):
        warn_if_not_finite(name, found.tokens, column)
    return found


def _compared(
    a: Lab,
    b: Lab,
    mine: Passages,
    theirs: Passages,
    how: Settings,
    own: dict[str, Metric],
    called: tuple[str, str],
) -> LabComparison:
    most = how.batch_tokens or min(batch_tokens_for(a), batch_tokens_for(b))
    batches = mine.batches(most)
    works = [
        Work(lab, passages, batches, own, (), Parts(how.folder, SCHEMA, lab, *_how(lab), own))
        for lab, passages in ((a, mine), (b, theirs))
    ]
    unlike = _other_routing(a, b)

    def of_other(batch: BatchRun) -> Outcome:
        found = observe(b, [theirs.all[i] for i in batch.sequences])
        return _beside(batch.base, found, with_routing=not unlike)

    # Not callable, so that a part is known again by what it holds.
    identity = (b, *_how(b), b.preprocessor, b.positions) if how.folder is not None else None
    named = {_OTHER: Named(lambda _: (), (), identity, other=of_other)}
    equivalents = variants(how.noise, how.seed)
    on_noise = (
        sampled(batches, lambda i: len(mine.all[i].ids), how.noise_tokens, how.seed)
        if how.noise
        else []
    )
    works[0].run(named, equivalents, on_noise, how.progress)
    works[1].run({}, equivalents, on_noise, how.progress)

    measured = works[0].measured(_OTHER, named[_OTHER])
    noisy = [[w.noise(i, v, on_noise) for i, v in enumerate(equivalents)] for w in works]
    layers = routed_layers(a)
    if unlike:
        layers, measured = (), dataclasses.replace(measured, flips_LN=measured.flips_LN[:0])
    layout = mine.layout(layers, ("text",) if isinstance(a.config, TextConfig) else BANKS)
    settings = {
        "n_draws": how.n_draws,
        "seed": how.seed,
        "noise": how.noise,
        "noise_tokens": int(sum(len(mine.all[i].ids) for n in on_noise for i in batches[n])),
        "n_batches": len(batches),
        "parts_found": sum(work.parts.n_found for work in works),
        "names": list(called),
        "other_routing": unlike,
        "flips_by_lot": None if unlike else _flips_by_lot(a),
    }
    of = [_provenance(lab, how.seed) for lab in (a, b)]
    return LabComparison.of(measured, noisy, equivalents, layout, (of[0], of[1]), settings)


def _names(a: Lab, b: Lab) -> tuple[str, str]:
    if a.model_id != b.model_id:
        return a.model_id, b.model_id
    if a.dtype != b.dtype:
        dtypes = [str(lab.dtype).removeprefix("torch.") for lab in (a, b)]
        return f"{a.model_id}, {dtypes[0]}", f"{b.model_id}, {dtypes[1]}"
    schemes = [quantised_details(lab.model).get("quantize", "unquantised") for lab in (a, b)]
    if schemes[0] != schemes[1]:
        return f"{a.model_id}, {schemes[0]}", f"{b.model_id}, {schemes[1]}"
    return f"{a.model_id} (a)", f"{b.model_id} (b)"


def _how(lab: Lab) -> tuple[str, str]:
    return str(lab.dtype), str(lab.device)


def _beside(base: Outcome, other: Outcome, *, with_routing: bool) -> Outcome:
    """The other model's outcome where the first one's is; without routing, that of the first."""
    assert base.run.logits is not None
    assert other.run.logits is not None
    assert other.run.token_loss is not None
    device = base.run.logits.device
    run = dataclasses.replace(
        other.run,
        logits=other.run.logits.to(device),
        token_loss=other.run.token_loss.to(device),
    )
    if not with_routing:
        return Outcome(run, base.ids_LTK, base.bank_LT)
    return Outcome(run, other.ids_LTK, other.bank_LT)


def _require_same(
    a: Lab, b: Lab, mine: Passages, theirs: Passages, called: tuple[str, str]
) -> None:
    sizes = [lab.config.decoder.vocab_size for lab in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{called[0]} predicts {sizes[0]} words, {called[1]} {sizes[1]}: their distributions "
            "cannot be compared word by word"
        )
    for number, (one, other) in enumerate(zip(mine.all, theirs.all, strict=True)):
        if one.ids != other.ids:
            pairs = zip(one.ids, other.ids, strict=False)
            same = next((i for i, (x, y) in enumerate(pairs) if x != y), None)
            where = min(len(one.ids), len(other.ids)) if same is None else same
            told = [list(ids[where : where + 3]) for ids in (one.ids, other.ids)]
            raise ValueError(
                f"prompt {number} has other token ids: from position {where} on, {called[0]} reads "
                f"{told[0]}, {called[1]} {told[1]} (of {len(one.ids)} and {len(other.ids)}). Give "
                "token ids, or for chats one template to both: chat={'template': …}"
            )
        if mine.texts[number] != theirs.texts[number]:
            pairs_of_text = zip(mine.texts[number], theirs.texts[number], strict=True)
            place = [x == y for x, y in pairs_of_text].index(False)
            raise ValueError(
                f"prompt {number}: id {one.ids[place]} at position {place} is "
                f"{mine.texts[number][place]!r} to {called[0]} and "
                f"{theirs.texts[number][place]!r} to {called[1]}: other vocabularies"
            )
    for name in ("labels", "answers"):
        if any(
            getattr(x, name) != getattr(y, name) for x, y in zip(mine.all, theirs.all, strict=True)
        ):
            raise ValueError(f"the two tokenizers make other {name} of the same words; give ids")


def _other_routing(a: Lab, b: Lab) -> str:
    """Why set flips have no meaning between these two; empty where they have."""
    if isinstance(a.config, TextConfig) != isinstance(b.config, TextConfig):
        return "one of them has a single bank of experts"
    if routed_layers(a) != routed_layers(b):
        return "they route in other layers"
    if not routed_layers(a):
        return "neither has experts"
    one, other = (lab.config.decoder.moe for lab in (a, b))
    assert one is not None
    assert other is not None
    for name, words in (("n_experts", "experts"), ("n_chosen", "experts chosen")):
        sizes = [getattr(moe.router, name) for moe in (one, other)]
        if sizes[0] != sizes[1]:
            return f"they have {sizes[0]} and {sizes[1]} {words}"
    return ""


def _flips_by_lot(lab: Lab) -> float:
    """What two independent draws of k of E experts give: 1 - k / E."""
    moe = lab.config.decoder.moe
    assert moe is not None
    return 1 - moe.router.n_chosen / moe.router.n_experts


def _provenance(lab: Lab, seed: int) -> Provenance:
    return Provenance.now(
        lab.model_id,
        revision=lab.revision,
        config_hash=config_hash(lab),
        dtype=str(lab.dtype).removeprefix("torch."),
        device=str(lab.device),
        seed=seed,
        **quantised_details(lab.model),
    )
