"""Documents from files, folders, data sets and iterators, one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from ernie_lab.corpus.folder import CorpusError

SUFFIXES = (".txt", ".jsonl", ".parquet")
_CONTENT = ("text", "ids", "messages")
_PICTURES = ("images", "videos")
# Of a picture in a file, what is no path relative to it: `data:…`, `https://…`.
_ADDRESS = re.compile(r"data:|[a-zA-Z][a-zA-Z0-9+.-]+://")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, token ids, or chat, with its pictures; `where` is what an error calls it.

    `domain` is any label by which counts should be kept apart, empty where there is none.
    `through` is the share of the corpus that has been read with it, None where its length is not
    known beforehand.
    """

    content: str | Sequence[int] | Sequence[Mapping[str, Any]]
    domain: str = ""
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    where: str = ""
    through: float | None = None


Corpus: TypeAlias = str | Path | Iterable[str | Path | Mapping[str, Any] | Document]


def read_documents(corpus: Corpus) -> Iterator[Document]:
    """The documents of a corpus, in an order that is the same every time.

    - A path: a `.txt` file is one document, a line of a `.jsonl` file and a row of a `.parquet`
      file one each, a folder all of these in it, by name. Lines and rows have one of `text`, `ids`
      and `messages`, and may have `domain` (a text) and, for vision-language models, `images` and
      `videos` (paths, relative to the file, or `data:` URIs; a `.parquet` of `datasets` has their
      bytes). Other columns are left alone.
    - Anything that can be iterated over: strings (texts), paths, mappings as above (so the rows of
      a `datasets` data set, also of one that streams), or `Document`s. To resume, it must give the
      same again.

    Raises `CorpusError`, naming file and line, for what cannot be read.
    """
    if isinstance(corpus, Path) or (isinstance(corpus, str) and _is_path(corpus)):
        yield from _of_path(Path(corpus).expanduser())
        return
    if isinstance(corpus, str):
        raise CorpusError(
            f"corpus={corpus!r}: no such file or folder. A corpus of texts is a list of strings"
        )
    _require_rows(corpus)
    n_items = len(corpus) if isinstance(corpus, Sized) else None
    for number, item in enumerate(corpus):
        found = _of_item(item, f"item {number} of the corpus")
        yield from found if n_items is None else _within(found, number / n_items, 1 / n_items)


def _require_rows(corpus: object) -> None:
    """Refuse what gives its names when it is iterated over: they would be taken for texts."""
    kind = type(corpus).__name__
    if isinstance(corpus, Mapping):
        names = ", ".join(map(repr, list(corpus)[:4]))
        raise CorpusError(
            f"corpus is a {kind} with {names}: expected one of its values, such as a split of a "
            "data set, or a list of such mappings"
        )
    if hasattr(corpus, "iterrows"):
        raise CorpusError(f"corpus is a {kind}: pass its rows, corpus.to_dict('records')")


def _of_item(item: object, where: str) -> Iterator[Document]:
    if isinstance(item, Document):
        yield item if item.where else replace(item, where=where)
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


def _within(documents: Iterable[Document], start: float, share: float) -> Iterator[Document]:
    """The documents of a part of the corpus, which is this share of it."""
    for document in documents:
        # One of unknown length is counted when the next part begins.
        inner = 1.0 if document.through is None else document.through
        yield replace(document, through=start + inner * share)


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
        sizes = [file.stat().st_size for file in files]
        total, before = max(sum(sizes), 1), 0
        for file, size in zip(files, sizes, strict=True):
            yield from _within(_of_path(file), before / total, size / total)
            before += size
    elif not path.is_file():
        raise CorpusError(f"{path}: no such file or folder")
    elif path.suffix == ".txt":
        yield Document(_text_of(path), where=str(path), through=1.0)
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
    n_bytes = max(path.stat().st_size, 1)
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
            document = _of_fields(fields, where, path.parent)
            yield replace(document, through=lines.tell() / n_bytes)


def _of_rows(path: Path) -> Iterator[Document]:
    from ernie_lab.corpus.parquet import pyarrow_parquet

    file = pyarrow_parquet().ParquetFile(path)
    known = [name for name in (*_CONTENT, "domain", *_PICTURES) if name in file.schema_arrow.names]
    number = 0
    for batch in file.iter_batches(batch_size=256, columns=known):
        for fields in batch.to_pylist():
            document = _of_fields(fields, f"{path}, row {number}", path.parent)
            number += 1
            yield replace(document, through=number / file.metadata.num_rows)


def _of_fields(fields: Mapping[str, Any], where: str, folder: Path | None) -> Document:
    given = [name for name in _CONTENT if fields.get(name) is not None]
    if len(given) != 1:
        raise CorpusError(
            f"{where} has {' and '.join(given) or 'none'} of {', '.join(_CONTENT)}; expected one "
            f"(it has {list(fields)})"
        )
    content, domain = fields[given[0]], fields.get("domain")
    if given[0] == "ids" and hasattr(content, "tolist"):
        content = content.tolist()
    expected = str if given[0] == "text" else Sequence
    if not isinstance(content, expected) or (expected is Sequence and isinstance(content, str)):
        raise CorpusError(f"{where}: {given[0]!r} is a {type(content).__name__}")
    if domain is not None and not isinstance(domain, str):
        raise CorpusError(
            f"{where}: 'domain' is {domain!r}, expected a text (of a ClassLabel of `datasets`: "
            "features['domain'].int2str)"
        )
    for name in _PICTURES:
        if fields.get(singular := name.removesuffix("s")) is not None:
            raise CorpusError(
                f"{where} has {singular!r}, which is not read: call it {name!r}, or leave it out"
            )
    images, videos = (_pictures(fields.get(name), folder) for name in _PICTURES)
    return Document(content, domain or "", images, videos, where=where)


def _pictures(given: Any, folder: Path | None) -> list[Any]:
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    return [_picture(picture, folder) for picture in listed]


def _picture(given: Any, folder: Path | None) -> Any:
    """`datasets` writes a picture into its files as `{"bytes": …, "path": …}`, one of them null."""
    if isinstance(given, Mapping) and set(given) == {"bytes", "path"}:
        given = given["path"] if given["bytes"] is None else given["bytes"]
    if folder is None or not isinstance(given, str) or _ADDRESS.match(given):
        return given
    return folder / given
