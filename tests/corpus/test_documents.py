"""Documents from every source, and errors that say where."""

import json
from dataclasses import replace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from ernie_lab.corpus import CorpusError, Document, read_documents

LINES = [{"text": "one", "domain": "a"}, {"ids": [3, 4]}, {"text": "two", "extra": 1}]


def contents(corpus):
    return [document.content for document in read_documents(corpus)]


def test_files_and_folders(tmp_path) -> None:
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, LINES)) + "\n\n")
    (tmp_path / "a.txt").write_text("first\nsecond", encoding="utf-8")
    table = pyarrow.table({"text": ["p", "q"], "domain": ["x", None], "other": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    (tmp_path / "ignored.csv").write_text("x")
    expected = ["first\nsecond", "one", [3, 4], "two", "p", "q"]
    assert contents(tmp_path) == contents(str(tmp_path)) == expected
    found = list(read_documents(tmp_path))
    assert [document.domain for document in found] == ["", "a", "", "", "x", ""]
    assert found[1].where == f"{tmp_path / 'b.jsonl'}, line 1" and found[5].where.endswith("row 1")
    assert contents([tmp_path / "a.txt", "a text", LINES[0]]) == ["first\nsecond", "a text", "one"]


def test_pictures_lie_beside_their_file(tmp_path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "what?", "images": ["p/1.png"]}))
    (document,) = read_documents(tmp_path / "x.jsonl")
    assert document.images == [tmp_path / "p/1.png"]


def test_iterators() -> None:
    given = Document("x", where="here")
    assert list(read_documents(iter([given]))) == [given]
    assert list(read_documents([given])) == [replace(given, through=1.0)]
    (named,) = read_documents(iter([Document("x")]))
    assert named.where == "item 0 of the corpus"


class Streamed:
    """As `datasets.IterableDataset`: rows as mappings, begun anew each time, and no length."""

    def __iter__(self):
        yield from ({**row, "other": 1} for row in LINES)


class Indexed(Streamed):
    """As `datasets.Dataset`."""

    def __len__(self):
        return len(LINES)

    def __getitem__(self, number):
        return LINES[number]


def test_data_sets() -> None:
    expected = ["one", [3, 4], "two"]
    for made in (Streamed(), Indexed()):
        assert contents(made) == contents(made) == expected
    assert [d.through for d in read_documents(Indexed())] == pytest.approx([1 / 3, 2 / 3, 1])
    assert {d.through for d in read_documents(Streamed())} == {None}
    assert contents([{"ids": np.array([3, 4])}]) == [[3, 4]]


class Frame:
    iterrows = None

    def __iter__(self):
        return iter(["text", "domain"])


@pytest.mark.parametrize(
    ("corpus", "said"),
    [
        ({"train": LINES, "test": LINES}, r"is a dict with 'train', 'test': expected one of its"),
        (LINES[0], "is a dict with 'text', 'domain'.* or a list of such mappings"),
        (Frame(), r"corpus is a Frame: pass its rows, corpus\.to_dict\('records'\)"),
    ],
)
def test_names_are_not_taken_for_texts(corpus, said) -> None:
    with pytest.raises(CorpusError, match=said):
        contents(corpus)


def test_pictures_as_files_hold_them(tmp_path) -> None:
    given = ["a.png", "data:image/png;base64,AA", "https://x.org/y.png",
             {"bytes": b"png", "path": None}, {"bytes": None, "path": "b.png"}]  # fmt: skip
    table = pyarrow.Table.from_pylist([{"text": "?", "images": given[3:]}])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    (document,) = read_documents(tmp_path / "x.parquet")
    assert document.images == [b"png", tmp_path / "b.png"]
    (tmp_path / "y.jsonl").write_text(json.dumps({"text": "?", "images": given[:3]}))
    (document,) = read_documents(tmp_path / "y.jsonl")
    assert document.images == [tmp_path / "a.png", *given[1:3]]
    picture = object()  # of Pillow, as `datasets` gives it
    for images in (picture, [picture]):
        (document,) = read_documents([{"text": "?", "images": images}])
        assert document.images == [picture]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is a list, expected an object"),
        ('{"domain": "a"}', "has none of text, ids, messages"),
        ('{"text": "a", "ids": [1]}', "has text and ids of"),
        ('{"text": 3}', "'text' is a int"),
        ('{"text": "a", "domain": 3}', r"'domain' is 3, expected a text \(of a ClassLabel"),
        ('{"text": "a", "image": "x.png"}', "has 'image', which is not read: call it 'images'"),
    ],
)
def test_errors_say_where(tmp_path, line, said) -> None:
    (tmp_path / "x.jsonl").write_text(line)
    with pytest.raises(CorpusError, match=said):
        contents(tmp_path)


def test_what_is_no_corpus(tmp_path) -> None:
    with pytest.raises(CorpusError, match=r"no such file or folder\. A corpus of texts is a list"):
        contents("once upon a time")
    with pytest.raises(CorpusError, match="holds no file with one of the endings"):
        contents(tmp_path)
    with pytest.raises(CorpusError, match="item 1 of the corpus is a int"):
        contents(["a", 3])
    (tmp_path / "x.csv").write_text("")
    with pytest.raises(CorpusError, match=r"expected a file with one of \.txt"):
        contents(tmp_path / "x.csv")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(CorpusError, match="is not UTF-8"):
        contents(tmp_path / "x.txt")
