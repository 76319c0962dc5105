"""Where the weights of a model go: what `load(placement=…)` may say, read in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Kind: TypeAlias = Literal["auto"]
CHOICES = {
    "auto": "whole layers over the GPUs of this machine and its memory",
}


@dataclass(frozen=True, slots=True)
class Placement:
    kind: Kind


def read_placement(text: str | None) -> Placement | None:
    """None, for a whole model on one device, stays None.

    Raises:
        ValueError: naming the choices.
    """
    if text is None:
        return None
    for kind in get_args(Kind):
        if text == kind:
            return Placement(kind)
    choices = "; ".join(f'"{name}": {meaning}' for name, meaning in CHOICES.items())
    raise ValueError(f"placement={text!r} must be one of these, or left out: {choices}")
