"""ernie_lab: record, see and change the expert routing of ERNIE 4.5 mixture-of-experts models.

lab = el.load("tiny-text")                 a model: shipped, a folder, or a name on the hub
run = lab.run(prompt, keep="routing")      one pass; run.trace is what was kept, by name
lab.generate(prompt, max_new_tokens=20)    a continuation, recorded too if keep= says so
el.keep("routing", layers=[1, 2])          what to keep, narrowed; lab.sites() lists all
lab.run(prompt, edits=el.shared.zero())    edits: el.shared, el.experts, el.routing, el.edits
el.compare(lab, prompts, {"off": edit})    the effect of edits, with intervals and noise floor
el.analysis.balance_by(run.trace)          numbers of a trace
el.plots.plot_expert_map(run.trace)        figures
el.widgets.explore_routing(run.trace)      views to click through
el.RecordPlan(model=…, corpus=…, folder=…).run()    the routing of a whole corpus
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ernie_lab import analysis, plots, widgets
    from ernie_lab.checkpoint import (
        CheckpointError,
        ConfigError,
        ModelUnavailable,
        NotEnoughMemory,
        save_model,
    )
    from ernie_lab.corpus import CorpusError, RecordPlan, RoutingStore
    from ernie_lab.experiments import Effects, LabComparison, compare, compare_labs, effects
    from ernie_lab.inference.forward import LossNotFiniteWarning
    from ernie_lab.inputs import (
        BatchError,
        ChatTemplateError,
        ImageError,
        PromptError,
        VideoError,
    )
    from ernie_lab.interventions import (
        EditChangedNothingWarning,
        EditError,
        at,
        edit,
        experts,
        routing,
        shared,
    )
    from ernie_lab.interventions import catalogue as edits
    from ernie_lab.interventions.comparison import Comparison
    from ernie_lab.lab import Lab
    from ernie_lab.loading import load
    from ernie_lab.organisms.builtin import BuiltinError
    from ernie_lab.results import Generation, NothingKept, Run
    from ernie_lab.sites import Site, SiteError, all_sites
    from ernie_lab.trace.budget import TraceTooLarge
    from ernie_lab.trace.keep import keep
    from ernie_lab.trace.keys import NotKept
    from ernie_lab.trace.storage import TraceFileError
    from ernie_lab.trace.trace import Trace

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
    "BuiltinError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "EditChangedNothingWarning",
    "EditError",
    "ImageError",
    "LossNotFiniteWarning",
    "ModelUnavailable",
    "NotEnoughMemory",
    "NotKept",
    "NothingKept",
    "PromptError",
    "SiteError",
    "TraceFileError",
    "TraceTooLarge",
    "VideoError",
]


# Everything is imported at first use, torch too. Names by the module they come from, and modules
# by the name they have here.
_HOMES = {
    "checkpoint": ("CheckpointError ConfigError ModelUnavailable NotEnoughMemory save_model"),
    "corpus": "CorpusError RecordPlan RoutingStore",
    "experiments": "Effects LabComparison compare compare_labs effects",
    "inference.forward": "LossNotFiniteWarning",
    "inputs": "BatchError ChatTemplateError ImageError PromptError VideoError",
    "interventions": "EditChangedNothingWarning EditError at edit",
    "interventions.comparison": "Comparison",
    "lab": "Lab",
    "loading": "load",
    "organisms.builtin": "BuiltinError",
    "results": "Generation NothingKept Run",
    "sites": "Site SiteError all_sites",
    "trace.budget": "TraceTooLarge",
    "trace.keep": "keep",
    "trace.keys": "NotKept",
    "trace.storage": "TraceFileError",
    "trace.trace": "Trace",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
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


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        found: Any = importlib.import_module(f"ernie_lab.{_MODULES[name]}")
    elif name in _HOME:
        found = getattr(importlib.import_module(f"ernie_lab.{_HOME[name]}"), name)
    else:
        nearest = importlib.import_module("ernie_lab.nearest")
        where = nearest.in_words(name, __all__, _MODULES)
        raise AttributeError(f"module 'ernie_lab' has no attribute {name!r}{where}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Completion offers what is public, imported yet or not, and nothing else."""
    return __all__
