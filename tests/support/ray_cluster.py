"""Ray on this machine, for the tests that need it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """Its own start gives up after 15 s, which a busy machine may need."""
    ray = pytest.importorskip("ray")
    for attempt in range(3):
        try:
            ray.init(include_dashboard=False, log_to_driver=False, num_cpus=2)
            break
        except Exception:  # it raises no type of its own
            ray.shutdown()
            if attempt == 2:
                raise
    yield ray
    ray.shutdown()
    gc.collect()  # of what Ray leaves open, which is not the next test's
