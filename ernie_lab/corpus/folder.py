"""The folder of a recording: units committed whole, and what was asked for.

A unit is its statistics file; that is written last, so its rows are there before it counts. Names
follow from the unit's number alone: whoever writes a unit twice writes the same file, and nothing
is ever counted twice. Totals come from these files, never from what a worker reported.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_lab.trace.folders import holds, not_there, require_folder

SCHEMA = "ernie_lab.routing/1"
PLAN = "plan.json"
_TEMPORARY = ".tmp-"
# A younger scratch file may be another worker's.
_STALE_SECONDS = 900


class CorpusError(RuntimeError):
    """A corpus, folder or plan that cannot be recorded or continued."""


class CorpusIncomplete(CorpusError):
    """Some units failed; the others are committed, and a further run tries these again."""


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths of a recording. `plan.json`, `units/000000.safetensors`, `.parquet`, `failed/`."""

    path: Path

    @property
    def units(self) -> Path:
        return self.path / "units"

    @property
    def failed(self) -> Path:
        return self.path / "failed"

    def statistics(self, number: int) -> Path:
        return self.units / f"{number:06d}.safetensors"

    def rows(self, number: int) -> Path:
        return self.units / f"{number:06d}.parquet"

    def failure(self, number: int) -> Path:
        return self.failed / f"{number:06d}.json"

    def committed(self) -> list[int]:
        """Numbers of the units that are there, rising."""
        return sorted(_numbered(self.units.glob("*.safetensors")))

    def holds(self, number: int, with_rows: bool) -> bool:
        """Is a unit there whole? Rows that were taken away are recorded again."""
        there = self.statistics(number).exists()
        return there and (not with_rows or self.rows(number).exists())

    def failures(self) -> dict[int, dict[str, Any]]:
        there, found = set(self.committed()), {}
        for number, file in sorted(_numbered(self.failed.glob("*.json")).items()):
            # Another process may have committed the unit since, and taken its failure away.
            with suppress(FileNotFoundError):
                if number not in there:
                    found[number] = dict(json.loads(file.read_text()))
        return found

    def damaged(self, path: Path, error: object) -> CorpusError:
        """What to raise for a file of a unit that cannot be read."""
        return CorpusError(
            f"{path} is damaged: {error}. Delete it and run the plan again: its unit alone is then "
            "recorded again"
        )

    def plan(self) -> dict[str, Any]:
        try:
            content = json.loads((self.path / PLAN).read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            saves = "RecordPlan(…).run()"
            raise CorpusError(
                str(not_there(self.path, "a recording", PLAN, "el.RoutingStore", saves))
            ) from None
        except json.JSONDecodeError as error:
            raise CorpusError(f"{self.path / PLAN} is damaged: {error}") from None
        if content.get("schema") != SCHEMA:
            raise CorpusError(
                f"{self.path} has schema {content.get('schema')!r}, this ernie_lab reads {SCHEMA!r}"
            )
        return dict(content)

    def require_free(self) -> None:
        """Refuse a folder that holds anything but a recording; one just begun has no plan yet."""
        try:
            # Listed before the plan is looked for: another process may be beginning it.
            units = [file.name for file in self.units.glob("*")]
            there = {file.name for file in self.path.iterdir()} if self.path.is_dir() else set()
            if (self.path / PLAN).exists():
                return
            require_folder(self.path)
            if any(not name.startswith(_TEMPORARY) for name in there - {"units"}):
                raise CorpusError(f"{self.path} {holds(self.path)}; name another folder")
            if any(not name.startswith(_TEMPORARY) for name in units):
                raise CorpusError(f"{self.path} has units but no {PLAN}; name another folder")
        except OSError as error:
            raise CorpusError(str(error)) from error

    def open(self, asked: Mapping[str, Any]) -> None:
        """Begin a recording, or go on with the one that is there if it was asked the same.

        `asked` is all that its numbers depend on.
        """
        self.require_free()
        try:
            self.units.mkdir(parents=True, exist_ok=True)
            if not (self.path / PLAN).exists():
                text = json.dumps({"schema": SCHEMA, **asked}, indent=1)
                with suppress(FileExistsError):  # another process was first: compared below
                    write(self.path / PLAN, text.encode(), replace=False)
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be written to: {error}") from error
        there = self.plan()
        changed = [name for name in asked if there.get(name) != asked[name]]
        if changed:
            shown = "; ".join(f"{n}: {there.get(n)!r}, now {asked[n]!r}" for n in changed)
            raise CorpusError(
                f"{self.path} holds a recording of another plan ({shown[:600]}). Go on with the "
                "same plan, or name another folder; nothing was changed"
            )

    def sweep(self) -> None:
        """Remove what killed processes left; raises if the folder cannot be written to."""
        try:
            for place in (self.path, self.units, self.failed):
                for scratch in place.glob(f"{_TEMPORARY}*"):
                    with suppress(FileNotFoundError):  # swept by another process
                        if scratch.stat().st_mtime < time.time() - _STALE_SECONDS:
                            scratch.unlink()
            handle, name = tempfile.mkstemp(dir=self.units, prefix=_TEMPORARY)
            os.close(handle)
            Path(name).unlink()
        except OSError as error:
            raise CorpusError(
                f"{self.path} cannot be written to, and units are missing in it: {error}"
            ) from error

    def fail(self, number: int, facts: Mapping[str, Any]) -> None:
        self.failed.mkdir(exist_ok=True)
        write(self.failure(number), json.dumps(facts, indent=1).encode())


def write(path: Path, data: bytes, replace: bool = True) -> None:
    with committed(path, replace) as scratch:
        scratch.write_bytes(data)


@contextmanager
def committed(path: Path, replace: bool = True) -> Iterator[Path]:
    """A scratch file that becomes `path` when the block ends, on disk before it does.

    After an error nothing is left of it: neither a half file nor an old one replaced. With
    `replace=False`, `FileExistsError` where the file is there, whoever wrote it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=_TEMPORARY, suffix=path.suffix)
    os.close(handle)
    scratch = Path(name)
    try:
        yield scratch
        with scratch.open("rb+") as file:
            os.fsync(file.fileno())
        scratch.chmod(0o644)
        if replace:
            scratch.replace(path)
        else:
            path.hardlink_to(scratch)
            scratch.unlink()
        _settle(path.parent)
    except BaseException:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)
        raise


def _settle(folder: Path) -> None:
    """The new name on disk too, so that a unit's rows cannot be lost and its statistics kept."""
    with suppress(OSError):  # not every system opens a folder
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _numbered(files: Iterable[Path]) -> dict[int, Path]:
    """Files named by a unit's number; a scratch file is not."""
    return {int(file.stem): file for file in files if re.fullmatch(r"\d{6,}", file.stem)}
