"""Folders of saved things: what one holds, and a new one put in its place with nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

# What a folder with this file holds, and what opens it.
_KINDS = {
    "trace.json": ("a saved trace", "el.Trace.load"),
    "plan.json": ("a recording", "el.RoutingStore"),
    "edits.json": ("saved edits", "el.edits.load"),
    "config.json": ("a saved model", "el.load"),
}
TABLES = "tables.json"
TABLES_OPEN = {"comparison": "el.Comparison.load", "comparison of labs": "el.LabComparison.load"}


def held(folder: Path) -> tuple[str, str] | None:
    """What was saved there, in words, and what opens it; None if nothing that is known."""
    for name, (what, opens) in _KINDS.items():
        if (folder / name).is_file():
            return what, f"{opens}({str(folder)!r})"
    try:
        kind = json.loads((folder / TABLES).read_text(encoding="ascii"))["format"]
        kind = kind.removeprefix("ernie_lab ")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    known = f"{TABLES_OPEN[kind]}({str(folder)!r})" if kind in TABLES_OPEN else "another ernie_lab"
    return f"a saved {kind}", known


def holds(folder: Path) -> str:
    """`holds a saved trace`, or `holds notes.txt, a.csv and 3 more`."""
    known = held(folder)
    return f"holds {known[0] if known else _listed([file.name for file in folder.iterdir()])}"


def require_folder(folder: Path) -> None:
    """Refuse a place where no folder can be made or written into, before anything is computed."""
    for place in (folder, *folder.parents):
        if not place.exists():
            continue
        if not place.is_dir():
            where = "" if place == folder else f", so there can be no {folder}"
            raise FileExistsError(f"{place} is a file{where}; name a folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise PermissionError(f"{place} cannot be written to; name another folder")
        return


def require_replaceable(folder: Path, what: str, header: str, parts: Collection[str]) -> None:
    """Refuse to replace a folder in which anything stands but the `parts` of `what`."""
    require_folder(folder)
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / header).is_file():
        raise FileExistsError(
            f"{folder} {holds(folder)} and is not {what}, so it is not overwritten; choose another "
            "name"
        )
    if strange := [file.name for file in folder.iterdir() if file.name not in parts]:
        raise FileExistsError(
            f"{folder} holds, besides {what}, {_listed(strange)}, which would be lost, so it is "
            "not overwritten; choose another name or move them away"
        )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends.

    After an error nothing is left of it, and what was there is there still.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        new = scratch / "new"
        new.mkdir()
        yield new
        put(new, folder, aside=scratch / "old")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def put(new: Path, folder: Path, aside: Path) -> None:
    """Move `new` to `folder`; what was there goes aside, and back if the move fails."""
    if folder.exists():
        folder.replace(aside)
    try:
        new.replace(folder)
    except BaseException:
        if aside.exists() and not folder.exists():
            aside.replace(folder)
        raise


def not_there(folder: Path, what: str, header: str, opens: str, saves: str) -> FileNotFoundError:
    """Why `folder` does not open as `what`, and what would."""
    if not folder.exists():
        where = "" if folder.is_absolute() else f" in {Path.cwd()}"
        return FileNotFoundError(f"there is no folder {folder}{where}; {saves} writes one")
    if not folder.is_dir():
        if (folder.parent / header).is_file():
            return FileNotFoundError(
                f"{folder} is a file of {what}; give its folder: {opens}({str(folder.parent)!r})"
            )
        return FileNotFoundError(f"{folder} is a file; {what} is a folder with {header}")
    if known := held(folder):
        return FileNotFoundError(
            f"{folder} is not {what}: it holds {known[0]}, which {known[1]} opens"
        )
    inside = sorted(file.parent for file in folder.glob(f"*/{header}"))
    if len(inside) == 1:
        way = f"did you mean {inside[0]}?"
    elif inside:
        way = f"in it are {_listed([place.name for place in inside])}"
    else:
        way = f"{saves} writes one"
    lacks = "another program's" if (folder / header).exists() else "no"
    return FileNotFoundError(f"{folder} is not {what}: it has {lacks} {header}; {way}")


def _listed(names: Collection[str], most: int = 6) -> str:
    if not names:
        return "nothing"
    shown, left = sorted(names)[:most], len(names) - most
    return ", ".join(shown) + (f" and {left} more" if left > 0 else "")
