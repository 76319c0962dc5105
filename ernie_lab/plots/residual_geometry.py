"""Where kinds of tokens lie in the residual stream: norms, centroids, variance between them."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ernie_lab.analysis.residual_geometry import ResidualGeometry
from ernie_lab.plots.by_layer import (
    Line,
    draw,
    handle,
    layer_axis,
    look_of,
    null_handle,
    panel_name,
    twin_handle,
)
from ernie_lab.plots.given import require
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, PALE
from ernie_lab.plots.view import Sheet, View

_PAIRS = tuple(
    zip(("vermillion", "sky", "black", "purple", "green", "yellow"), "ovPD^s", strict=True)
)
MAX_PAIRS = len(_PAIRS)


def plot_residual_geometry(
    geometry: ResidualGeometry,
    *,
    untrained: ResidualGeometry | None = None,
    model: str = "",
    title: str | None = None,
    caption: str | None = None,
) -> View:
    """Three panels over the layers: norm by kind, cosine of centroids by pair, variance between.

    `untrained` is the geometry of an untrained twin on the same tokens, dashed: what is alike in
    both is of the architecture and of how pictures enter.
    """
    require(
        geometry,
        "ResidualGeometry",
        "plot_residual_geometry",
        "el.analysis.residual_geometry(trace)",
    )
    layers = [int(layer) for layer in geometry.between.index]
    pairs = [tuple(map(str, pair)) for pair in geometry.cosines.droplevel(0).index.unique()]
    if len(pairs) > MAX_PAIRS:
        raise ValueError(
            f"{len(geometry.kinds)} kinds make {len(pairs)} pairs, at most {MAX_PAIRS} can be told "
            "apart: give residual_geometry fewer kinds"
        )
    if untrained is not None and untrained.kinds != geometry.kinds:
        raise ValueError(f"the twin has kinds {untrained.kinds}, the model {geometry.kinds}")
    both = [(geometry, False)] + ([(untrained, True)] if untrained is not None else [])
    with Sheet(None, 11.4, 4.3, (1, 3)) as sheet:
        norms, cosines, between = sheet.axes
        for of, twin in both:
            _norms(norms, of, twin)
            _cosines(cosines, of, pairs, twin)
            _between(between, of, twin)
        for ax in sheet.axes:
            layer_axis(ax, layers)
        norms.set_yscale("log")
        norms.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        norms.yaxis.set_minor_formatter(lambda y, _: f"{y:g}" if str(y)[0] in "25" else "")
        norms.tick_params(axis="y", which="minor", labelsize=7)
        norms.set_ylabel("norm of a state, mean")
        cosines.set_ylim(min(-0.2, cosines.get_ylim()[0]), 1.05)
        cosines.axhline(0, color=MUTED, lw=0.8, zorder=1)
        cosines.set_ylabel("cosine of two centroids")
        between.set_ylim(0, None)
        between.set_ylabel("share of the variance between kinds")
        twins = [twin_handle()] if untrained is not None else []
        _below(norms, [handle(k, *look_of(k, geometry.kinds)) for k in geometry.kinds], twins)
        _below(cosines, [
            handle(f"{a} – {b}", OKABE_ITO[colour], marker)
            for (a, b), (colour, marker) in zip(pairs, _PAIRS, strict=False)
        ], [null_handle("labels shuffled: 5 % lie below")])  # fmt: skip
        _below(between, [handle("share", INK)], [*twins, null_handle("shuffled: 5 % lie above")])
        panel_name(norms, "How long")
        panel_name(cosines, "Which way")
        panel_name(between, "How far apart")
        n = geometry.norms["n_tokens"].groupby("kind").max()
        counts = ", ".join(f"{n[kind]:,} {kind}" for kind in geometry.kinds)
        text = (
            f"{model + '. ' if model else ''}N = {counts} tokens of {geometry.n_documents} "
            "documents. Veils and bars: 95 % intervals over documents. Dotted: labels of tokens "
            "shuffled within documents, so that kinds mean nothing. "
            + (
                "Hollow, dashed: a twin with random weights on the same tokens; only what differs "
                "from it came with training. "
                if untrained is not None
                else "Kinds are apart in an untrained model, too: compare with a twin. "
            )
            + "Kinds that lie apart can still be alike inside."
        )
        view = sheet.finish(
            title or "Where text and pictures lie in the residual stream",
            text if caption is None else caption,
            _alt(geometry, untrained, pairs, model),
        )
        assert isinstance(view, View)
        return view


def _norms(ax: Axes, of: ResidualGeometry, twin: bool) -> None:
    for kind in of.kinds:
        rows = of.norms.xs(kind, level="kind")
        ends = (rows["low"], rows["high"])
        draw(ax, Line(list(rows.index), rows["mean"], *look_of(kind, of.kinds), *ends, twin=twin))


def _cosines(ax: Axes, of: ResidualGeometry, pairs: list[tuple[str, ...]], twin: bool) -> None:
    for pair, (colour, marker) in zip(pairs, _PAIRS, strict=False):
        rows = of.cosines.xs(pair, level=("first", "second"))
        look = (OKABE_ITO[colour], marker, rows["low"], rows["high"])
        draw(ax, Line(list(rows.index), rows["cosine"], *look, twin=twin))
        if not twin:
            ax.plot(rows.index, rows["null_p05"], color=OKABE_ITO[colour], lw=1.0, ls=":", zorder=1)


def _between(ax: Axes, of: ResidualGeometry, twin: bool) -> None:
    rows = of.between
    ends = (rows["low"], rows["high"])
    draw(ax, Line(list(rows.index), rows["share"], MUTED if twin else INK, "o", *ends, twin=twin))
    if not twin:
        ax.fill_between(rows.index, 0, rows["null_p95"], color=PALE, lw=0, zorder=0)
        ax.plot(rows.index, rows["null_p95"], color=MUTED, lw=1.0, ls=":", zorder=1)


def _below(ax: Axes, handles: list[Line2D], more: list[Line2D]) -> None:
    """A legend under the layer axis, where nothing is drawn."""
    ax.legend(
        handles=[*handles, *more], loc="upper left", bbox_to_anchor=(-0.12, -0.17), ncols=2,
        fontsize=7.5, columnspacing=1.0, handletextpad=0.5, borderaxespad=0,
    )  # fmt: skip


def _alt(
    of: ResidualGeometry, untrained: ResidualGeometry | None, pairs: list[tuple[str, ...]],
    model: str,
) -> str:  # fmt: skip
    def ends(one: ResidualGeometry) -> str:
        rows = [one.cosines.xs(pair, level=("first", "second"))["cosine"] for pair in pairs]
        said = [
            f"{a} and {b} {row.iloc[0]:.2f} to {row.iloc[-1]:.2f}"
            for (a, b), row in zip(pairs, rows, strict=True)
        ]
        share = one.between["share"]
        return (
            f"cosine of centroids {'; '.join(said)}; variance between kinds {share.iloc[0]:.1%} "
            f"to {share.iloc[-1]:.1%}"
        )

    norms = of.norms["mean"]
    lengths = [
        f"{kind} {norms.xs(kind, level='kind').iloc[0]:.3g} to "
        f"{norms.xs(kind, level='kind').iloc[-1]:.3g}"
        for kind in of.kinds
    ]
    layers = of.between.index
    return (
        f"Residual stream{f' of {model}' if model else ''}, layer {layers[0]} to {layers[-1]}: "
        f"mean norm {', '.join(lengths)}; {ends(of)}."
        + (f" Untrained twin: {ends(untrained)}." if untrained is not None else "")
    )
