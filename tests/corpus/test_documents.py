"""Documents from every source, and errors that say where."""

import json

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
    assert list(read_documents([given])) == [given]
    (named,) = read_documents(iter([Document("x")]))
    assert named.where == "item 0 of the corpus"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 is a list, expected an object"),
        ('{"domain": "a"}', "has none of text, ids, messages"),
        ('{"text": "a", "ids": [1]}', "has text and ids of"),
        ('{"text": 3}', "'text' is a int"),
        ('{"text": "a", "domain": 3}', "'domain' is 3"),
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
