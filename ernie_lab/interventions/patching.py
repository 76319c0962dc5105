"""Activation patching over a grid, and along one path."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from tqdm.auto import tqdm

from ernie_lab.interventions.edits import EditChangedNothingWarning
from ernie_lab.interventions.general import patch
from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.targets import Layers, as_layers, true_layer
from ernie_lab.sites import Site, resolve, select
from ernie_lab.trace.positions import PositionsLike, as_positions
from ernie_lab.trace.trace import Trace

if TYPE_CHECKING:
    import xarray as xr

# What a layer writes to the residual stream.
_WRITES = (".attn.attn_out", ".mlp.mlp_out", ".moe.moe_out")


class Runs(Protocol):
    """A `Lab`."""

    def run(self, prompt: Any, /, **options: Any) -> Any: ...


def patch_grid(
    lab: Runs,
    prompt: Any,
    source: Trace,
    metric: Callable[[Any], float],
    *,
    site: str = "resid_pre",
    by: Literal["position", "head"] = "position",
    layers: Layers = None,
    positions: PositionsLike | None = None,
    progress: bool = True,
    **given: Any,
) -> xr.DataArray:
    """`metric(run)` for every layer and position (or head), patched there alone from `source`.

    Args:
        prompt: one prompt, whose tokens stand where those of `source` do. `given` goes to
            `lab.run` with it (`images=`, `chat=`).
        source: a trace of the other prompt that kept `site`: `lab.run(other, keep=site).trace`.
        metric: of a `Run`, for example the difference of two logits of its last token.
        site: a quantity without its layer; `"resid_pre"`, `"attn.attn_out"`, `"attn.z"`,
            `"attn.pattern"`, …
        by: `"head"` patches one head of a layer at all `positions`.
        positions: those to patch; all of the prompt if absent.

    Returns:
        (layer, position) or (layer, head). `attrs` hold `base`, the metric without a patch.
    """
    import xarray as xr

    if by not in ("position", "head"):
        raise EditError(f'by={by!r} must be "position" or "head"')
    sites = _in(source, site, layers)
    base = lab.run(prompt, **given)
    if len(base.batch.lengths) != 1:
        raise EditError(f"a grid takes one prompt, not {len(base.batch.lengths)}")
    n_tokens = base.batch.lengths[0]
    wanted = list(range(n_tokens))
    if positions is not None:
        wanted = as_positions(positions).among(n_tokens)
    if not wanted:
        raise EditError(f"positions={positions} are not in a prompt of {n_tokens} tokens")
    columns = wanted if by == "position" else list(range(_n_heads(source, sites[0])))
    cells = [(row, column) for row in range(len(sites)) for column in range(len(columns))]
    found = torch.zeros(len(sites), len(columns), dtype=torch.float64)
    for row, column in tqdm(cells, desc=f"patching {site}", disable=not progress):
        where: dict[str, Any] = {"positions": [columns[column]]}
        if by == "head":
            where = {"positions": wanted, "heads": columns[column]}
        run = _run(lab, prompt, edits=patch(sites[row].path, source, **where), **given)
        found[row, column] = float(metric(run))
    return xr.DataArray(
        found.numpy(),
        dims=("layer", by),
        coords={"layer": [one.layer for one in sites], by: columns},
        name=f"metric, {site} patched",
        attrs={"base": float(metric(base)), "site": site, "source": source.provenance.line()},
    )


def _in(source: Trace, site: str, layers: Layers) -> list[Site]:
    sites = [one for one in select(site, source.known_sites) if one.layer is not None]
    if (numbers := as_layers(layers)) is not None:
        wanted = {true_layer(layer, source.known_sites) for layer in numbers}
        sites = [one for one in sites if one.layer in wanted]
    else:
        sites = [one for one in sites if one.path in source.values] or sites
    if not sites:
        raise EditError(f"{site} is no quantity of these layers")
    if len({one.quantity for one in sites}) > 1:
        names = sorted({one.quantity for one in sites})
        raise EditError(f"site={site!r} names several quantities: {', '.join(names)}; take one")
    return sites


def _n_heads(source: Trace, site: Site) -> int:
    letters = site.dims.split()
    if "h" not in letters or site.of_patches:
        raise EditError(f'by="head" needs a site with heads, such as attn.z; {site.path} has none')
    if site.ragged:  # maps `[h s t]`
        return int(source.tensor(site, source.sequences[0]).shape[0])
    # Rows of a trace have lost the batch axis.
    return int(source.tensor(site).shape[letters.index("h") - 1])


def _run(lab: Runs, prompt: Any, **options: Any) -> Any:
    """A run in which an edit may change nothing: two prompts agree in most of their tokens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EditChangedNothingWarning)
        return lab.run(prompt, **options)


@dataclass(frozen=True, slots=True, repr=False)
class PathPatch:
    """The effect of one sender on one receiver alone. `frozen` kept their values of `base`."""

    base: Any
    patched: Any
    receiver: Trace
    frozen: tuple[str, ...]

    def __repr__(self) -> str:
        return f"PathPatch({', '.join(self.receiver.sites)}; {len(self.frozen)} outputs frozen)"


def path_patch(
    lab: Runs,
    prompt: Any,
    source: Trace,
    sender: str | Site,
    receiver: str | Site,
    *,
    sender_heads: int | Iterable[int] | None = None,
    receiver_heads: int | Iterable[int] | None = None,
    positions: PositionsLike | None = None,
    **given: Any,
) -> PathPatch:
    """What the receiver does if it alone sees, through the residual stream, the other sender.

    1. The base run of `prompt`. 2. The sender's value comes from `source` (which kept it), and
    what every other attention and MLP between the two writes is held to the base run: so
    the receiver sees the direct path. 3. The base run with the receiver's value of 2. The last
    run is `.patched`; compare its logits with those of `.base`.
    """
    start, end = resolve_in(source, sender), resolve_in(source, receiver)
    frozen = between(source.known_sites, start, end)
    base = lab.run(prompt, keep=[end.path, *frozen], **given)
    send = patch(start.path, source, heads=sender_heads, positions=positions)
    hold = [patch(list(frozen), base.trace)] if frozen else []
    direct = _run(lab, prompt, edits=[send, *hold], keep=end.path, **given).trace
    receive = patch(end.path, direct, heads=receiver_heads)
    return PathPatch(base, lab.run(prompt, edits=receive, **given), direct, frozen)


def resolve_in(trace: Trace, site: str | Site) -> Site:
    return resolve(site.path if isinstance(site, Site) else site, trace.known_sites)


def between(sites: Sequence[Site], sender: Site, receiver: Site) -> tuple[str, ...]:
    """The writes to the residual stream after the sender and before the receiver, but for the
    write that the sender is a part of."""
    paths = [site.path for site in sites]
    first, last = paths.index(sender.path), paths.index(receiver.path)
    if first >= last:
        raise EditError(f"{receiver.path} does not come after {sender.path}")
    part = ".".join(sender.path.split(".")[:3])
    own = next((path for path in paths[first:] if path.endswith(_WRITES)), None)
    inside = own is not None and own.startswith(f"{part}.")
    if inside and own in paths[last:] and own != receiver.path:
        raise EditError(f"{sender.path} and {receiver.path} are in one sublayer: no path to freeze")
    return tuple(
        path
        for path in paths[first + 1 : last]
        if path.endswith(_WRITES) and not (inside and path == own)
    )
