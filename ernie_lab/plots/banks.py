"""Two banks of experts beside each other, each with its own tokens and its own chance level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ernie_lab.analysis.balance import load
from ernie_lab.plots.expert_load import plot_expert_load
from ernie_lab.plots.pictures import TraceLike, bank_of, chosen_layers, model_name
from ernie_lab.plots.style import MUTED
from ernie_lab.plots.view import Sheet, View

_BESIDE = 16  # more experts than this and the panels stand one below the other


def plot_banks(
    trace: TraceLike,
    *,
    layers: Sequence[int] | None = None,
    model: str | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Load of every expert by layer, one panel per bank, as in `plot_expert_load`.

    An expert of one bank is never on the same axis as one of the other: they are different
    experts. Each bank has its own number of tokens, so its own reference by chance.
    """
    n, name = trace.n_experts, model_name(trace, model)
    ledgers = {bank: bank_of(trace, bank) for bank in trace.banks}
    sizes = {bank: _n_tokens(trace, bank) for bank in ledgers}
    total = sum(sizes.values())
    if not total:
        raise ValueError("this slice of the trace has no tokens")
    loads = {
        bank: _loads(ledger, layers, n) for bank, ledger in ledgers.items() if sizes[bank]
    }  # fmt: skip
    n_layers = max(len(numbers) for numbers, _, _ in loads.values())
    row = float(np.clip(7.2 / n_layers, 0.2, 0.36))
    beside = n <= _BESIDE
    width = float(np.clip(n * 0.13, 4.0, 8.6)) + 2.2
    height = n_layers * row + 1.35
    grid = (1, len(sizes)) if beside else (len(sizes), 1)
    alts, references = [], []
    with Sheet(None, width * grid[1], height * grid[0] + 0.8, grid) as sheet:
        for ax, (bank, n_tokens) in zip(sheet.axes, sizes.items(), strict=True):
            if not n_tokens:
                ax.axis("off")
                ax.text(0.5, 0.5, f"no token went to the {bank} bank", ha="center", color=MUTED)
                alts.append(f"{bank} bank: no tokens.")
                continue
            numbers, load_LE, k = loads[bank]
            alone = plot_expert_load(load_LE, n_tokens=n_tokens, k=k, layers=numbers)
            alts.append(f"{bank} bank: {alone.alt}")
            plot_expert_load(
                load_LE, n_tokens=n_tokens, k=k, layers=numbers, ax=ax,
                title=f"{bank} bank: {n_tokens:,} tokens",
            )  # fmt: skip
            unused = int((load_LE == 0).sum())
            references.append(
                f"{bank}: N = {n_tokens:,} tokens x {k} of {n} experts"
                + (f", {unused} of {load_LE.size} without any token" if unused else "")
            )
        text = (
            f"{name + '. ' if name else ''}{'; '.join(references)}. White: the fair share, "
            f"{1 / n:.2%} of the bank's slots. The darkest blue is the end of the bar "
            "or less; × (if they are few): no token at all. Above MaxVio "
            "(the busiest expert's excess over the fair share) stands what uniform routing of as "
            "many tokens exceeds in 5 % of draws; bold is beyond that. The banks have different "
            "experts: expert 5 of one is not expert 5 of the other."
        )
        view = sheet.finish(
            title or "How evenly the experts of the two banks are used, layer by layer",
            text if caption is None else caption,
            " ".join(alts),
        )
        assert isinstance(view, View)
        return view


def _n_tokens(trace: TraceLike, bank: str) -> int:
    """Tokens that this bank really read, in the layer with most of them."""
    if not (trace.tokens["bank"] == bank).any():
        return 0
    return int(trace.routing(bank).expert_ids.shape[1])


def _loads(ledger: Any, layers: Sequence[int] | None, n: int) -> tuple[list[int], Any, int]:
    ids = ledger.expert_ids
    numbers, places = chosen_layers(ids, None, layers)
    return numbers, np.stack([load(ids.values[place], n) for place in places]), ids.shape[-1]
