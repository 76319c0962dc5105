"""Scores of every (fact, expert) by each localisation method, and the truth by ablation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.planted.asking import (
    N_FACTS,
    TURNS,
    Asked,
    ask,
    logits_of,
    outcome,
    per_fact,
)
from benchmarks.planted.taps import (
    EXPERTS,
    LAYERS,
    AtMean,
    KeepOutputs,
    Slots,
    by_expert,
    of_pictures,
    silenced,
)
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.recipe import N_EXPERTS
from ernie_lab.organisms.boards.rows import Encoder
from ernie_lab.organisms.boards.seeing import Seen
from ernie_lab.sites import Tap

CEILING = "zero ablation (the truth again)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Boards of each set; of the integrated gradients (a part of the methods' set), and steps.

    `pooled_draws` are those of the bootstrap over (fact, expert) pairs, which is the slow one.
    """

    truth: int = 200
    methods: int = 200
    integrated: int = 100
    steps: int = 4
    truth_seed: int = 401
    methods_seed: int = 402
    pooled_draws: int = 400


@dataclass(frozen=True, slots=True, eq=False)
class Effects:
    """`[question expert]`: nats that the answer loses, and points of exact match."""

    nats_QE: np.ndarray
    points_QE: np.ndarray


def effects(model: VLModel, asked: Asked, taps: Callable[[int, int], Tap]) -> Effects:
    intact = outcome(model, asked)
    edited = [outcome(model, asked, taps(layer, expert)) for layer, expert in EXPERTS]
    return Effects(
        np.stack([intact.logp_Q - other.logp_Q for other in edited], 1),
        np.stack([100.0 * intact.right_Q - 100.0 * other.right_Q for other in edited], 1),
    )


def expert_means(model: VLModel, asked: Asked) -> dict[tuple[int, int], Tensor]:
    """Each expert's output, averaged over the tokens of `asked` that chose it."""
    paths = {
        (layer, quantity): f"blocks.{layer}.moe.vision.{quantity}"
        for layer in LAYERS
        for quantity in ("expert_out", "expert_ids")
    }
    keep = KeepOutputs(frozenset(paths.values()))
    outcome(model, asked, keep)
    means = {}
    for layer in LAYERS:
        out_JD = torch.cat(keep.kept[paths[layer, "expert_out"]])
        ids_J = torch.cat(keep.kept[paths[layer, "expert_ids"]]).flatten()
        for expert in range(N_EXPERTS):
            means[layer, expert] = out_JD[ids_J == expert].mean(0)
    return means


def readings(model: VLModel, chats: Asked) -> dict[str, np.ndarray]:
    """Every method that needs one forward and at most two backwards, `[question expert]`.

    Of chats with one question each. Routing, norms and direct attribution are those at the token
    of the glyph asked about; activation x gradient is summed over all tokens of the picture.
    Direct attribution leaves out the final norm's scale, which is the same for all experts of a
    token; like the logit, it is the answer's minus the mean over the ten digits.
    """
    found: dict[str, list[list[Tensor]]] = {}
    start = 0
    for batch in chats.batches:
        n = len(batch.kind_Q)
        these = slice(start, start + n)
        start += n
        glyph_B = torch.from_numpy(chats.cell_Q[these]) + 1
        tap = Slots()
        logits_BV = logits_of(model, chats, batch, tap)
        numbers = {
            "activation x gradient, log-prob": logits_BV.log_softmax(-1),
            "activation x gradient, logit": logits_BV
            - logits_BV[:, chats.digits_V].mean(1, keepdim=True),
        }
        digit_B1 = chats.digit_Q[these, None]
        slots = [tap.of(layer, "slot_out") for layer in LAYERS]
        gradients = {
            name: torch.autograd.grad(x.gather(1, digit_B1).sum(), slots, retain_graph=True)
            for name, x in numbers.items()
        }
        words = model.embed_VD if model.unembed_VD is None else model.unembed_VD
        contrast_BD = words[chats.digit_Q[these]] - words[chats.digits_V].mean(0)
        read_BD = contrast_BD * model.final_norm.gain_D
        parts: dict[str, list[Tensor]] = {}
        for i, layer in enumerate(LAYERS):
            ids, weights = tap.of(layer, "expert_ids"), tap.of(layer, "expert_weights")
            slot = slots[i].detach()
            along = (of_pictures(slot) * read_BD[:, None, None]).sum(-1).flatten(0, 1)
            at_glyph = {
                "routing frequency": torch.ones_like(weights),
                "routing weight": weights,
                "output norm x weight": slot.norm(dim=-1),
                "direct logit attribution": along,
            }
            rows_B = torch.arange(n)
            for name, values in at_glyph.items():
                picture_BME = of_pictures(by_expert(values, ids))
                parts.setdefault(name, []).append(picture_BME[rows_B, glyph_B])
            for name, gradient in gradients.items():
                values = (slot * gradient[i]).sum(-1)
                parts.setdefault(name, []).append(of_pictures(by_expert(values, ids)).sum(1))
        for name, layers in parts.items():
            found.setdefault(name, []).append(layers)
    return {name: joined(batches) for name, batches in found.items()}


def joined(batches: Sequence[Sequence[Tensor]]) -> np.ndarray:
    """`[question (layer expert)]`"""
    rows: np.ndarray = torch.cat([torch.cat(list(x), 1).detach() for x in batches]).numpy()
    return rows


def integrated(model: VLModel, chats: Asked, steps: int) -> np.ndarray:
    """Integrated gradients of the log-prob from all slots of a layer at 0, layer by layer.

    slot . mean over midpoints alpha of d log-prob / d slot where the layer's slots are alpha times
    what they are; summed over all tokens of the picture.
    """
    found, start = [], 0
    for batch in chats.batches:
        digit_B1 = chats.digit_Q[start : start + len(batch.kind_Q), None]
        start += len(batch.kind_Q)
        layers = []
        for layer in LAYERS:
            total: Tensor | float = 0.0
            for step in range(steps):
                alpha = (step + 0.5) / steps
                tap = Slots((layer, alpha))
                logp_BV = logits_of(model, chats, batch, tap).log_softmax(-1)
                slot = tap.of(layer, "slot_out")
                (gradient,) = torch.autograd.grad(logp_BV.gather(1, digit_B1).sum(), slot)
                total = total + (slot.detach() / alpha * gradient).sum(-1) / steps
            assert isinstance(total, Tensor)
            ids = tap.of(layer, "expert_ids")
            layers.append(of_pictures(by_expert(total, ids)).sum(1))
        found.append(layers)
    return joined(found)


def all_scores(
    model: VLModel, encoder: Encoder, seen: Seen, sizes: Sizes
) -> tuple[dict[str, np.ndarray], Asked]:
    """`[fact expert]` for each method; and the questions of the ablations among them."""
    rows = ask(encoder, seen, TURNS, sizes.methods_seed)
    chats = ask(encoder, seen, 1, sizes.methods_seed)
    some = Seen(seen.scenes[: sizes.integrated], seen.features_NMD[: sizes.integrated])
    fewer = ask(encoder, some, 1, sizes.methods_seed)
    means = expert_means(model, rows)
    noise = np.random.default_rng(sizes.methods_seed).random((N_FACTS, len(EXPERTS)))
    scores = {"random": noise}
    scores |= {name: per_fact(x_QE, chats) for name, x_QE in readings(model, chats).items()}
    scores["integrated gradients, log-prob"] = per_fact(
        integrated(model, fewer, sizes.steps), fewer
    )
    at_mean = effects(model, rows, lambda layer, e: AtMean(layer, e, means[layer, e]))
    scores["mean ablation"] = per_fact(at_mean.nats_QE, rows)
    scores[CEILING] = per_fact(effects(model, rows, silenced).nats_QE, rows)
    return scores, rows
