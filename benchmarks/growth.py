"""How time and memory of a run grow: with tokens, sequences, experts and what is recorded.

    python -m benchmarks.growth
    python -m benchmarks.growth --part batch

`lab.run(..., logits="last")` of a model of the widths of `benchmarks/shapes.py` and three layers,
one of them dense; CPU, fp32, random weights. Each part is measured in a process of its own, from
small to large: seconds, the median of up to three runs after one that is not counted; and the
peak of resident memory over what was there before, in that uncounted run. Slopes are of least
squares in the logarithms over the three largest points: 1 is linear, 2 quadratic.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks.shapes import ours_alone
from benchmarks.timing import RESULTS, THREADS, conditions, store, table, timed
from ernie_lab.plots.style import MUTED, OKABE_ITO, style

LAYERS = 3
LENGTHS = (128, 512, 2048, 4096, 8192, 16384)
# What is recorded -> colour, marker and name in the chart.
RECORDED = {
    "nothing": ("black", "o", "nothing recorded"),
    "routing": ("blue", "s", "routing"),
    "residual": ("orange", "^", "residual stream"),
    "attention": ("green", "D", "attention, summed"),
}
# From here on a run takes seconds and is timed once.
_LONG = 8192
_STATUS, _PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Part:
    """One line of the chart: what grows, and the call for each of its sizes."""

    grows: str
    sizes: tuple[int, ...]
    call: Callable[[int], Callable[[], object]]


def parts(quick: bool) -> dict[str, Part]:
    lengths = (16, 32, 64) if quick else LENGTHS
    n_tokens = 16 if quick else 512
    found = {
        what: Part("tokens", lengths, lambda n, what=what: run_of(what, 1, n)) for what in RECORDED
    }
    sizes = (1, 2, 4) if quick else (1, 2, 4, 8, 16, 32)
    found["batch"] = Part("sequences", sizes, lambda n: run_of("nothing", n, n_tokens))
    sizes = (8, 16, 32) if quick else (8, 16, 32, 64, 128, 256)
    found["experts"] = Part("experts", sizes, lambda n: run_of("nothing", 1, n_tokens, n))
    return found


def run_of(what: str, n_sequences: int, n_tokens: int, n_experts: int = 64) -> Callable[[], object]:
    lab = _lab(n_experts)
    ids_BS = torch.randint(3, lab.config.vocab_size, (n_sequences, n_tokens))
    given = ids_BS.tolist() if n_sequences > 1 else ids_BS[0].tolist()
    if what == "attention":
        keep = el.keep("attn.q_rot", "attn.k_rot", layers=range(LAYERS))

        def call() -> object:
            trace = lab.run(given, keep=keep, logits="last").trace
            return [el.analysis.attention_summary(trace, layer) for layer in range(LAYERS)]

        return call
    return lambda: lab.run(given, keep=None if what == "nothing" else what, logits="last")


_LABS: dict[int, el.Lab] = {}


def _lab(n_experts: int) -> el.Lab:
    """The last one stays for the next size."""
    if n_experts not in _LABS:
        _LABS.clear()
        _LABS[n_experts] = ours_alone(num_hidden_layers=LAYERS, moe_num_experts=n_experts)
    return _LABS[n_experts]


def measured(name: str, quick: bool) -> list[dict[str, float]]:
    """Each size of a part, in this process."""
    part, rows = parts(quick)[name], []
    run_of("attention" if name == "attention" else "nothing", 1, 16)()  # imports, and first calls
    for size in part.sizes:
        call = part.call(size)
        mib = extra_memory(call)
        n_runs = 1 if name in RECORDED and size >= _LONG else 3
        seconds = float(np.median([timed(call) for _ in range(n_runs)]))
        rows.append({"size": size, "seconds": round(seconds, 4), "mib": round(mib, 1)})
    return rows


def extra_memory(call: Callable[[], object]) -> float:
    """MiB of resident memory at the peak of a call, over what was there before."""
    if not _PEAK.exists():
        call()
        return float("nan")
    # What earlier calls freed goes back first; else a later one would find its room there.
    ctypes.CDLL(None).malloc_trim(0)
    _PEAK.write_text("5")  # the peak is now what is resident
    before = _kib("VmRSS")
    held = call()
    peak = _kib("VmHWM")
    del held
    return (peak - before) / 1024


def _kib(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def slope(rows: list[dict[str, float]], what: str, last: int = 3) -> float:
    x = np.array([row["size"] for row in rows[-last:]])
    y = np.array([max(row[what], 1e-3) for row in rows[-last:]])
    return round(float(np.polyfit(np.log(x), np.log(y), 1)[0]), 2)


def apart(name: str, quick: bool) -> list[dict[str, float]]:
    code = (
        f"import json, torch; torch.set_num_threads({THREADS}); torch.manual_seed(0)\n"
        f"from benchmarks.growth import measured; print(json.dumps(measured({name!r}, {quick})))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found: list[dict[str, float]] = json.loads(ran.stdout.splitlines()[-1])
    return found


def chart(found: dict[str, Any]) -> Any:
    """Time above, memory below; against tokens, sequences, experts; linear growth dotted."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    columns = (
        ("tokens, one sequence", tuple(RECORDED)),
        ("sequences of 512 tokens", ("batch",)),
        ("experts, 6 chosen; 512 tokens", ("experts",)),
    )
    measures = (("seconds", "seconds"), ("mib", "MiB at the peak, beside the weights"))
    with style():
        figure, axes = plt.subplots(2, 3, figsize=(8.4, 5.9), width_ratios=(1.5, 1, 1))
        figure.suptitle("Time and memory of a forward pass as its work grows", fontweight="bold")
        for column, (label, names) in enumerate(columns):
            for row, (what, unit) in enumerate(measures):
                ax = axes[row, column]
                for name in names:
                    colour, marker, words = RECORDED.get(name, ("black", "o", ""))
                    rows = found[name]["rows"]
                    ax.plot(
                        [one["size"] for one in rows],
                        [one[what] for one in rows],
                        color=OKABE_ITO[colour],
                        marker=marker,
                        markersize=4,
                        linewidth=1.3,
                        label=f"{words}: slope {found[name]['slopes'][what]}".removeprefix(": "),
                    )
                _linear(ax, found[names[0]]["rows"], what)
                ax.set_xscale("log", base=2)
                ax.set_yscale("log")
                ax.set_xticks([one["size"] for one in found[names[0]]["rows"]])
                ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
                ax.set_ylim(*_limits(found, names, what))
                ax.yaxis.set_major_locator(LogLocator(subs=(1,) if not column else (1, 2, 5)))
                ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
                ax.xaxis.set_minor_locator(NullLocator())
                ax.yaxis.set_minor_formatter(NullFormatter())
                ax.set_xlabel(label if row else "")
                ax.set_ylabel("" if column else unit)
                ax.legend(loc="best", fontsize=7, handlelength=1.6)
        figure.supxlabel(
            "Random model, 512 wide, 3 layers; float32, two CPU threads. "
            "Slopes: the last three points. Dotted: linear growth.",
            fontsize=8,
        )
    return figure


def _limits(found: dict[str, Any], names: tuple[str, ...], what: str) -> tuple[float, float]:
    """A factor of two around the values."""
    values = [one[what] for name in names for one in found[name]["rows"]]
    return min(values) / 2, 2 * max(values)


def _linear(ax: Any, rows: list[dict[str, float]], what: str) -> None:
    """A dotted line of slope 1 through the last point."""
    x = np.array([row["size"] for row in rows[len(rows) // 2 :]], dtype=float)
    ax.plot(x, rows[-1][what] * x / x[-1], color=MUTED, linestyle=":", linewidth=1.2, zorder=0)


def _short(x: float) -> str:
    return f"{x / 1024:g}k" if x >= 1024 else f"{x:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--part", choices=parts(True), help="measure this one, keep the others")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    path, found = RESULTS / "growth.json", {}
    if path.exists() and options.part and not options.quick:
        found = json.loads(path.read_text())
    for name, part in parts(options.quick).items():
        if options.part in (None, name):
            under = conditions()
            rows = apart(name, options.quick)
            slopes = {what: slope(rows, what) for what in ("seconds", "mib")}
            found[name] = {
                "grows": part.grows, "rows": rows, "slopes": slopes, "conditions": under,
            }  # fmt: skip
            print(name, slopes, table(rows), sep="\n", flush=True)
    complete = parts(True).keys() <= found.keys()
    if not options.quick:
        print(store("growth", found))
    if complete:
        import matplotlib as mpl

        mpl.use("agg")
        figure = chart(found)
        if not options.quick:
            figure.savefig(RESULTS / "growth.png", dpi=110)


if __name__ == "__main__":
    main()
