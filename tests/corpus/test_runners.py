"""Many workers, the same store: torchrun's ranks, and Ray actors, one of them killed."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.ray_cluster import ray_cluster

from ernie_lab.corpus import CorpusError, RecordPlan, RoutingStore
from ernie_lab.corpus.units import Unit

CORPUS = [
    {"text": f"And God said {i}, let there be light number {i}.", "domain": "ab"[i % 2]}
    for i in range(120)
]
SETTINGS = {"model": "tiny-text", "corpus": CORPUS, "unit_tokens": 200, "rows": "ids"}

LONG = SETTINGS | {"corpus": CORPUS * 12}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> RoutingStore:
    folder = tmp_path_factory.mktemp("whole")
    return RecordPlan(folder=folder, **SETTINGS).run(progress=False)


def same(store: RoutingStore, whole: RoutingStore) -> bool:
    sums, theirs = store.statistics().sums, whole.statistics().sums
    rows = store.sample(10**6).expert_ids.equals(whole.sample(10**6).expert_ids)
    return rows and all(torch.equal(theirs[name], x) for name, x in sums.items())


def test_ranks_share_the_units(whole, tmp_path) -> None:
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from ernie_lab.corpus import RecordPlan\n"
        "from corpus.test_runners import SETTINGS\n"
        "RecordPlan(folder=sys.argv[1], **SETTINGS).run(runner='torchrun', progress=False)"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert same(RoutingStore(tmp_path), whole)


def test_torchrun_and_workers_say_what_they_need(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    plan = RecordPlan(folder=tmp_path, **SETTINGS)
    with pytest.raises(CorpusError, match=r"'RANK' in the environment: start the script with"):
        plan.run(runner="torchrun", progress=False)
    with pytest.raises(ValueError, match="workers and gpus_per_worker are of runner='ray'"):
        plan.run(workers=2)
    with pytest.raises(ValueError, match="runner='spark' must be one of"):
        plan.run(runner="spark")
    in_memory = RecordPlan(folder=tmp_path, **SETTINGS | {"model": plan.lab()})
    with pytest.raises(ValueError, match="not a Lab in memory"):
        in_memory.run(runner="ray", progress=False)


@pytest.fixture(scope="module")
def cluster():
    with ray_cluster() as ray:
        yield ray


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_actor_that_is_killed_costs_nothing(cluster, whole, tmp_path) -> None:
    folder = tmp_path / "ray"
    pids = set()

    def kill_one() -> None:
        while len(list((folder / "units").glob("0*.safetensors"))) < 2:
            time.sleep(0.01)
        workers = [p for p in _processes() if "_Worker" in p[1]]
        pids.update(pid for pid, _ in workers)
        os.kill(workers[0][0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    plan = RecordPlan(folder=folder, **SETTINGS)
    store = plan.run(runner="ray", workers=2, progress=False)
    killer.join(timeout=60)
    assert pids, "no worker was found to kill"
    assert same(store, whole)
    assert not store.status().attrs["failed"]


@pytest.mark.slow
def test_a_driver_that_is_killed_costs_nothing(tmp_path) -> None:
    """SIGKILL of the process that shares out the units; its workers end by themselves."""
    pytest.importorskip("ray")
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        f"sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from ernie_lab.corpus import RecordPlan\n"
        "from corpus.test_runners import LONG\n"
        "RecordPlan(folder=sys.argv[1], **LONG).run(runner='ray', workers=2, progress=False)"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "ray")]
    whole = RecordPlan(folder=tmp_path / "whole", **LONG).run(progress=False)
    driver = subprocess.Popen(run)
    units = tmp_path / "ray/units"
    deadline = time.monotonic() + 300
    while len(list(units.glob("0*.safetensors"))) < 3:
        assert time.monotonic() < deadline and driver.poll() is None
        time.sleep(0.01)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    n_before = len(list(units.glob("0*.safetensors")))
    assert 3 <= n_before < len(whole.units), "there must be something left to do"
    subprocess.run(run, check=True, timeout=600)
    store = RoutingStore(tmp_path / "ray")
    assert store.units == whole.units and same(store, whole)
    found = store.sql("select count(*) n, count(distinct (doc, pos)) d from tokens")
    assert found.values.tolist() == [[whole.statistics().n_tokens] * 2]


def _processes() -> list[tuple[int, str]]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found.append((int(folder.name), (folder / "cmdline").read_text()))
        except OSError:
            continue
    return found


def test_units_travel() -> None:
    import pickle

    plan = RecordPlan(folder="unused", **SETTINGS)
    unit = next(plan.units(plan.lab()))
    there = pickle.loads(pickle.dumps(unit))
    assert isinstance(there, Unit) and there.digest == unit.digest
