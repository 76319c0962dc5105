"""Views to explore with. Each one also shows a still picture where no kernel runs."""

from ernie_lab.widgets.ablation import AblationExplorer, explore_ablation
from ernie_lab.widgets.attention import AttentionExplorer, explore_attention
from ernie_lab.widgets.image import ImageExplorer, explore_image
from ernie_lab.widgets.routing import RoutingExplorer, explore_routing
from ernie_lab.widgets.slides import Slides, explore

__all__ = [
    "AblationExplorer",
    "AttentionExplorer",
    "ImageExplorer",
    "RoutingExplorer",
    "Slides",
    "explore",
    "explore_ablation",
    "explore_attention",
    "explore_image",
    "explore_routing",
]


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__
