"""Peak memory of a load, measured from outside: anonymous pages of a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint.files import random_tensors, write_sharded
from support.models import small_config

from ernie_lab.checkpoint.config import AttentionConfig, MoEConfig, RouterConfig
from ernie_lab.checkpoint.config_json import write_config
from ernie_lab.checkpoint.memory import weight_bytes
from ernie_lab.checkpoint.names import LAYOUTS
from ernie_lab.checkpoint.quantise import Scheme

WIDTH, HIDDEN, N_EXPERTS = 512, 512, 24
CONFIG = small_config(
    width=WIDTH,
    n_layers=4,
    dense_hidden=1024,
    attention=AttentionConfig(width=WIDTH, n_heads=8, n_kv_heads=2, head_dim=64),
    moe=MoEConfig(
        layers=(1, 2, 3),
        router=RouterConfig(width=WIDTH, n_experts=N_EXPERTS, n_chosen=2),
        expert_hidden=HIDDEN,
        n_shared=2,
    ),
)

# Prints the anonymous bytes a load added over what the imports had taken: at its peak, sampled
# all the while, and in the end.
MEASURE = """
import json, sys, threading, torch
from pathlib import Path
from ernie_lab.checkpoint import Reader, detect, fill, read_config_file
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.model.packed import PackedMatrices
from ernie_lab.model.quantised import quantise
from ernie_lab.model.text import TextModel

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

def watch():
    while not done.wait(0.0005):
        seen.append(anonymous())

folder, dtype = Path(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(1)
with torch.device("meta"):
    model = TextModel(read_config_file(folder))
if len(sys.argv) > 3:
    how = Quantisation(sys.argv[3])
    quantise(model, how)
    warm = PackedMatrices("weight", (8, 64), how.scheme)  # imports what packs
    warm.take((), torch.ones(8, 64)); warm.dequantised()
reader = Reader.open(folder)
seen, done, watcher = [anonymous()], threading.Event(), threading.Thread(target=watch)
watcher.start()
fill(model, reader, detect(reader.tensors), device="cpu", dtype=dtype, progress=False)
done.set(); watcher.join()
print(json.dumps({"peak": max(seen) - seen[0], "end": anonymous() - seen[0], "n": len(seen)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("layout", "dtype"), [("released", "bfloat16"), ("transformers", "float32")]
)
def test_peak_is_the_weights(tmp_path: Path, layout: str, dtype: str) -> None:
    """250 MB of fp32 in 3 shards; loading as bf16 converts every tensor on its way."""
    measured = measure(tmp_path, layout, dtype)
    weights = weight_bytes(CONFIG, getattr(torch, dtype))
    largest = N_EXPERTS * 2 * HIDDEN * WIDTH * getattr(torch, dtype).itemsize
    assert measured["n"] > 20, "too few samples to speak of a peak"
    assert measured["peak"] <= 1.1 * (weights + largest), (measured, weights, largest)
    # What we hold ourselves to: no second copy of anything.
    assert measured["peak"] <= 1.1 * weights, (measured, weights)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(("layout", "scheme"), [("released", "int8"), ("transformers", "nf4")])
def test_peak_of_a_quantised_load_is_the_packed_weights(
    tmp_path: Path, layout: str, scheme: Scheme
) -> None:
    """Matrix by matrix, also where a file stores a layer's experts as one tensor of 50 MB."""
    measured = measure(tmp_path, layout, "bfloat16", scheme)
    weights = weight_bytes(CONFIG, torch.bfloat16, scheme)
    unquantised = weight_bytes(CONFIG, torch.bfloat16)
    matrix = 1024 * WIDTH * 4  # the largest, in float32
    assert measured["peak"] <= 1.1 * weights + 4 * matrix, (measured, weights, unquantised)
    assert measured["peak"] < 0.7 * unquantised


def measure(folder: Path, layout: str, *arguments: str) -> dict[str, int]:
    """Write `CONFIG` in this layout and load it in a process of its own."""
    write_sharded(folder, random_tensors(CONFIG, LAYOUTS[layout]), 3)
    (folder / "config.json").write_text(json.dumps(write_config(CONFIG)))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    measured: dict[str, int] = json.loads(ran.stdout)
    return measured
