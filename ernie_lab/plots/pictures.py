"""What a trace tells of one picture: its pixels, and which token lies where on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ernie_lab.plots.tokens import coordinate

if TYPE_CHECKING:
    import pandas as pd

Floats: TypeAlias = NDArray[np.float64]
Integers: TypeAlias = NDArray[np.int64]
Span: TypeAlias = tuple[int, int]


@runtime_checkable
class TraceLike(Protocol):
    """The part of `Trace` that the figures of pictures read."""

    @property
    def tokens(self) -> pd.DataFrame: ...
    @property
    def media(self) -> Sequence[Any]: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def banks(self) -> tuple[str, ...]: ...
    def routing(self, bank: str | None = None) -> Any: ...
    def pattern(self, layer: int, sequence: int | None = None) -> Any: ...


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """One image, or two frames of a clip, and the position of the token in each of its boxes.

    `pixels_YXC` are what the model saw, `second_YXC` the other frame of a pair. `positions_RC` is
    -1 where the trace has no such token.
    `row` and `col` are the first ones shown: true numbers, also in a part of the picture.
    """

    image: int
    kind: str
    frame: int
    frames: str
    sequence: int
    pixels_YXC: NDArray[np.uint8]
    positions_RC: Integers
    row: int = 0
    col: int = 0
    second_YXC: NDArray[np.uint8] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        rows, cols = self.positions_RC.shape
        return rows, cols

    @property
    def n_tokens(self) -> int:
        """Boxes that have a token in this trace."""
        return int((self.positions_RC >= 0).sum())

    @property
    def aspect(self) -> float:
        """Height over width, in pixels."""
        height, width, _ = self.pixels_YXC.shape
        return float(height / width)

    @property
    def name(self) -> str:
        return f"{'image' if self.kind == 'image' else 'clip'} {self.image}"

    @property
    def label(self) -> str:
        """The name, and which frames of a clip."""
        return f"{self.name}{f', {self.frames}' if self.frames else ''}"

    @property
    def size(self) -> str:
        rows, cols = self.shape
        return f"{rows} x {cols} tokens"

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """left, right, bottom, top in rows and columns of tokens, for `imshow`."""
        rows, cols = self.shape
        return self.col, self.col + cols, self.row + rows, self.row

    def indices(self, array: Any) -> Integers:
        """`[row col]`: where each box's token is on the token axis of `array`, -1 if it is not."""
        return indices(array, self.sequence, self.positions_RC)

    def folded(self, values_N: Floats, index_RC: Integers) -> Floats:
        """`[row col]` of the values at `index_RC`, NaN where it is -1."""
        return np.where(index_RC >= 0, values_N[np.maximum(index_RC, 0)], np.nan)


def indices(array: Any, sequence: int, positions: Integers) -> Integers:
    """Where these positions of a sequence are on the token axis of a labelled array."""
    pos, sequences = coordinate(array, "pos"), coordinate(array, "sequence")
    if pos is None:
        raise ValueError("the array has no coordinate pos, so its tokens cannot be found")
    pos_N = np.asarray(pos, dtype=np.int64)
    mine_N = np.ones(len(pos_N), bool) if sequences is None else np.asarray(sequences) == sequence
    lookup = np.full(int(max(pos_N.max(initial=0), positions.max(initial=0))) + 2, -1)
    lookup[pos_N[mine_N]] = np.flatnonzero(mine_N)
    return np.asarray(lookup[np.where(positions < 0, len(lookup) - 1, positions)])


def shown(
    trace: TraceLike,
    image: int,
    frame: int | None = None,
    rows: Span | None = None,
    cols: Span | None = None,
) -> Shown:
    """Image `image` of the trace, or of a clip the pair of frames that `frame` is one of.

    `rows=(start, stop)` and `cols=(start, stop)` narrow it, counted in tokens.
    """
    medium = medium_of(trace, image)
    n_rows, n_cols = medium.grid[1] // 2, medium.grid[2] // 2
    first, frames = _frames(medium, image, frame)
    table = trace.tokens
    mine = table[(table["image"] == image) & (table["frame"] == first)]
    positions_RC = np.full((n_rows, n_cols), -1)
    positions_RC[mine["row"].to_numpy(int), mine["col"].to_numpy(int)] = mine["pos"].to_numpy(int)
    if not len(mine):
        raise ValueError(f"the tokens of picture {image} are not in this slice of the trace")
    top, bottom = _span("rows", rows, n_rows)
    left, right = _span("cols", cols, n_cols)
    _, down, across, _ = medium.frames.shape
    height, width = down / n_rows, across / n_cols
    part_TYXC = np.asarray(medium.frames)[
        first : first + 2,
        round(top * height) : round(bottom * height),
        round(left * width) : round(right * width),
    ]
    return Shown(
        image, str(medium.kind), first, frames, int(medium.sequence), part_TYXC[0],
        positions_RC[top:bottom, left:right], top, left, part_TYXC[1] if frames else None,
    )  # fmt: skip


def medium_of(trace: TraceLike, image: int) -> Any:
    """The picture with this number; raises where the trace has none, or not its pixels."""
    media = trace.media
    if not media:
        raise ValueError("this trace has no pictures: run the prompt with images= or videos=")
    if not 0 <= image < len(media):
        raise ValueError(f"image={image}: the trace has pictures 0 to {len(media) - 1}")
    if media[image].frames is None:
        raise ValueError(f"the pixels of picture {image} are not in the trace: it was recorded "
                         "without media=")  # fmt: skip
    return media[image]


def _frames(medium: Any, image: int, frame: int | None) -> tuple[int, str]:
    """The first frame of the pair, and both in words."""
    n_frames = int(medium.grid[0])
    wanted = 0 if frame is None else frame
    if not 0 <= wanted < n_frames:
        raise ValueError(f"frame={frame}: picture {image} has frames 0 to {n_frames - 1}")
    if n_frames == 1:
        return 0, ""
    first = wanted - wanted % 2
    times = [medium.timestamps[i] for i in (first, first + 1) if i < len(medium.timestamps)]
    seconds = f" ({' and '.join(f'{time:.1f}' for time in times)} s)" if times else ""
    return first, f"frames {first} and {first + 1}{seconds}"


def _span(name: str, wanted: Span | None, size: int) -> Span:
    start, stop = (0, size) if wanted is None else wanted
    if not 0 <= start < stop <= size:
        raise ValueError(f"{name}={wanted}: (start, stop) within 0 and {size} is needed")
    return start, stop


def bank_of(trace: TraceLike, bank: str) -> Any:
    """The routing of a bank, of a model that has two."""
    if len(trace.banks) < 2:
        raise ValueError(
            f"bank={bank!r}: this model has one bank of experts, so it reads no pictures; for its "
            "routing there are plot_expert_map and plot_expert_load"
        )
    return trace.routing(bank)


def model_name(trace: Any, model: str | None) -> str:
    """The name for captions, given or the trace's own, and what the run was edited with."""
    source = getattr(trace, "provenance", None)
    name = str(getattr(source, "model", "")) if model is None else model
    edited = str(getattr(source, "edited", ""))
    return name if edited in name else ", ".join(filter(None, (name, edited)))


def chosen_layers(
    array: Any, layer: int | None, layers: Sequence[int] | None
) -> tuple[list[int], list[int]]:
    """Their true numbers and their places on the layer axis of `array`; without any, all."""
    known = [int(one) for one in coordinate(array, "layer") or []]
    if layer is not None and layers is not None:
        raise ValueError("layer= and layers= are both given: one of them is needed")
    wanted = [layer] if layer is not None else known if layers is None else list(layers)
    absent = [one for one in wanted if one not in known]
    if absent or not wanted:
        raise ValueError(f"layers={wanted}: the trace has experts in layers {known}")
    return wanted, [known.index(one) for one in wanted]
