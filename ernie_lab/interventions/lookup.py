"""Recorded values in the place of those that flow, told by (sequence, position)."""

from __future__ import annotations

import torch
from torch import Tensor

from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.values import Values
from ernie_lab.sites import Site


def looked_up(values: Values, site: Site, x: Tensor, here: Here, missing: str) -> Tensor:
    """`x` with each real token's row replaced by the recorded one.

    Of an attention map (`b h s t`) a row is a query; its keys are told by their positions.
    """
    found_N = _found(values, site, x, here, missing)
    rows = values[site.path]
    by_row = x.movedim(2, 1) if site.ragged else x
    flat = by_row.reshape(len(found_N), *by_row.shape[2 if site.row == "b" else 1 :]).clone()
    known_N = found_N >= 0
    # Picked where they lie, so that only what is needed travels to another device.
    new = rows[found_N[known_N].to(rows.device)].to(flat)
    if site.ragged:
        new = _by_columns(new, flat[known_N], known_N, site, here)
    if new.shape[1:] != flat.shape[1:]:
        raise EditError(
            f"{values!r} has rows of shape {tuple(new.shape[1:])} for {site.path}, expected "
            f"{tuple(flat.shape[1:])}"
        )
    flat[known_N] = new
    out = flat.view_as(by_row)
    return out.movedim(1, 2) if site.ragged else out


def _found(values: Values, site: Site, x: Tensor, here: Here, missing: str) -> Tensor:
    """The recorded row of each row of `x`; -1 where there is none."""
    sequence_N, pos_N = here.coordinates(site, x)
    found_N = values.find(site.path, sequence_N, pos_N)
    lacking_N = here.real(site, x) & (found_N < 0)
    if missing == "error" and bool(lacking_N.any()):
        first = int(lacking_N.nonzero()[0])
        raise EditError(
            f"{values!r} has no {site.path} of sequence {int(sequence_N[first])}, position "
            f"{int(pos_N[first])} ({int(lacking_N.sum())} such tokens in this forward): other "
            'prompts, or the token was in the other bank. missing="keep" leaves such tokens alone'
        )
    return found_N


def _by_columns(new_NHT: Tensor, x_NHT: Tensor, known_N: Tensor, site: Site, here: Here) -> Tensor:
    """Recorded queries, their keys moved from positions to the columns of this forward."""
    if new_NHT.shape[1] != x_NHT.shape[1]:
        raise EditError(
            f"{site.path}: the trace has {new_NHT.shape[1]} heads, the model {x_NHT.shape[1]}"
        )
    pos_BT = here.past.positions.to(x_NHT.device)
    if pos_BT.shape[1] != x_NHT.shape[-1]:
        raise EditError(
            f"{site.path} has {x_NHT.shape[-1]} keys, the forwards bound so far {pos_BT.shape[1]}; "
            "bind the tap from the first forward of a cache on"
        )
    n_queries = len(known_N) // len(pos_BT)
    pos_NT = pos_BT.repeat_interleave(n_queries, 0)[known_N]
    there_NT = (pos_NT >= 0) & (pos_NT < new_NHT.shape[-1])
    index_NHT = pos_NT.clamp(0, new_NHT.shape[-1] - 1)[:, None].expand_as(x_NHT)
    # Keys that a query cannot see keep what they are: 0, or -inf before the softmax.
    return torch.where(there_NT[:, None], new_NHT.gather(-1, index_NHT), x_NHT)
