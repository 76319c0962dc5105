"""A finished figure: what every `plot_*` returns, and how it shows itself."""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ernie_lab.plots.png import compressed
from ernie_lab.plots.style import INK, MUTED, style
from ernie_lab.plots.tokens import drawable

DPI = 144  # 1.5 picture pixels per CSS pixel, sharp on most screens,
_NOTEBOOK_PIXELS = 2.4e6  # until the picture is so large that a notebook file would feel it
CSS_PER_INCH = 96
# Not a limit of matplotlib: what a notebook can still scroll through.
MAX_MEGAPIXELS = 40
_FORMATS = {".png": "png", ".svg": "svg", ".pdf": "pdf"}


class View:
    """A figure with its title, caption and alternative text; shows itself in a notebook.

    `note` is text that only a browser can draw (it has more fonts), shown below the picture.
    `figure` is a plain matplotlib Figure: change it freely, it is drawn anew each time.
    """

    def __init__(
        self, figure: Figure, *, title: str, alt: str, caption: str = "", note: str = ""
    ) -> None:
        self.figure = figure
        self.title = title
        self.alt = alt
        self.caption = caption
        self.note = note

    def png(self, dpi: float | None = None) -> bytes:
        """PNG in which a colour that fills 2 x 2 pixels or more is exactly what was drawn.

        The edges of letters and lines share what 256 colours leave, where the areas leave any;
        else the picture has true colours. Without `dpi`, for a notebook, the pixels of a
        photograph and the veils over them are approximated too: `dpi=` or `save` keeps them.
        """
        small = dpi is None
        width, height = self.figure.get_size_inches()
        dpi = min(DPI, (_NOTEBOOK_PIXELS / (width * height)) ** 0.5) if dpi is None else dpi
        megapixels = width * height * dpi**2 / 1e6
        if megapixels > MAX_MEGAPIXELS:
            raise ValueError(
                f"the picture would have {megapixels:.0f} megapixels, limit {MAX_MEGAPIXELS}: "
                "pass a smaller dpi= or plot less of the data"
            )
        raw = io.BytesIO()
        self._write(raw, "png", dpi)
        with Image.open(raw) as image:
            rgb = image.convert("RGB")
        return compressed(rgb, dpi, small=small)

    def save(self, path: str | os.PathLike[str], dpi: float = 200) -> Path:
        """Write png, svg or pdf by the suffix; all or nothing. Returns the path."""
        path = Path(path)
        if path.suffix.lower() not in _FORMATS:
            raise ValueError(f"{path.name}: suffix {path.suffix!r}; one of {', '.join(_FORMATS)}")
        buffer = io.BytesIO()
        kind = _FORMATS[path.suffix.lower()]
        if kind == "png":
            buffer.write(self.png(dpi))
        else:
            self._write(buffer, kind, dpi)
        write_atomic(path, buffer.getvalue())
        return path

    def _write(self, buffer: io.BytesIO, kind: str, dpi: float) -> None:
        undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
        with style():
            self.figure.savefig(buffer, format=kind, dpi=dpi, metadata=undated)

    def img(self, png: bytes | None = None) -> str:
        """`<img>` with the picture inside it, at its size in inches and no wider than the page."""
        data = base64.b64encode(self.png() if png is None else png).decode()
        width = round(self.figure.get_size_inches()[0] * CSS_PER_INCH)
        return (
            f'<img alt="{html.escape(self.alt)}" width="{width}" '
            f'style="max-width:100%;height:auto" src="data:image/png;base64,{data}">'
        )

    def _repr_mimebundle_(self, **_selection: Any) -> dict[str, str]:
        png = self.png()
        note = f"<div><small>{html.escape(self.note)}</small></div>" if self.note else ""
        return {
            "text/html": self.img(png) + note,
            "image/png": base64.b64encode(png).decode(),
            "text/plain": repr(self),
        }

    def __repr__(self) -> str:
        return "\n".join(filter(None, (self.title, self.alt, self.caption, self.note)))


class Sheet:
    """The axes to draw on: our own figure's (`ax`, or `axes` in a grid), or the caller's.

    A context manager that applies our style while drawing. `finish` returns a View for our own
    figure; on the caller's Axes it sets the title and returns them, caption and size are theirs.
    """

    def __init__(
        self, ax: Axes | None, width: float, height: float, grid: tuple[int, int] = (1, 1)
    ) -> None:
        self._own = ax is None
        self._size = (width, height)
        self._grid = grid
        self._given = ax

    def __enter__(self) -> Sheet:
        self._style = style()
        self._style.__enter__()
        if self._given is None:
            self.figure = Figure(figsize=self._size, layout="constrained")
            self.axes: list[Axes] = list(self.figure.subplots(*self._grid, squeeze=False).flat)
        else:
            self.axes = [self._given]
        self.ax = self.axes[0]
        return self

    def __exit__(self, *error: object) -> None:
        self._style.__exit__(None, None, None)

    def finish(self, title: str, caption: str, alt: str, note: str = "") -> View | Axes:
        if not self._own:
            text, fonts = drawable(title)
            self.ax.set_title(
                text, fontfamily=fonts, loc="left", fontweight="bold", parse_math=False
            )
            return self.ax
        # Sizes in points: 0.55 em is DejaVu's mean advance in running text.
        self._text(self.figure.suptitle, title, 11.0, color=INK, fontweight="bold", va="top")
        if caption:
            self._text(self.figure.supxlabel, caption, 8.0, color=MUTED, va="bottom")
        return View(self.figure, title=title, alt=alt, caption=caption, note=note)

    def _text(self, place: Any, words: str, points: float, **look: Any) -> None:
        text, fonts = drawable(words)
        columns = int(self._size[0] * 72 / (points * (0.62 if look.get("fontweight") else 0.55)))
        wrapped = "\n".join(textwrap.fill(line, columns) for line in text.splitlines())
        place(
            wrapped, x=0.008, ha="left", fontsize=points, fontfamily=fonts, linespacing=1.35, **look
        )


def write_atomic(path: Path, data: bytes) -> None:
    """Write beside the target, then rename: no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        # mkstemp makes it private; a figure gets what the process would give any file.
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)
        Path(temporary).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
