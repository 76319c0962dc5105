"""The corpus cut into units: what is recorded, committed and resumed as one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.corpus.documents import Document
from ernie_lab.corpus.folder import CorpusError
from ernie_lab.inputs import Media
from ernie_lab.lab import Lab

MAX_DOMAINS = 256


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A sequence that the model reads: a document, or a piece of one from position `start`.

    A later piece is read without what stood before it, so its first tokens have less context
    than in the document. `doc` counts documents over the corpus. `span` are the shares of the
    corpus before it and with it, None where its length is not known beforehand.
    """

    doc: int
    start: int
    ids: tuple[int, ...]
    domain: str
    media: tuple[Media, ...] = ()
    span: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """Windows in corpus order, number `number` of the plan."""

    number: int
    windows: tuple[Window, ...]

    @property
    def n_tokens(self) -> int:
        return sum(len(window.ids) for window in self.windows)

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(sorted({window.domain for window in self.windows}))

    @property
    def span(self) -> tuple[float, float] | None:
        first, last = self.windows[0].span, self.windows[-1].span
        return None if first is None or last is None else (first[0], last[1])

    @property
    def digest(self) -> str:
        """SHA-256 of everything that is read: a corpus that changed gives another."""
        known = hashlib.sha256()
        for window in self.windows:
            head = f"{window.doc}\x1f{window.start}\x1f{len(window.ids)}\x1f{window.domain}\x1e"
            known.update(head.encode("utf-8", "surrogatepass"))
            known.update(np.asarray(window.ids, dtype="<i8").tobytes())
            for media in window.media:
                known.update(media.patches_PQ.float().numpy().tobytes())
        return known.hexdigest()


def windows(lab: Lab, documents: Iterable[Document], max_length: int) -> Iterator[Window]:
    """Each document tokenised as `lab.run` would, in pieces of at most `max_length` tokens.

    Documents never share a sequence, so none attends to another. One with pictures stays whole,
    however long. Empty texts have no tokens and are passed over; they keep their number.

    Raises `CorpusError`, naming the document, for what the model cannot read, and for more than
    256 domains: counts are kept for each.
    """
    domains: set[str] = set()
    before = 0.0
    for doc, document in enumerate(documents):
        if not (document.content or document.images or document.videos):
            continue
        if document.domain not in domains:
            _check_domain(document, domains)
            domains.add(document.domain)
        ids, media = _encoded(lab, document)
        for start in range(0, len(ids), len(ids) if media else max_length):
            piece, span = ids if media else ids[start : start + max_length], None
            if document.through is not None:
                whole = (document.through - before) / len(ids)
                span = before + whole * start, before + whole * (start + len(piece))
            yield Window(doc, start, piece, document.domain, media, span)
        before = document.through or before


def units(pieces: Iterable[Window], unit_tokens: int) -> Iterator[Unit]:
    """A unit ends with the window that brings it to `unit_tokens`; the last may be smaller."""
    number, held, n_tokens = 0, list[Window](), 0
    for window in pieces:
        held.append(window)
        n_tokens += len(window.ids)
        if n_tokens >= unit_tokens:
            yield Unit(number, tuple(held))
            number, held, n_tokens = number + 1, [], 0
    if held:
        yield Unit(number, tuple(held))


def _check_domain(document: Document, known: set[str]) -> None:
    try:
        document.domain.encode()
    except UnicodeEncodeError:
        raise CorpusError(
            f"{document.where}: domain {document.domain!r} is no valid Unicode (half of a "
            "surrogate pair)"
        ) from None
    if len(known) == MAX_DOMAINS:
        raise CorpusError(
            f"{document.where} brings domain {document.domain!r} after {MAX_DOMAINS} others. "
            "Counts are kept for each domain, so it must be a kind of text, not a name or a "
            "number of its own"
        )


def _encoded(lab: Lab, document: Document) -> tuple[tuple[int, ...], tuple[Media, ...]]:
    try:
        if isinstance(lab.config, TextConfig) and (document.images or document.videos):
            raise ValueError(f"it has pictures, and {lab.model_id} reads text alone")
        batch = lab.prepare(
            document.content,
            images=list(document.images) or None,
            videos=list(document.videos) or None,
        )
    except Exception as error:
        raise CorpusError(f"{document.where} cannot be read: {error}") from error
    if len(batch.input_ids) != 1:
        raise CorpusError(f"{document.where} holds {len(batch.input_ids)} sequences; give one each")
    media = () if batch.visual is None else batch.visual.media
    return tuple(batch.input_ids[0].tolist()), media
