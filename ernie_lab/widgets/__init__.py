"""Views to explore with. Each one also shows a still picture where no kernel runs."""

from ernie_lab.widgets.slides import Slides, explore

__all__ = ["Slides", "explore"]
