"""Other ranks as processes: none is left behind, and one that is lost is told of at once."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ernie_lab as el
from ernie_lab.parallel.experts import SplitExpertBank
from ernie_lab.parallel.ranks import RankError

TEXT = "Plants generate energy through"
ROOT = Path(__file__).parents[2]


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def in_time(done: Callable[[], bool], seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if done():
            return True
        time.sleep(0.02)
    return False


def other(lab: el.Lab) -> int:
    bank = next(part for part in lab.model.modules() if isinstance(part, SplitExpertBank))
    assert bank.ranks is not None
    return int(bank.ranks.reports[1]["process"])


def test_a_killed_rank_ends_the_call_and_a_closed_lab_says_so() -> None:
    lab = el.load("tiny-text", placement="ep:2")
    assert lab.run(TEXT).loss.isfinite()
    assert "placement   experts over 2 ranks, 8 of a bank on each" in repr(lab)
    pid, started = other(lab), time.monotonic()
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(RankError, match=rf"rank 1 of 2 is gone: process {pid}, killed by signal 9"):
        lab.run(TEXT)
    assert time.monotonic() - started < 60
    with pytest.raises(RankError, match=r"rank 1 of 2 is gone(?s:.*)load it again"):
        lab.run(TEXT)
    lab.close()
    lab.close()


def test_no_process_outlives_its_lab() -> None:
    lab = el.load("tiny-text", placement="ep:2")
    first = other(lab)
    lab.close()
    assert in_time(lambda: not lives(first))
    with pytest.raises(RankError, match="were closed; load it again"):
        lab.run(TEXT)
    lab = el.load("tiny-text", placement="ep:2")
    second = other(lab)
    assert lives(second)
    del lab
    gc.collect()
    assert in_time(lambda: not lives(second))


@pytest.mark.parametrize("end", ["kill", "raise"])
def test_no_process_outlives_python(end: str) -> None:
    code = (
        "import sys, ernie_lab as el\n"
        "lab = el.load('tiny-text', placement='ep:2')\n"
        "part = next(p for p in lab.model.modules() if hasattr(p, 'ranks'))\n"
        "print(part.ranks.reports[1]['process'], flush=True)\n"
        "sys.stdin.readline()\n" + ("raise ValueError('mine')\n" if end == "raise" else "")
    )
    rank_0 = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    )  # fmt: skip
    assert rank_0.stdout is not None
    pid = int(rank_0.stdout.readline())
    assert lives(pid)
    if end == "kill":
        rank_0.kill()
    _, errors = rank_0.communicate("\n" if end != "kill" else None, timeout=120)
    assert in_time(lambda: not lives(pid))
    assert ("ValueError: mine" in errors) == (end == "raise")
    assert "RankError" not in errors


def test_a_rank_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", "/nowhere")  # no Python starts under it
    with pytest.raises(RankError, match=r"(?s)rank 1 ended before it was ready: process.*said:"):
        el.load("tiny-text", placement="ep:2")


SCRIPT = """
import sys, torch, ernie_lab as el
torch.set_num_threads(1)
lab = el.load("tiny-text", placement="ep:2+tp" if "tp" in sys.argv else "ep:2", progress=False)
print("this is said once", flush=True)
if "raise" in sys.argv:
    raise ValueError("of rank 0")
if "kill" in sys.argv:
    part = next(p for p in lab.model.modules() if hasattr(p, "ranks"))
    import os; os.kill(part.ranks.reports[1]["process"], 9)
other = el.load("tiny-vl", placement="ep:2", progress=False)  # by the same processes
run = lab.run("Plants generate energy through", keep="blocks.3.moe.expert_act")
torch.save({"logits": run.logits, "act": run.trace.tensor("blocks.3.moe.expert_act"),
            "other": other.run("Look:").logits}, sys.argv[1])
"""


def torchrun(folder: Path, *arguments: str, n: int = 2) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), "--standalone",
         str(folder / "script.py"), str(folder / "out.pt"), *arguments],
        capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_torchrun_runs_the_script_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("this is said once") == 1
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    run = el.load("tiny-text").run(TEXT, keep="blocks.3.moe.expert_act")
    assert torch.equal(found["logits"], run.logits)
    assert torch.equal(found["act"], run.trace.tensor("blocks.3.moe.expert_act"))
    assert torch.equal(found["other"], el.load("tiny-vl").run("Look:").logits)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        pytest.param("raise", "ValueError: of rank 0", marks=pytest.mark.slow),
        ("kill", ""),  # torchrun may see it, and end rank 0, before rank 0 says so
    ],
)
def test_torchrun_ends_in_seconds(tmp_path: Path, how: str, words: str) -> None:
    started = time.monotonic()
    done = torchrun(tmp_path, how)
    assert done.returncode != 0
    assert words in done.stderr
    assert time.monotonic() - started < 120


def test_torchrun_with_another_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"needs 2 processes, and torchrun started 3.*or ep:3"):
        el.load("tiny-text", placement="ep:2")
