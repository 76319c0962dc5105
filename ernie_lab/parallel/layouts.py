"""Where the value at a site is computed under a placement, and so what it costs to look at it.

Taps never see a part: what is split is put together on rank 0 when a tap wants it, and what an edit
makes of it goes back to the ranks that go on with it.
"""

from __future__ import annotations

from ernie_lab.sites import Site

_INSIDE_EXPERTS = ("expert_gate", "expert_up", "expert_act", "expert_out")
_HEADS = ("h", "g")


def layout_of(site: Site, placement: str | None) -> str:
    """`"whole"`: on rank 0 (or in the only process). `"experts"`: each row on the rank that holds
    its expert. `"heads:2"`: the heads, axis 2, shared by the ranks in their order.

    `placement` is what `load` was given. Values that are not whole travel between ranks when they
    are kept or edited, and only then (`expert_out` in any case).
    """
    ranks, _, more = (placement or "").partition("+")
    if not ranks.startswith("ep:"):
        return "whole"
    if site.path.rpartition(".")[2] in _INSIDE_EXPERTS:
        return "experts"
    if more == "tp" and site.layer is not None and set(_HEADS) & set(site.dims.split()):
        return f"heads:{head_axis(site)}"
    return "whole"


def head_axis(site: Site) -> int:
    """Of a site that has heads, of queries or of keys and values."""
    letters = site.dims.split()
    return next(letters.index(letter) for letter in _HEADS if letter in letters)
