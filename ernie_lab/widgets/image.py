"""A picture under its routing, layer by layer, with each patch's experts in words."""

from __future__ import annotations

from typing import Any

import anywidget
import numpy as np
import traitlets

from ernie_lab.plots.image_experts import plot_image_experts
from ernie_lab.plots.image_values import plot_image_value
from ernie_lab.plots.panels import HUES, VEIL
from ernie_lab.plots.pictures import TraceLike, model_name
from ernie_lab.plots.view import View
from ernie_lab.widgets.live import below, one_of, require_state, script, shades, traced, with_still
from ernie_lab.widgets.pictured import SLOTS, Pictured, Place

MOST_NUMBERED = 36  # columns of a still picture whose boxes have room for a number
VALUES = {
    "expert": "expert",
    "weight": "weight of that choice",
    "entropy": "entropy of the router",
    "margin": "margin of the choice",
}


class ImageExplorer(anywidget.AnyWidget):
    """What `explore_image` returns. Its state can be set from Python as well.

    `image` is the picture's number in `trace.media`, `frame` the first of a pair of a clip's
    frames, `layer` the layer's number, `value` one of `VALUES`, `slot` whose choice is meant,
    `expert` the one whose boxes are framed, or -1. Where no kernel runs, a still picture is shown.
    """

    _esm = script("parts.js", "image.js")
    _css = script("explorer.css")

    about = traitlets.Dict().tag(sync=True)
    image = traitlets.Int().tag(sync=True)
    frame = traitlets.Int(0).tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    value = traitlets.Enum([*VALUES], "expert").tag(sync=True)
    slot = traitlets.Int(0).tag(sync=True)
    expert = traitlets.Int(-1).tag(sync=True)
    picture = traitlets.Dict().tag(sync=True)
    values = traitlets.Dict().tag(sync=True)

    def __init__(
        self, trace: TraceLike, image: int | None, bank: str, model: str | None = None
    ) -> None:
        self._pictured = Pictured(trace, bank)
        self._source = model_name(trace, model)
        pictures = self._pictured.pictures
        first = pictures[0] if image is None else one_of("image", image, pictures)
        pairs = {str(i): self._pictured.pairs(i) for i in pictures}
        super().__init__(
            image=first,
            frame=pairs[str(first)][0][0],
            layer=self._pictured.layers[0],
            about={
                "model": self._source,
                "bank": bank,
                "layers": self._pictured.layers,
                "pictures": [[i, self._pictured.shown(Place(i, 0)).name] for i in pictures],
                "pairs": pairs,
                "n_experts": trace.n_experts,
                "n_chosen": int(self._pictured.ids.shape[-1]),
                "values": self._known_values(),
                "hues": [[*(round(255 * x) for x in hue[:3]), float(hue[3])] for hue in HUES],
                "shades": shades(VEIL),
                "highest_entropy": float(np.log(trace.n_experts)),
            },
        )
        self._show_picture()

    def __setattr__(self, name: str, value: Any) -> None:
        require_state(self, name)
        super().__setattr__(name, value)

    def _known_values(self) -> list[list[str]]:
        """Entropy and margin need the router's probabilities."""
        absent = {
            "entropy": self._pictured.entropy is None,
            "margin": self._pictured.margin is None,
        }
        return [[value, words] for value, words in VALUES.items() if not absent.get(value)]

    @property
    def _place(self) -> Place:
        return Place(self.image, self.frame)

    @traitlets.validate("image")
    def _is_image(self, proposal: Any) -> int:
        return one_of("image", int(proposal["value"]), self._pictured.pictures)

    @traitlets.validate("frame")
    def _is_frame(self, proposal: Any) -> int:
        known = [frame for frame, _ in self._pictured.pairs(self.image)]
        return one_of("frame", int(proposal["value"]), known)

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", int(proposal["value"]), self._pictured.layers)

    @traitlets.validate("slot")
    def _is_slot(self, proposal: Any) -> int:
        n_chosen = int(self._pictured.ids.shape[-1])
        return below("slot", int(proposal["value"]), n_chosen, "the choices of a token are")

    @traitlets.validate("expert")
    def _is_expert(self, proposal: Any) -> int:
        n_experts = self._pictured.trace.n_experts
        return below("expert", int(proposal["value"]), n_experts, "the bank has", none=True)

    @traitlets.observe("image")
    def _other_image(self, _change: Any) -> None:
        if self.picture:
            with self.hold_sync():
                self.frame = self._pictured.pairs(self.image)[0][0]
                self._show_picture()

    @traitlets.observe("frame")
    def _other_frame(self, _change: Any) -> None:
        if self.picture:
            self._show_picture()

    @traitlets.observe("layer")
    def _other_layer(self, _change: Any) -> None:
        if self.picture:
            self.values = self._pictured.values(self._place, self.layer)

    def _show_picture(self) -> None:
        with self.hold_sync():
            self.picture = self._pictured.picture(self._place)
            self.values = self._pictured.values(self._place, self.layer)

    def still(self) -> View:
        """The picture that stays where no kernel runs: this layer and this value."""
        found = self._pictured
        if self.value == "expert" and not self._crowded:
            return plot_image_experts(
                found.trace, image=self.image, frame=self.frame, layer=self.layer, slot=self.slot,
                bank=found.bank, model=self._source,
            )  # fmt: skip
        array = {"entropy": found.entropy, "margin": found.margin}.get(
            self.value, found.weights.isel(slot=self.slot)
        )
        if array is None:
            raise ValueError(f"value={self.value!r}: the router's probabilities are not known")
        name = {"entropy": VALUES["entropy"], "margin": VALUES["margin"]}.get(
            self.value, f"weight of the {_rank(self.slot)} choice"
        )
        widest, even = self.picture["widest_margin"], self.about["highest_entropy"]
        highest = {"entropy": even, "margin": widest}.get(self.value, 1.0)
        lost = " (too many patches for the experts' numbers: with a kernel, point at them)"
        return plot_image_value(
            found.trace, array.sel(layer=[self.layer]), name=name,
            unit="nats" if self.value == "entropy" else "", image=self.image, frame=self.frame,
            limits=(0.0, highest), model=self._source,
            title=f"{name[:1].upper()}{name[1:]} on {self.picture['name']}, layer {self.layer}"
            + (lost if self.value == "expert" else ""),
        )  # fmt: skip

    @property
    def _crowded(self) -> bool:
        """No room for numbers in a figure of two panels."""
        rows, cols = int(self.picture["rows"]), int(self.picture["cols"])
        return cols > MOST_NUMBERED or rows > 2 * MOST_NUMBERED

    def _repr_mimebundle_(self, **selection: Any) -> Any:
        return with_still(super()._repr_mimebundle_(**selection), self.still(), repr(self))

    def __repr__(self) -> str:
        layers = self._pictured.layers
        return (
            f"explore_image: {self.picture['name']}, {self.picture['rows']} x "
            f"{self.picture['cols']} tokens, layer {self.layer} of {layers[0]}..{layers[-1]}, "
            f"{VALUES[self.value]}"
        )


def explore_image(
    trace: TraceLike, *, image: int | None = None, bank: str = "vision", model: str | None = None
) -> ImageExplorer:
    """A picture with its patches coloured by expert, weight, entropy or margin, layer by layer.

    Point at a patch for its token, its experts and where it lies in the original picture; of a
    clip, pick the pair of frames. `image` is the picture to start with. Needs `keep="routing"`;
    the still pictures are `plot_image_experts` and `plot_image_value`.
    """
    return ImageExplorer(traced(trace, "explore_image"), image, bank, model)


def _rank(slot: int) -> str:
    return SLOTS[slot] if slot < len(SLOTS) else f"{slot + 1}th"
