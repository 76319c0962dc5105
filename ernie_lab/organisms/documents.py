"""The corpus of tiny-text as documents, its kinds in turn: what a recording of a corpus reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ernie_lab.organisms.corpus import Split, lines

# Characters of a document: about 350 tokens in every domain, so that the mixture is even.
CHARACTERS = {
    "prose": 1100, "code": 1000, "chinese": 320, "sums": 350,
    "sums_zh": 350, "json": 730, "copy": 1700, "facts": 1400,
}  # fmt: skip


def documents(folder: Path, split: Split, seed: int = 0) -> Iterator[dict[str, str]]:
    """`text` and `domain`, a document of each domain in turn until all are used up.

    A document is whole lines of one domain, about 350 tokens of them; chapters of prose and
    modules of code are cut at line ends. The order is the same every time. `folder` is
    `training/tiny_text/corpus` of a source checkout.
    """
    waiting = {
        domain: _pieces("".join(line.text for line in drawn), CHARACTERS[domain])
        for domain, drawn in lines(folder, split, seed).items()
    }
    while waiting:
        for domain in list(waiting):
            text = next(waiting[domain], None)
            if text is None:
                del waiting[domain]
            else:
                yield {"text": text, "domain": domain}


def _pieces(text: str, characters: int) -> Iterator[str]:
    held: list[str] = []
    for line in text.splitlines(keepends=True):
        held.append(line)
        if sum(map(len, held)) >= characters:
            yield "".join(held)
            held = []
    if held:
        yield "".join(held)
