"""`RecordPlan`: what to record of which corpus with which model, and running it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np

from ernie_lab.checkpoint.packing import quantised_details
from ernie_lab.corpus.committing import record, require_same
from ernie_lab.corpus.documents import Corpus, read_documents
from ernie_lab.corpus.folder import CorpusError, CorpusIncomplete, Folder
from ernie_lab.corpus.parquet import pyarrow
from ernie_lab.corpus.progress import shown
from ernie_lab.corpus.record import Wanted, read_facts, shapes
from ernie_lab.corpus.statistics import DEFAULT, STATISTICS
from ernie_lab.corpus.units import Unit, units, windows
from ernie_lab.interventions.edits import Edit, EditChangedNothingWarning, EditTap
from ernie_lab.interventions.fingerprint import fingerprint
from ernie_lab.interventions.storing import to_json
from ernie_lab.lab import Lab
from ernie_lab.loading import load
from ernie_lab.parallel.over_ranks import is_over_ranks
from ernie_lab.sites import all_sites
from ernie_lab.trace.provenance import Provenance

if TYPE_CHECKING:
    from ernie_lab.corpus.store import RoutingStore

Rows: TypeAlias = Literal["ids", "ids+weights"]
Runner: TypeAlias = Literal["local", "torchrun", "ray"]


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
        folder: where units go; another plan or other files in it are refused.
        unit_tokens: tokens of a unit, about: it ends with the window that reaches them. What is
            lost when killed is at most one unit.
        max_length: longer documents are read in pieces of this length, each without the text
            before it.
        batch_tokens: padded tokens of one forward; a bound on memory.
        rows: also keep one row per token, `"ids"` or `"ids+weights"`, as Parquet (extra `tables`).
        stats: what is counted, of `ernie_lab.corpus.statistics.STATISTICS`; `"vocabulary"`
            (tokens x experts by layer) needs memory for vocabulary x experts x layers numbers.
        edits: applied in every forward.
        load_options: what `el.load` takes besides the source: dtype, device, revision, …
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
    load_options: Mapping[str, Any] = field(default_factory=dict)
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
        if not isinstance(self.model, Lab):
            return load(os.fspath(self.model), **self.load_options)
        if self.load_options:
            raise ValueError(f"load_options={dict(self.load_options)}: the model is loaded already")
        return self.model

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
            "quantised": quantised_details(lab.model) or None,
            "layers": list(shapes(lab, ())["text"].layers),
            "unit_tokens": self.unit_tokens,
            "max_length": self.max_length,
            "batch_tokens": self.batch_tokens,
            "rows": self.rows,
            "stats": list(self.wanted.statistics),
            "edits": to_json(self._edits),
        }

    def run(
        self,
        *,
        runner: Runner = "local",
        workers: int = 1,
        gpus_per_worker: float = 0,
        progress: bool = True,
    ) -> RoutingStore:
        """Record what is not there yet, and return the store.

        Args:
            runner: `"local"`, this process. `"ray"`, that many `workers`, each with the model of
                its own (extra `cluster`); on the cluster that Ray is connected to, whose nodes
                must all see `folder`, else on this machine. `"torchrun"`: each process that
                torchrun started takes the units of its rank, and none waits for another.

        Raises `CorpusIncomplete` when units failed twice: they are set aside in `failed/` with
        their traceback, the others are committed. An interrupt loses at most the units at work.
        Trouble with the disk stops at once.
        """
        from ernie_lab.corpus.store import RoutingStore

        if runner not in get_args(Runner):
            raise ValueError(f"runner={runner!r} must be one of {', '.join(get_args(Runner))}")
        if runner != "ray" and (workers != 1 or gpus_per_worker):
            raise ValueError(f"workers and gpus_per_worker are of runner='ray', not {runner!r}")
        folder = Folder(Path(self.folder).expanduser())
        folder.require_free()  # before the weights are read
        lab = self.lab()
        if runner == "torchrun" and is_over_ranks(lab.model):
            raise ValueError(
                "runner='torchrun' gives each rank a model and units of its own, but this model is "
                "over the ranks: rank 0 records all of it, with runner='local'"
            )
        _refuse_moved(self._edits, lab, self.rows)
        if isinstance(self.corpus, str | Path):  # a misspelt path must leave no folder behind
            next(read_documents(self.corpus), None)
        folder.open(self.asked(lab))
        done = (
            self._ray(lab, folder, workers, gpus_per_worker)
            if runner == "ray"
            else self._here(lab, folder, *(_rank() if runner == "torchrun" else (0, 1)))
        )
        for _ in shown(done, progress):
            pass
        if not folder.committed() and not folder.failures():
            raise CorpusError(f"the corpus holds no token: nothing was recorded.{self._once()}")
        self._warn_if_idle(folder)
        if failed := folder.failures():
            first = next(iter(failed.values()))
            raise CorpusIncomplete(
                f"{len(failed)} units failed ({', '.join(map(str, list(failed)[:8]))}), "
                f"{len(folder.committed())} are committed in {folder.path}. The first: "
                f"{first['error']}. Its traceback is in {folder.failed}; run again to try again"
            )
        return RoutingStore(folder.path)

    def missing(self, lab: Lab, folder: Folder) -> Iterator[Unit]:
        """The units that are not committed; those that are, are checked."""
        there, swept = set(folder.committed()), False
        for unit in self.units(lab):
            if unit.number in there and folder.holds(unit.number, self.rows is not None):
                require_same(folder, unit)
            else:
                if not swept:
                    folder.sweep()
                    swept = True
                yield unit
            there.discard(unit.number)
        if there:
            raise CorpusError(
                f"{folder.path} holds units {sorted(there)[:5]}, which this corpus has not: it has "
                f"become shorter.{self._once() or ' Name another folder'}"
            )

    def _once(self) -> str:
        """What may be the matter with a corpus that gives less than it should."""
        if _read_once(self.corpus):
            return (
                f" A {type(self.corpus).__name__} gives its documents once; to run again, make a "
                "new one, or pass a list or a file"
            )
        return ""

    def _warn_if_idle(self, folder: Folder) -> None:
        """Say so when an edit changed nothing in any unit."""
        if not self._edits:
            return
        numbers = folder.committed()
        changed = np.zeros(len(self._edits), dtype=int)
        for number in numbers:
            changed += [n_changed for _, n_changed in read_facts(folder, number)["edits"]]
        for edit in [edit for edit, n in zip(self._edits, changed, strict=True) if n == 0]:
            warnings.warn(
                f"{edit!r} changed nothing in all {len(numbers)} units",
                EditChangedNothingWarning,
                stacklevel=3,
            )

    def _here(self, lab: Lab, folder: Folder, rank: int, n_ranks: int) -> Iterator[Unit]:
        """Commit every missing unit of this rank, and yield it."""
        for unit in self.missing(lab, folder):
            if unit.number % n_ranks == rank:
                # Another process may be at work on the same folder.
                if not folder.holds(unit.number, self.rows is not None):
                    record(lab, folder, unit, self.wanted)
                yield unit

    def _ray(
        self, lab: Lab, folder: Folder, workers: int, gpus_per_worker: float
    ) -> Iterator[Unit]:
        from ernie_lab.corpus.on_ray import record_on_ray

        if isinstance(self.model, Lab):
            raise ValueError(
                "runner='ray' needs a model that every worker can load: a built-in name, a folder "
                "or a hub id, not a Lab in memory"
            )
        how = {"source": os.fspath(self.model), "options": dict(self.load_options)}
        return record_on_ray(
            self.missing(lab, folder), how, folder, self.wanted, workers, gpus_per_worker
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


def _rank() -> tuple[int, int]:
    try:
        return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except KeyError as missing:
        raise CorpusError(
            f"runner='torchrun' needs {missing} in the environment: start the script with "
            "torchrun --nproc-per-node N script.py"
        ) from None


def _dtype(lab: Lab) -> str:
    return str(lab.dtype).removeprefix("torch.")


def _read_once(corpus: Corpus) -> bool:
    """Can it be read a single time, as a generator can?"""
    return not isinstance(corpus, str | Path) and iter(corpus) is corpus
