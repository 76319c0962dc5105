"""The public surface, and what importing it may cost."""

import subprocess
import sys
from pathlib import Path

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


def test_names_are_pinned() -> None:
    assert el.__all__ == NAMES
    assert all(hasattr(el, name) for name in NAMES)
    assert set(NAMES) <= set(dir(el)), "completion offers what is imported at first use"
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
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = el.lode


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
