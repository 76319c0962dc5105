"""The corpus as documents: whole lines, the domains in turn, the same every time."""

from itertools import islice
from pathlib import Path

import pytest

from ernie_lab.organisms.corpus import lines
from ernie_lab.organisms.documents import CHARACTERS, documents

CORPUS = Path(__file__).parents[2] / "training/tiny_text/corpus"


@pytest.fixture(scope="module")
def held_out():
    return list(documents(CORPUS, "held_out"))


def test_domains_in_turn(held_out) -> None:
    assert [document["domain"] for document in held_out[:16]] == [*CHARACTERS] * 2
    assert held_out[:40] == list(islice(documents(CORPUS, "held_out"), 40))


def test_every_line_once_and_whole(held_out) -> None:
    for domain, drawn in lines(CORPUS, "held_out").items():
        mine = [document["text"] for document in held_out if document["domain"] == domain]
        assert "".join(mine) == "".join(line.text for line in drawn)
        assert all(len(text) >= CHARACTERS[domain] for text in mine[:-1])
        assert all(text[-1] == "\n" for text in mine[:-1])
