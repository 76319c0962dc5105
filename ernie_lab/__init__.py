"""ernie_lab: record, see and change the expert routing of ERNIE 4.5 mixture-of-experts models.

import ernie_lab as el

lab = el.load("tiny-text")
run = lab.run("Plants generate energy through", keep="routing")
run.trace.expert_ids
"""

import importlib
from typing import TYPE_CHECKING, Any

from ernie_lab.checkpoint import (
    CheckpointError,
    ConfigError,
    ModelUnavailable,
    NotEnoughMemory,
    save_model,
)
from ernie_lab.inputs import BatchError, ImageError, PromptError, VideoError
from ernie_lab.interventions import EditChangedNothingWarning, EditError, at, edit
from ernie_lab.lab import Lab
from ernie_lab.loading import load
from ernie_lab.results import Generation, Run
from ernie_lab.sites import Site, SiteError, all_sites
from ernie_lab.trace.budget import TraceTooLarge
from ernie_lab.trace.keep import keep
from ernie_lab.trace.trace import Trace

if TYPE_CHECKING:
    from ernie_lab import analysis, plots, widgets
    from ernie_lab.corpus import CorpusError, RecordPlan, RoutingStore
    from ernie_lab.experiments import Effects, LabComparison, compare, compare_labs, effects
    from ernie_lab.interventions import catalogue as edits
    from ernie_lab.interventions import experts, routing, shared
    from ernie_lab.interventions.comparison import Comparison

__version__ = "0.1.0"

__all__ = [
    "load",
    "Lab",
    "Run",
    "Generation",
    "Trace",
    "analysis",
    "plots",
    "widgets",
    "keep",
    "edit",
    "edits",
    "at",
    "shared",
    "experts",
    "routing",
    "compare",
    "Comparison",
    "compare_labs",
    "LabComparison",
    "effects",
    "Effects",
    "RecordPlan",
    "RoutingStore",
    "Site",
    "all_sites",
    "save_model",
    "BatchError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "EditChangedNothingWarning",
    "EditError",
    "ImageError",
    "ModelUnavailable",
    "NotEnoughMemory",
    "PromptError",
    "SiteError",
    "TraceTooLarge",
    "VideoError",
]


# Imported at first use: what brings matplotlib, pandas or ipywidgets, and what `load` and a run
# can do without. Modules by the name they have here, then names by the module they come from.
_MODULES = {
    "analysis": "analysis",
    "corpus": "corpus",
    "edits": "interventions.catalogue",
    "experts": "interventions.experts",
    "plots": "plots",
    "routing": "interventions.routing",
    "shared": "interventions.shared",
    "widgets": "widgets",
}
_HOMES = {
    "compare": "experiments",
    "compare_labs": "experiments",
    "Comparison": "interventions.comparison",
    "CorpusError": "corpus",
    "effects": "experiments",
    "Effects": "experiments",
    "LabComparison": "experiments",
    "RecordPlan": "corpus",
    "RoutingStore": "corpus",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(f"ernie_lab.{_MODULES[name]}")
    elif name in _HOMES:
        found = getattr(importlib.import_module(f"ernie_lab.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'ernie_lab' has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Completion offers what is not imported yet, too."""
    return sorted({*globals(), *__all__})
