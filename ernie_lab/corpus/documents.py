"""Documents from files, folders, data sets and iterators, one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ernie_lab.corpus.folder import CorpusError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_CONTENT = ("text", "ids", "messages")
_PICTURES = ("images", "videos")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, token ids, or chat, with its pictures; `where` is what an error calls it.

    `domain` is any label by which counts should be kept apart, empty where there is none.
    """

    content: str | Sequence[int] | Sequence[Mapping[str, Any]]
    domain: str = ""
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    where: str = ""


Corpus: TypeAlias = str | Path | Iterable[str | Path | Mapping[str, Any] | Document]


def read_documents(corpus: Corpus) -> Iterator[Document]:
    """The documents of a corpus, in an order that is the same every time.

    - A path: a `.txt` file is one document, a line of a `.jsonl` file and a row of a `.parquet`
      file one each, a folder all of these in it, by name. Lines and rows have one of `text`, `ids`
      and `messages`, and may have `domain` (a text) and, for vision-language models, `images` and
      `videos` (paths, relative to the file). Other columns are left alone.
    - Anything that can be iterated over: strings (texts), paths, mappings as above (so the rows of
      a `datasets` data set), or `Document`s. To resume, it must give the same again.

    Raises `CorpusError`, naming file and line, for what cannot be read.
    """
    if isinstance(corpus, Path) or (isinstance(corpus, str) and _is_path(corpus)):
        yield from _of_path(Path(corpus).expanduser())
        return
    if isinstance(corpus, str):
        raise CorpusError(
            f"corpus={corpus!r}: no such file or folder. A corpus of texts is a list of strings"
        )
    for number, item in enumerate(corpus):
        where = f"item {number} of the corpus"
        if isinstance(item, Document):
            yield item if item.where else _named(item, where)
        elif isinstance(item, Path):
            yield from _of_path(item)
        elif isinstance(item, str):
            yield Document(item, where=where)
        elif isinstance(item, Mapping):
            yield _of_fields(item, where, None)
        else:
            raise CorpusError(
                f"{where} is a {type(item).__name__}; expected a text, a Path, a mapping with "
                "'text', 'ids' or 'messages', or a Document"
            )


def _is_path(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except OSError:  # longer than a name may be: a text
        return False


def _of_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        if not files:
            raise CorpusError(f"{path} holds no file with one of the endings {', '.join(SUFFIXES)}")
        for file in files:
            yield from _of_path(file)
    elif not path.is_file():
        raise CorpusError(f"{path}: no such file or folder")
    elif path.suffix == ".txt":
        yield Document(_text_of(path), where=str(path))
    elif path.suffix == ".jsonl":
        yield from _of_lines(path)
    elif path.suffix == ".parquet":
        yield from _of_rows(path)
    else:
        raise CorpusError(f"{path}: expected a file with one of {', '.join(SUFFIXES)}, or a folder")


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not UTF-8: {error}") from None


def _of_lines(path: Path) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise CorpusError(f"{where} is not JSON: {error}") from None
            if not isinstance(fields, dict):
                raise CorpusError(f"{where} is a {type(fields).__name__}, expected an object")
            yield _of_fields(fields, where, path.parent)


def _of_rows(path: Path) -> Iterator[Document]:
    from ernie_lab.corpus.parquet import pyarrow_parquet

    file = pyarrow_parquet().ParquetFile(path)
    known = [name for name in (*_CONTENT, "domain", *_PICTURES) if name in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=known):
        for fields in batch.to_pylist():
            yield _of_fields(fields, f"{path}, row {number}", path.parent)
            number += 1


def _of_fields(fields: Mapping[str, Any], where: str, folder: Path | None) -> Document:
    given = [name for name in _CONTENT if fields.get(name) is not None]
    if len(given) != 1:
        raise CorpusError(
            f"{where} has {' and '.join(given) or 'none'} of {', '.join(_CONTENT)}; expected one "
            f"(it has {list(fields)})"
        )
    content, domain = fields[given[0]], fields.get("domain")
    expected = str if given[0] == "text" else Sequence
    if not isinstance(content, expected) or (expected is Sequence and isinstance(content, str)):
        raise CorpusError(f"{where}: {given[0]!r} is a {type(content).__name__}")
    if domain is not None and not isinstance(domain, str):
        raise CorpusError(f"{where}: 'domain' is {domain!r}, expected a text")
    pictures = {name: _pictures(fields.get(name), folder) for name in _PICTURES}
    return Document(content, domain or "", **pictures, where=where)


def _pictures(given: Any, folder: Path | None) -> list[Any]:
    listed = [] if given is None else [given] if isinstance(given, str) else list(given)
    if folder is None:
        return listed
    return [folder / picture if isinstance(picture, str) else picture for picture in listed]


def _named(document: Document, where: str) -> Document:
    return Document(
        document.content, document.domain, document.images, document.videos, where=where
    )
