"""How well each localisation method finds the vision experts that store a planted fact.

    python -m benchmarks.planted_facts

Of `tiny-vl`. A fact is the value of a (shape, colour) glyph; its question is `Value of red?`.
Truth: what switching a single vision expert off (its slots zeroed at every token) costs the
answers to the questions about that fact, on one set of boards. Every method gives a score to each
(fact, expert) from another set of boards. See benchmarks/README.md for what this can show.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from tokenizers import Tokenizer
from torch import Tensor

from ernie_lab.interventions.bootstrap import draws_of, estimate
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.ablations import SilenceExpert
from ernie_lab.organisms.boards.check import open_model
from ernie_lab.organisms.boards.draw import N_CELLS, Board
from ernie_lab.organisms.boards.planted import GLYPH_FACTS, glyph_fact
from ernie_lab.organisms.boards.questions import Question
from ernie_lab.organisms.boards.recipe import N_EXPERTS
from ernie_lab.organisms.boards.rows import Batch, Encoder, Row, Turn, embeddings, encode_rows
from ernie_lab.organisms.boards.seeing import Seen, look
from ernie_lab.organisms.boards.words import COLOURS
from ernie_lab.organisms.builtin import BUILTIN, builtin_path
from ernie_lab.sites import Site, Tap, idle

RESULTS = Path(__file__).parent / "results" / "planted_facts.json"
LAYERS = (1, 2, 3)  # nothing reads what the last layer writes at a picture's tokens
EXPERTS = [(layer, expert) for layer in LAYERS for expert in range(N_EXPERTS)]
N_FACTS = GLYPH_FACTS.size
BANK_ROWS = N_CELLS + 2  # of a picture: start delimiter, cells in reading order, end delimiter
# Points of exact match that a holder of a fact must cost; the gates' bar for an expert's own facts.
HOLDS = 15.0
OFTEN = 0.5  # of a fact's occurrences are routed to the expert
# Turns that fit, after the picture, into the 88 tokens of a training row.
TURNS = 7
ROWS_AT_ONCE = 100
N_DRAWS = 2000
CEILING = "zero ablation (the truth again)"
HEADINGS = {
    "all": "24 experts of layers 1 to 3",
    "layer 1": "8 experts of layer 1",
    "chosen": "layer 1, pairs often chosen",
}
METRICS = ("spearman", "precision@1", "precision@2", "auroc")


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
class Asked:
    """Value questions about every glyph of some boards, ready to run.

    For each question Q: the fact, the glyph's cell, the board's number. `digit_Q` is the token of
    the answer; `digits_V` those of all ten values.
    """

    batches: list[Batch]
    seen: Seen
    fact_Q: np.ndarray
    cell_Q: np.ndarray
    board_Q: np.ndarray
    digit_Q: Tensor
    digits_V: Tensor

    @property
    def features(self) -> dict[str, Tensor]:
        return {"image": self.seen.features_NMD}


def ask(encoder: Encoder, seen: Seen, turns_per_row: int, seed: int) -> Asked:
    """One question about every glyph, in random order, `turns_per_row` in each chat."""
    rng = np.random.default_rng(seed)
    rows, facts, cells, boards = [], [], [], []
    for number, board in enumerate(seen.scenes):
        assert isinstance(board, Board)
        order = rng.permutation(board.filled())
        for start in range(0, len(order), turns_per_row):
            chosen = order[start : start + turns_per_row].tolist()
            rows.append(Row("image", number, tuple(turn(board, cell) for cell in chosen)))
            facts += [glyph_fact(board.shape_C[cell], board.colour_C[cell]) for cell in chosen]
            cells += chosen
            boards += [number] * len(chosen)
    batches = [
        encode_rows(rows[i : i + ROWS_AT_ONCE], encoder) for i in range(0, len(rows), ROWS_AT_ONCE)
    ]
    digits = torch.cat([batch.token_id[first_tokens(batch)] for batch in batches])
    known = torch.tensor([encoder.ids(f" {value}")[0] for value in range(10)])
    return Asked(batches, seen, np.array(facts), np.array(cells), np.array(boards), digits, known)


def turn(board: Board, cell: int) -> Turn:
    shape, colour = board.shape_C[cell], board.colour_C[cell]
    text, value = f"Value of {COLOURS[colour]}?", str(GLYPH_FACTS[shape, colour])
    return Turn(Question("value", text, value, (glyph_fact(shape, colour),), (cell,)), False)


def first_tokens(batch: Batch) -> Tensor:
    """Which of the batch's answer tokens are the digits; the others end their answers."""
    return torch.from_numpy(np.unique(batch.token_question.numpy(), return_index=True)[1])


def logits_of(model: VLModel, asked: Asked, batch: Batch, tap: Tap = idle) -> Tensor:
    """`[q v]`, where each answer is to be given."""
    hidden = model.trunk(
        inputs_embeds=embeddings(model.embed_VD, batch, asked.features),
        position_ids=batch.positions_BSR,
        bank=batch.bank_BS,
        tap=tap,
    )
    first = first_tokens(batch)
    return model.unembed(hidden.normed_BSD[batch.token_row[first], batch.token_place[first]])


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    logp_Q: np.ndarray
    right_Q: np.ndarray


@torch.no_grad()
def outcome(model: VLModel, asked: Asked, tap: Tap = idle) -> Outcome:
    logits_QV = torch.cat([logits_of(model, asked, batch, tap) for batch in asked.batches])
    logp_QV = logits_QV.log_softmax(-1)
    logp_Q = logp_QV.gather(1, asked.digit_Q[:, None])[:, 0]
    return Outcome(logp_Q.numpy(), (logits_QV.argmax(-1) == asked.digit_Q).numpy())


def per_fact(values_QE: np.ndarray, asked: Asked, these_Q: np.ndarray | None = None) -> np.ndarray:
    """`[fact expert]`: means over the questions about each fact; NaN where there are none."""
    use_Q = np.ones(len(asked.fact_Q), bool) if these_Q is None else these_Q
    fact_Q, sums = asked.fact_Q[use_Q], np.zeros((N_FACTS, values_QE.shape[1]))
    np.add.at(sums, fact_Q, values_QE[use_Q])
    n = np.bincount(fact_Q, minlength=N_FACTS)[:, None]
    return np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0)


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


def silenced(layer: int, expert: int) -> Tap:
    return SilenceExpert(layer, expert, "vision.")


@dataclass(slots=True)
class AtMean:
    """One expert's outputs, before their weights, replaced by their mean."""

    layer: int
    expert: int
    mean_D: Tensor
    ids_NK: Tensor | None = None

    def wants(self, site: Site, /) -> bool:
        return site.path == f"blocks.{self.layer}.moe.vision.expert_out"

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path == f"blocks.{self.layer}.moe.vision.expert_ids":
            self.ids_NK = x
        if self.wants(site):
            assert self.ids_NK is not None, "ids come before outputs"
            return torch.where((self.ids_NK == self.expert)[..., None], self.mean_D, x)
        return x


@dataclass(slots=True)
class Slots:
    """Keeps the vision banks' ids, weights and slots; the slots can be differentiated by.

    With `scaled`, (layer, alpha), the slots of that layer are multiplied by alpha.
    """

    scaled: tuple[int, float] | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:
        return site.path.endswith("vision.slot_out")

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        quantity = site.quantity.removeprefix("moe.vision.")
        if quantity == "slot_out" and site.layer in LAYERS:
            if self.scaled is not None and self.scaled[0] == site.layer:
                x = x * self.scaled[1]
            if torch.is_grad_enabled() and not x.requires_grad:
                x.requires_grad_()
        if quantity in ("slot_out", "expert_ids", "expert_weights"):
            self.kept[site.path] = x
        return x

    def of(self, layer: int, quantity: str) -> Tensor:
        return self.kept[f"blocks.{layer}.moe.vision.{quantity}"]


def by_expert(values_NK: Tensor, ids_NK: Tensor) -> Tensor:
    """`[n e]`: each slot's value in the column of its expert, 0 where it was not chosen."""
    return values_NK.new_zeros(len(values_NK), N_EXPERTS).scatter(1, ids_NK, values_NK)


def of_pictures(values_NE: Tensor) -> Tensor:
    """`[b m e]`: a bank's rows, picture by picture."""
    return values_NE.unflatten(0, (-1, BANK_ROWS))


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


@dataclass(slots=True)
class KeepOutputs:
    """Keeps the named sites, on-demand ones too, one row for each slot of outputs."""

    paths: frozenset[str]
    kept: dict[str, list[Tensor]] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:
        return site.path in self.paths

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in self.paths:
            rows = x.flatten(0, 1) if site.path.endswith("expert_out") else x
            self.kept.setdefault(site.path, []).append(rows)
        return x


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


def spearman(scores_FE: np.ndarray, truth_FE: np.ndarray) -> np.ndarray:
    """Over the experts of each fact; 0 where either puts them all level."""
    ranks = [rankdata(x, axis=1) for x in (scores_FE, truth_FE)]
    a, b = (x - x.mean(1, keepdims=True) for x in ranks)
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    return np.divide((a * b).sum(1), norms, out=np.zeros(len(a)), where=norms > 0)


def precision(scores_FE: np.ndarray, truth_FE: np.ndarray, k: int) -> np.ndarray:
    """Which share of a method's first k experts are among the true first k; ties at random."""
    lots_FE = np.random.default_rng(0).random(scores_FE.shape)
    first, true = (np.lexsort((lots_FE, -x), axis=1)[:, :k] for x in (scores_FE, truth_FE))
    share: np.ndarray = (first[:, :, None] == true[:, None, :]).any(2).mean(1)
    return share


def auroc(scores_FE: np.ndarray, holds_FE: np.ndarray) -> np.ndarray:
    """Of each fact: P(a holder's score > another expert's), ties by half; NaN without both."""
    ranks = rankdata(scores_FE, axis=1)
    n_holders = holds_FE.sum(1)
    n_others = holds_FE.shape[1] - n_holders
    above = (ranks * holds_FE).sum(1) - n_holders * (n_holders + 1) / 2
    pairs = n_holders * n_others
    return np.divide(above, pairs, out=np.full(len(above), np.nan), where=pairs > 0)


def measured(
    scores_FE: np.ndarray, nats_FE: np.ndarray, holds_FE: np.ndarray, draws: np.ndarray
) -> dict[str, dict[str, float]]:
    """Means over facts with 95 % intervals of a bootstrap over facts."""
    values = {
        "spearman": spearman(scores_FE, nats_FE),
        "precision@1": precision(scores_FE, nats_FE, 1),
        "precision@2": precision(scores_FE, nats_FE, 2),
        "auroc": auroc(scores_FE, holds_FE),
    }
    facts = np.arange(len(scores_FE))
    found = {name: estimate(x, facts, draws) for name, x in values.items()}
    return {
        name: {"mean": rounded(x.value), "low": rounded(x.low), "high": rounded(x.high)}
        for name, x in found.items()
    }


def among_chosen(
    scores_FE: np.ndarray,
    nats_FE: np.ndarray,
    points_FE: np.ndarray,
    often_FE: np.ndarray,
    n_draws: int,
) -> dict[str, dict[str, float]]:
    """The (fact, expert) pairs of `often_FE` together: which of them does the fact need?

    A stricter question than the rest: experts that never see the fact are left out, and the facts
    without a holder come in. Intervals are of a bootstrap over facts.
    """
    rng, facts = np.random.default_rng(0), np.arange(len(scores_FE))
    found: dict[str, list[float]] = {"spearman": [], "auroc": []}
    for draw in range(n_draws + 1):
        these = facts if draw == 0 else rng.choice(facts, len(facts))
        often = often_FE[these]
        score, nats, points = (x[these][often][None] for x in (scores_FE, nats_FE, points_FE))
        found["spearman"].append(float(spearman(score, nats)[0]))
        found["auroc"].append(float(auroc(score, points >= HOLDS)[0]))
    return {
        name: {
            "mean": rounded(x[0]),
            "low": rounded(np.quantile(x[1:], 0.025)),
            "high": rounded(np.quantile(x[1:], 0.975)),
        }
        for name, x in found.items()
    }


def rounded(value: float) -> float:
    return round(float(value), 4)


def benchmark(sizes: Sizes) -> dict[str, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    folder = builtin_path("tiny-vl")
    model = open_model(folder).requires_grad_(False)
    encoder = Encoder(Tokenizer.from_file(str(folder / "tokenizer.json")))
    asked = ask(encoder, look(model, "image", sizes.truth, sizes.truth_seed), TURNS, 0)
    true = effects(model, asked, silenced)
    nats_FE, points_FE = per_fact(true.nats_QE, asked), per_fact(true.points_QE, asked)
    seen = look(model, "image", sizes.methods, sizes.methods_seed)
    scores, rows = all_scores(model, encoder, seen, sizes)
    known_F = np.all([np.isfinite(x).all(1) for x in (*scores.values(), nats_FE)], axis=0)
    held_F = known_F & (points_FE >= HOLDS).any(1)
    draws = draws_of(int(held_F.sum()), N_DRAWS, 0)
    held = {"all": slice(None), "layer 1": slice(0, N_EXPERTS)}
    tables = {
        among: {
            name: measured(
                x[held_F, these], nats_FE[held_F, these], points_FE[held_F, these] >= HOLDS, draws
            )
            for name, x in scores.items()
        }
        for among, these in held.items()
    }
    own = np.flatnonzero(known_F)[:, None], np.arange(N_EXPERTS)
    often_FE = scores["routing frequency"][own] > OFTEN
    tables["chosen"] = {
        name: among_chosen(x[own], nats_FE[own], points_FE[own], often_FE, sizes.pooled_draws)
        for name, x in scores.items()
    }
    halves = [per_fact(true.nats_QE, asked, asked.board_Q % 2 == half) for half in (0, 1)]
    both_F = held_F & np.all([np.isfinite(half).all(1) for half in halves], axis=0)
    agreement = {
        among: rounded(spearman(*(half[both_F, these] for half in halves)).mean())
        for among, these in held.items()
    }
    return {
        "tables": tables,
        "truth": {
            "facts asked about": int(known_F.sum()),
            f"facts with a holder (>= {HOLDS:.0f} points)": int(held_F.sum()),
            "holders": holders(points_FE[known_F]),
            "points of exact match, by layer and expert": true.points_QE.mean(0)
            .reshape(len(LAYERS), -1)
            .round(2)
            .tolist(),
            "split-half Spearman of the truth (half the boards each)": agreement,
        },
        "routing as a predictor, layer 1": as_predictor(
            scores["routing frequency"][known_F, :N_EXPERTS], points_FE[known_F, :N_EXPERTS]
        ),
        "conditions": {
            "model": "tiny-vl",
            "sha256": BUILTIN["tiny-vl"].sha256,
            "sizes": asdict(sizes),
            "questions": {"truth": len(asked.fact_Q), "methods": len(rows.fact_Q)},
            "threads": torch.get_num_threads(),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("ernie-lab", "torch", "numpy", "scipy")},
            },
            "date": datetime.now(UTC).date().isoformat(),
            "seconds": {
                "wall": round(time.perf_counter() - wall, 1),
                "cpu": round(time.process_time() - cpu, 1),
            },
        },
    }


def holders(points_FE: np.ndarray) -> dict[str, int]:
    """How many (fact, expert) pairs hold, by layer."""
    holds_FL = (points_FE >= HOLDS).reshape(len(points_FE), len(LAYERS), -1).sum((0, 2))
    return {f"layer {layer}": int(n) for layer, n in zip(LAYERS, holds_FL, strict=True)}


def as_predictor(frequency_FE: np.ndarray, points_FE: np.ndarray) -> dict[str, float]:
    """An expert chosen in more than half of a fact's occurrences: does the fact need it?"""
    often, holds = frequency_FE > OFTEN, points_FE >= HOLDS
    return {
        "pairs chosen in more than half": int(often.sum()),
        "of these, holders (%)": round(100 * float(holds[often].mean()), 1),
        "of these, cost below 1 point (%)": round(100 * float((points_FE[often] < 1).mean()), 1),
        "mean cost of these (points)": round(float(points_FE[often].mean()), 1),
        "mean cost of the others (points)": round(float(points_FE[~often].mean()), 2),
        "of the holders, chosen in more than half (%)": round(100 * float(often[holds].mean()), 1),
    }


def printed(found: dict[str, Any]) -> str:
    lines = []
    for among, table in found["tables"].items():
        metrics = [metric for metric in METRICS if metric in table["random"]]
        lines.append(f"{HEADINGS[among]:34}" + "".join(f"{metric:>20}" for metric in metrics))
        for name, row in table.items():
            cells = [
                f"{row[m]['mean']:.2f} [{row[m]['low']:.2f}, {row[m]['high']:.2f}]" for m in metrics
            ]
            lines.append(f"{name:34}" + "".join(f"{cell:>20}" for cell in cells))
        lines.append("")
    for part in ("truth", "routing as a predictor, layer 1", "conditions"):
        lines += [f"{part}:", *(f"  {name}: {value}" for name, value in found[part].items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Localisation methods on planted facts.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = benchmark(Sizes())
    print(printed(found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
