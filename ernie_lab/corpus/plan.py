"""`RecordPlan`: what to record of which corpus with which model, and running it."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from ernie_lab.corpus.documents import Corpus, read_documents
from ernie_lab.corpus.folder import CorpusError, CorpusIncomplete, Folder
from ernie_lab.corpus.parquet import pyarrow
from ernie_lab.corpus.record import Wanted, commit_unit, read_facts, run_unit, shapes
from ernie_lab.corpus.statistics import DEFAULT, STATISTICS
from ernie_lab.corpus.units import Unit, units, windows
from ernie_lab.interventions.edits import Edit, EditTap
from ernie_lab.interventions.fingerprint import fingerprint
from ernie_lab.interventions.storing import to_json
from ernie_lab.lab import Lab
from ernie_lab.loading import load
from ernie_lab.sites import all_sites
from ernie_lab.trace.provenance import Provenance

if TYPE_CHECKING:
    from ernie_lab.corpus.store import RoutingStore

Rows: TypeAlias = Literal["ids", "ids+weights"]
Runner: TypeAlias = Literal["local"]

ATTEMPTS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordPlan:
    """The routing of a corpus, recorded in units that are committed one by one.

        plan = el.RecordPlan(model="tiny-text", corpus="texts.jsonl", folder="recording")
        store = plan.run()

    Run again, it goes on where it was stopped: committed units are skipped, after checking that
    the corpus still gives the same tokens there. Every unit is computed by itself and every
    statistic is an integer, so interruptions and the number of workers change nothing. Other
    `unit_tokens` or `batch_tokens` put other texts into one batch, which rounds otherwise: sums of
    probabilities then agree to rounding, and a choice between near ties may fall the other way.

    Args:
        model: a `Lab`, or what `el.load` takes.
        corpus: see `read_documents`.
        folder: where units go; another plan in it is refused.
        unit_tokens: tokens of a unit, about: it ends with the window that reaches them. What is
            lost when killed is at most one unit.
        max_length: longer documents are read in pieces of this length, each without the text
            before it.
        batch_tokens: padded tokens of one forward; a bound on memory.
        rows: also keep one row per token, `"ids"` or `"ids+weights"`, as Parquet (extra `tables`).
        stats: what is counted, of `ernie_lab.corpus.statistics.STATISTICS`; `"vocabulary"`
            (tokens x experts by layer) needs memory for vocabulary x experts x layers numbers.
        edits: applied in every forward.
    """

    model: Lab | str | os.PathLike[str]
    corpus: Corpus
    folder: str | os.PathLike[str]
    unit_tokens: int = 100_000
    max_length: int = 4096
    batch_tokens: int = 16_384
    rows: Rows | None = None
    stats: Sequence[str] = DEFAULT
    edits: Edit | Iterable[Edit] = ()
    _edits: tuple[Edit, ...] = field(init=False, default=())

    def __post_init__(self) -> None:
        for name in ("unit_tokens", "max_length", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.rows not in (None, "ids", "ids+weights"):
            raise ValueError(f"rows={self.rows!r} must be None, 'ids' or 'ids+weights'")
        if unknown := [name for name in self.stats if name not in STATISTICS]:
            raise ValueError(f"stats={unknown} are unknown; there are {', '.join(STATISTICS)}")
        if self.rows is not None:
            pyarrow()
        edits = (self.edits,) if isinstance(self.edits, Edit) else tuple(self.edits)
        object.__setattr__(self, "_edits", edits)

    @property
    def wanted(self) -> Wanted:
        statistics = tuple(name for name in STATISTICS if name in self.stats)
        return Wanted(statistics, self.rows, self.batch_tokens, self._edits)

    def lab(self) -> Lab:
        return self.model if isinstance(self.model, Lab) else load(os.fspath(self.model))

    def units(self, lab: Lab) -> Iterator[Unit]:
        """The corpus, tokenised and cut; the same every time."""
        pieces = windows(lab, read_documents(self.corpus), self.max_length)
        return units(pieces, self.unit_tokens)

    def asked(self, lab: Lab) -> dict[str, Any]:
        """All that the numbers depend on, besides the corpus (whose tokens each unit checks)."""
        provenance = Provenance.now(lab.model_id, revision=lab.revision, dtype=_dtype(lab))
        return {
            "model": lab.model_id,
            "revision": lab.revision,
            "weights": fingerprint(lab.model),
            "dtype": provenance.dtype,
            "layers": list(shapes(lab, ())["text"].layers),
            "unit_tokens": self.unit_tokens,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "rows": self.rows,
            "stats": list(self.wanted.statistics),
            "edits": to_json(self._edits),
        }

    def run(self, *, runner: Runner = "local", progress: bool = True) -> RoutingStore:
        """Record what is not there yet, and return the store.

        Raises `CorpusIncomplete` when units failed twice: they are set aside in `failed/` with
        their traceback, the others are committed. An interrupt loses at most the unit at work.
        Trouble with the disk stops at once.
        """
        from ernie_lab.corpus.store import RoutingStore

        if runner != "local":
            raise ValueError(f"runner={runner!r} must be 'local'")
        lab, folder = self.lab(), Folder(Path(self.folder).expanduser())
        _refuse_moved(self._edits, lab, self.rows)
        folder.open(self.asked(lab))
        for _ in _progress(self._local(lab, folder), progress):
            pass
        if failed := folder.failures():
            first = next(iter(failed.values()))
            raise CorpusIncomplete(
                f"{len(failed)} units failed ({', '.join(map(str, list(failed)[:8]))}), "
                f"{len(folder.committed())} are committed in {folder.path}. The first: "
                f"{first['error']}. Its traceback is in {folder.failed}; run again to try again"
            )
        return RoutingStore(folder.path)

    def _local(self, lab: Lab, folder: Folder) -> Iterator[int]:
        """Commit every unit that is missing; yields the tokens of each unit, found or done."""
        there = set(folder.committed())
        for unit in self.units(lab):
            if unit.number in there:
                require_same(folder, unit)
            else:
                record(lab, folder, unit, self.wanted)
            there.discard(unit.number)
            yield unit.n_tokens
        if there:
            raise CorpusError(
                f"{folder.path} holds units {sorted(there)[:5]}, which this corpus has not: it has "
                "become shorter. Name another folder"
            )


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
                folder.fail(unit.number, told)
                return False
            continue
        try:
            commit_unit(folder, unit, recorded, wanted, time.perf_counter() - start)
        except OSError as error:
            raise CorpusError(
                f"unit {unit.number} could not be written to {folder.path}: {error}. What was "
                "committed is safe; make room and run again"
            ) from error
        folder.failure(unit.number).unlink(missing_ok=True)
        return True
    return False


def require_same(folder: Folder, unit: Unit) -> None:
    """Is a committed unit made of the tokens that the corpus now gives there?"""
    facts = read_facts(folder.statistics(unit.number))
    if facts["digest"] != unit.digest:
        raise CorpusError(
            f"the corpus has changed: unit {unit.number} of {folder.path} (documents "
            f"{facts['documents'][0]} to {facts['documents'][1]}, {facts['n_tokens']} tokens) was "
            f"recorded from other tokens than the {unit.n_tokens} it has now. Name another folder"
        )


def _refuse_moved(edits: tuple[Edit, ...], lab: Lab, rows: str | None) -> None:
    """A row says of which bank its ids are; an edit of the bank would make that untrue."""
    tap = EditTap.of(edits, all_sites(lab.model), model=lab.model)
    moved = [path for path in tap.by_path if path.endswith(".moe.bank")]
    if rows is not None and moved:
        raise CorpusError(
            f"an edit changes {moved[0]}: rows could not say which bank an expert is of. Take "
            "rows=None; the statistics are kept by the bank that was used"
        )


def _dtype(lab: Lab) -> str:
    return str(lab.dtype).removeprefix("torch.")


def _progress(done: Iterator[int], shown: bool) -> Iterator[int]:
    """Tokens and their rate; how many there will be is not known before the corpus was read."""
    from tqdm.auto import tqdm

    with tqdm(desc="recording", unit=" tokens", unit_scale=True, disable=not shown) as bar:
        for n_tokens in done:
            bar.update(n_tokens)
            yield n_tokens
