"""How much memory a recording takes, before it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from ernie_lab.checkpoint.config import ModelConfig, VLConfig
from ernie_lab.checkpoint.memory import free_bytes
from ernie_lab.display import in_words
from ernie_lab.inputs.media import SPATIAL_MERGE, Grid
from ernie_lab.sites import Site
from ernie_lab.trace.keep import Keep, KeptSite

_FALLBACK = 4 * 2**30


class TraceTooLarge(MemoryError):
    """A recording that would not fit its budget; nothing has been run."""


def extents(site: Site, config: ModelConfig) -> dict[str, int]:
    """How long each axis of a site is, by its letter; those of rows belong to the input."""
    text = config.decoder
    of_model = {
        "d": text.width,
        "v": text.vocab_size,
        "h": text.attention.n_heads,
        "g": text.attention.n_kv_heads,
        "a": text.attention.head_dim,
        "f": text.dense_hidden,
    }
    if isinstance(config, VLConfig) and site.of_pictures:
        vision = config.vision
        return of_model | {
            "w": vision.width,
            "h": vision.n_heads,
            "a": vision.width // vision.n_heads,
            "f": vision.hidden,
            "x": vision.width * vision.merge_size**2,
        }
    if text.moe is None:
        return of_model
    return of_model | {
        "e": text.moe.router.n_experts,
        "k": text.moe.router.n_chosen,
        "f": _hidden(site, config),
    }


def _hidden(site: Site, config: ModelConfig) -> int:
    """The width of the MLP or of the experts at this site."""
    text = config.decoder
    assert text.moe is not None
    if ".moe.shared." in site.path:
        return text.moe.shared_hidden
    if isinstance(config, VLConfig) and site.bank == "vision":
        return config.vision_expert_hidden
    return text.moe.expert_hidden if ".moe." in site.path else text.dense_hidden


@dataclass(frozen=True, slots=True)
class _Input:
    """How many rows there will be, by kind, and how many slots of experts where it is known."""

    lengths: tuple[int, ...]
    grids: tuple[Grid, ...]
    n_vision: tuple[int, ...] | None
    n_chosen: Mapping[str, int]

    def n_rows(self, rule: KeptSite) -> int:
        """Rows of a site, or for maps pairs of query and key; at most."""
        queries = _queries(rule, self.lengths)
        match rule.site.row:
            case "p":
                return sum(grid.n_patches for grid in self.grids)
            case "o":
                return sum(grid.n_patches for grid in self.grids) // SPATIAL_MERGE**2
            case "i":
                return sum(grid.t * (grid.h * grid.w) ** 2 for grid in self.grids)
            case "m":
                return min(sum(queries), sum(grid.n_tokens for grid in self.grids))
            case "n" if self.n_vision is not None:
                mine = (
                    self.n_vision
                    if rule.site.bank == "vision"
                    else [all_ - n for all_, n in zip(self.lengths, self.n_vision, strict=True)]
                )
                return sum(min(q, n) for q, n in zip(queries, mine, strict=True))
        if rule.site.ragged:
            return sum(q * t for q, t in zip(queries, self.lengths, strict=True))
        return sum(queries)


def estimate_bytes(
    keep: Keep,
    config: ModelConfig,
    lengths: Sequence[int],
    max_new_tokens: int = 0,
    dtype: torch.dtype = torch.float32,
    grad: bool = False,
    *,
    grids: Sequence[tuple[int, int, int]] = (),
    n_vision: Sequence[int] | None = None,
    n_chosen: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bytes per site, an upper bound; `lengths` are the real tokens of each prompt.

    The last new token is sampled and never read, so it costs nothing. `dtype` is that of the
    model's activations. With `grad`, the recorder also holds the sites' own tensors, which are
    whole whatever the filters, on the model's device; padding is not counted.

    `grids` are the pictures, and `n_vision` the tokens of each prompt that go to the vision bank:
    placeholders and delimiters. Without `n_vision` (an edit may move tokens from bank to bank)
    each bank is taken to get every token. `n_chosen` are the experts chosen for each token, by
    the path of their mixture (`blocks.3.moe`, `blocks.3.moe.text`), where it is not the config's.

    Positions that no sequence can reach are refused here, before anything has run.
    """
    grown = tuple(length + max(max_new_tokens - 1, 0) for length in lengths)
    given = _Input(
        grown,
        tuple(Grid(*grid) for grid in grids),
        None if n_vision is None else tuple(n_vision),
        n_chosen or {},
    )
    sizes = {}
    for rule in keep.kept:
        refuse_unknown_end(rule, grows=max_new_tokens > 1)
        _refuse_unreachable(rule, grown, max_new_tokens)
        sizes[rule.site.path] = _site_bytes(rule, config, given, dtype)
        if grad:
            sizes[rule.site.path] += _site_bytes(KeptSite(rule.site), config, given, dtype)
    return sizes


def _site_bytes(rule: KeptSite, config: ModelConfig, given: _Input, dtype: torch.dtype) -> int:
    sizes = extents(rule.site, config) | ({"h": len(rule.heads)} if rule.heads else {})
    mixture = rule.site.path.rpartition(".")[0]
    sizes |= {"k": given.n_chosen[mixture]} if mixture in given.n_chosen else {}
    inner = [letter for letter in rule.site.dims.split() if letter not in "bstnpuiom"]
    row_bytes = math.prod(sizes[letter] for letter in inner) * _itemsize(rule, dtype)
    return row_bytes * given.n_rows(rule)


def _queries(rule: KeptSite, lengths: Sequence[int]) -> list[int]:
    """How many rows of each sequence the rule keeps."""
    return [
        length if rule.positions is None else len(rule.positions.among(length))
        for length in lengths
    ]


def _refuse_unreachable(rule: KeptSite, lengths: Sequence[int], max_new_tokens: int) -> None:
    """Raise where an index is beyond every sequence at its longest, or a span takes nothing."""
    if rule.positions is None:
        return
    longest = max(lengths, default=0)
    beyond = rule.positions.beyond(longest)
    if not beyond and any(_queries(rule, lengths)):
        return
    new = (
        f" with max_new_tokens={max_new_tokens}, the last of which is never read"
        if max_new_tokens > 1
        else ""
    )
    raise ValueError(
        f"positions={rule.positions} of {rule.site.path}: {beyond or 'all of them'} cannot be "
        f"reached; the longest sequence has {longest} tokens{new}"
    )


def refuse_unknown_end(rule: KeptSite, grows: bool) -> None:
    """Raise where negative positions are asked of sequences that still grow."""
    if grows and rule.positions is not None and rule.positions.needs_the_end:
        raise ValueError(
            f"positions={rule.positions} of {rule.site.path} count from an end that generation "
            "has not reached; give positions from the start, or slice the trace afterwards "
            "with t.sel(position=...)"
        )


def _itemsize(rule: KeptSite, dtype: torch.dtype) -> int:
    own = dtype if rule.site.dtype == "model" else getattr(torch, rule.site.dtype)
    assert isinstance(own, torch.dtype)
    return (rule.dtype if rule.dtype and own.is_floating_point else own).itemsize


def default_budget(device: str = "cpu") -> int:
    """Half of the free memory of this device; 4 GiB when it cannot be known."""
    free = free_bytes(torch.device(device))
    return _FALLBACK if free is None else free // 2


def require_budget(
    sizes: Mapping[str, int],
    max_bytes: int | None = None,
    device: str | Mapping[str, str] = "cpu",
) -> int:
    """The sum of `estimate_bytes`; raises `TraceTooLarge` when it exceeds the budget.

    `device` is where the values will be kept: one for all, or `Keep.devices`. `max_bytes` bounds
    the sum; without it, each device may be filled by half of what it has free.
    """
    total = sum(sizes.values())
    if max_bytes is not None:
        _require(sizes, max_bytes, "")
        return total
    where = dict.fromkeys(sizes, device) if isinstance(device, str) else device
    for name in dict.fromkeys(where[path] for path in sizes):
        there = {path: size for path, size in sizes.items() if where[path] == name}
        _require(there, default_budget(name), f" on {name}")
    return total


def _require(sizes: Mapping[str, int], budget: int, where: str) -> None:
    total = sum(sizes.values())
    if total <= budget:
        return
    biggest = max(sizes, key=lambda path: sizes[path])
    name = _without_layer(biggest)
    alike = sum(size for path, size in sizes.items() if _without_layer(path) == name)
    raise TraceTooLarge(
        f"recording {len(sizes)} sites would take {in_words(total)}{where}; the budget is "
        f"{in_words(budget)}. The biggest is {biggest} with {in_words(sizes[biggest])} "
        f"({name} of all layers: {in_words(alike)}). Narrow it with "
        "el.keep(..., layers=, heads=, positions=, dtype='bfloat16'), or raise max_bytes."
        f"{_without_map(name)}"
    )


def _without_map(quantity: str) -> str:
    if quantity not in ("attn.pattern", "attn.scores"):
        return ""
    return (
        " What attention does with a long input can be told without its map: keep attn.q_rot and "
        "attn.k_rot, and take el.analysis.attention_summary(trace, layer) or attention_rows."
    )


def _without_layer(path: str) -> str:
    return Site(path, "", "").quantity
