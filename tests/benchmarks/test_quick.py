"""Every benchmark of cost runs at small sizes, and its own arithmetic holds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.growth import RECORDED, chart, parts, slope
from benchmarks.loading import QUICK, loaded, read_plainly, write

ROOT = Path(__file__).parents[2]


def test_slope_is_that_of_the_last_points() -> None:
    rows = [{"size": 1, "seconds": 9.0}] + [{"size": n, "seconds": 3.0 * n**2} for n in (2, 4, 8)]
    assert slope(rows, "seconds") == 2
    assert slope([{"size": n, "seconds": 5.0} for n in (2, 4, 8)], "seconds") == 0


def test_chart_of_all_parts() -> None:
    rows = [{"size": 2**i, "seconds": 0.1 * 2**i, "mib": 4.0 * 2**i} for i in range(4)]
    found = {name: {"rows": rows, "slopes": {"seconds": 1.0, "mib": 1.0}} for name in parts(True)}
    figure = chart(found)
    assert len(figure.axes) == 6
    assert len(figure.axes[0].lines) == len(RECORDED) + 1
    told = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert told[1] == "routing: slope 1.0"


def test_both_ways_read_the_same_bytes(tmp_path: Path) -> None:
    sizes = write(tmp_path, QUICK, n_shards=2)
    ours, plain = loaded(str(tmp_path / "model")), read_plainly(str(tmp_path / "model"))
    assert ours["n_bytes"] == plain["n_bytes"] > 0
    assert 0 < ours["checking"] < ours["seconds"]
    # Routers are fp32 in memory and in a file.
    assert sizes["weights"] == plain["n_bytes"] and sizes["largest"] < sizes["weights"]


@pytest.mark.slow
@pytest.mark.parametrize("line", ["attention", "growth --part experts", "importing", "loading"])
def test_runs_at_small_sizes(line: str) -> None:
    name, *more = line.split()
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", *more]
    # Threads that wait for one another on cores that others use take minutes.
    alone = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=alone, check=True, capture_output=True, text=True)
