"""One figure for each value of a slider."""

from __future__ import annotations

import base64
from collections.abc import Callable, Hashable, Iterable
from typing import Any

from ernie_lab.plots.view import View


class Slides:
    """A slider over figures: what `explore` returns.

    In JupyterLab it is a slider with the picture below. Where no kernel runs (GitHub, HTML), the
    same output shows the first picture: that is why it is an object of ours and no bare widget.
    """

    def __init__(self, draw: Callable[[Any], View], values: Iterable[Hashable], name: str) -> None:
        import ipywidgets

        self.name, self.values = name, tuple(values)
        if not self.values:
            raise ValueError(f"nothing to explore: {name} has no values")
        self._draw = draw
        self._drawn: dict[Hashable, tuple[View, bytes]] = {}
        # Pictures go into one HTML, whose <img> has its alternative text; an Output would flicker.
        self.slider = ipywidgets.SelectionSlider(
            options=[(str(value), value) for value in self.values],
            description=name,
            continuous_update=False,
            style={"description_width": "initial"},
        )
        self.picture = ipywidgets.HTML()
        self.slider.add_class("ernie-slider")
        self.picture.add_class("ernie-picture")
        self.box = ipywidgets.VBox([self.slider, self.picture])
        self.slider.observe(lambda _change: self._show(), names="value")
        self._show()

    @property
    def view(self) -> View:
        """The figure that is shown now."""
        return self._now()[0]

    @property
    def png(self) -> bytes:
        """Its picture."""
        return self._now()[1]

    def _now(self) -> tuple[View, bytes]:
        value = self.slider.value
        if value not in self._drawn:
            view = self._draw(value)
            self._drawn[value] = view, view.png()
        return self._drawn[value]

    def _show(self) -> None:
        self.picture.value = self.view.img(self.png)

    def _repr_mimebundle_(self, **selection: Any) -> Any:
        still = {
            "text/html": self.view.img(self.png),
            "image/png": base64.b64encode(self.png).decode(),
        }
        shown = self.box._repr_mimebundle_(**selection) or {}
        data, metadata = shown if isinstance(shown, tuple) else (shown, {})
        return {**still, **data, "text/plain": repr(self)}, metadata

    def __repr__(self) -> str:
        return (
            f"{self.slider.description} = {self.slider.value} of {list(self.values)}\n{self.view}"
        )


def explore(draw: Callable[[Any], View], values: Iterable[Hashable], *, name: str) -> Slides:
    """A slider called `name` over `values`; `draw(value)` makes the figure, once for each value.

    el.widgets.explore(lambda layer: plot_image_experts(t, layer=layer), t.layers, name="layer")
    """
    return Slides(draw, values, name)
