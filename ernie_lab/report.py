"""A self-contained HTML page about the routing of some texts. Composes traces and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ernie_lab.analysis.balance import balance_table, load
from ernie_lab.plots import (
    Section,
    plot_banks,
    plot_clip_experts,
    plot_expert_load,
    plot_expert_map,
    plot_image_experts,
    plot_router_token,
    report,
    token_html,
)
from ernie_lab.plots.expert_map import MAX_TOKENS
from ernie_lab.plots.report import Item
from ernie_lab.trace.ledger import RoutingLedger
from ernie_lab.trace.trace import Trace

# Of a larger picture the numbers in the boxes could not be read.
_MOST_BOXES = 600


@dataclass(frozen=True, slots=True)
class Reported:
    """A trace, what it is called on the page, and the text that was generated, if any."""

    name: str
    trace: Trace
    generated: str | None = None


NEEDED = ("router_logits", "expert_ids", "expert_weights")


def reportable(trace: Trace) -> bool:
    """Does this trace hold what the page shows, of every bank that has tokens?"""
    banks = _banks(trace)
    places = [f"moe.{bank}" if bank else "moe" for bank in banks]
    return bool(places) and all(f"{place}.{name}" in trace for place in places for name in NEEDED)


def routing_report(path: str | Path, title: str, texts: Mapping[str, Reported]) -> Path:
    """Write one page with a section for each text: map, one token's router, load and balance."""
    sections = [
        section
        for heading, one in texts.items()
        for sequence in one.trace.sequences
        for section in _sections(
            heading if len(one.trace.sequences) == 1 else f"{heading}, sequence {sequence}",
            one,
            one.trace.sel(sequence=sequence),
        )
    ]
    intro = (
        "Which experts each token went to. Position means expert: expert 0 is at the top of each "
        "band. A routing picture shows what separates tokens, not what experts do; for that, "
        "switch an expert off and measure."
    )
    return report(path, title=title, sections=sections, intro=intro)


def _banks(trace: Trace) -> list[str]:
    """The banks that have tokens here; "" for the one of a text model."""
    if len(trace.banks) < 2:
        return [""] * len(trace.banks)
    with_tokens = set(trace.tokens["bank"])
    return [bank for bank in trace.banks if bank in with_tokens]


def _sections(heading: str, one: Reported, trace: Trace) -> list[Section]:
    banks = _banks(trace)
    ledgers = {bank: trace.routing(bank or None) for bank in banks}
    generated = [f"Generated: {one.generated!r}"] if one.generated else []
    drawn = _pictures(one, trace)
    pictures = [Section(f"{heading}: vision experts on the picture", drawn)] if drawn else []
    maps = [_map(one, trace, bank, ledger) for bank, ledger in ledgers.items()]
    return [
        *pictures,
        Section(f"{heading}: every token, every layer", [*generated, *maps]),
        Section(
            f"{heading}: how close the choices were",
            [
                "The margin is the selection score of the last chosen expert minus that of the "
                "first not chosen, here in the last layer. Where it is small, a rounding error "
                "may choose another expert. Drawn below: the token with the smallest margin.",
                *(item for bank in banks for item in _closest(one, trace, bank, ledgers[bank])),
            ],
        ),
        Section(f"{heading}: expert load", _loads(one, trace, ledgers)),
    ]


def _border(ledger: RoutingLedger) -> int | None:
    """How many tokens of this bank came before the first generated one; None without any."""
    phases = ledger.expert_ids["phase"].values.tolist()
    n_prompt = phases.count("prefill")
    return None if n_prompt == len(phases) else n_prompt


def _map(one: Reported, trace: Trace, bank: str, ledger: RoutingLedger) -> Item:
    ids = ledger.expert_ids
    return plot_expert_map(
        ids,
        ledger.expert_weights,
        n_experts=trace.n_experts,
        bank=bank,
        tokens=trace.tokens,
        window=(0, min(ids.sizes["token"], MAX_TOKENS)),
        n_prompt=_border(ledger),
        model=one.name,
    )


def _closest(one: Reported, trace: Trace, bank: str, ledger: RoutingLedger) -> list[Item]:
    """The margins of the last layer, and the token with the closest call: the most telling one."""
    layer = int(ledger.expert_ids["layer"].values[-1])
    margin = ledger.margin.sel(layer=layer)
    place = int(margin.values.argmin())
    tokens = trace.tokens.set_index(["sequence", "pos"], drop=False)
    where = (int(margin["sequence"].values[place]), int(margin["pos"].values[place]))
    return [
        token_html(
            margin,
            trace.tokens,
            name=f"margin of the {bank} router" if bank else "margin",
            n_prompt=_border(ledger),
            caption=f"Layer {layer}.",
        ),
        plot_router_token(
            ledger.router_probs.sel(layer=layer).values[place],
            ledger.expert_ids.sel(layer=layer).values[place],
            ledger.correction_bias.sel(layer=layer).values,
            token=tokens.loc[where],
            layer=layer,
            bank=bank,
            model=one.name,
        ),
    ]


def _loads(one: Reported, trace: Trace, ledgers: Mapping[str, RoutingLedger]) -> list[Item]:
    n = trace.n_experts
    if "" not in ledgers:
        return [
            plot_banks(trace, model=one.name),
            *(
                item
                for bank, ledger in ledgers.items()
                for item in (f"The {bank} bank:", balance_table(ledger, n_experts=n))
            ),
        ]
    ids = ledgers[""].expert_ids
    layers = [int(layer) for layer in ids["layer"].values]
    return [
        plot_expert_load(
            [load(ids.sel(layer=layer).values, n) for layer in layers],
            n_tokens=len(trace),
            k=trace.n_chosen,
            layers=layers,
            model=one.name,
        ),
        balance_table(ledgers[""], n_experts=n),
    ]


def _pictures(one: Reported, trace: Trace) -> list[Item]:
    """Each picture with its experts in the first, middle and last layer."""
    if "vision" not in trace.banks:
        return []
    items: list[Item] = []
    for image in sorted({int(image) for image in trace.tokens["image"].dropna()}):
        medium = trace.media[image]
        if medium.frames is None:
            continue
        known = trace.routing("vision").expert_ids["layer"].values.tolist()
        middle = {0, len(known) // 2, len(known) - 1}
        layers = [int(known[i]) for i in sorted(middle)]
        boxes = medium.grid.h * medium.grid.w // 4
        if boxes > _MOST_BOXES:
            items.append(
                f"Picture {image} has {boxes} tokens, too many to number here: take "
                "el.plots.plot_image_experts(trace, rows=(start, stop), cols=(start, stop))."
            )
        elif medium.kind == "video":
            frames = (0, min(int(medium.grid.t), 8))
            items.append(
                plot_clip_experts(
                    trace, image=image, layers=layers[-1:], frames=frames, model=one.name
                )
            )
        else:
            shown = layers if boxes <= 100 else layers[-1:]
            items.append(plot_image_experts(trace, image=image, layers=shown, model=one.name))
    return items
