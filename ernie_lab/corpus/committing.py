"""A unit run and committed, or set aside; and whether a committed one is still the corpus's."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ernie_lab.corpus.folder import CorpusError, Folder
from ernie_lab.corpus.record import Wanted, commit_unit, read_facts, run_unit
from ernie_lab.corpus.units import Unit
from ernie_lab.lab import Lab

ATTEMPTS = 2


def record(lab: Lab, folder: Folder, unit: Unit, wanted: Wanted) -> bool:
    """Run and commit one unit; what cannot be run goes to `failed/`. True if it was committed."""
    for attempt in range(1, ATTEMPTS + 1):
        start = time.perf_counter()
        try:
            recorded = run_unit(lab, unit, wanted)
        except Exception as error:
            if attempt == ATTEMPTS:
                told = {
                    "unit": unit.number,
                    "digest": unit.digest,
                    "documents": [unit.windows[0].doc, unit.windows[-1].doc],
                    "error": f"{type(error).__name__}: {error}",
                    "traceback": traceback.format_exc(),
                }
                with _writing(folder, unit):
                    folder.fail(unit.number, told)
                return False
            continue
        with _writing(folder, unit):
            commit_unit(folder, unit, recorded, wanted, time.perf_counter() - start)
            folder.failure(unit.number).unlink(missing_ok=True)
        return True
    return False


@contextmanager
def _writing(folder: Folder, unit: Unit) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CorpusError(
            f"unit {unit.number} could not be written to {folder.path}: {error}. What was "
            "committed is safe; make room, or the folder writable, and run again"
        ) from error


def require_same(folder: Folder, unit: Unit) -> None:
    """Is a committed unit made of the tokens that the corpus now gives there?"""
    facts = read_facts(folder, unit.number)
    if facts["digest"] != unit.digest:
        raise CorpusError(
            f"the corpus has changed: unit {unit.number} of {folder.path} (documents "
            f"{facts['documents'][0]} to {facts['documents'][1]}, {facts['n_tokens']} tokens) was "
            f"recorded from other tokens than the {unit.n_tokens} it has now. Name another folder"
        )
