"""Sites and taps: how anything inside a forward pass is observed or changed.

A `Site` names one quantity of the model and its dimension letters. It is built once, with
its module. A `Tap` is handed down the forward pass; each named quantity flows through it:

    attn_out_BSD = tap(at.attn_out, linear(z_BSHA, w_o))

The default, `idle`, returns its input, so a reader who ignores taps loses nothing. Taps
compose (`EditTap(edits, then=Recorder(keep))`), hold no state on the model and leave nothing
to reset. Why not forward hooks: after `torch.compile` a hook added late is silently ignored,
and inner quantities (router probabilities, attention pattern) have no module to hook.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from ernie_lab.display import ranges

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Site:
    """One named quantity: where it is, which axes it has, what it means.

    `dims` uses the letters of `ernie_lab.dims`. `dtype` is `"model"` for the dtype of the
    activations, else the dtype's name. An `on_demand` site costs memory or another code path
    and is computed only when a tap wants it. A `ragged` site has a key axis as long as the
    sequence so far, so it cannot be stacked over sequences of different length.
    """

    path: str
    dims: str
    meaning: str
    dtype: str = "model"
    on_demand: bool = False

    # Cached, because a recorder asks at each site of each forward.
    @cached_property
    def letters(self) -> tuple[str, ...]:
        return tuple(self.dims.split())

    @cached_property
    def ragged(self) -> bool:
        return "t" in self.letters

    @cached_property
    def row(self) -> str:
        """The letter of its rows: `b` (with `s`) tokens, `n` a bank's tokens, `p` patches, `i`
        frames, `o` blocks of patches, `m` image tokens."""
        return self.dims[0]

    @cached_property
    def of_pictures(self) -> bool:
        """Does it belong to the tower or the resampler, which run in a prefill with pictures?"""
        return self.row in "piom"

    @property
    def of_patches(self) -> bool:
        """Are its rows patches, blocks or frames of them, and no tokens?"""
        return self.row in "pio"

    @cached_property
    def bank(self) -> str | None:
        """Whose experts, in a layer that has two banks: `text` or `vision`."""
        match = re.match(r"blocks\.\d+\.moe\.(\w+)\.", self.path)
        return match.group(1) if match and self.row == "n" else None

    @cached_property
    def bank_path(self) -> str | None:
        """The path of the site that says which bank each token takes, for a site in a bank."""
        return None if self.bank is None else f"blocks.{self.layer}.moe.bank"

    @cached_property
    def layer(self) -> int | None:
        """The layer's true number in `blocks.{layer}.…`, or None outside the decoder blocks."""
        match = re.match(r"blocks\.(\d+)\.", self.path)
        return int(match.group(1)) if match else None

    @property
    def name(self) -> str:
        """The path, by the name that TransformerLens' hooks read (`hook.name`)."""
        return self.path

    @property
    def quantity(self) -> str:
        """The path without its layer: `moe.router_logits` for `blocks.3.moe.router_logits`."""
        return re.sub(r"^blocks\.\d+\.", "", self.path)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass is part of; taps are bound to it, because edits select on it.

    `mask` `[b s]` is True on real tokens (padding and finished sequences are False),
    `positions` are the rotary positions, `[b s]` or `[b s 3]`. `index` counts forwards: 0 is the
    prefill. In a vision-language model `modality` `[b s]` is 0 text, 1 image, 2 video (delimiters
    are text), `bank` `[b s]` the bank that each token is expected to take, 0 text and 1 vision,
    and `grids` are all pictures of this forward in reading order: (frames, rows, columns) of
    patches. Where the first two are None, every token is text.
    """

    phase: Phase
    index: int
    positions: Tensor
    mask: Tensor
    modality: Tensor | None = None
    bank: Tensor | None = None
    grids: tuple[tuple[int, int, int], ...] = ()


@runtime_checkable
class Tap(Protocol):
    """What a forward pass calls at each site."""

    def wants(self, site: Site, /) -> bool:
        """Must an on-demand site be computed? Asked for on-demand sites only."""
        ...

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        """Return `x`, or a replacement of the same shape, dtype and device."""
        ...


@runtime_checkable
class BindableTap(Tap, Protocol):
    """A tap that looks at the step, for example to leave padding out of a recording."""

    def bind(self, step: Step, /) -> Tap: ...


@runtime_checkable
class CandidTap(Tap, Protocol):
    """A tap that says beforehand where it does something."""

    def changes(self, paths: frozenset[str], /) -> bool:
        """May it return something else than it is given, at one of these sites?"""
        ...

    def reads(self, paths: frozenset[str], /) -> frozenset[str]:
        """Those of these sites that it has to be called at."""
        ...

    def accept(self, values: Mapping[str, Tensor], /) -> None:
        """At once what it reads of some sites, by path in forward order, instead of a call at each.

        The tensors are its own: nothing else changes them from now on.
        """
        ...


class Idle:
    """The tap that does nothing."""

    __slots__ = ()

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:  # noqa: ARG002
        return x

    def bind(self, step: Step, /) -> Tap:  # noqa: ARG002
        return self

    def changes(self, paths: frozenset[str], /) -> bool:  # noqa: ARG002
        return False

    def reads(self, paths: frozenset[str], /) -> frozenset[str]:  # noqa: ARG002
        return frozenset()

    def accept(self, values: Mapping[str, Tensor], /) -> None:
        pass


idle = Idle()


def may_change(tap: Tap, paths: frozenset[str]) -> bool:
    """Could what flows through these sites be replaced? Of a tap that does not say: yes."""
    # Not `isinstance`, which looks through a protocol's members anew in each layer.
    changes = getattr(tap, "changes", None)
    return changes is None or not hasattr(tap, "accept") or bool(changes(paths))


class SiteError(KeyError):
    """A site that does not exist, or a selection that matches none."""

    def __str__(self) -> str:
        return str(self.args[0])


def flatten(tree: Any) -> Iterator[Site]:
    """The sites of a tree of dataclasses and tuples, in the order they are declared."""
    if isinstance(tree, Site):
        yield tree
    elif isinstance(tree, tuple):
        for branch in tree:
            yield from flatten(branch)
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for field in dataclasses.fields(tree):
            yield from flatten(getattr(tree, field.name))


def all_sites(model: Any) -> tuple[Site, ...]:
    """Every site of a model, in the order of the forward pass, without running it."""
    return tuple(flatten(model.sites))


# TransformerLens' names, on the left as patterns over a whole path once `hook_` is dropped.
_TRANSFORMER_LENS = (
    (r"ln_final\.(.+)", r"final_norm.\1"),
    (r"unembed", "logits"),
    (r"(blocks\.[^.]+)\.ln1\.(.+)", r"\1.norm1.\2"),
    (r"(blocks\.[^.]+)\.ln2\.(.+)", r"\1.norm2.\2"),
    (r"(blocks\.[^.]+)\.attn\.attn_scores", r"\1.attn.scores"),
    (r"(blocks\.[^.]+)\.attn\.rot_([qk])", r"\1.attn.\2_rot"),
    (r"(blocks\.[^.]+)\.mlp\.gate\.out", r"\1.moe.router_logits"),
    # Theirs holds every expert's probability; the top k are taken after it.
    (r"(blocks\.[^.]+)\.mlp\.expert_weights", r"\1.moe.router_probs"),
    (r"(blocks\.[^.]+)\.mlp\.expert_indices", r"\1.moe.expert_ids"),
    (r"(blocks\.[^.]+)\.mlp\.shared_experts\.pre", r"\1.moe.shared.gate_proj"),
    (r"(blocks\.[^.]+)\.mlp\.shared_experts\.post", r"\1.moe.shared.act"),
    (r"(blocks\.[^.]+)\.mlp\.shared_experts\.out", r"\1.moe.shared_out"),
    (r"(blocks\.[^.]+)\.mlp\.pre_linear", r"\1.mlp.up"),
    (r"(blocks\.[^.]+)\.mlp\.pre", r"\1.mlp.gate_proj"),
    (r"(blocks\.[^.]+)\.mlp\.post", r"\1.mlp.act"),
    (r"(blocks\.[^.]+)\.mlp\.in", r"\1.moe.in"),
)

# Short spellings of our own, tried in order; the first that exists is meant.
_SHORT = (
    (r"(blocks\.[^.]+)\.attn_out", (r"\1.attn.attn_out",)),
    (r"(blocks\.[^.]+)\.mlp_out", (r"\1.mlp.mlp_out", r"\1.moe.moe_out")),
    (r"(blocks\.[^.]+)\.(?:mlp\.out|mlp\.mlp_out)", (r"\1.mlp.mlp_out", r"\1.moe.moe_out")),
    (r"(blocks\.[^.]+)\.moe_out", (r"\1.moe.moe_out",)),
)


def _spellings(name: str) -> Iterator[str]:
    """The paths that `name` may mean, most literal first."""
    if name.endswith("hook_scale"):
        raise SiteError(
            f"{name!r} is the rms in TransformerLens, and code divides by it; ours is 1 / rms, "
            "without a last axis. Ask for it by its own name, such as 'blocks.0.norm1.scale'"
        )
    yield name
    plain = re.sub(r"\bhook_", "", name)
    yield plain
    for pattern, ours in _TRANSFORMER_LENS:
        if re.fullmatch(pattern, plain):
            yield re.sub(f"^{pattern}$", ours, plain)
    for pattern, candidates in _SHORT:
        if re.fullmatch(pattern, plain):
            for ours in candidates:
                yield re.sub(f"^{pattern}$", ours, plain)


def lens_name(site: Site) -> str:
    """TransformerLens' spelling of a site: `blocks.3.attn.hook_rot_q`, `blocks.3.hook_mlp_out`."""
    where, _, name = site.path.rpartition(".")
    if name in ("attn_out", "mlp_out", "moe_out"):
        where, name = where.rpartition(".")[0], name.replace("moe", "mlp")
    name = {"scores": "attn_scores", "q_rot": "rot_q", "k_rot": "rot_k"}.get(name, name)
    return f"{where}.hook_{name}" if where else f"hook_{name}"


def filtered(wanted: Callable[[str], bool], sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites whose path, or TransformerLens name, passes a filter function.

    Raises `SiteError` when none does.
    """
    chosen = tuple(site for site in sites if wanted(site.path) or wanted(lens_name(site)))
    if not chosen:
        raise SiteError(
            f"no site passes the filter {wanted!r}; it is given paths such as "
            f"{sites[-1].path!r} and {lens_name(sites[-1])!r}. `lab.sites()` lists all."
        )
    return chosen


def resolve(name: str, sites: Sequence[Site]) -> Site:
    """The one site called `name`: its path, a short form, or TransformerLens' name for it.

    Raises `SiteError` with the nearest paths when there is none.
    """
    by_path = {site.path: site for site in sites}
    for path in _spellings(name):
        if path in by_path:
            return by_path[path]
    raise SiteError(_no_site(name, sites))


def select(patterns: str | Site | Iterable[str | Site], sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites that match any of the patterns, in forward order.

    A pattern is a Site, a path, a glob over paths (`blocks.*.moe.*`), a name or glob without its
    layer (`moe.router_logits`, `attn.*`: every layer's), or TransformerLens' spelling of these.
    `*` also matches dots. A pattern that matches nothing raises `SiteError`: selecting nothing is a
    mistake, never a wish.
    """
    if isinstance(patterns, str | Site):
        patterns = (patterns,)
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, Site):
            matched = {site.path for site in sites if site == pattern}
            if not matched:
                raise SiteError(_no_site(pattern.path, sites))
        else:
            matched = _matches(pattern, sites)
        chosen |= matched
    return tuple(site for site in sites if site.path in chosen)


def _matches(pattern: str, sites: Sequence[Site]) -> set[str]:
    matched: set[str] = set()
    for spelling in _spellings(pattern):
        matched |= {site.path for site in sites if _means(spelling, site)}
    if not matched:
        raise SiteError(_no_site(pattern, sites))
    return matched


def _no_site(name: str, sites: Sequence[Site]) -> str:
    paths = [site.path for site in sites]
    near = difflib.get_close_matches(name, paths, n=3, cutoff=0.5)
    layers = sorted({site.layer for site in sites if site.layer is not None})
    routed = sorted({s.layer for s in sites if s.layer is not None and ".moe." in s.path})
    named = re.match(r"blocks\.(\d+)\.(moe\.)?", name)
    layer = int(named.group(1)) if named else None
    if in_banks := _in_banks(name, sites):
        why = (
            "this model has two banks of experts, and expert 5 of the one is not expert 5 of the "
            f"other; name one: {' or '.join(in_banks)}. "
        )
    elif layers and layer is not None and layer not in layers:
        why = f"the model's layers are {ranges(layers)}. "
    elif named and named.group(2) and layer not in routed:
        why = f"layer {layer} is dense; layers with experts: {ranges(routed)}. "
    else:
        why = f"nearest: {', '.join(near)}. " if near else ""
    return f"no site matches {name!r}; {why}`lab.sites()` lists all {len(paths)}."


def _in_banks(name: str, sites: Sequence[Site]) -> list[str]:
    """The names under each bank, of what a text model has once: `moe.text.router_logits`, …"""
    banks = list(dict.fromkeys(site.bank for site in sites if site.bank))
    for spelling in _spellings(name):
        where, moe, quantity = spelling.rpartition("moe.")
        found = [f"{where}moe.{bank}.{quantity}" for bank in banks if moe]
        if found and all(any(_means(path, site) for site in sites) for path in found):
            return found
    return []


def _means(spelling: str, site: Site) -> bool:
    return any(fnmatch.fnmatchcase(name, spelling) for name in (site.path, site.quantity))
