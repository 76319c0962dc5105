"""Attention of long inputs without a map: time beside the layer itself, and memory.

    python -m benchmarks.attention

`attention_summary` of all heads of one layer of the model of `benchmarks/shapes.py`, against one
forward of that layer under the fused kernel; peak memory beyond what was there before.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks.shapes import ours_alone
from benchmarks.timing import THREADS, conditions, paired, store, table
from ernie_lab.model.rope import rotation
from ernie_lab.sites import idle

LAYER = 1
KEEP = ("attn.q_rot", "attn.k_rot")


def recorded(lab: el.Lab, n_tokens: int) -> el.Trace:
    ids = torch.randint(3, lab.config.vocab_size, (n_tokens,)).tolist()
    return lab.run(ids, keep=el.keep(*KEEP, layers=[LAYER]), logits="last").trace


SUMS, GROUPS, ALL = "sums", "sums, groups, distances", "sums, groups, distances, 8 largest keys"


def summarised(trace: el.Trace, what: str = SUMS) -> Any:
    half = len(trace) // 2
    groups = ["first half"] * half + ["second half"] * (len(trace) - half)
    more = {} if what == SUMS else {"groups": groups, "histogram": True}
    return el.analysis.attention_summary(trace, LAYER, top=8 if what == ALL else 0, **more)


def one_layer(lab: el.Lab, n_tokens: int) -> Any:
    """The layer's forward on states of this length, as `lab.model` runs it."""
    block = lab.model.blocks[LAYER]
    resid_BSD = torch.randn(1, n_tokens, lab.config.width, dtype=lab.dtype)
    positions_BS = torch.arange(n_tokens)[None]
    by = rotation(lab.config.rope, lab.config.attention.head_dim, positions_BS)

    def forward() -> None:
        with torch.no_grad():
            block(resid_BSD, by, None, None, None, idle)

    return forward


def timings(lab: el.Lab, lengths: list[int], pairs: int) -> list[dict[str, Any]]:
    rows = []
    for n_tokens in lengths:
        trace, layer = recorded(lab, n_tokens), one_layer(lab, n_tokens)
        for what in (SUMS, GROUPS, ALL):
            found = paired(partial(summarised, trace, what), layer, pairs, warm=1)
            rows.append({"tokens": n_tokens, "reductions": what} | found.row())
    return rows


def memory(n_tokens: int, what: str) -> float:
    """MiB of peak memory of the reductions alone, in a process of their own."""
    code = (
        f"import resource, torch; torch.set_num_threads({THREADS})\n"
        "from benchmarks.attention import recorded, summarised\n"
        "from benchmarks.shapes import ours_alone\n"
        f"lab = ours_alone(); summarised(recorded(lab, 64), {what!r})\n"
        f"trace = recorded(lab, {n_tokens})\n"
        # Freed memory that the process still has would hide what is taken from it.
        "import ctypes; ctypes.CDLL(None).malloc_trim(0)\n"
        "held = open('/proc/self/clear_refs', 'w'); held.write('5'); held.close()\n"
        "read = lambda name: next(int(l.split()[1]) for l in open('/proc/self/status') "
        "if l.startswith(name))\n"
        f"before = read('VmRSS'); summarised(trace, {what!r}); print(read('VmHWM') - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1]) / 1024


def worst_difference(lab: el.Lab, n_tokens: int) -> dict[str, float]:
    """Against the full map of the same layer, largest absolute difference."""
    ids = torch.randint(3, lab.config.vocab_size, (n_tokens,)).tolist()
    keep = el.keep(*KEEP, "attn.pattern", layers=[LAYER])
    trace = lab.run(ids, keep=keep, logits="last").trace
    found = el.analysis.attention_summary(trace, LAYER)
    p = trace.pattern(LAYER).values.astype(np.float64)
    back = np.arange(n_tokens)[:, None] - np.arange(n_tokens)
    entropy = -(p * np.log(np.where(p > 0, p, 1))).sum(-1)
    relative = np.abs((p * back).sum(-1) - found["distance"].values) / n_tokens
    return {
        "entropy": float(np.abs(entropy - found["entropy"].values).max()),
        "first": float(np.abs(p[..., 0] - found["first"].values).max()),
        "largest": float(np.abs(p.max(-1) - found["largest"].values).max()),
        "distance / length": float(relative.max()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--longest", type=int, default=32768)
    quick = parser.parse_args().quick
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    under = conditions()
    lab = ours_alone()
    lengths = [128] if quick else [1024, 4096]
    longest = 256 if quick else parser.parse_args().longest
    rows = timings(lab, lengths, 2 if quick else 25)
    mib = {
        f"{n} tokens, {what}": round(memory(n, what), 1)
        for n in (lengths[-1], longest)
        for what in (SUMS, ALL)
    }
    found = {
        "timings": rows,
        "peak_mib": mib,
        "worst_difference_at_1024": worst_difference(lab, 128 if quick else 1024),
        "max_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "conditions": under,
    }
    print(table(rows))
    print(mib, found["worst_difference_at_1024"])
    if not quick:
        print(store("attention", found))


if __name__ == "__main__":
    main()
