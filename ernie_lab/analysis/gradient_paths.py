"""Along the straight path from a baseline: values between, gradients there, what flips on the way.

Used by `gradient_attribution`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.metrics import set_flips
from ernie_lab.model.kinds import Model
from ernie_lab.sites import Site, all_sites, select
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.trace import Trace

_IDS = ".expert_ids"
# What a `Run` is reduced to: one number to differentiate.
Of = Callable[[Any], Tensor]


class Runs(Protocol):
    """A `Lab`, as far as it is needed here."""

    @property
    def model(self) -> Model: ...
    def run(self, *args: Any, **kwargs: Any) -> Any: ...


def require_vectors(site: Site) -> None:
    """Raise where a site has no row of numbers for each token that a patch could replace."""
    if site.ragged or site.row == "i":
        why = (
            "is an attention map: patch it with el.edits.patch, or take attn.z, what heads put out"
        )
    elif site.row in "po":
        why = "has patches and no tokens; take resampler.out, or embed_in"
    elif not site.dtype.startswith("float") and site.dtype != "model":
        why = "holds integers, through which no gradient flows"
    elif len(site.dims.split()) < (3 if site.row == "b" else 2):
        why = f"has one number per token ({site.dims})"
    else:
        return
    raise ValueError(
        f"{site.path} has no vector per token to patch: it {why}. Sites `b s …` and `n …` have one"
    )


@dataclass(frozen=True, slots=True, eq=False)
class Between:
    """baseline + alpha (x - baseline) at a site of tokens; `rows` `[n …]` in the order of a trace
    of the same batch. With `only`, that place of the flattened `[n (heads, slots, …)]` alone."""

    path: str
    alpha: float
    rows: Tensor
    only: int | None = None

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return select(self.path, sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        real_N = here.real(site, x)
        if len(self.rows) != int(real_N.sum()):
            raise EditError(
                f"{site.path}: the baseline has {len(self.rows)} tokens, the batch "
                f"{int(real_N.sum())}"
            )
        rows = self.rows.to(device=x.device, dtype=x.dtype)
        flat = x.detach().reshape(len(real_N), *self.rows.shape[1:]).clone()
        if self.only is None:
            flat[real_N] = rows
        else:
            own = flat[real_N].flatten(0, -2)
            own[self.only] = rows.flatten(0, -2)[self.only]
            flat[real_N] = own.view_as(rows)
        base = flat.view_as(x)
        return base + self.alpha * (x - base)


def integrated(
    lab: Runs,
    prompt: Any,
    of: Of,
    path: str,
    base: Tensor,
    clean: Trace,
    steps: int,
    given: Mapping[str, Any],
) -> tuple[Tensor, dict[str, float]]:
    """`[token index]`, and the mean set flips along the path (in a model with experts).

    The mean of the gradient over `steps` midpoints, all tokens moving together.
    """
    total: Tensor | float = 0.0
    ids = [site.path for site in all_sites(lab.model) if site.path.endswith(_IDS)]
    usual = lab.run(prompt, keep=ids, **given).trace if ids else None
    flips = []
    for step in range(steps):
        edit = Between(path, 1 - (step + 0.5) / steps, base)
        run = lab.run(prompt, edits=[edit], keep=[path, *ids], grad=True, **given)
        total = total + along(run.trace, clean, number_of(of, run), path, base) / steps
        if usual is not None:
            flips.append(_mean_flips(usual, run.trace, ids))
    assert isinstance(total, Tensor)
    return total, {"flips": float(np.mean(flips))} if flips else {}


def along(trace: Trace, clean: Trace, of: Tensor, path: str, base: Tensor) -> Tensor:
    """`[token index]`: (b - x) . gradient, x being the unpatched value."""
    gradient = torch.from_numpy(trace.gradient(of, path).values.copy()).double()
    difference = base.double() - clean.tensor(path).detach().cpu().double()
    product: Tensor = (difference * gradient).sum(-1)
    return product.reshape(len(product), -1)


def number_of(of: Of, run: Any) -> Tensor:
    value = of(run)
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise ValueError(
            f"of(run) must be one number as a tensor, such as run.loss, not {type(value).__name__}"
            + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
        )
    return value


def baseline_rows(baseline: Trace | None, clean: Trace, path: str) -> Tensor:
    if baseline is None:
        return torch.zeros_like(clean.tensor(path).detach().cpu())
    return rows_like(baseline, clean, path)


def rows_like(baseline: Trace, trace: Trace, path: str) -> Tensor:
    """Another run's values at the same sequences and positions."""
    if path not in baseline.values:
        raise NotKept(f"the baseline has no {path}; run it with keep={path!r}")
    mine, theirs = (
        [(t.context.sequence[i], t.context.pos[i]) for i in t.values[path].parts[None].rows_N]
        for t in (trace, baseline)
    )
    if mine != theirs:
        raise ValueError(
            f"{path}: the baseline has {len(theirs)} tokens, the run {len(mine)}, or at other "
            "positions; a patch needs prompts of equal length"
        )
    return baseline.tensor(path).detach().cpu()


def _mean_flips(usual: Trace, trace: Trace, ids: Sequence[str]) -> float:
    pairs = [(usual.tensor(path), trace.tensor(path)) for path in ids]
    flips = [set_flips(a, b) for a, b in pairs if len(a) == len(b)]
    joined = torch.cat(flips)
    return float(joined.mean()) if len(joined) else float("nan")
