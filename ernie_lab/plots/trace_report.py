"""One self-contained HTML page about traces: pictures, expert maps, margins, load, attention."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import pandas as pd

from ernie_lab.analysis.balance import balance_table, load
from ernie_lab.plots.attention import plot_attention_heads
from ernie_lab.plots.banks import plot_banks
from ernie_lab.plots.expert_load import plot_expert_load
from ernie_lab.plots.expert_map import MAX_TOKENS, plot_expert_map
from ernie_lab.plots.image_experts import plot_clip_experts, plot_image_experts
from ernie_lab.plots.modality_attention import plot_modality_attention
from ernie_lab.plots.pictures import model_name
from ernie_lab.plots.report import MAX_BYTES, Item, Section, report
from ernie_lab.plots.router_token import plot_router_token
from ernie_lab.plots.token_text import token_html
from ernie_lab.trace.html import counts, notes, site_rows
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.ledger import RoutingLedger
from ernie_lab.trace.trace import Trace

# Of a larger picture the numbers in the boxes could not be read.
_MOST_BOXES = 600
MAX_SEQUENCES = 6
_NEEDED = ("router_logits", "expert_ids", "expert_weights")
_INTRO = (
    "Which experts each token went to. Position means expert: expert 0 is at the top of each "
    "band. A routing picture shows what separates tokens, not what experts do; for that, "
    "switch an expert off and measure."
)


@dataclass(frozen=True, slots=True)
class Reported:
    """A trace, what its model is called on the page, and the text that was generated, if any."""

    name: str
    trace: Trace
    generated: str | None = None


def reportable(trace: Trace) -> bool:
    """Is the whole routing here, of every bank that has tokens?"""
    places = _places(trace)
    return bool(places) and all(f"{place}.{name}" in trace for place in places for name in _NEEDED)


def trace_report(
    path: str | PathLike[str],
    trace: Trace,
    *,
    title: str = "",
    max_bytes: int = MAX_BYTES,
) -> Path:
    """What `Trace.report` writes: what was kept, and every figure that this can be drawn as."""
    if not len(trace):
        raise ValueError("this trace has no token: there is nothing to report")
    if not any(f"{place}.expert_ids" in trace for place in _places(trace)) and not _mapped(trace):
        kept = ", ".join(trace.sites[:4]) or "nothing"
        raise NotKept(
            f"nothing of this trace can be drawn: it kept {kept}"
            f"{' …' if len(trace.sites) > 4 else ''}. A report shows routing and attention: run "
            'again with keep="routing" or keep=["routing", "attn.pattern"]'
        )
    one = Reported(model_name(trace, None), trace)
    sections = [Section("What this is", _facts(trace)), *_each_sequence("", one)]
    return report(
        path,
        title=title or f"Trace of {trace.provenance.line()}",
        sections=sections,
        intro=_INTRO,
        max_bytes=max_bytes,
    )


def routing_report(path: str | PathLike[str], title: str, texts: Mapping[str, Reported]) -> Path:
    """One page about several traces, the text of each by its name."""
    sections = [s for heading, one in texts.items() for s in _each_sequence(heading, one)]
    return report(path, title=title, sections=sections, intro=_INTRO)


def _banks(trace: Trace) -> list[str]:
    """The banks that have tokens here; "" for the one of a text model."""
    if len(trace.banks) < 2:
        return [""] * len(trace.banks)
    with_tokens = set(trace.tokens["bank"])
    return [bank for bank in trace.banks if bank in with_tokens]


def _places(trace: Trace) -> list[str]:
    return [f"moe.{bank}" if bank else "moe" for bank in _banks(trace)]


def _mapped(trace: Trace) -> list[int]:
    """The layers whose attention maps were kept."""
    return [layer for layer in trace.layers if ("pattern", layer) in trace]


def _facts(trace: Trace) -> list[Item]:
    source = trace.provenance
    facts = {
        "model": source.line() + f", config {(source.config_hash or 'unknown')[:12]}",
        "recorded": source.created or "unknown",
        "with": ", ".join(f"{name} {version}" for name, version in source.versions.items()),
        "tokens": counts(trace),
        "kept": trace.keep,
        "edited sites": ", ".join(trace.edited) or "none",
    }
    said = "\n".join([*(f"{name}: {value}" for name, value in facts.items()), *notes(trace)])
    kept = pd.DataFrame(site_rows(trace), columns=pd.Index(["site", "layers", "size"]))
    return [said, "All that was recorded; routing and attention are drawn below.",
            kept.set_index("site")]  # fmt: skip


def _each_sequence(heading: str, one: Reported) -> list[Section]:
    sequences = one.trace.sequences
    found = []
    for sequence in sequences[:MAX_SEQUENCES]:
        named = [heading] if heading else []
        named += [f"sequence {sequence}"] if len(sequences) > 1 else []
        found += _sections(", ".join(named), one, one.trace.sel(sequence=sequence))
    if len(sequences) > 1 and not heading:
        found.append(Section("All sequences: expert load", _loads(one, one.trace)))
    rest = len(sequences) - MAX_SEQUENCES
    if rest > 0:
        told = f"{rest} more sequences are not drawn; t.sel(sequence=…).report(…) takes others."
        found.append(Section("Not shown", [told]))
    return found


def _sections(heading: str, one: Reported, trace: Trace) -> list[Section]:
    generated: list[Item] = [f"Generated: {one.generated!r}"] if one.generated else []
    found = []
    if pictures := _pictures(one, trace):
        found.append(Section(_headed(heading, "vision experts on the picture"), pictures))
    if trace.banks and any(f"{place}.expert_ids" in trace for place in _places(trace)):
        maps = [item for bank in _banks(trace) for item in _map(one, trace, bank)]
        margins = [item for bank in _banks(trace) for item in _closest(one, trace, bank)]
        found += [
            Section(_headed(heading, "every token, every layer"), [*generated, *maps]),
            Section(
                _headed(heading, "how close the choices were"),
                [
                    "The margin is the selection score of the last chosen expert minus that of "
                    "the first not chosen, here in the last layer. Where it is small, a rounding "
                    "error may choose another expert. Drawn below: the token with the smallest "
                    "margin.",
                    *margins,
                ],
            ),
            Section(_headed(heading, "expert load"), _loads(one, trace)),
        ]
    if _mapped(trace):
        found.append(Section(_headed(heading, "attention"), _attention(one, trace)))
    return found


def _headed(heading: str, what: str) -> str:
    return f"{heading}: {what}" if heading else what[:1].upper() + what[1:]


def _or_why(what: str, draw: Callable[[], Iterable[Item]]) -> list[Item]:
    """The items, or the reason why these cannot be drawn of this trace."""
    try:
        return list(draw())
    except (ValueError, NotKept) as error:
        return [f"Not drawn: {what}. {error}"]


def _border(ledger: RoutingLedger) -> int | None:
    """How many tokens of this bank came before the first generated one; None without any."""
    phases = ledger.expert_ids["phase"].values.tolist()
    n_prompt = phases.count("prefill")
    return None if n_prompt == len(phases) else n_prompt


def _map(one: Reported, trace: Trace, bank: str) -> list[Item]:
    ledger = trace.routing(bank or None)
    place = f"moe.{bank}" if bank else "moe"

    def drawn() -> Iterable[Item]:
        ids = ledger.expert_ids
        weighted = f"{place}.expert_weights" in trace
        n = ids.sizes["token"]
        if n > MAX_TOKENS:
            yield (
                f"The first {MAX_TOKENS} of {n:,} tokens; "
                "t.sel(position=slice(a, b)).report(…) takes others."
            )
        yield plot_expert_map(
            ids,
            ledger.expert_weights if weighted else None,
            n_experts=trace.n_experts,
            bank=bank,
            tokens=trace.tokens,
            window=(0, min(n, MAX_TOKENS)),
            n_prompt=_border(ledger),
            model=one.name,
        )

    return _or_why(f"the expert map{f' of the {bank} bank' if bank else ''}", drawn)


def _closest(one: Reported, trace: Trace, bank: str) -> list[Item]:
    """The margins of the last layer, and the token with the closest call: the most telling one."""
    ledger = trace.routing(bank or None)

    def drawn() -> Iterable[Item]:
        layer = int(ledger.expert_ids["layer"].values[-1])
        margin = ledger.margin.sel(layer=layer)
        place = int(margin.values.argmin())
        tokens = trace.tokens.set_index(["sequence", "pos"], drop=False)
        where = (int(margin["sequence"].values[place]), int(margin["pos"].values[place]))
        yield token_html(
            margin,
            trace.tokens,
            name=f"margin of the {bank} router" if bank else "margin",
            n_prompt=_border(ledger),
            caption=f"Layer {layer}.",
        )
        yield plot_router_token(
            ledger.router_probs.sel(layer=layer).values[place],
            ledger.expert_ids.sel(layer=layer).values[place],
            ledger.correction_bias.sel(layer=layer).values,
            token=tokens.loc[where],
            layer=layer,
            bank=bank,
            model=one.name,
        )

    return _or_why("margins", drawn)


def _loads(one: Reported, trace: Trace) -> list[Item]:
    n = trace.n_experts
    if "" in _banks(trace):
        return _or_why("expert load", lambda: _load(one, trace, trace.routing()))
    found = _or_why("both banks", lambda: [plot_banks(trace, model=one.name)])
    for bank in _banks(trace):
        ledger = trace.routing(bank)
        found.append(f"The {bank} bank:")
        found += _or_why("its balance", lambda of=ledger: [balance_table(of, n_experts=n)])  # type: ignore[misc]
    return found


def _load(one: Reported, trace: Trace, ledger: RoutingLedger) -> list[Item]:
    ids, n = ledger.expert_ids, trace.n_experts
    layers = [int(layer) for layer in ids["layer"].values]
    return [
        plot_expert_load(
            [load(ids.sel(layer=layer).values, n) for layer in layers],
            n_tokens=len(trace),
            k=trace.n_chosen,
            layers=layers,
            model=one.name,
        ),
        balance_table(ledger, n_experts=n),
    ]


def _attention(one: Reported, trace: Trace) -> list[Item]:
    """All heads of the first, middle and last layer that was kept; between text and pictures."""
    layers = _mapped(trace)
    shown = [layers[i] for i in sorted({0, len(layers) // 2, len(layers) - 1})]
    found: list[Item] = []
    if left := [layer for layer in layers if layer not in shown]:
        found.append(f"Layers {', '.join(map(str, left))} were kept too and are not drawn.")
    for layer in shown:
        found += _or_why(
            f"attention of layer {layer}",
            lambda at=layer: [plot_attention_heads(trace.pattern(at), layer=at, model=one.name)],  # type: ignore[misc]
        )
    if trace.tokens["image"].notna().any():
        found += _or_why(
            "attention between text and pictures",
            lambda: [plot_modality_attention(trace, model=one.name)],
        )
    return found


def _pictures(one: Reported, trace: Trace) -> list[Item]:
    """Each picture with its experts in the first, middle and last layer."""
    if "vision" not in trace.banks or "moe.vision.expert_ids" not in trace:
        return []
    items: list[Item] = []
    for image in sorted({int(image) for image in trace.tokens["image"].dropna()}):
        if trace.media[image].frames is None:
            items.append(f"Picture {image} was recorded without its pixels.")
        else:
            items += _or_why(f"picture {image}", lambda at=image: [_picture(one, trace, at)])  # type: ignore[misc]
    return items


def _picture(one: Reported, trace: Trace, image: int) -> Item:
    medium = trace.media[image]
    known = trace.routing("vision").expert_ids["layer"].values.tolist()
    layers = [int(known[i]) for i in sorted({0, len(known) // 2, len(known) - 1})]
    boxes = medium.grid.h * medium.grid.w // 4
    if boxes > _MOST_BOXES:
        return (
            f"Picture {image} has {boxes} tokens, too many to number here: take "
            "el.plots.plot_image_experts(trace, rows=(start, stop), cols=(start, stop))."
        )
    if medium.kind == "video":
        frames = (0, min(int(medium.grid.t), 8))
        return plot_clip_experts(
            trace, image=image, layers=layers[-1:], frames=frames, model=one.name
        )
    shown = layers if boxes <= 100 else layers[-1:]
    return plot_image_experts(trace, image=image, layers=shown, model=one.name)
