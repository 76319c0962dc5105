"""The public surface, and what importing it may cost."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import ernie_lab as el

NAMES = [
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


def test_names_are_pinned() -> None:
    assert el.__all__ == NAMES
    assert all(hasattr(el, name) for name in NAMES)
    assert dir(el) == sorted(NAMES), "completion offers what is imported at first use, no more"
    undocumented = [name for name in NAMES if not getattr(el, name).__doc__]
    assert not undocumented


def test_import_is_light_and_quiet(tmp_path: Path) -> None:
    """Nothing of ours or heavy is imported before its first use; no file, thread or output."""
    code = (
        "import sys, threading, ernie_lab\n"
        "ours = [name for name in sys.modules if name.startswith('ernie_lab.')]\n"
        "print(sorted({'torch', 'numpy'} & sys.modules.keys()), ours, threading.active_count())"
    )
    tmp_path.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[] [] 1"
    assert not list(tmp_path.iterdir())


def test_load_imports_only_what_it_needs() -> None:
    """No pandas, xarray, matplotlib, widgets, hub or transformers; no experiments, no catalogue."""
    code = (
        "import sys, ernie_lab; ernie_lab.load('tiny-text')\n"
        "heavy = {'pandas', 'xarray', 'matplotlib', 'ipywidgets', 'anywidget', 'IPython', "
        "'transformers', 'scipy', 'huggingface_hub', 'av', 'sentencepiece', 'PIL.ImageDraw', "
        "'ernie_lab.experiments', 'ernie_lab.interventions.catalogue', "
        "'ernie_lab.interventions.patching', 'ernie_lab.corpus'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_nothing_else_is_an_attribute() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lode', did you mean el\.load\?"):
        _ = el.lode


@pytest.mark.parametrize(
    "module", ["analysis", "plots", "widgets", "shared", "experts", "routing", "edits"]
)
def test_completion_offers_what_is_public(module: str) -> None:
    """All that is imported or defined there for its users, and no dataclass, nn or submodule."""
    found = getattr(el, module)
    assert dir(found) == sorted(found.__all__)
    assert all(getattr(found, name).__doc__ for name in found.__all__)
    if found.__name__.endswith((".analysis", ".plots", ".widgets")):
        there = {name for name, value in vars(found).items() if not isinstance(value, ModuleType)}
        assert {name for name in there if not name.startswith("_")} == set(found.__all__)


def test_a_name_of_a_subpackage_is_found_without_importing_it() -> None:
    code = (
        "import sys, ernie_lab as el\n"
        "for name in ('explore_routing', 'balance_by', 'zero', 'plot_expert_mapp', 'qqqq'):\n"
        "    try: getattr(el, name)\n"
        "    except AttributeError as error: print(str(error).partition(name)[2])\n"
        "print('matplotlib' in sys.modules, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "': it is el.widgets.explore_routing",
        "': it is el.analysis.balance_by",
        "': it is el.edits.zero or el.shared.zero",
        "', did you mean el.plots.plot_expert_map?",
        "'; dir(el) lists all",
        "False False",
    ]


def test_transformers_is_never_needed() -> None:
    """Loading, running and generating with transformers made unimportable."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import ernie_lab as el\n"
        "lab = el.load('tiny-text')\n"
        "print(len(lab.generate('And God said', max_new_tokens=3, keep='routing').tokens[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in {"1", "2", "3"}
