"""Which experts a kind of text goes to: experts x labels, relative to a fair share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from numpy.typing import NDArray

from ernie_lab.interventions.bootstrap import few_drawn
from ernie_lab.plots.given import require
from ernie_lab.plots.style import DEVIATION, INK, RULE
from ernie_lab.plots.tokens import drawable, shortened
from ernie_lab.plots.view import Sheet, View

if TYPE_CHECKING:
    import xarray as xr

MAX_LABELS, MAX_EXPERTS = 60, 512
_MOST_NUMBERS = 24  # experts beside each other whose percents can be read


@overload
def plot_domain_load(
    found: xr.Dataset, *, layer: int | None = ..., label: str = ..., model: str = ...,
    ax: None = None, title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_domain_load(
    found: xr.Dataset, *, layer: int | None = ..., label: str = ..., model: str = ...,
    ax: Axes, title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_domain_load(
    found: xr.Dataset,
    *,
    layer: int | None = None,
    label: str = "domain",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """Heat map of one layer of `domain_specialisation`: red more than a fair share, blue less.

    The colour is logarithmic in share / fair share, so that half and double are equally far from
    white. Up to 24 experts have the share in percent in their cell; × is none at all.
    """
    require(
        found, "Dataset", "plot_domain_load", "el.analysis.domain_specialisation(routing, labels)"
    )
    share_CE, low_CE, high_CE, layer, names = _picked(found, layer)
    fair = float(found.attrs["fair_share"])
    n_labels, n_experts = share_CE.shape
    relative_CE = share_CE / fair
    seen = relative_CE[relative_CE > 0]
    limit = int(np.clip(np.ceil(np.percentile(np.abs(np.log2(seen)), 95)), 1, 3))
    cell = 0.42 if n_experts <= _MOST_NUMBERS else float(np.clip(7.0 / n_experts, 0.06, 0.3))
    left = 0.4 + 0.075 * max(len(name) for name in names)
    row = 0.34 if n_labels <= 24 else 0.22
    width = float(np.clip(n_experts * cell + left + 1.3, 6.0, 9.6))
    with Sheet(ax, width, n_labels * row + 1.9) as sheet:
        axes = sheet.ax
        image = axes.imshow(
            np.log2(np.clip(relative_CE, 2.0**-9, None)), cmap=DEVIATION, aspect="auto",
            norm=Normalize(-limit, limit), interpolation="nearest",
        )  # fmt: skip
        _axes(axes, names, found.n_tokens.values, n_experts, label)
        if n_experts <= _MOST_NUMBERS:
            _numbers(axes, share_CE, relative_CE, limit)
        _bar(axes, image, limit, n_labels * row)
        return sheet.finish(
            title or f"Layer {layer}: which experts each {label} goes to",
            _caption(found, model, label, low_CE, high_CE) if caption is None else caption,
            _alt(share_CE, names, layer, fair, model, label),
        )


def _picked(
    found: xr.Dataset, layer: int | None
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], int, list[str]]:
    layers = [int(x) for x in np.atleast_1d(found.layer.values)]
    if layer is None and len(layers) > 1:
        raise ValueError(f"layers {layers} are given; pick one, layer={layers[0]}")
    layer = layers[0] if layer is None else layer
    if layer not in layers:
        raise ValueError(f"no layer {layer}; there are layers {layers}")
    one = found if found.layer.ndim == 0 else found.sel(layer=layer)
    n_experts, n_labels = one.sizes["expert"], one.sizes["label"]
    if n_labels > MAX_LABELS:
        raise ValueError(
            f"{n_labels} labels, at most {MAX_LABELS}: pass found.isel(label=slice(…))"
        )
    if n_experts > MAX_EXPERTS:
        raise ValueError(f"{n_experts} experts, at most {MAX_EXPERTS}: found.isel(expert=slice(…))")
    parts = (one[name].transpose("label", "expert").values for name in ("share", "low", "high"))
    names = [shortened(str(name), 24) for name in one.label.values]
    share, low, high = parts
    return share, low, high, layer, names


def _axes(ax: Axes, names: list[str], n_tokens: NDArray[Any], n_experts: int, label: str) -> None:
    step = 1 if n_experts <= 32 else 4 if n_experts <= 96 else 32
    ax.set_xticks(range(0, n_experts, step))
    shown = [drawable(f"{name}  ({n:,})") for name, n in zip(names, n_tokens, strict=True)]
    ax.set_yticks(range(len(names)), [text for text, _ in shown], parse_math=False)
    for tick, (_, fonts) in zip(ax.get_yticklabels(), shown, strict=True):
        tick.set_fontfamily(list(fonts))
    ax.set_xticks(np.arange(n_experts - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(names) - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.6 if n_experts <= 96 else 0)
    ax.tick_params(which="both", length=0)
    ax.set_xlabel("expert")
    ax.set_ylabel(f"{label} (tokens)")
    for spine in ax.spines.values():
        spine.set_visible(False)


def _numbers(ax: Axes, share_CE: NDArray[Any], relative_CE: NDArray[Any], limit: int) -> None:
    for (row, expert), share in np.ndenumerate(share_CE):
        dark = abs(np.log2(max(float(relative_CE[row, expert]), 2.0**-9))) > 0.62 * limit
        text = "×" if share == 0 else f"{100 * share:.0f}"
        ax.text(expert, row, text, ha="center", va="center", fontsize=7,
                color="white" if dark else INK)  # fmt: skip


def _bar(ax: Axes, image: Any, limit: int, height: float) -> None:
    bar = ax.figure.colorbar(
        image, ax=ax, extend="both", pad=0.02, shrink=min(1.0, 2.4 / height), aspect=13
    )
    powers = np.arange(-limit, limit + 0.1, 0.5 if limit == 1 else 1)
    names = {0: "1"} | {p: f"1/{2.0**-p:.2g}×" for p in powers if p < 0}
    bar.set_ticks(powers.tolist(), labels=[names.get(p, f"{2.0**p:.2g}×") for p in powers])
    bar.set_label("share, × fair share")
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)


def _caption(
    found: xr.Dataset, model: str, label: str, low_CE: NDArray[Any], high_CE: NDArray[Any]
) -> str:
    k, fair = int(found.attrs["k"]), float(found.attrs["fair_share"])
    n_experts = found.sizes["expert"]
    chosen = "first choice" if k == 1 else f"{k} chosen experts"
    numbers = "Numbers: percent of its tokens. " if n_experts <= _MOST_NUMBERS else ""
    half = np.nanmedian(high_CE - low_CE) / 2 if np.isfinite(low_CE).any() else np.nan
    sure = f" Median 95 % interval over documents: ± {100 * half:.1f} points." if half >= 0 else ""
    sure += few_drawn(int(found.attrs["n_documents"])) if sure else ""
    return (
        f"{model + '. ' if model else ''}Share of a {label}'s tokens that have the expert among "
        f"their {chosen} (OLMoE's domain specialisation). {numbers}White: {100 * fair:.1f} %, what "
        f"uniform routing gives.{sure} Random routers show such patterns too, see "
        "plot_specialisation; and being chosen is not being needed."
    )


def _alt(
    share_CE: NDArray[Any], names: list[str], layer: int, fair: float, model: str, label: str
) -> str:
    best = [
        f"{name} to expert {int(row.argmax())}, {100 * row.max():.0f} %"
        for name, row in zip(names, share_CE, strict=True)
    ]
    shown = best if len(best) <= 12 else [*best[:12], f"and {len(best) - 12} more"]
    return (
        f"Heat map of layer {layer}{f' of {model}' if model else ''}, experts by {label}. Most "
        f"often: {'; '.join(shown)}. Fair share {100 * fair:.1f} %."
    )
