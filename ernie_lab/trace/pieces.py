"""What one forward leaves of a site: copies of its rows, without any padding."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_lab.inputs.media import SPATIAL_MERGE
from ernie_lab.sites import Site
from ernie_lab.trace.keep import KeptSite
from ernie_lab.trace.rows import Rows, StepRows, Subset


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Copies of a site's values in one forward, and which tokens their rows are.

    One tensor `[n …]`; for a ragged site one `[h s t]` per sequence; for attention in the vision
    tower one `[h p u]` per frame. `rows` is None where the rows are patches or blocks of
    patches: of these all are kept, in their order.
    """

    rows: Rows | None
    values: tuple[Tensor, ...]


def take(rule: KeptSite, step: StepRows, x: Tensor, bank: Subset | None = None) -> Piece:
    """What the rule keeps of a site's value; `bank` are the rows of a bank, for its sites."""
    check_shape(rule.site, step, x, bank)
    rows = _rows(rule, step, bank)
    return Piece(rows, cut(rule, step, rows, x))


def _rows(rule: KeptSite, step: StepRows, bank: Subset | None) -> Rows | None:
    match rule.site.row:
        case "b":
            return step.rows[rule.positions]
        case "n":
            assert bank is not None
            return bank.among(step.rows[rule.positions])
        case "m":
            return step.image_tokens.among(step.rows[rule.positions])
        case _:
            return None


def cut(rule: KeptSite, step: StepRows, rows: Rows | None, x: Tensor) -> tuple[Tensor, ...]:
    """These rows of a value, or of its gradient: always copies."""
    if rule.site.row == "i":
        maps = zip(x, step.frame_lengths, strict=True)
        return tuple(
            _converted(_of_heads(x_HPU[:, :n, :n], rule, axis=0).clone(), rule) for x_HPU, n in maps
        )
    if rows is None:
        return (_converted(_of_heads(x, rule, axis=1).clone(), rule),)
    if not rule.site.ragged:
        x_N = x.flatten(0, 1) if rule.site.row == "b" else x
        kept = x_N.clone() if rows.is_all else x_N.index_select(0, rows.flat_N.to(x.device))
        return (_converted(_of_heads(kept, rule, axis=1), rule),)
    pieces = []
    for x_HST, queries, keys in zip(x, rows.columns, step.keys, strict=True):
        map_HST = _of_heads(x_HST, rule, axis=0).index_select(1, queries.to(x.device))
        pieces.append(_converted(map_HST.index_select(2, keys.to(x.device)), rule))
    return tuple(pieces)


def check_shape(site: Site, step: StepRows, x: Tensor, bank: Subset | None = None) -> None:
    """Raise where a value has not the rows that the step tells of."""
    if site.of_pictures:
        _check_pictures(site, step, x)
    elif site.bank is not None:
        assert bank is not None
        if x.ndim != len(site.letters) or len(x) != len(bank):
            raise ValueError(
                f"{site.path} has shape {list(x.shape)}, but its dims {site.dims!r} and the bank "
                f"of each token ask for {len(bank)} rows"
            )
    elif site.letters[:2] == ("b", "s") or site.letters == ("b", "h", "s", "t"):
        _check_tokens(site, step, x)
    else:
        raise ValueError(f"cannot record {site.path}: its dims are {site.dims!r}, not token rows")


def _check_tokens(site: Site, step: StepRows, x: Tensor) -> None:
    n_queries = x.shape[site.letters.index("s")] if x.ndim == len(site.letters) else None
    if n_queries is None or (x.shape[0], n_queries) != step.shape:
        hint = (
            "; the forward computed logits for some positions only: use logits='all' to keep them"
            if site.path == "logits"
            else ""
        )
        raise ValueError(
            f"{site.path} has shape {list(x.shape)}, but its dims {site.dims!r} and the mask ask "
            f"for {step.shape[0]} sequences of {step.shape[1]} positions{hint}"
        )
    if site.ragged and x.shape[-1] != step.n_keys:
        raise ValueError(
            f"{site.path} has {x.shape[-1]} keys, the forwards recorded so far have "
            f"{step.n_keys} columns; record from the first forward of a cache on"
        )


def _check_pictures(site: Site, step: StepRows, x: Tensor) -> None:
    n_patches = sum(grid.n_patches for grid in step.grids)
    lengths = step.frame_lengths
    n_rows = {
        "p": n_patches,
        "o": n_patches // SPATIAL_MERGE**2,
        "m": len(step.image_tokens),
        "i": len(lengths),
    }[site.row]
    fits = x.ndim == len(site.letters) and len(x) == n_rows
    if site.row == "i":
        fits = fits and x.shape[2:] == (max(lengths, default=0),) * 2
    if not fits:
        raise ValueError(
            f"{site.path} has shape {list(x.shape)}, but its dims {site.dims!r} and the grids "
            f"{[tuple(grid) for grid in step.grids]} of the step ask for {n_rows} rows; bind the "
            "recorder to Step(grids=...) with the pictures of this forward"
        )


def _of_heads(x: Tensor, rule: KeptSite, axis: int) -> Tensor:
    if rule.heads is None:
        return x
    if max(rule.heads) >= x.shape[axis]:
        raise ValueError(
            f"heads={list(rule.heads)}: {rule.site.path} has heads 0..{x.shape[axis] - 1}"
        )
    return x.index_select(axis, torch.tensor(rule.heads, device=x.device))


def _converted(x: Tensor, rule: KeptSite) -> Tensor:
    dtype = rule.dtype if rule.dtype and x.is_floating_point() else x.dtype
    there = dtype is x.dtype and x.is_cpu and rule.device == "cpu"
    return x if there else x.to(rule.device, dtype)


def future_fill(site: Site) -> float:
    """What the causal mask puts where a key comes after its query."""
    return -math.inf if site.path.endswith(".scores") else 0.0
