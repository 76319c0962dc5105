"""How far a recording is: tokens, their rate, and the time left where the corpus has a length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ernie_lab.corpus.units import Unit


def shown(done: Iterable[Unit], n_documents: int | None, on: bool = True) -> Iterator[Unit]:
    """Passes on the units that are done, with a bar of their tokens.

    How many tokens there will be is known from the documents done and all `n_documents`; without
    these, as for files, the bar shows tokens and rate alone.
    """
    from tqdm.auto import tqdm

    first, last, tokens = None, 0, 0
    with tqdm(desc="recording", unit=" tokens", unit_scale=True, disable=not on) as bar:
        for unit in done:
            tokens += unit.n_tokens
            first = unit.windows[0].doc if first is None else first
            last = max(last, unit.windows[-1].doc + 1)
            if n_documents is not None:
                bar.total = max(tokens, round(tokens * (n_documents - first) / (last - first)))
            bar.update(unit.n_tokens)
            yield unit
