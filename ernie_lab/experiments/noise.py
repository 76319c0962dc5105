"""Runs that should give the same numbers and do not quite: the floor under every effect.

The same sequences in other company, with other padding and under another attention kernel, in
the same dtype. Nothing of this is an effect, so an effect no larger than this is not one either.
Another dtype or quantisation is an effect, and is not done here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ernie_lab.experiments.measuring import Kernel, Outcome, observe, reassembled
from ernie_lab.experiments.passages import Passage
from ernie_lab.lab import Lab

LEAST_RUNS = 8


@dataclass(frozen=True, slots=True)
class Variant:
    """One equivalent way to run a batch: in `n_groups` drawn anew, each beside a sequence
    that is longer by `filler` tokens, under this kernel."""

    n_groups: int
    filler: int | None
    kernel: Kernel
    seed: int

    def groups(self, n: int) -> list[list[int]]:
        order = list(range(n))
        random.Random(self.seed).shuffle(order)
        return [sorted(order[i :: self.n_groups]) for i in range(min(n, self.n_groups))]

    def row(self) -> dict[str, str]:
        return {
            "composition": f"{self.n_groups} groups, drawn with seed {self.seed}",
            "padding": "least" if self.filler is None else f"{self.filler} columns more",
            "kernel": self.kernel,
        }


def variants(n: int, seed: int) -> list[Variant]:
    """None of them is the base run, not even for a batch of one sequence: every one without more
    padding has another kernel."""
    if 0 < n < LEAST_RUNS:
        raise ValueError(
            f"noise={n}: a 95th percentile needs at least {LEAST_RUNS} equivalent runs; noise=0 "
            "leaves the floor out"
        )
    return [
        Variant(
            n_groups=(2, 3, 1, 4)[i % 4],
            filler=None if i % 4 == 1 else 1 + 3 * i,
            kernel="math" if i % 2 else "default",
            seed=seed + i,
        )
        for i in range(n)
    ]


def equivalent(lab: Lab, passages: Sequence[Passage], base: Outcome, variant: Variant) -> Outcome:
    """The batch of `base` run as the variant says, on the grid of `base`."""
    groups = []
    for rows in variant.groups(len(passages)):
        members = [passages[row] for row in rows]
        other = observe(lab, members, kernel=variant.kernel, filler=variant.filler)
        groups.append((rows, other))
    return reassembled(base, groups)


def sampled(
    batches: Sequence[Sequence[int]], tokens: Callable[[int], int], most: int, seed: int
) -> list[int]:
    """Numbers of batches, drawn at random, of at most `most` tokens in all, and at least one."""
    order = list(range(len(batches)))
    random.Random(seed).shuffle(order)
    chosen: list[int] = []
    total = 0
    for number in order:
        size = sum(tokens(i) for i in batches[number])
        if chosen and total + size > most:
            continue
        chosen.append(number)
        total += size
    return sorted(chosen)
