"""Ranks as Ray actors, on one machine: the same results, and an error when one dies."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
import torch
from parallel.test_ranks import TEXT, in_time, lives, other
from support.ray_cluster import ray_cluster

import ernie_lab as el
from ernie_lab.parallel.ranks import RankError

ray = pytest.importorskip("ray")


@pytest.fixture
def cluster() -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_actors(cluster: None) -> None:
    lab, one = el.load("tiny-text", placement="ep:2"), el.load("tiny-text")
    keep = ["blocks.2.moe.expert_act", "moe.expert_ids"]
    edits = el.routing.forbid(3, range(6))
    runs = [each.run(TEXT, keep=keep, edits=edits) for each in (one, lab)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    for path in runs[0].trace.values:
        assert torch.equal(runs[0].trace.tensor(path), runs[1].trace.tensor(path)), path
    pid, started = other(lab), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankError, match=r"rank 1 of 2 is gone: its actor ended"):
        lab.run(TEXT)
    assert time.monotonic() - started < 60
    lab = el.load("tiny-text", placement="ep:2")
    pid = other(lab)
    lab.close()
    assert in_time(lambda: not lives(pid))
