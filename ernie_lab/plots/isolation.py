"""The isolation of text and pictures on one page: what is apart, and what they still share."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ernie_lab.analysis.modality_isolation import ModalityIsolation
from ernie_lab.plots.by_layer import KINDS, Line, draw, handle, layer_axis, panel_name
from ernie_lab.plots.given import require
from ernie_lab.plots.pictures import Floats
from ernie_lab.plots.shared_ratio import plot_shared_ratio
from ernie_lab.plots.style import AMOUNT, INK, MUTED, OKABE_ITO, PALE
from ernie_lab.plots.view import Sheet, View

_BANKS = ("text", "vision")
_FLOOR = 1e-9  # where a deviation of exactly 0 is drawn


def plot_isolation(
    isolation: ModalityIsolation,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Four panels of `modality_isolation`.

    1. Did every token use the bank that its id says? Logits recomputed with the gate of each bank:
       filled, the worst token with the gate that fits; hollow, the best token with the other one.
    2. Are the two routers alike? Size of the cosines between their centred rows, beside chance.
    3. What the shared experts write, by what tokens are.
    4. Who looks at whom, mean over layers and heads, beside looking evenly.
    """
    require(
        isolation,
        "ModalityIsolation",
        "plot_isolation",
        "el.analysis.modality_isolation(lab, prompts)",
    )
    report, routers = isolation.report, isolation.routers
    with Sheet(None, 9.6, 8.4, (2, 2)) as sheet:
        proof, rows, shared, attention = sheet.axes
        _proof(proof, isolation)
        _routers(rows, isolation)
        if isolation.shared is None:
            shared.axis("off")
            shared.text(0.5, 0.5, "this model has no shared experts", ha="center", color=MUTED)
        else:
            plot_shared_ratio(isolation.shared, ax=shared)
        panel_name(
            shared, "Shared: the shared experts",
            "size of their output beside the routed one, by kind of token;\n"
            "dashed: equal sizes; veil: 95 % over documents",
        )  # fmt: skip
        _attention(attention, isolation)
        n_layers = len(report.layers)
        verdict = "isolated" if report.isolated else "not isolated"
        text = (
            f"{isolation.model}. {report.n_tokens:,} tokens, {n_layers} mixture layers. Upper row: "
            "what is apart, below: what text and pictures share. Isolation of routing follows from "
            "the token ids and is not learned: an untrained model has it too. No panel says what a "
            "part does; switching it off, or crossing the banks, does."
        )
        view = sheet.finish(
            title or f"Text and pictures in {isolation.model}: routing is {verdict}",
            text if caption is None else caption,
            _alt(isolation, routers["size"].to_numpy()),
        )
        assert isinstance(view, View)
        return view


def _proof(ax: Axes, of: ModalityIsolation) -> None:
    report = of.report
    ax.axhspan(_FLOOR / 3, report.tolerance, color=PALE, lw=0, zorder=0)
    ax.axhline(report.tolerance, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=1)
    for bank, shift in zip(_BANKS, (-0.12, 0.12), strict=True):
        table = report.table.xs(bank, level="bank")
        colour, marker = KINDS[bank]
        x = table.index.to_numpy() + shift
        look: dict[str, Any] = {"marker": marker, "color": colour, "ls": "", "ms": 5, "zorder": 3}
        ax.plot(x, np.maximum(table["deviation"], _FLOOR), **look)
        ax.plot(x, table["other_gate"], mfc="white", **look)
    ax.set_yscale("log")
    ax.set_ylim(_FLOOR / 3, 30)
    ticks = [_FLOOR, 1e-6, 1e-3, 1]
    ax.set_yticks(ticks, ["0", "1e-6", "1e-3", "1"])
    ax.set_yticks([], minor=True)
    layer_axis(ax, report.layers)
    ax.set_ylabel("logits off by")
    leaks = report.table["leaks"].groupby("layer").sum()
    for layer, n in leaks[leaks > 0].items():
        ax.annotate(
            f"{n}", (layer, 8), ha="center", va="center", fontsize=7.5, color="white", zorder=5,
            bbox={"boxstyle": "round,pad=0.25", "fc": OKABE_ITO["vermillion"], "lw": 0},
        )  # fmt: skip
    dark: dict[str, Any] = {"color": INK, "marker": "o", "ls": "", "ms": 5}
    handles = [
        handle(f"{bank} bank", *KINDS[bank]) for bank in _BANKS
    ] + [Line2D([], [], label="its gate", **dark),
         Line2D([], [], label="the other gate", mfc="white", **dark)]  # fmt: skip
    for one in handles[:2]:
        one.set_linestyle("")
    ax.legend(handles=handles, loc="center right", ncols=2, handletextpad=0.2, columnspacing=0.8)
    n = report.n_tokens * len(report.layers)
    said = f"no leak in {n:,} choices" if report.leaks.empty else f"{len(report.leaks):,} leaks"
    if report.n_undecided:
        said += f", {report.n_undecided:,} undecided"
    panel_name(
        ax, f"Apart: the banks ({said})",
        "every router's logits recomputed from the gate of each bank: the worst\n"
        "of its own, the nearest of the other; grey: they fit"
        + ("" if report.leaks.empty else "; red: leaks by layer"),
    )  # fmt: skip


def _routers(ax: Axes, of: ModalityIsolation) -> None:
    table = of.routers
    layers = [int(layer) for layer in table.index]
    for name, colour, marker in (
        ("size", OKABE_ITO["vermillion"], "o"), ("largest", OKABE_ITO["sky"], "P"),
    ):  # fmt: skip
        x, width = np.array(layers), 0.34
        for place, low, high in zip(x, table[f"{name}_low"], table[f"{name}_high"], strict=True):
            ax.fill_between(
                [place - width, place + width], low, high, color=colour, alpha=0.22, lw=0
            )
        draw(ax, Line(layers, table[name], colour, marker))
    ax.axhline(float(table["size_random"].iloc[0]), color=MUTED, lw=1, ls=":")
    layer_axis(ax, layers)
    ax.set_ylim(0, max(1.15 * float(table[["largest", "largest_high"]].max().max()), 0.1))
    ax.set_ylabel("|cosine| of two rows")
    n = int(table["n_experts"].iloc[0])
    handles = [
        handle("largest", OKABE_ITO["sky"], "P"),
        handle("root mean square", OKABE_ITO["vermillion"]),
        Line2D([], [], color=MUTED, lw=1, ls=":", label="two random rows"),
    ]
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.17),
        ncols=3,
        columnspacing=1.0,
        handletextpad=0.4,
    )  # below: points may lie anywhere in the panel
    panel_name(
        ax, "Apart: the two routers",
        f"{n} text rows against {n} vision rows, each centred;\n"
        "boxes: 95 % of draws with one router's coordinates shuffled",
    )  # fmt: skip


def _attention(ax: Axes, of: ModalityIsolation) -> None:
    share, even, counts = _matrices(of)
    shown = np.where(even > 0, share, np.nan)
    ax.imshow(
        np.ma.masked_invalid(shown), cmap=AMOUNT.with_extremes(bad=PALE), vmin=0, vmax=1,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    for row, col in np.argwhere(np.isfinite(shown)).tolist():
        look: dict[str, Any] = {"ha": "center", "color": "white" if shown[row, col] > 0.5 else INK}
        ax.text(col, row - 0.03, f"{100 * shown[row, col]:.0f}", va="bottom", fontsize=9, **look)
        ax.text(col, row + 0.06, f"({100 * even[row, col]:.0f})", va="top", fontsize=7, **look)
    sources, targets = of.attention.sources, of.attention.targets
    ax.set_xticks(range(len(targets)), targets, rotation=25, ha="right", rotation_mode="anchor")
    ax.set_yticks(range(len(sources)), [f"{s} ({n})" for s, n in zip(sources, counts, strict=True)])
    ax.tick_params(length=0, labelsize=8)
    ax.set_xlabel("where they look")
    ax.set_ylabel("who looks (tokens)")
    for spine in ax.spines.values():
        spine.set_visible(False)
    n_layers, n_heads = of.attention.mass.shape[1:3]
    panel_name(
        ax, "Shared: attention",
        f"percent, mean of {n_layers} layers and {n_heads} heads; in brackets: looking\n"
        "evenly at every visible token; grey: cannot be seen",
    )  # fmt: skip


def _matrices(of: ModalityIsolation) -> tuple[Floats, Floats, list[int]]:
    """Shares (source, target), mean over layers; the even ones; how many tokens look."""
    table = of.attention.table(n_draws=1)
    mean = table.groupby(["source", "target"], sort=False)[["share", "even", "n"]].mean()
    shape = (len(of.attention.sources), len(of.attention.targets))
    share, even, n = (mean[name].to_numpy().reshape(shape) for name in ("share", "even", "n"))
    return share, even, [int(count) for count in n[:, 0]]


def _alt(of: ModalityIsolation, sizes: Floats) -> str:
    share, even, _ = _matrices(of)
    report, names = of.report, of.attention
    parts = []
    if "picture" in names.targets:
        col = names.targets.index("picture")
        parts = [
            f"{name} {share[i, col]:.0%} (evenly {even[i, col]:.0%})"
            for i, name in enumerate(names.sources)
        ]
    shared = ""
    if of.shared is not None:
        medians = of.shared["median"].groupby("content").median()
        shared = "Shared over routed output, median over layers: " + ", ".join(
            f"{kind} {value:.2g}" for kind, value in medians.items()
        )
    return (
        f"Four panels on {of.model}. {len(report.leaks)} leaks in {report.n_tokens} tokens x "
        f"{len(report.layers)} layers; logits off by {report.deviation:.1g} with the gate used, by "
        f"at least {report.other_gate:.2g} with the other. Root mean square cosine of router rows "
        f"{sizes.min():.3f} to {sizes.max():.3f}, two random rows "
        f"{of.routers['size_random'].iloc[0]:.3f}. {shared}. Attention on the picture: "
        f"{'; '.join(parts)}."
    )
