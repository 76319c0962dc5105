"""Tensors that an edit holds: reference values, recorded rows, directions; equal if they hold
the same numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from ernie_lab.interventions.here import EditError
from ernie_lab.sites import Site, select
from ernie_lab.trace.recorded import Recorded
from ernie_lab.trace.trace import Trace

# The rows of `path` stand at (sequence, position) = `path + AT`.
AT = "@"


@dataclass(frozen=True, eq=False, repr=False)
class Values:
    """Tensors by name, with a word on where they are from. Nothing changes them."""

    tensors: Mapping[str, Tensor]
    source: str

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name, x in sorted(self.tensors.items()):
            digest.update(f"{name} {x.dtype} {tuple(x.shape)}\n".encode())
            raw = x.detach().cpu().contiguous()
            digest.update(raw.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Values) and self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"<{self.source}, {self.sha256[:8]}>"

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(name for name in self.tensors if not name.endswith(AT) and "." in name)

    def like(self, name: str, x: Tensor) -> Tensor:
        return self.tensors[name].to(device=x.device, dtype=x.dtype)

    @cached_property
    def derived(self) -> dict[str, Tensor]:
        """What follows from the tensors and is slow to make: found once."""
        return {}

    def find(self, path: str, sequence_N: Tensor, pos_N: Tensor) -> Tensor:
        """The row of each (sequence, position), -1 where none was recorded."""
        if path not in self.derived:
            at_N2 = self.tensors[path + AT]
            sizes = at_N2.amax(0) + 1 if len(at_N2) else torch.zeros(2, dtype=torch.int64)
            table = torch.full((int(sizes[0]), int(sizes[1])), -1)
            table[at_N2[:, 0], at_N2[:, 1]] = torch.arange(len(at_N2))
            self.derived[path] = table
        table = self.derived[path].to(sequence_N.device)
        known_N = (sequence_N < table.shape[0]) & (pos_N >= 0) & (pos_N < table.shape[1])
        found_N = torch.full_like(sequence_N, -1)
        found_N[known_N] = table[sequence_N[known_N], pos_N[known_N]]
        return found_N


def kept_paths(trace: Trace, patterns: Sequence[str], every: bool) -> list[str]:
    """The paths of the sites that match and were kept; with `every`, all that match must be."""
    if not isinstance(trace, Trace):
        raise EditError(f"a Trace is needed, not {type(trace).__name__}; pass run.trace")
    matching = select(patterns, trace.known_sites)
    kept = [site.path for site in matching if site.path in trace.values]
    missing = [site.path for site in matching if site.path not in trace.values]
    if missing and (every or not kept):
        raise EditError(
            f"the trace has no {missing[0]} ({len(missing)} sites are missing); record it: "
            f"keep={list(patterns)!r}"
        )
    return kept


def recorded_rows(trace: Trace, paths: Sequence[str], source: str) -> Values:
    """Every row of these sites, and the (sequence, position) of each.

    Of attention maps a row is a query, `[h t]`, its keys counted by position and as many as the
    longest sequence has; what is beyond its own is 0.
    """
    sequence = torch.tensor(trace.context.sequence)
    pos = torch.tensor(trace.context.pos)
    tensors = {}
    for path in paths:
        if trace.values[path].site.of_patches:
            raise EditError(
                f"{path} has patches and no tokens, and another picture's patches are of other "
                "places; take what image tokens read: resampler.out, or embed_in, where='image'"
            )
        values, rows_N = _queries(trace, path) if _is_map(trace, path) else _rows(trace, path)
        tensors[path] = values
        tensors[path + AT] = torch.stack([sequence[rows_N], pos[rows_N]], 1)
    return Values(tensors, source)


def recorded_means(trace: Trace, paths: Sequence[str], source: str) -> Values:
    """The mean of each site over all of its rows, in fp64 on the way."""
    means = {}
    for path in paths:
        values, _ = _rows(trace, path)
        if not values.is_floating_point():
            raise EditError(f"{path} holds integers, which have no mean")
        if not len(values):
            raise EditError(f"the trace has no token at {path}, so it has no mean there")
        means[path] = values.double().mean(0).to(values.dtype)
    return Values(means, source)


def refuse_maps(trace: Trace, paths: Sequence[str], what: str) -> None:
    """Raise at attention maps, where `what` (a mean over tokens, …) means nothing."""
    if maps := [path for path in paths if _is_map(trace, path)]:
        raise EditError(
            f"{maps[0]} is an attention map: each query has keys of its own number, so there is no "
            f"{what}. el.edits.patch takes maps, from a trace that has the same positions; "
            "el.edits.knockout cuts them"
        )


def _is_map(trace: Trace, path: str) -> bool:
    return trace.values[path].site.ragged


def _rows(trace: Trace, path: str) -> tuple[Tensor, Tensor]:
    kept = trace.values[path]
    _require_all_heads(kept)
    if kept.site.row == "i":
        raise EditError(f"{path} has one map for each frame; edits take what has rows of tokens")
    part = kept.parts[None]
    return part.values.detach().cpu(), part.rows_N


def _queries(trace: Trace, path: str) -> tuple[Tensor, Tensor]:
    """`[n h t]`, the queries of all sequences, and their rows of the tokens table."""
    kept = trace.values[path]
    _require_all_heads(kept)
    longest = max(part.values.shape[-1] for part in kept)
    maps = [pad(part.values.detach().cpu(), (0, longest - part.values.shape[-1])) for part in kept]
    return torch.cat([one.movedim(1, 0) for one in maps]), torch.cat([p.rows_N for p in kept])


def _require_all_heads(kept: Recorded) -> None:
    if kept.heads is not None:
        raise EditError(f"{kept.site.path} was recorded for some heads alone; record all of them")


def require_in(values: Values, sites: Sequence[Site]) -> None:
    missing = [site.path for site in sites if site.path not in values]
    if missing:
        raise EditError(f"{values!r} has nothing for {missing[0]} ({len(missing)} missing sites)")
