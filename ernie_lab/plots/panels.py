"""Pictures as small multiples: size, axes, and what is laid over the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from ernie_lab.plots.pictures import Floats, Shown
from ernie_lab.plots.style import INK, MUTED, OKABE_ITO, RULE
from ernie_lab.plots.view import Sheet

PAGE = 9.6  # inches that all panels share
TALLEST = 26.0
_WIDEST_BOX = 0.52
_NARROWEST = 1.75  # panel; else its title does not fit
_SPACE = 0.16
TITLE = 0.27
_FOOT = 0.34  # tick labels below and left of the panels
# Two digits of 4.6 points.
LEAST_NUMBERED = 0.118
LEAST_BOX = 0.02
MAX_NUMBERS = 3000

_ENLARGED = 240  # pixels that a panel of 1.75 inches shows enlarged

_SHADES = np.linspace(0, 1, 49)


def _ramp(pale: tuple[float, ...], middle: tuple[float, ...], deep: tuple[float, ...]) -> Floats:
    return np.column_stack([np.interp(_SHADES, [0, 0.5, 1], ends) for ends in zip(
        pale, middle, deep, strict=True)])  # fmt: skip


def _veil(colours: Floats, strength: Floats) -> Floats:
    """Colours that let the picture through where there is little to show."""
    return np.column_stack([colours, strength])


_BLUES = _ramp((0.42, 0.68, 0.93), (0.13, 0.44, 0.76), (0.02, 0.12, 0.34))
_REDS = _ramp((0.96, 0.60, 0.42), (0.84, 0.30, 0.22), (0.42, 0.00, 0.08))
# Nothing is nothing: at 0 the picture is bare.
_AMOUNT = np.interp(_SHADES, [0, 0.05, 1], [0.0, 0.30, 0.88])
VEIL = ListedColormap(_veil(_BLUES, _AMOUNT))
# Tinted at once on both sides: a notebook's photograph has few colours, and a faint one may turn.
DIVERGING_VEIL = ListedColormap(np.vstack([_veil(_BLUES, _AMOUNT)[:0:-1], _veil(_REDS, _AMOUNT)]))
# Hues for up to eight experts, black weaker than the others.
HUES = np.array([to_rgba(c, 0.3 if name == "black" else 0.55) for name, c in OKABE_ITO.items()])
_HEADS = 0.98  # inches of title and caption


@dataclass(frozen=True, slots=True)
class Layout:
    """Panels of one size in rows; all lengths in inches."""

    n: int
    columns: int
    width: float
    tall: float

    @property
    def lines(self) -> int:
        return -(-self.n // self.columns)

    @property
    def size(self) -> tuple[float, float]:
        return (
            self.columns * (self.width + _SPACE) - _SPACE + _FOOT,
            self.lines * (self.tall + TITLE + _SPACE) - _SPACE + _FOOT,
        )

    def sheet(self, ax: Axes | None, bar: bool = False) -> Sheet:
        """A figure with room for the panels, the words and a colour bar."""
        return Sheet(ax, self._across(bar) + 0.15 + 0.75 * bar, self.size[1] + _HEADS)

    def _across(self, bar: bool) -> float:
        """The panels' width, or more, so that the title has room."""
        return max(self.size[0], 5.5 - 0.75 * bar)

    def axes(self, sheet: Sheet, alone: bool, bar: bool = False) -> list[Axes]:
        """One Axes for each panel; a panel that is `alone` is the sheet's own."""
        if alone:
            return [sheet.ax]
        sheet.ax.axis("off")
        across, down = self._across(bar), self.size[1]
        found = []
        for i in range(self.n):
            line, column = divmod(i, self.columns)
            left = _FOOT + column * (self.width + _SPACE)
            top = line * (self.tall + TITLE + _SPACE) + TITLE
            box = (left / across, 1 - (top + self.tall) / down,
                   self.width / across, self.tall / down)  # fmt: skip
            panel = sheet.ax.inset_axes(box)
            panel.set_in_layout(False)  # titles and numbers have their room already
            found.append(panel)
        return found

    def is_edge(self, i: int) -> tuple[bool, bool]:
        """In the first column; with nothing below."""
        return i % self.columns == 0, i + self.columns >= self.n


def layout(
    n: int,
    picture: Shown,
    *,
    least: float,
    narrow: str,
    columns: Sequence[int] | None = None,
    narrowest: float = _NARROWEST,
) -> Layout:
    """As few columns as give a page that can be looked at; a box is at least `least` wide."""
    cols = picture.shape[1]
    wanted = min(PAGE, max(cols * _WIDEST_BOX, narrowest))
    start = min(n, int((PAGE + _SPACE) / (wanted + _SPACE)))
    fits = None
    for across in columns or range(start, n + 1):
        width = min((PAGE - (across - 1) * _SPACE) / across, wanted)
        found = Layout(n, min(across, n), width, width * picture.aspect)
        if width / cols >= least:
            fits = found
        if found.size[1] <= 0.9 * PAGE:
            break
    if fits is None or fits.size[1] > TALLEST:
        raise ValueError(
            f"{n} x {picture.size} do not fit on a page so that they can be read: narrow with "
            f"{narrow}, or a part of the picture, rows=(start, stop) and cols=(start, stop)"
        )
    return fits


def draw_picture(ax: Axes, picture: Shown, *, pale: bool) -> None:
    """The pixels, in colour or as a pale ground for what is laid over them."""
    pixels_YXC = picture.pixels_YXC
    if pale:
        grey_YX = (pixels_YXC @ np.array([0.299, 0.587, 0.114])) / 255
        pixels_YXC = np.repeat((255 * (0.5 + 0.5 * grey_YX))[..., None], 3, axis=2).astype(np.uint8)
    rows, cols = picture.shape
    # Enlarged pixels stay squares: what the model saw, and a third less of a file than smoothed.
    smooth = "auto" if max(pixels_YXC.shape) > _ENLARGED else "nearest"
    ax.imshow(pixels_YXC, extent=picture.extent, interpolation=smooth, zorder=1)
    ax.set_aspect(picture.aspect * cols / rows, anchor="NW")
    ax.set_xlim(picture.extent[:2])
    ax.set_ylim(picture.extent[2:])
    for spine in ax.spines.values():
        spine.set_visible(True)
        spine.set_color(RULE)


def lay_over(
    ax: Axes,
    picture: Shown,
    values_RC: Floats,
    norm: Normalize,
    cmap: ListedColormap,
    box: float,
) -> Any:
    """A veil over each box by its value; a cross where there is none."""
    missing = ~np.isfinite(values_RC)
    image = ax.imshow(
        np.ma.masked_array(values_RC, missing), cmap=cmap, norm=norm, extent=picture.extent,
        interpolation="nearest", zorder=2, aspect=ax.get_aspect(),
    )  # fmt: skip
    crosses(ax, picture, missing, box)
    return image


def crosses(ax: Axes, picture: Shown, missing_RC: NDArray[np.bool_], box: float) -> None:
    places = np.argwhere(missing_RC)
    if len(places):
        ax.scatter(
            places[:, 1] + picture.col + 0.5, places[:, 0] + picture.row + 0.5, marker="x",
            s=(box * 72 * 0.35) ** 2, lw=0.8, color=MUTED, zorder=3,
        )  # fmt: skip


def box_lines(ax: Axes, picture: Shown, box: float) -> None:
    """Thin white lines between the boxes."""
    left, right, bottom, top = picture.extent
    width = float(np.clip(box * 3, 0.25, 1.0))
    look: dict[str, Any] = {"color": "white", "lw": width, "zorder": 2.5}
    ax.vlines(np.arange(left + 1, right), top, bottom, **look)
    ax.hlines(np.arange(top + 1, bottom), left, right, **look)


def write_in_boxes(ax: Axes, picture: Shown, texts: Any, box: float, digits: int = 2) -> None:
    """A text in the middle of each box, on a thin white ground; empty ones are left out."""
    size = float(np.clip(box * 72 / (0.66 * digits + 0.35), 4.0, 9.5))
    ground = [withStroke(linewidth=size * 0.24, foreground="white")]
    for row, line in enumerate(texts):
        for col, text in enumerate(line):
            if text:
                ax.text(
                    picture.col + col + 0.5, picture.row + row + 0.52, text, ha="center",
                    va="center", fontsize=size, color=INK, zorder=4, path_effects=ground,
                    clip_on=True, in_layout=False,
                )  # fmt: skip


def outline(ax: Axes, picture: Shown, row: int, col: int) -> None:
    """A frame around one box."""
    x, y = picture.col + col, picture.row + row
    ax.plot(
        [x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color=OKABE_ITO["vermillion"], lw=1.5,
        zorder=5, solid_joinstyle="miter",
    )  # fmt: skip


def number_axes(ax: Axes, picture: Shown, width: float, *, left: bool, bottom: bool) -> None:
    """Row and column numbers of the tokens, at the outer panels."""
    rows, cols = picture.shape
    size = 6.5 if width > 1.3 else 5.5
    for axis, first, count, inches in (
        (ax.xaxis, picture.col, cols, width),
        (ax.yaxis, picture.row, rows, width * picture.aspect),
    ):
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 200) if s * inches / count >= 0.21)
        numbers = [n for n in range(first, first + count) if n % step == 0]
        axis.set_ticks([n + 0.5 for n in numbers], [str(n) for n in numbers])
    ax.tick_params(labelleft=left, labelbottom=bottom, length=0, labelsize=size, pad=1.5)
    if bottom:
        ax.set_xlabel("column", fontsize=7, labelpad=1, color=MUTED)
    if left:
        ax.set_ylabel("row", fontsize=7, labelpad=1, color=MUTED)


def value_bar(sheet: Sheet, drawn: Any, label: str, height: float) -> Any:
    """A colour bar of everything that `drawn` stands for."""
    bar = sheet.ax.figure.colorbar(
        drawn, ax=sheet.ax, shrink=min(1.0, 2.2 / height), aspect=14, pad=0.015
    )
    bar.set_label(label)
    bar.outline.set_edgecolor(RULE)
    bar.ax.tick_params(length=2)
    return bar


def panel_title(ax: Axes, text: str, *, muted: bool = False, size: float = 8.5) -> None:
    ax.set_title(
        text, fontsize=size, pad=3, fontweight="normal", color=MUTED if muted else INK, loc="left",
        parse_math=False,
    )  # fmt: skip
