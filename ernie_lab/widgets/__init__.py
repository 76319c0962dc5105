"""Views to explore with. Each one also shows a still picture where no kernel runs."""

from ernie_lab.widgets.image import ImageExplorer, explore_image
from ernie_lab.widgets.routing import RoutingExplorer, explore_routing
from ernie_lab.widgets.slides import Slides, explore

__all__ = [
    "explore",
    "explore_image",
    "explore_routing",
    "ImageExplorer",
    "RoutingExplorer",
    "Slides",
]
