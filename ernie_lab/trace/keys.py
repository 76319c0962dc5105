"""Which sites a key of a trace means: `t["blocks.3.attn.pattern"]`, `t["pattern", 3]`, …"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import TypeAlias

from ernie_lab.display import ranges
from ernie_lab.sites import Site, SiteError, resolve
from ernie_lab.trace.integers import integer

Key: TypeAlias = "str | Site | tuple[str, int] | tuple[str, int, str]"

# TransformerLens' third entry says in which part of the block a name is meant.
_PARTS = {
    "a": ("attn",),
    "attn": ("attn",),
    "m": ("mlp", "moe", "moe.shared", "moe.text", "moe.vision"),
    "mlp": ("mlp", "moe", "moe.shared", "moe.text", "moe.vision"),
    "ln1": ("norm1",),
    "norm1": ("norm1",),
    "ln2": ("norm2",),
    "norm2": ("norm2",),
    "moe": ("moe", "moe.text", "moe.vision"),
    "text": ("moe.text",),
    "vision": ("moe.vision",),
}
# The one name for two quantities: what the MLP, dense or a mixture, writes to the stream.
_ALIAS = "mlp_out"


class AmbiguousName(SiteError):
    """A name that more than one quantity answers to."""


class NotKept(SiteError):
    """A site the model has, but this trace did not record."""


def lookup(key: Key, sites: Sequence[Site]) -> Site | tuple[Site, ...]:
    """One site, or the sites of every layer for a name without one (`"resid_post"`).

    A name means one quantity, whatever the layer; only `mlp_out` is the dense MLP's output in
    one layer and the mixture's in another.
    """
    if isinstance(key, Site):
        return resolve(key.path, sites)
    if isinstance(key, tuple):
        return _in_layer(key, sites)
    if not isinstance(key, str):
        raise _not_a_key(key)
    try:
        return resolve(key, sites)
    except SiteError:
        found = _in_every_layer(key, sites)
        if not found:
            raise
        _require_one_name(key, found)
        return tuple(found)


def _in_every_layer(
    name: str, sites: Sequence[Site], parts: tuple[str, ...] | None = None
) -> list[Site]:
    layers = sorted({site.layer for site in sites if site.layer is not None})
    whole = [site for site in sites if site.layer is not None and site.quantity == name]
    if whole and parts is None:
        return whole
    return [site for layer in layers for site in _named(name, layer, sites, parts)]


def _in_layer(key: tuple[str, int] | tuple[str, int, str], sites: Sequence[Site]) -> Site:
    if len(key) not in (2, 3) or not isinstance(key[0], str):
        raise _not_a_key(key)
    try:
        layer = integer(key[1], "layer")
    except TypeError:
        raise _not_a_key(key) from None
    name, part = key[0], key[2] if len(key) == 3 else None
    n_layers = 1 + max((site.layer for site in sites if site.layer is not None), default=-1)
    if not -n_layers <= layer < n_layers:
        raise SiteError(f"layer {layer} does not exist; the model has layers 0..{n_layers - 1}")
    layer %= n_layers
    if part is not None and part not in _PARTS:
        raise SiteError(f"no part {part!r} of a block; known: {', '.join(_PARTS)}")
    parts = None if part is None else _PARTS[part]
    found = _named(name, layer, sites, parts)
    if len(found) > 1:
        raise AmbiguousName(
            f"{name!r} is ambiguous in layer {layer}: {', '.join(site.path for site in found)}"
        )
    return found[0] if found else _elsewhere(name, layer, sites, parts)


def _elsewhere(name: str, layer: int, sites: Sequence[Site], parts: tuple[str, ...] | None) -> Site:
    """Raises, saying which layers have what this one has not."""
    others = _in_every_layer(name, sites, parts)
    if not others or others[0].quantity.startswith("moe."):
        # Its message tells dense layers from those with experts.
        return resolve(f"blocks.{layer}.{others[0].quantity if others else name}", sites)
    layers = [site.layer for site in others if site.layer is not None]
    raise SiteError(f"layer {layer} has no {others[0].quantity}; it is in layers {ranges(layers)}")


def _not_a_key(key: object) -> TypeError:
    as_array = isinstance(key, int)  # so ask numpy, list() and zip()
    way = ". A trace is no array; give one of its arrays, such as t.expert_ids" if as_array else ""
    return TypeError(
        f"a key is a path, a Site, (name, layer) or (name, layer, part), such as "
        f"('pattern', 3), not {key!r}{way}"
    )


def _named(
    name: str, layer: int, sites: Sequence[Site], parts: tuple[str, ...] | None
) -> list[Site]:
    if name.endswith("hook_scale"):
        return []  # `resolve` refuses it, with the reason
    here = [site for site in sites if site.layer == layer]
    if parts is not None:
        here = [site for site in here if site.quantity.rpartition(".")[0] in parts]
    name = name.removeprefix("hook_")
    for exact in (
        [site for site in here if site.quantity == name],
        [site for site in here if site.quantity.endswith(f".{name}")],
    ):
        if exact:
            return exact
    for spelling in (name, f"attn.{name}", f"mlp.{name}"):
        try:
            return [resolve(f"blocks.{layer}.{spelling}", here)]
        except SiteError:
            continue
    return []


def _require_one_name(key: str, found: Sequence[Site]) -> None:
    names = list(dict.fromkeys(site.quantity for site in found))
    if len(names) > 1 and key.removeprefix("hook_") != _ALIAS:
        raise AmbiguousName(f"{key!r} is ambiguous; say which of {', '.join(names)}")


def require_kept(site: Site, kept: Collection[str]) -> str:
    """The site's path if it was recorded, else `NotKept` with what to ask for."""
    if site.path in kept:
        return site.path
    some = ", ".join(list(kept)[:3]) + (", …" if len(kept) > 3 else "")
    every = re.sub(r"^vision\.blocks\.\d+\.", "vision.blocks.*.", site.quantity)
    alike = "" if every == site.path else f" (or {every!r} for every layer)"
    raise NotKept(
        f"{site.path} exists but was not kept; this trace has {len(kept)} sites: {some}. "
        f"Run again with keep={site.path!r} in the list{alike}."
    )
