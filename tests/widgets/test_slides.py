"""A slider over figures: moves, draws once, and leaves a picture behind."""

import base64

import pytest
from matplotlib.figure import Figure

from ernie_lab.plots.view import View
from ernie_lab.widgets import explore

# ipywidgets builds a comm without a kernel and says so.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Drawer:
    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, layer: int) -> View:
        self.asked.append(layer)
        figure = Figure(figsize=(2, 1))
        figure.subplots().plot([0, layer])
        return View(figure, title=f"layer {layer}", alt=f"a line up to {layer}")


def test_moving_the_slider_changes_the_picture_and_its_words() -> None:
    draw = Drawer()
    slides = explore(draw, (1, 2, 5), name="layer")
    first = slides.picture.value
    slides.slider.value = 5
    assert slides.picture.value != first
    assert 'alt="a line up to 5"' in slides.picture.value
    assert slides.view.title == "layer 5"
    slides.slider.value = 1
    assert slides.picture.value == first
    assert draw.asked == [1, 5], "each is drawn once, and only when it is looked at"


def test_without_a_kernel_the_output_is_a_picture() -> None:
    slides = explore(Drawer(), (3, 4), name="layer")
    data, _metadata = slides._repr_mimebundle_()
    assert base64.b64decode(data["image/png"]) == slides.png
    assert 'alt="a line up to 3"' in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data
    assert "layer = 3 of [3, 4]" in data["text/plain"]


def test_nothing_to_explore_is_an_error() -> None:
    with pytest.raises(ValueError, match="layer has no values"):
        explore(Drawer(), (), name="layer")
