"""Edits of any site, knockout, patching, files of edits: what is public as `el.edits`."""

from ernie_lab.interventions.general import add, mean, patch, resample, scale, zero
from ernie_lab.interventions.knockout import knockout, tokens
from ernie_lab.interventions.patching import patch_grid, path_patch
from ernie_lab.interventions.storing import from_json, load, save, to_json

__all__ = [
    "zero",
    "scale",
    "mean",
    "resample",
    "patch",
    "add",
    "knockout",
    "tokens",
    "patch_grid",
    "path_patch",
    "to_json",
    "from_json",
    "save",
    "load",
]


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__
