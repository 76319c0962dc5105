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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ernie_lab.analysis.gradient_paths import (
    Between,
    Of,
    Runs,
    along,
    baseline_rows,
    integrated,
    number_of,
    require_vectors,
    rows_like,
)
from ernie_lab.interventions.edits import EditChangedNothingWarning
from ernie_lab.sites import all_sites, select
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.trace import Trace

TOP_K_CAVEAT = (
    "no gradient passes top-k: effects through a change of the chosen experts are not in these "
    "numbers"
)


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
        base = torch.zeros_like(x) if baseline is None else rows_like(baseline, trace, site.path)
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
        require_vectors(site)
    paths = [site.path for site in chosen]
    run = lab.run(prompt, keep=paths, grad=True, **given)
    value = number_of(of, run)
    clean, plain = run.trace, float(value.detach())
    base = {path: baseline_rows(baseline, clean, path) for path in paths}
    frames, rows = [], []
    for path in paths:
        estimates = {"activation_gradient": along(clean, clean, value, path, base[path])}
        if steps:
            means, facts = integrated(lab, prompt, of, path, base[path], clean, steps, given)
            estimates["integrated"] = means
            edit = Between(path, 0.0, base[path])
            with torch.no_grad():
                whole = float(number_of(of, lab.run(prompt, edits=[edit], **given)))
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
            table.loc[place, "true"] = float(number_of(of, run)) - plain
    methods = ["activation_gradient", *(["integrated"] if steps else [])]
    return GradientAttribution(table, _correlation(table, methods), pd.DataFrame(rows))


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
