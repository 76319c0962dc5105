"""One other rank for all tests of this folder that want one: a process takes seconds to start."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import ernie_lab as el
from ernie_lab.lab import Lab
from ernie_lab.parallel import over_ranks
from ernie_lab.parallel.processes import start_processes
from ernie_lab.parallel.ranks import Ranks

Load = Callable[..., Lab]


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """This process and one more. As under torchrun, they hold the parts of several models."""
    ranks = start_processes(2)
    yield ranks
    ranks.close()


@pytest.fixture
def load_over_two(two_ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`el.load(placement=…)`, with the ranks that are there in the place of new ones."""

    def load(source: Any, placement: str = "ep:2", **options: Any) -> Lab:
        with monkeypatch.context() as patched:
            patched.setattr(over_ranks, "gather", lambda n_ranks: two_ranks)
            return el.load(source, placement=placement, **options)

    return load
