"""Imports flow one way: a module may import only from layers to its left."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import ernie_lab

PACKAGE = Path(ernie_lab.__file__).parent
ORDER = (
    "dims",
    "display",
    "sites",
    "checkpoint",
    "inputs",
    "model",
    "parallel",
    "inference",
    "trace",
    "interventions",
    "analysis",
    "plots",
    "widgets",
)
# These compose everything, and nothing above imports them.
COMPOSERS = (
    "arguments",
    "describe",
    "results",
    "session",
    "lab",
    "loading",
    "preparing",
    "experiments",
    "corpus",
    "organisms",
    "cli",
    "demo",
    "nearest",
    "__init__",
    "__main__",
)
# Inference runs a model under any tap; it must not know what taps there are.
FORBIDDEN = {"inference": {"trace", "interventions"}, "checkpoint": {"model"}, "plots": {"model"}}
# `Trace.report` draws itself, by an import inside the method.
EXCEPTIONS = {("trace/trace.py", "plots")}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write imports in full"
            names = [node.module or ""]
            if node.module == "ernie_lab":
                names = [f"ernie_lab.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "ernie_lab" and len(parts) > 1:
                yield node.lineno, parts[1]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_flow_one_way(path: Path) -> None:
    here = room(path)
    assert here in ORDER + COMPOSERS, f"{here} has no place in the order; give it one"
    if here in COMPOSERS:
        return
    for line, there in imported_rooms(path):
        if (path.relative_to(PACKAGE).as_posix(), there) in EXCEPTIONS:
            continue
        assert there in ORDER, f"{path}:{line} imports {there}, which composes it"
        assert ORDER.index(there) <= ORDER.index(here), f"{path}:{line}: {here} imports {there}"
        assert there not in FORBIDDEN.get(here, ()), f"{path}:{line}: {here} imports {there}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_have_one_subject(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in {"utils", "helpers", "misc", "common"}


def test_checkpoint_spellings_stand_in_one_file() -> None:
    """Keys of released files belong to checkpoint/names.py; configs are another vocabulary."""
    spellings = ("q_proj", "e_score_correction_bias", "embed_tokens", "post_attention_layernorm")
    for path in FILES:
        if path.name == "names.py" or room(path) == "organisms":
            continue
        found = [s for s in spellings if s in path.read_text()]
        assert not found, f"{path}: {found}"
