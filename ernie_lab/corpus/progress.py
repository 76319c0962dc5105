"""How far a recording is: tokens, their rate, and the time left where the corpus has a length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ernie_lab.corpus.units import Unit


def shown(done: Iterable[Unit], on: bool = True) -> Iterator[Unit]:
    """Passes on the units that are done, with a bar of their tokens.

    How many tokens there will be follows from the share of the corpus that they are, by items of
    a list, bytes of files, rows of a table. A corpus without a length, such as a generator, has
    tokens and rate alone.
    """
    from tqdm.auto import tqdm

    tokens = 0
    first, last = 1.0, 0.0
    with tqdm(desc="recording", unit=" tokens", unit_scale=True, disable=not on) as bar:
        for unit in done:
            tokens += unit.n_tokens
            if (span := unit.span) is not None:
                first, last = min(first, span[0]), max(last, span[1])
                bar.total = max(tokens, round(tokens * (1 - first) / (last - first)))
            bar.update(unit.n_tokens)
            yield unit
