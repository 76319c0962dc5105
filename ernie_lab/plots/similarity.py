"""Heat maps of experts against experts: cosines, similarities, how often two go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from numpy.typing import ArrayLike, NDArray

from ernie_lab.plots.style import DEVIATION, INK, PALE, RULE
from ernie_lab.plots.tokens import coordinate
from ernie_lab.plots.view import Sheet, View

Floats = NDArray[np.float64]
Order = Literal["number", "alike"]

MAX_EXPERTS = 160
_NUMBERED = 16  # experts whose cells can hold a number
ORDERED = (
    "Order: alike experts stand together, which makes a band along the diagonal out of noise too; "
    "the numbers are the true ones."
)
_OWN = "#cfd4da"  # a cell of an expert with itself: no colour of either scale
_DARK = 0.6  # of the scale: from here on the numbers are white


@dataclass(frozen=True, slots=True, eq=False)
class Square:
    """Values `[row, column]` in the order in which they are drawn, with true expert numbers.

    `own_diagonal`: rows and columns are the same experts, so that the diagonal is themselves.
    """

    values: Floats
    rows: list[int]
    columns: list[int]
    own_diagonal: bool

    @property
    def apart(self) -> Floats:
        """The values that compare two different things; each pair once where both ways agree."""
        keep = np.isfinite(self.values)
        if self.own_diagonal:
            known = np.where(keep, self.values, 0.0)
            twice = np.allclose(known, known.T) and (keep == keep.T).all()
            keep &= np.triu(keep, 1) if twice else ~np.eye(len(keep), dtype=bool)
        return self.values[keep]

    def extreme(self, largest: bool) -> tuple[int, int, float]:
        """Row, column and value of the largest or smallest of `apart`."""
        shown = np.where(np.isfinite(self.values), self.values, -np.inf if largest else np.inf)
        if self.own_diagonal:
            np.fill_diagonal(shown, -np.inf if largest else np.inf)
        i, j = np.unravel_index(shown.argmax() if largest else shown.argmin(), shown.shape)
        return self.rows[i], self.columns[j], float(shown[i, j])


@overload
def plot_similarity(
    matrix: ArrayLike, *, name: str, layer: int | None = ..., rows: str | None = ...,
    columns: str | None = ..., spread: float | None = ..., center: float | None = ...,
    chance_name: str | None = ..., order: Order = ..., model: str = ..., ax: None = None,
    title: str | None = ..., caption: str | None = ...,
) -> View: ...  # fmt: skip
@overload
def plot_similarity(
    matrix: ArrayLike, *, name: str, layer: int | None = ..., rows: str | None = ...,
    columns: str | None = ..., spread: float | None = ..., center: float | None = ...,
    chance_name: str | None = ..., order: Order = ..., model: str = ..., ax: Axes,
    title: str | None = ..., caption: str | None = ...,
) -> Axes: ...  # fmt: skip
def plot_similarity(
    matrix: ArrayLike,
    *,
    name: str,
    layer: int | None = None,
    rows: str | None = None,
    columns: str | None = None,
    spread: float | None = None,
    center: float | None = None,
    chance_name: str | None = None,
    order: Order = "number",
    model: str = "",
    ax: Axes | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> View | Axes:
    """A matrix of similarities `[row, column]`, in the unit `name` ("cosine of router rows").

    `layer` chooses from an array with that axis. `rows` and `columns` name what stands there, by
    default the array's axes ("text_expert"). White is `center`, what chance gives, and `spread`
    the size of chance's deviations from it: it is marked on the colour bar, and the scale is never
    narrower than three times it, so that noise does not look like structure. Both, and
    `chance_name`, are by default the array's attributes `chance`, `chance_spread`, `chance_name`;
    without them white is 0. `order="alike"` puts alike experts next to each other, under their
    true numbers.
    """
    told = getattr(matrix, "attrs", {})
    center = float(told.get("chance", 0.0) if center is None else center)
    spread = float(told.get("chance_spread", 0.0) if spread is None else spread)
    chance = told.get("chance_name", "chance") if chance_name is None else chance_name
    one, layer = one_layer(matrix, layer)
    names = _axis_names(one, rows, columns)
    square = ordered(one, order, same=names[0] == names[1])
    limit = float(max(np.abs(square.apart - center).max(initial=0), 3 * spread)) or 1.0
    side = side_of(square)
    with Sheet(ax, side[0] + 1.9, side[1] + 1.95) as sheet:
        scale = Normalize(center - limit, center + limit)
        image = draw_square(sheet.ax, square, DEVIATION, scale, side, _plain)
        name_axes(sheet.ax, *names)
        bar = colour_bar(sheet.ax, image, name, side[1])
        mark_chance(bar, [center - spread, center + spread] if spread else [center])
        between = "" if names[0] == names[1] else f": {names[0]}s against {names[1]}s"
        where = "" if layer is None else f" in layer {layer}"
        return sheet.finish(
            title or f"{name[:1].upper()}{name[1:]}{where}{between}",
            _caption(square, model, layer, center, spread, chance, order)
            if caption is None
            else caption,
            _alt(square, name, names, model, layer, center, spread, chance),
        )


def _axis_names(matrix: Any, rows: str | None, columns: str | None) -> tuple[str, str]:
    dims = [str(dim) for dim in getattr(matrix, "dims", ("expert", "other"))]
    row, column = (dim.replace("_", " ") for dim in dims)
    return rows or row, columns or ("expert" if column == "other" else column)


def one_layer(matrix: Any, layer: int | None) -> tuple[Any, int | None]:
    """The matrix of one layer, and its true number where it is known."""
    if "layer" not in getattr(matrix, "dims", ()):
        known = coordinate(matrix, "layer")
        return matrix, layer if layer is not None or not known else int(known[0])
    numbers = [int(one) for one in matrix.coords["layer"].values]
    if layer is None and len(numbers) == 1:
        layer = numbers[0]
    if layer not in numbers:
        raise ValueError(f"layer={layer}: one of {', '.join(map(str, numbers))} is drawn at a time")
    return matrix.sel(layer=layer), layer


def ordered(matrix: Any, order: Order, same: bool = True, alike: Floats | None = None) -> Square:
    """`alike` are the similarities to order by, where they are not the values."""
    values = np.asarray(matrix, dtype=np.float64)
    if values.ndim != 2 or not values.size:
        raise ValueError(f"a matrix of shape {values.shape}; expected [row, column]")
    if max(values.shape) > MAX_EXPERTS:
        raise ValueError(
            f"{values.shape[0]} x {values.shape[1]} experts, at most {MAX_EXPERTS} can be told "
            "apart: pass matrix[start:stop, start:stop]"
        )
    dims = getattr(matrix, "dims", (None, None))
    rows, columns = (
        [int(one) for one in coordinate(matrix, str(dim)) or range(size)]
        for dim, size in zip(dims, values.shape, strict=True)
    )
    if not np.isfinite(values).any():
        raise ValueError("no cell of the matrix is a number")
    if order == "number":
        return Square(values, rows, columns, same and rows == columns)
    if order != "alike":
        raise ValueError(f"order={order!r}; 'number' or 'alike'")
    if rows != columns or not same:
        raise ValueError("order='alike' needs the same experts in rows and columns")
    place = leaf_order(values if alike is None else alike)
    numbers = [rows[i] for i in place]
    return Square(values[np.ix_(place, place)], numbers, numbers, True)


def leaf_order(values: Floats) -> list[int]:
    """Alike next to each other: average linkage, leaves ordered so that the sum of similarities
    of neighbours is largest (Bar-Joseph et al. 2001, as in scipy)."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import squareform

    if len(values) < 3:
        return list(range(len(values)))
    alike = (values + values.T) / 2
    apart = ~np.eye(len(values), dtype=bool) & np.isfinite(alike)
    far = float(alike[apart].max()) - alike
    far[~np.isfinite(far)] = np.nanmax(far[apart]) if apart.any() else 0.0
    np.fill_diagonal(far, 0.0)
    distances = squareform(far, checks=False)
    tree = optimal_leaf_ordering(linkage(distances, "average"), distances)
    return [int(i) for i in leaves_list(tree)]


def side_of(square: Square) -> tuple[float, float]:
    """Width and height in inches."""
    n_rows, n_columns = square.values.shape
    cell = float(np.clip(7.4 / max(n_rows, n_columns), 0.05, 0.34))
    return max(n_columns * cell, 2.6), max(n_rows * cell, 2.2)


def draw_square(
    ax: Axes, square: Square, cmap: Colormap, norm: Normalize, side: tuple[float, float],
    write: Any, colours: Floats | None = None,
) -> Any:  # fmt: skip
    """The cells, `colours` where these are not the values; numbers in them where there is room."""
    values = square.values if colours is None else colours
    shown = np.ma.masked_invalid(values)
    n_rows, n_columns = values.shape
    image = ax.imshow(
        shown, cmap=cmap.with_extremes(bad=PALE), norm=norm, aspect="auto", interpolation="nearest"
    )
    if square.own_diagonal:
        for i in range(n_rows):
            ax.add_patch(_themselves(i))
    cell = min(side[0] / n_columns, side[1] / n_rows)
    size = float(np.clip(cell * 72 * 0.62, 4.6, 8))
    # Numbers of three digits are as wide as two cells are high.
    step = next(s for s in (1, 2, 4, 8, 16) if s * cell >= 0.09)
    for axis, numbers in ((ax.xaxis, square.columns), (ax.yaxis, square.rows)):
        places = range(0, len(numbers), step)
        axis.set_ticks(list(places), [str(numbers[i]) for i in places])
    ax.tick_params(length=0, labelsize=size, pad=2)
    if cell < 0.17 and max(square.columns) > 9:
        ax.tick_params(axis="x", labelrotation=90)
    ax.set_xticks(np.arange(n_columns - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(n_rows - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.5 if cell > 0.12 else 0.25)
    ax.tick_params(which="minor", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if max(n_rows, n_columns) <= _NUMBERED:
        _write(ax, square, values, norm, cell, write, cmap is DEVIATION)
    return image


def _themselves(i: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((i - 0.5, i - 0.5), 1, 1, facecolor=_OWN, edgecolor="white", lw=0.5, zorder=2)


def _write(
    ax: Axes, square: Square, colours: Floats, norm: Normalize, cell: float, write: Any,
    diverging: bool,
) -> None:  # fmt: skip
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 1.0)
    for i, j in np.argwhere(np.isfinite(square.values)).tolist():
        if square.own_diagonal and i == j:
            continue
        far = (colours[i, j] - low) / (high - low)
        if diverging:
            far = abs(2 * far - 1)
        ax.text(
            j, i, write(float(square.values[i, j])), ha="center", va="center", zorder=3,
            fontsize=float(np.clip(cell * 21, 4.5, 7.5)), color="white" if far > _DARK else INK,
        )  # fmt: skip


def _plain(value: float) -> str:
    """.12 and -.03: a leading zero would cost a third of the cell."""
    if abs(value) < 0.005:
        return "0"
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(value) < 0.995 else f"{value:.1f}"


def name_axes(ax: Axes, rows: str, columns: str) -> None:
    ax.set_ylabel(rows)
    ax.set_xlabel(columns)


def colour_bar(ax: Axes, image: Any, label: str, height: float, **look: Any) -> Any:
    bar = ax.figure.colorbar(
        image, ax=ax, pad=0.02, shrink=min(1.0, 2.8 / height), aspect=15, **look
    )
    bar.set_label(label)
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)
    return bar


def mark_chance(bar: Any, values: Sequence[float]) -> None:
    """Lines on a colour bar: what chance gives."""
    for value in values:
        bar.ax.axhline(value, color=INK, lw=1.1)


def three(value: float) -> str:
    """Three decimals, and no minus before a zero."""
    return f"{round(value, 3) + 0.0:.3f}"


def _caption(
    square: Square, model: str, layer: int | None, center: float, spread: float, chance: str,
    order: Order,
) -> str:  # fmt: skip
    apart = square.apart
    head = ", ".join(filter(None, (model, "" if layer is None else f"layer {layer}")))
    parts = [
        f"{head}: " if head else "",
        f"{apart.size:,} pairs, mean {three(apart.mean())}, from {three(apart.min())} to "
        f"{three(apart.max())}.",
    ]
    if spread:
        beyond = float((np.abs(apart - center) > 2 * spread).mean())
        parts.append(
            f" Lines on the colour bar: {three(center) + ' ' if center else ''}±{three(spread)}, "
            f"{chance}; {beyond:.0%} of the pairs are beyond twice that (4.6 % by chance)."
        )
    elif center:
        parts.append(f" White and the line on the colour bar: {three(center)}, {chance}.")
    if square.own_diagonal:
        parts.append(" Grey: an expert with itself.")
    if order == "alike":
        parts.append(f" {ORDERED}")
    return "".join(parts)


def _alt(
    square: Square, name: str, names: tuple[str, str], model: str, layer: int | None,
    center: float, spread: float, chance: str,
) -> str:  # fmt: skip
    i, j, high = square.extreme(True)
    m, n, low = square.extreme(False)
    expected = (f" Chance: {three(center)}" + (f" ±{three(spread)}" if spread else "")
                + f", {chance}." if spread or center else "")  # fmt: skip
    return (
        f"Heat map of {name}{f' of {model}' if model else ''}"
        f"{'' if layer is None else f', layer {layer}'}: {len(square.rows)} {names[0]}s by "
        f"{len(square.columns)} {names[1]}s. Largest: {names[0]} {i}, {names[1]} {j}, "
        f"{three(high)}; smallest: {names[0]} {m}, {names[1]} {n}, {three(low)}; mean "
        f"{three(square.apart.mean())}.{expected}"
    )
