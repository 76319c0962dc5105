"""What `import ernie_lab` takes beside `import torch`: time of fresh processes, in turn.

    python -m benchmarks.importing

The package imports everything at first use, so a second row has all that `load` needs: it is what
the first model of a session pays, once. Within each process the clock starts before the imports
and stops after them, so that starting Python counts for neither. Bytecode is cached and the files
are in the page cache for both.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections import Counter
from typing import Any

from benchmarks.timing import Paired, conditions, store, table

_CODE = (
    "import time\n"
    "wall, cpu = time.perf_counter(), time.process_time()\n"
    "{}\n"
    "print(time.perf_counter() - wall, time.process_time() - cpu)"
)


TORCH = "import torch"
OURS = {
    "import ernie_lab, torch": "import torch, ernie_lab",
    "and all that load needs": "import torch, ernie_lab; ernie_lab.load",
}


def seconds(code: str) -> tuple[float, float]:
    """Wall and CPU time of the imports in a fresh process."""
    wall, cpu = _python("-c", _CODE.format(code)).stdout.split()
    return float(wall), float(cpu)


def beside_torch(pairs: int) -> list[dict[str, Any]]:
    rows = []
    for name, code in OURS.items():
        ours, theirs = [], []
        for number in range(-1, pairs):
            order = (code, TORCH) if number % 2 else (TORCH, code)
            found = {one: seconds(one) for one in order}
            if number >= 0:  # the first pair writes the bytecode
                ours.append(found[code])
                theirs.append(found[TORCH])
        for i, what in enumerate(("wall", "CPU")):
            both = Paired(tuple(one[i] for one in ours), tuple(one[i] for one in theirs))
            rows.append({"what": f"{name} / {TORCH}, {what} time"} | both.row())
    return rows


def by_package(runs: int = 3) -> dict[str, float]:
    """Milliseconds beyond torch by package, the least of several runs of `-X importtime`."""
    least: dict[str, int] = {}
    for _ in range(runs):
        told = _python("-X", "importtime", "-c", "import torch, ernie_lab; ernie_lab.load").stderr
        lines = re.findall(r"^import time: +(\d+) \| +\d+ \|( +)(\S+)$", told, re.M)
        end_of_torch = next(
            i for i, (_, indent, module) in enumerate(lines) if module == "torch" and indent == " "
        )
        for micros, _, module in lines[end_of_torch + 1 :]:
            least[module] = min(int(micros), least.get(module, int(micros)))
    total: Counter[str] = Counter()
    for module, micros in least.items():
        total[".".join(module.split(".")[: 2 if module.startswith("ernie_lab") else 1])] += micros
    return {package: round(micros / 1000, 1) for package, micros in total.most_common(12)}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one pair: does it run?")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args()
    under = conditions()
    rows = beside_torch(1 if options.quick else options.pairs)
    packages = by_package(1 if options.quick else 3)
    print(table(rows))
    print(packages)
    if not options.quick:
        found = {"rows": rows, "ms_by_package": packages, "conditions": under}
        print(store("importing", found))


if __name__ == "__main__":
    main()
