"""Devices as users write them: `80GB`, `8x80GB`, `4x80GB,2x24GiB`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ernie_lab.display import in_words

UNITS = {
    "MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip
_GROUP = re.compile(r"(?:(\d+)\s*[x×*]\s*)?(\d+(?:\.\d+)?)\s*((?!x)[a-z]+)", re.IGNORECASE)
_EXAMPLES = "80GB, 8x80GB, 2x24GiB or 4x80GB,2x24GB"
# More is a slip of the keyboard.
_MOST = 4096


def read_devices(text: str) -> tuple[int, ...]:
    """Bytes of each device, in the order given. GB are 10^9 bytes, GiB 2^30.

    Raises:
        ValueError: naming the group that cannot be read.
    """
    groups = [group.strip() for group in text.split(",")]
    if not any(groups):
        raise ValueError(f"devices={text!r} names no device; write {_EXAMPLES}")
    return tuple(size for group in groups for size in _sizes(group, text))


def _sizes(group: str, text: str) -> list[int]:
    where = f"devices={text!r}" + ("" if group == text.strip() else f", group {group!r}")
    found = _GROUP.fullmatch(group)
    if found is None:
        raise ValueError(f"{where}: {_advice(group)}")
    number, size, unit = found.groups()
    known = {name.lower(): n_bytes for name, n_bytes in UNITS.items()}
    if unit.lower() not in known:
        raise ValueError(
            f"{where}: no unit {unit!r}; there are {', '.join(UNITS)} (GB = 10^9 bytes, as data "
            "sheets count; GiB = 2^30)"
        )
    n_devices, n_bytes = int(number or 1), int(float(size) * known[unit.lower()])
    if not 1 <= n_devices <= _MOST or n_bytes < 1:
        raise ValueError(f"{where} is {n_devices} devices of {n_bytes} bytes; write {_EXAMPLES}")
    return [n_bytes] * n_devices


def _advice(group: str) -> str:
    if turned := re.fullmatch(r"(\d+(?:\.\d+)?\s*[a-z]+)\s*[x×*]\s*(\d+)", group, re.IGNORECASE):
        return f"the number of devices comes first: {turned[2]}x{turned[1]}"
    if re.fullmatch(r"(\d+\s*[x×*]\s*)?\d+(\.\d+)?", group):
        return f"{group} of what? write {group}GB (10^9 bytes) or {group}GiB (2^30)"
    if any(character.isalpha() for character in group):
        return f"expected memory and not a name; write {_EXAMPLES}"
    return f"expected {_EXAMPLES}"


def devices_in_words(sizes: Sequence[int]) -> str:
    """`4 x 80.0 GB + 2 x 24.0 GB`."""
    runs: list[list[int]] = []
    for size in sizes:
        if runs and runs[-1][1] == size:
            runs[-1][0] += 1
        else:
            runs.append([1, size])
    return " + ".join(f"{n} x {in_words(size)}" if n > 1 else in_words(size) for n, size in runs)
