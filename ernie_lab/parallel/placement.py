"""Where the weights of a model go: what `load(placement=…)` may say, read in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

Plain: TypeAlias = Literal["auto", "stream"]
Kind: TypeAlias = Plain | Literal["ep"]
CHOICES = {
    "auto": "whole layers over the GPUs of this machine and its memory",
    "stream": "layer by layer from disk, in every pass, for models that fit nowhere",
    "ep:N": "experts over N ranks, such as ep:2; with ep:N+tp the heads of attention too",
}
_RANKS = re.compile(r"ep:(\d+)(\+tp)?")


@dataclass(frozen=True, slots=True)
class Placement:
    """`n_ranks` and `heads` (are they over the ranks too?) are of `"ep"`."""

    kind: Kind
    n_ranks: int = 1
    heads: bool = False


def read_placement(text: str | None) -> Placement | None:
    """None, for a whole model on one device, stays None.

    Raises:
        ValueError: naming the choices.
    """
    if text is None:
        return None
    for kind in get_args(Plain):
        if text == kind:
            return Placement(kind)
    if found := _RANKS.fullmatch(str(text)):
        if int(found[1]) < 2:
            raise ValueError(f"placement={text!r} needs at least 2 ranks; for one leave it out")
        return Placement("ep", int(found[1]), heads=found[2] is not None)
    choices = "; ".join(f'"{name}": {meaning}' for name, meaning in CHOICES.items())
    raise ValueError(f"placement={text!r} must be one of these, or left out: {choices}")


def require_fitting(placement: Placement, device: object, quantize: str | None) -> None:
    """Raise `ValueError` where another argument of `load` contradicts the placement."""
    if placement.kind == "auto" and device is not None:
        raise ValueError(
            f'placement="auto" chooses devices, but device={str(device)!r} is given; leave one out'
        )
    if placement.kind == "stream" and quantize is not None:
        raise ValueError(
            f'placement="stream" with quantize={quantize!r}: the weights would be packed anew in '
            "every pass and save no reading. Leave quantize= out; or leave placement= out if the "
            "quantised model fits"
        )
    if placement.kind == "ep" and quantize is not None:
        raise ValueError(
            f'placement="ep:{placement.n_ranks}" with quantize={quantize!r}: slices of packed '
            "weights are not supported. Leave one of the two out"
        )
