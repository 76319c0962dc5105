"""Gradients as cheap stand-ins for patches, and how well they stand in.

Top-k passes no gradient. What an activation does by changing *who* is chosen, in its own layer
or later ones, is not in any number that a gradient gives; the weights of the experts that were
chosen are. So a site whose effect runs through routing can look harmless here. Every result says
so, reports how often the path of an integrated gradient crossed such a jump, and compares a
sample of its numbers with true patches.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ernie_lab.interventions.edits import EditChangedNothingWarning
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.metrics import set_flips
from ernie_lab.model.kinds import Model
from ernie_lab.sites import Site, all_sites, select
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.trace import Trace

TOP_K_CAVEAT = (
    "no gradient passes top-k: effects through a change of the chosen experts are not in these "
    "numbers"
)
_IDS = ".expert_ids"
# What a `Run` is reduced to: one number to differentiate.
Of = Callable[[Any], Tensor]


class Runs(Protocol):
    """A `Lab`, as far as it is needed here."""

    @property
    def model(self) -> Model: ...
    def run(self, *args: Any, **kwargs: Any) -> Any: ...


def activation_gradient(
    trace: Trace, of: Tensor, sites: str | Iterable[str], *, baseline: Trace | None = None
) -> pd.DataFrame:
    """(x - baseline) . d of / dx for every token at each site: first order in x - baseline.

    `trace` is of a run with `grad=True` that kept the sites; `of` is a number made from that
    run's logits. `baseline` is a trace of other values at the same tokens, zero if absent. Summed
    over the last axis; heads, slots and other axes between stay apart, numbered by `index`.

    No gradient passes top-k: effects through a change of the chosen experts are not in it.
    """
    frames = []
    for site in select([sites] if isinstance(sites, str) else list(sites), trace.known_sites):
        if site.path not in trace.values:
            raise NotKept(f"{site.path} was not kept; run with grad=True, keep={site.path!r}")
        gradient = torch.from_numpy(trace.gradient(of, site.path).values.copy())
        x = trace.tensor(site.path).detach().cpu()
        base = torch.zeros_like(x) if baseline is None else _rows_like(baseline, trace, site.path)
        product = ((x - base).double() * gradient.double()).sum(-1)
        rows_N = trace.values[site.path].parts[None].rows_N.tolist()
        tokens = trace.context.take(rows_N)
        per_token = product.reshape(len(rows_N), -1)
        n, m = per_token.shape
        frames.append(
            pd.DataFrame(
                {
                    "site": site.path,
                    "layer": pd.array([site.layer] * (n * m), dtype="Int64"),
                    "sequence": np.repeat(tokens.sequence, m),
                    "pos": np.repeat(tokens.pos, m),
                    "text": pd.Series(np.repeat(np.array(tokens.text, dtype=object), m)),
                    "index": np.tile(np.arange(m), n),
                    "value": per_token.flatten().numpy(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class GradientAttribution:
    """What replacing each token's value at each site does to a number, by three methods.

    `table`: one row for each site, token and `index`: the head, slot or other axis between the
    token's and the last, from 0 (0 alone where there is none). `activation_gradient` is the
    first-order estimate (baseline - x) . gradient; `integrated` the same with the gradient
    averaged along the straight path to the baseline, at all tokens together; `true` the change
    that the patch really makes, NaN where it was not tried. `correlation` compares the estimates
    with the true patches.

    `completeness` has one row per site: `sum` of the integrated gradients, the `change` they
    should sum to (all tokens replaced at once), their relative `gap`, and `flips`, the mean share
    of chosen experts that differ from the unpatched run along the path: the jumps that no
    gradient sees.
    """

    table: pd.DataFrame
    correlation: pd.DataFrame
    completeness: pd.DataFrame
    caveat: str = TOP_K_CAVEAT

    def __repr__(self) -> str:
        parts = [self._head(), self.correlation.round(3).to_string(index=False)]
        if len(self.completeness):
            parts.append(self.completeness.round(4).to_string(index=False))
        return "\n".join(parts)

    def _repr_html_(self) -> str:
        tables = self.correlation.round(3).to_html(index=False)
        tables += self.completeness.round(4).to_html(index=False) if len(self.completeness) else ""
        return f"<div>{html.escape(self._head())}{tables}</div>"

    def _head(self) -> str:
        return (
            f"Gradient attribution of {len(self.table)} values; "
            f"{int(self.table['true'].notna().sum())} checked by true patches. "
            f"Beware: {self.caveat}."
        )


def gradient_attribution(
    lab: Runs,
    prompt: Any,
    of: Of,
    sites: str | Iterable[str],
    *,
    baseline: Trace | None = None,
    steps: int = 8,
    check: int = 32,
    seed: int = 0,
    **given: Any,
) -> GradientAttribution:
    """Estimate the patch of every token's value at the sites from gradients, and check a sample.

    `of(run)` is the number, for example `lambda run: run.logits[0, -1, right] - run.logits[0, -1,
    wrong]`. A token's value at a site is replaced by that of `baseline`, a trace of an equally
    long run that kept the sites, or by zero. Heads and slots of experts are replaced one by one.

    - activation x gradient: (b - x) . g(x)
    - integrated gradients (Sundararajan et al. 2017): (b - x) . mean over `steps` midpoints t of
      g(x + t (b - x)), all tokens moving together; `steps=0` leaves it out
    - true: of(patched) - of(run), for `check` of the values drawn at random, and all of them
      where there are fewer

    No gradient passes top-k: effects through a change of the chosen experts are not in the
    estimates, but they are in the true patches. The result reports the correlation of the two.

    Args:
        sites: with one row per token, of all (`b s …`) or of one bank (`n …`):
            `blocks.*.resid_mid`, `attn.z` (heads), `moe.router_logits`, `moe.slot_out` (slots; the
            baseline's slot i may be another expert's than the run's: zero is the safe baseline).
            Attention maps and patches of pictures have no vector per token and are refused, and
            so are integers.
        given: `images=`, `videos=`, `chat=` and `labels=` of `lab.run`.
    """
    chosen = select([sites] if isinstance(sites, str) else list(sites), all_sites(lab.model))
    for site in chosen:
        _require_vectors(site)
    paths = [site.path for site in chosen]
    run = lab.run(prompt, keep=paths, grad=True, **given)
    value = _number(of, run)
    clean, plain = run.trace, float(value.detach())
    base = {path: _baseline(baseline, clean, path) for path in paths}
    frames, rows = [], []
    for path in paths:
        estimates = {"activation_gradient": _along(clean, clean, value, path, base[path])}
        if steps:
            means, facts = _integrated(lab, prompt, of, path, base[path], clean, steps, given)
            estimates["integrated"] = means
            edit = Between(path, 0.0, base[path])
            with torch.no_grad():
                whole = float(_number(of, lab.run(prompt, edits=[edit], **given)))
            total, change = float(means.sum()), whole - plain
            gap = abs(total - change) / max(abs(change), 1e-12)
            rows.append({"site": path, "sum": total, "change": change, "gap": gap} | facts)
        frames.append(_frame(clean, path, estimates))
    table = pd.concat(frames, ignore_index=True)
    table["true"] = np.nan
    first = np.cumsum([0, *map(len, frames)])
    places = np.random.default_rng(seed).permutation(len(table))[:check]
    for place in sorted(places.tolist()):
        which = int(np.searchsorted(first, place, "right")) - 1
        path = paths[which]
        patched = Between(path, 0.0, base[path], only=place - int(first[which]))
        with torch.no_grad(), warnings.catch_warnings():
            # A patch by an equal value changes nothing, and its true effect is 0.
            warnings.simplefilter("ignore", EditChangedNothingWarning)
            run = lab.run(prompt, edits=[patched], **given)
            table.loc[place, "true"] = float(_number(of, run)) - plain
    methods = ["activation_gradient", *(["integrated"] if steps else [])]
    return GradientAttribution(table, _correlation(table, methods), pd.DataFrame(rows))


def _require_vectors(site: Site) -> None:
    if site.ragged or site.row == "i":
        why = "is an attention map: patch it with el.edits.patch, or take attn.z, what a head reads"
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


def _frame(trace: Trace, path: str, estimates: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row for each token and index of a site."""
    n, m = next(iter(estimates.values())).shape
    tokens = trace.context.take(trace.values[path].parts[None].rows_N.tolist())
    frame = pd.DataFrame(
        {
            "site": path,
            "sequence": np.repeat(tokens.sequence, m),
            "pos": np.repeat(tokens.pos, m),
            "id": np.repeat(tokens.id, m),
            "text": pd.Series(np.repeat(np.array(tokens.text, dtype=object), m)),
            "index": np.tile(np.arange(m), n),
            "integrated": np.nan,
        }
    )
    frame.insert(6, "activation_gradient", np.nan)
    return frame.assign(**{name: x.flatten().numpy() for name, x in estimates.items()})


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


def _integrated(
    lab: Runs,
    prompt: Any,
    of: Of,
    path: str,
    base: Tensor,
    clean: Trace,
    steps: int,
    given: Mapping[str, Any],
) -> tuple[Tensor, dict[str, float]]:
    total: Tensor | float = 0.0
    ids = [site.path for site in all_sites(lab.model) if site.path.endswith(_IDS)]
    usual = lab.run(prompt, keep=ids, **given).trace if ids else None
    flips = []
    for step in range(steps):
        edit = Between(path, 1 - (step + 0.5) / steps, base)
        run = lab.run(prompt, edits=[edit], keep=[path, *ids], grad=True, **given)
        total = total + _along(run.trace, clean, _number(of, run), path, base) / steps
        if usual is not None:
            flips.append(_mean_flips(usual, run.trace, ids))
    assert isinstance(total, Tensor)
    return total, {"flips": float(np.mean(flips))} if flips else {}


def _along(trace: Trace, clean: Trace, of: Tensor, path: str, base: Tensor) -> Tensor:
    """`[token index]`: (b - x) . gradient, x being the unpatched value."""
    gradient = torch.from_numpy(trace.gradient(of, path).values.copy()).double()
    difference = base.double() - clean.tensor(path).detach().cpu().double()
    product: Tensor = (difference * gradient).sum(-1)
    return product.reshape(len(product), -1)


def _number(of: Of, run: Any) -> Tensor:
    value = of(run)
    if not isinstance(value, Tensor) or value.ndim != 0:
        raise ValueError(
            f"of(run) must be one number as a tensor, such as run.loss, not {type(value).__name__}"
            + (f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else "")
        )
    return value


def _baseline(baseline: Trace | None, clean: Trace, path: str) -> Tensor:
    if baseline is None:
        return torch.zeros_like(clean.tensor(path).detach().cpu())
    return _rows_like(baseline, clean, path)


def _rows_like(baseline: Trace, trace: Trace, path: str) -> Tensor:
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


def _correlation(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    checked = table[table["true"].notna()]
    rows = []
    for method in methods:
        varied = min(checked["true"].nunique(), checked[method].nunique()) > 1
        usable = len(checked) > 2 and varied
        rows.append(
            {
                "method": method,
                "n": len(checked),
                "pearson": checked["true"].corr(checked[method]) if usable else np.nan,
                "spearman": checked["true"].rank().corr(checked[method].rank())
                if usable
                else np.nan,
            }
        )
    return pd.DataFrame(rows)
