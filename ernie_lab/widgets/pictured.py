"""What the view of pictures shows of a trace: the pixels, and each box's token at a layer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ernie_lab.inputs.media import Cell
from ernie_lab.plots.pictures import Floats, Shown, TraceLike, bank_of, medium_of, shown
from ernie_lab.plots.tokens import coordinate
from ernie_lab.trace.keys import NotKept

if TYPE_CHECKING:
    import xarray as xr

SLOTS = ("first", "second", "third")
_SIDE = 760  # pixels; more does not fit beside the words


@dataclass(frozen=True, slots=True)
class Place:
    """A picture of the trace and, of a clip, the first frame of a pair."""

    image: int
    frame: int


class Pictured:
    """The pictures of a trace and how one bank of experts read them."""

    def __init__(self, trace: TraceLike, bank: str) -> None:
        self.trace, self.bank = trace, bank
        self.ledger = bank_of(trace, bank)
        self.ids, self.weights = self.ledger.expert_ids, self.ledger.expert_weights
        self.layers = [int(layer) for layer in coordinate(self.ids, "layer") or []]
        self.pictures = sorted({int(i) for i in trace.tokens["image"].dropna()})
        if not self.pictures:
            medium_of(trace, 0)  # says what is missing
            raise ValueError("no token of a picture is in this slice of the trace")
        self._drawn: dict[Place, Shown] = {}

    def pairs(self, image: int) -> list[tuple[int, str]]:
        """First frames of the pairs that share their tokens, and their names; of an image one."""
        table = self.trace.tokens
        frames = sorted({int(f) for f in table.loc[table["image"] == image, "frame"]})
        return [(frame, self.shown(Place(image, frame)).frames) for frame in frames]

    def shown(self, place: Place) -> Shown:
        if place not in self._drawn:
            self._drawn[place] = shown(self.trace, place.image, place.frame)
        return self._drawn[place]

    @cached_property
    def entropy(self) -> xr.DataArray | None:
        """(layer, token), of the router's probabilities, in nats; None where they are unknown."""
        try:
            probs: xr.DataArray = self.ledger.router_probs
        except (NotKept, ValueError):
            return None
        # As in the definition of entropy, 0 log 0 is 0.
        log_probs = np.log(probs.where(probs > 0, 1.0))
        return -(probs * log_probs).sum("expert")

    @cached_property
    def margin(self) -> xr.DataArray | None:
        """(layer, token), of selection scores; None where they are unknown."""
        try:
            margin: xr.DataArray = self.ledger.margin
        except (NotKept, ValueError):
            return None
        return margin

    def picture(self, place: Place) -> dict[str, Any]:
        """Pixels as PNG, the grid of boxes, and what each box covers of the original picture."""
        one, medium = self.shown(place), medium_of(self.trace, place.image)
        rows, cols = one.shape
        boxes = [
            medium.original_box(Cell(place.frame, r, c)) for r in range(rows) for c in range(cols)
        ]
        frames = [one.pixels_YXC] if one.second_YXC is None else [one.pixels_YXC, one.second_YXC]
        height, width = medium.original_size
        return {
            "image": place.image,
            "frame": place.frame,
            "name": one.label,
            "rows": rows,
            "cols": cols,
            "aspect": one.aspect,
            "original": f"{width} x {height}",
            "frames": [_png(frame_YXC) for frame_YXC in frames],
            "positions": one.positions_RC.ravel().astype("<i4").tobytes(),
            "boxes": np.asarray(boxes, dtype="<f4").tobytes(),
            "widest_margin": self._widest(one),
        }

    def values(self, place: Place, layer: int) -> dict[str, Any]:
        """Of every box, row by row: ids (int16), weights, probabilities `[box slot]`, entropy and
        margin `[box]` (float32); -1 and NaN where the bank did not read the token."""
        one, at = self.shown(place), self.layers.index(layer)
        index_C = one.indices(self.ids).ravel()
        ids_CK = _taken(self.ids.values[at], index_C)
        probs_CK = np.full(ids_CK.shape, np.nan)
        if self.entropy is not None:
            probs_CE = _taken(self.ledger.router_probs.values[at], index_C)
            chosen_CK = np.nan_to_num(ids_CK, nan=0).astype(np.int64)
            probs_CK = np.take_along_axis(probs_CE, chosen_CK, axis=1)
        return {
            "image": place.image,
            "frame": place.frame,
            "layer": layer,
            "ids": np.nan_to_num(ids_CK, nan=-1).astype("<i2").tobytes(),
            "weights": _taken(self.weights.values[at], index_C).astype("<f4").tobytes(),
            "probs": probs_CK.astype("<f4").tobytes(),
            "entropy": self._of_boxes(self.entropy, at, index_C),
            "margin": self._of_boxes(self.margin, at, index_C),
        }

    @staticmethod
    def _of_boxes(array: xr.DataArray | None, at: int, index_C: Any) -> bytes:
        nothing = np.full(len(index_C), np.nan)
        values_C = nothing if array is None else _taken(array.values[at], index_C)
        return values_C.astype("<f4").tobytes()

    def _widest(self, one: Shown) -> float:
        """The widest margin in any layer, so that all layers have one scale."""
        if self.margin is None:
            return 1.0
        index_C = one.indices(self.ids).ravel()
        margins = self.margin.values[:, index_C[index_C >= 0]]
        return float(np.nanmax(margins, initial=0.0)) or 1.0


def _taken(values_N: Any, index_C: Any) -> Floats:
    """Rows at these places, NaN where the place is -1."""
    taken: Floats = np.asarray(values_N, dtype=np.float64)[np.maximum(index_C, 0)]
    taken[index_C < 0] = np.nan
    return taken


def _png(pixels_YXC: Any) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(pixels_YXC))
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "png")
    return file.getvalue()
