"""What the C library does with memory that a forward pass lets go of."""

from __future__ import annotations

import torch

# glibc learns from blocks up to 32 MB (mallopt(3), "dynamic mmap threshold").
_LARGEST_LESSON = 31 * 2**20


def keep_freed_memory() -> None:
    """Let the process keep up to 64 MB that it has freed, for the next tensors.

    glibc returns memory at the top of its heap to the system above a limit, twice the largest
    block that it has seen freed. While that limit is small, every layer of a prefill gets its
    pages anew, each by a fault: 75,000 faults and a sixth of the time for 512 tokens (measured,
    benchmarks/NOTES.md). One large block, never touched, raises it. Other libraries of C do not
    mind.
    """
    torch.empty(_LARGEST_LESSON, dtype=torch.uint8, device="cpu")
