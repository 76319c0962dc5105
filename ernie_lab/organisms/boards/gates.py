"""The gates of `tiny-vl` and of its idle twin.

Each function asks one question and returns its gates. Costs are points of exact match, averaged
over the nine kinds of question on boards, on unseen boards and held-out pairs of facts, with the
part of every kind. `name` needs no fact and `fact` no board: they are the controls beside the rest.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ernie_lab.analysis.balance import multinomial_reference
from ernie_lab.analysis.information import mutual_information
from ernie_lab.model.redraw import VARIANTS, OtherRouter, choose, redraw
from ernie_lab.organisms.ablations import Keep, SilenceExpert
from ernie_lab.organisms.boards.bench import N_CHATS, Bench, Sample, mean
from ernie_lab.organisms.boards.clips import Clip
from ernie_lab.organisms.boards.draw import N_CELLS, NONE
from ernie_lab.organisms.boards.measure import Answers, answers, batches, unseen_rows
from ernie_lab.organisms.boards.planted import GLYPH_FACTS, VALUES
from ernie_lab.organisms.boards.questions import BLIND, ON_BOARDS, ON_CLIPS
from ernie_lab.organisms.boards.recipe import N_CHOSEN, N_EXPERTS
from ernie_lab.organisms.boards.taps import (
    BankName,
    KeepVision,
    at_mean,
    layers,
    learned_routers,
    off,
    paths,
    random_choice,
    reroute_vision,
    through_text_bank,
)
from ernie_lab.organisms.boards.words import COLOURS
from ernie_lab.organisms.gates import Gate

N_REDRAWN = 20
LONG = ("caption", *ON_CLIPS)
OWN_COST, OTHER_COST = 15.0, 3.0
N_FACTS = GLYPH_FACTS.size


def target_share(kind: str) -> float:
    return 85.0 if kind in LONG else 95.0


def parts(values: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.1f}" for kind, value in values.items())


def accuracy_gates(on: Bench) -> list[Gate]:
    """In rows of many turns, and alone: one question after a picture, after an empty reasoning."""
    single = {
        medium: single_chats(on, medium, kinds)
        for medium, kinds in (("image", ON_BOARDS), ("video", ON_CLIPS))
    }
    forms = {
        "many turns": on.confirm.intact.share() | on.clips.intact.share(),
        "one question": single["image"].share() | single["video"].share(),
    }
    return [
        Gate(
            f"right, {kind}, {form}",
            f">= {target_share(kind):.0f} %",
            f"{shares[kind]:.1f} %",
            shares[kind] >= target_share(kind),
        )
        for form, shares in forms.items()
        for kind in (*ON_BOARDS, *ON_CLIPS)
    ]


def single_chats(on: Bench, medium: str, kinds: tuple[str, ...]) -> Answers:
    """What greedy generation gives: it goes wrong where the likeliest token is first wrong."""
    rows = []
    for i, kind in enumerate(kinds):
        drawn = unseen_rows(
            on.encoder,
            on.unseen,
            (4, i),
            {medium: N_CHATS},
            kinds=(kind,) if medium == "image" else ON_BOARDS,
            think_share=1.0,
            most=1,
        )
        rows += [row for row in drawn if row.turns]
    return answers(on.model, batches(rows, on.encoder), on.unseen)


def observe(on: Bench, sample: Sample, quantity: str) -> dict[int, Tensor]:
    """One quantity of every mixture layer, a row per token."""
    where = paths(on.model, quantity)
    keep = Keep(frozenset(where.values()))
    on.answers(sample, keep)
    return {layer: keep.all(path) for layer, path in where.items()}


def mean_outputs(on: Bench, quantity: str) -> dict[int, Tensor]:
    """Of each layer apart, over the `pick` rows."""
    return {layer: x.mean(0) for layer, x in observe(on, on.pick, quantity).items()}


def cost_gate(name: str, costs: dict[str, float], least: float | None, most: float | None) -> Gate:
    """A mean cost that must be reached, or, in the idle twin, must not be."""
    found = mean(costs)
    text = f"{found:.1f} ({parts(costs)})"
    if least is not None:
        return Gate(name, f">= {least:.0f} points", text, found >= least)
    if most is not None:
        return Gate(name, f"< {most:.0f} points", text, found < most)
    return Gate(name, "reported", text, True)


def ablation_gates(on: Bench, idle_twin: bool) -> list[Gate]:
    """Vision experts of the twin are to cost little; its text experts are only reported."""
    gates, by_edit = [], {}
    for bank in ("vision", "text"):
        quantity = f"{bank}.routed_out"
        means_D = mean_outputs(on, quantity)
        for how, tap, least in (
            ("zero", off(on.model, quantity), 20.0),
            ("mean", at_mean(on.model, means_D, quantity), 10.0),
        ):
            name = f"all {bank} experts off, {how}"
            by_edit[name] = on.costs(on.confirm, tap)
            must = None if idle_twin else least
            may = 10.0 if idle_twin and bank == "vision" else None
            gates.append(cost_gate(name, by_edit[name], must, may))
        for layer in layers(on.model):
            costs = on.costs(on.confirm, at_mean(on.model, {layer: means_D[layer]}, quantity))
            note = ", no gradient reaches them" if last_vision(on, layer, bank) else ""
            gates.append(
                cost_gate(f"{bank} experts of layer {layer} at mean{note}", costs, None, None)
            )
    swapped = "vision tokens through the text bank"
    by_edit[swapped] = on.costs(on.confirm, through_text_bank(on.model))
    gates.append(
        cost_gate(
            swapped, by_edit[swapped], None if idle_twin else 20.0, 10.0 if idle_twin else None
        )
    )
    drawn = "vision experts chosen uniformly at random"
    by_edit[drawn] = min(
        (on.costs(on.confirm, random_choice(on.model, "vision", seed)) for seed in range(3)),
        key=mean,
    )
    gates.append(
        cost_gate(drawn, by_edit[drawn], None if idle_twin else 10.0, 10.0 if idle_twin else None)
    )
    gates += redrawn_gates(on, by_edit)
    gates += shared_gates(on, idle_twin)
    blind = max(
        abs(costs[kind])
        for name, costs in by_edit.items()
        if "text experts" not in name
        for kind in BLIND
    )
    gates.append(
        Gate(
            "questions that never look at the board, under any vision intervention",
            "< 1 point",
            f"at most {blind:.2f}",
            blind < 1,
        )
    )
    return gates


def last_vision(on: Bench, layer: int, bank: str) -> bool:
    """Nothing reads what the last layer writes at a picture's tokens."""
    return bank == "vision" and layer == layers(on.model)[-1]


def redrawn_gates(on: Bench, by_edit: dict[str, dict[str, float]]) -> list[Gate]:
    states, _ = vision_states(on, on.pick)
    learned = learned_routers(on.model, "vision")
    gates = []
    for variant in VARIANTS:
        routers = {
            layer: redraw(learned[layer], states[layer], N_CHOSEN, layer, variant)
            for layer in states
        }
        name = f"vision experts chosen by redrawn balanced routers, equal {variant}"
        by_edit[name] = on.costs(on.confirm, reroute_vision(on.model, routers))
        gates.append(cost_gate(name, by_edit[name], None, None))
    return gates


def shared_gates(on: Bench, idle_twin: bool) -> list[Gate]:
    means_D = mean_outputs(on, "shared_out")
    taps = {
        "zero": off(on.model, "shared_out"),
        "mean": at_mean(on.model, means_D, "shared_out"),
    }
    gates = []
    for how, tap in taps.items():
        costs = on.costs(on.confirm, tap)
        largest = max(costs, key=lambda kind: costs[kind])
        wanted = how == "zero" and not idle_twin
        gates.append(
            Gate(
                f"all shared experts off, {how}",
                ">= 5 points on one kind" if wanted else "reported",
                f"{largest} {costs[largest]:.1f}; mean {mean(costs):.1f} ({parts(costs)})",
                costs[largest] >= 5 or not wanted,
            )
        )
    return gates


def vision_states(on: Bench, sample: Sample) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """What the vision banks read, and what they choose, row by row."""
    keep = KeepVision.of(on.model)
    on.answers(sample, keep)
    return (
        {layer: torch.cat(kept) for layer, kept in keep.states.items()},
        {layer: torch.cat(kept) for layer, kept in keep.choices.items()},
    )


def glyph_rows(on: Bench, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of a vision bank are glyphs (not delimiters, not empty cells), and their facts."""
    is_glyph, facts = [], []
    for batch in sample.parts:
        for scene in batch.scene_B:
            board = on.unseen["image"].scenes[scene]
            assert not isinstance(board, Clip)
            fact_C = np.where(
                board.shape_C == NONE, NONE, board.shape_C * len(COLOURS) + board.colour_C
            )
            # Start delimiter, the cells in reading order, end delimiter.
            row = np.concatenate([[NONE], fact_C, [NONE]])
            is_glyph.append(row != NONE)
            facts.append(row)
    assert all(len(row) == N_CELLS + 2 for row in facts)
    glyphs = np.concatenate(is_glyph)
    return glyphs, np.concatenate(facts)[glyphs]


def expert_gates(on: Bench, idle_twin: bool) -> list[Gate]:
    """Own facts: routed to the expert in more than half of their occurrences on `pick`. Others:
    in fewer than one in twenty. Cost: `value` questions on `confirm`, the expert silenced."""
    _, choices = vision_states(on, on.values_pick)
    glyphs, facts = glyph_rows(on, on.values_pick)
    asked = on.values_confirm.intact.facts_Q2[:, 0]
    confirmed, tried = [], 0
    for layer in layers(on.model)[:-1]:
        shares_FE = routed_share(choices[layer].numpy()[glyphs], facts)
        for expert in range(N_EXPERTS):
            own, others = shares_FE[:, expert] > 0.5, shares_FE[:, expert] < 0.05
            if not (own.any() and others.any()):
                continue
            tried += 1
            edited = on.answers(on.values_confirm, SilenceExpert(layer, expert, "vision."))
            cost_Q = 100 * (on.values_confirm.intact.right_Q.astype(float) - edited.right_Q)
            of_own, of_others = cost_Q[own[asked]].mean(), cost_Q[others[asked]].mean()
            if of_own >= OWN_COST and of_others <= OTHER_COST:
                confirmed.append(
                    f"layer {layer} expert {expert}: {own.sum()} own facts {of_own:.1f}, "
                    f"{others.sum()} others {of_others:.1f}"
                )
    target = (
        f"at least 3: >= {OWN_COST:.0f} points on their own facts, <= {OTHER_COST:.0f} on others"
    )
    return [
        Gate(
            "single vision experts that hold facts",
            "reported" if idle_twin else target,
            f"{len(confirmed)} of {tried}. " + "; ".join(confirmed),
            idle_twin or len(confirmed) >= 3,
        )
    ]


def routed_share(ids_NK: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """`[fact expert]`: in what share of a fact's occurrences the expert is among the chosen."""
    counts_FE = np.zeros((N_FACTS, N_EXPERTS))
    np.add.at(counts_FE, (np.repeat(facts, ids_NK.shape[1]), ids_NK.ravel()), 1)
    occurrences = np.bincount(facts, minlength=N_FACTS)
    shares: np.ndarray = counts_FE / np.maximum(occurrences, 1)[:, None]
    return shares


def balance_gates(on: Bench) -> list[Gate]:
    gates = []
    for bank in ("text", "vision"):
        chosen = observe(on, on.confirm, f"{bank}.expert_ids")
        counts = [torch.bincount(ids.flatten(), minlength=N_EXPERTS) for ids in chosen.values()]
        load_LE = torch.stack(counts) / torch.stack(counts).float().mean(1, keepdim=True)
        n = len(next(iter(chosen.values())))
        chance = multinomial_reference(n, N_EXPERTS, N_CHOSEN)
        worst = ", ".join(f"{value:.2f}" for value in load_LE.amax(1) - 1)
        gates += [
            Gate(
                f"MaxVio, {bank} bank",
                "< 0.5",
                f"{worst} (layers {min(chosen)} to {max(chosen)}, {n:,} tokens; uniform routing of "
                f"as many stays below {chance.p95:.3f} in 95 % of draws)",
                bool(load_LE.max() < 1.5),
            ),
            Gate(
                f"least loaded expert, {bank} bank",
                "not dead: >= 0.01 of its fair share",
                f"{float(load_LE.min()):.2f}",
                bool(load_LE.min() >= 0.01),
            ),
        ]
    return gates


def information_gates(on: Bench) -> list[Gate]:
    """Bits between a glyph's fact and its experts. Biases of redrawn routers are fitted on `pick`;
    everything is measured on `confirm`."""
    fitted, _ = vision_states(on, on.pick)
    states, _ = vision_states(on, on.confirm)
    glyphs, facts = glyph_rows(on, on.confirm)
    labels = {
        "fact": facts,
        "shape": facts // len(COLOURS),
        "colour": facts % len(COLOURS),
        "value": VALUES[facts],
    }
    learned = learned_routers(on.model, "vision")
    gates, above = [], set()
    for layer, states_ND in states.items():
        on_glyphs = states_ND[torch.from_numpy(glyphs)]
        found = bits(on_glyphs, learned[layer], labels)
        for variant in VARIANTS:
            null = [
                bits(
                    on_glyphs,
                    redraw(learned[layer], fitted[layer], N_CHOSEN, seed, variant),
                    labels,
                )
                for seed in range(N_REDRAWN)
            ]
            texts = []
            for label in labels:
                drawn = [draw[label] for draw in null]
                texts.append(f"{label} {found[label]:.3f} [{min(drawn):.3f}, {max(drawn):.3f}]")
            if found["fact"] > max(draw["fact"] for draw in null):
                above.add((layer, variant))
            note = ", no gradient reaches it" if layer == layers(on.model)[-1] else ""
            gates.append(
                Gate(
                    f"information of layer {layer}{note}, redrawn at equal {variant}",
                    "reported",
                    "bits, [least, most] of the redrawn: " + "; ".join(texts),
                    True,
                )
            )
    both = [layer for layer in states if all((layer, variant) in above for variant in VARIANTS)]
    gates.append(
        Gate(
            f"information with the fact above all of {N_REDRAWN} redrawn routers, both kinds",
            "in at least one layer",
            f"in layers {both}" if both else "in no layer",
            bool(both),
        )
    )
    return gates


def bits(states_ND: Tensor, router: OtherRouter, labels: dict[str, np.ndarray]) -> dict[str, float]:
    ids_NK = choose(states_ND, router, N_CHOSEN).numpy()
    return {name: mutual_information(label, ids_NK, N_EXPERTS) for name, label in labels.items()}


def measure(on: Bench, idle_twin: bool) -> list[Gate]:
    return [
        *accuracy_gates(on),
        *balance_gates(on),
        *ablation_gates(on, idle_twin),
        *expert_gates(on, idle_twin),
        *information_gates(on),
    ]


__all__ = ["BankName", "measure"]
