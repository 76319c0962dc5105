"""The result of comparing edits: tables of effects, each beside its uncertainty and its floor."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_lab.interventions.bootstrap import draws_of, estimate, few_drawn
from ernie_lab.interventions.summary import BUILT_IN, exceeds, lost
from ernie_lab.interventions.tables import load_tables, save_tables
from ernie_lab.trace.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd

_KIND = "comparison"
_TABLES = ("tokens", "sequences", "conditions", "routing", "edits", "figures", "noise")
WORDS = {
    "loss_change": "loss change (nats)",
    "kl": "KL (nats)",
    "top1_agreement": "top-1 agreement",
    "logit_diff_change": "logit difference, change",
    "flips": "set flips",
}


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Comparison:
    """What `el.compare` found. Every number compares an edited run with the base run.

    - `conditions`: one row per condition. Each metric is an average over tokens (of its own kind
      over sequences) with `_low` and `_high`, the 95 % interval of a paired bootstrap over
      documents, and `_floor`, the 95th percentile of the same metric over equivalent runs.
      All are NaN where a counted prediction is: there is no average over the others.
      An effect inside its floor is numerical noise. `n_fired`, `n_changed` are of all edits.
    - `tokens`: one row per condition and token. `loss`, `kl` and `top1_…` are of predicting this
      token from those before it, NaN where it is not `counted`; `flips` are of reading it.
    - `sequences`: the same by sequence, and what has one value for each (`logit_diff`).
    - `routing`: set flips by layer, and by bank in a vision-language model.
    - `edits`: what each edit of each condition did, and after which others at the same sites.
    - `figures`: what edits report of themselves, such as norm ratios; means over tokens.
    - `noise`: the equivalent runs that the floors come from.
    """

    tokens: pd.DataFrame
    sequences: pd.DataFrame
    conditions: pd.DataFrame
    routing: pd.DataFrame
    edits: pd.DataFrame
    figures: pd.DataFrame
    noise: pd.DataFrame
    provenance: Provenance
    settings: Mapping[str, Any]

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of `conditions`, those of one's own last."""
        columns = self.conditions.columns
        return tuple(str(name) for name in columns if f"{name}_floor" in columns)

    def by(self, column: str, metric: str = "loss_change") -> pd.DataFrame:
        """A token metric apart for each value of a column of `tokens`, such as `bank`.

        The interval is of the same bootstrap; the floor is that of the whole comparison.
        """
        table = by_column(self.tokens, ["condition", column], metric, self.settings)
        if f"{metric}_floor" in self.conditions:
            table[f"{metric}_floor"] = self.conditions[f"{metric}_floor"].iloc[0]
        return table

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write all tables into `folder`, whole or not at all."""
        facts = {"provenance": self.provenance.as_json(), "settings": dict(self.settings)}
        tables = {name: getattr(self, name) for name in _TABLES}
        return save_tables(Path(folder), _KIND, tables, facts)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Comparison:
        """Reopen what `save` wrote; needs no model."""
        tables, facts = load_tables(Path(folder), _KIND)
        return cls(
            **tables,
            provenance=Provenance(**facts["provenance"]),
            settings=facts["settings"],
        )

    def __repr__(self) -> str:
        shown = self._shown()
        columns = [[head, *(row[i] for row in shown[1:])] for i, head in enumerate(shown[0])]
        widths = [max(map(len, column)) for column in columns]
        lines = [
            "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in shown
        ]
        return "\n".join([self._head(), *lines, self._foot()])

    def _repr_html_(self) -> str:
        first, *rest = self._shown()
        head = "".join(f"<th style='text-align:left'>{html.escape(cell)}</th>" for cell in first)
        rows = "".join(
            "<tr>"
            + "".join(f"<td style='text-align:left'>{html.escape(c)}</td>" for c in row)
            + "</tr>"
            for row in rest
        )
        return (
            f"<div>{html.escape(self._head())}<table><thead><tr>{head}</tr></thead>"
            f"<tbody>{rows}</tbody></table><small>{html.escape(self._foot())}</small></div>"
        )

    def _head(self) -> str:
        # Tokens by themselves: each stands once for every condition.
        first = self.conditions.iloc[0]
        return (
            f"Comparison on {self.provenance.line()}: {int(first['n_tokens'])} predicted tokens "
            f"of {int(first['n_documents'])} documents, base loss {first['loss_base']:.4f} nats"
        )

    def _foot(self) -> str:
        runs = len(self.noise)
        floor = (
            f"± floor: 95th percentile over {runs} equivalent runs; * beyond it, and no effect is "
            "outside the interval"
            if runs
            else "no noise floor was measured (noise=0)"
        )
        few = few_drawn(int(self.conditions["n_documents"].iloc[0]))
        return (
            f"[95 % interval, paired bootstrap over documents]; {floor}.{few} "
            ".conditions, .tokens, .sequences, .routing, .edits, .noise, .by(column), .save(folder)"
        )

    def _shown(self) -> list[list[str]]:
        table = [["condition", *(WORDS.get(name, name) for name in self.metrics), "changed"]]
        for condition, row in self.conditions.iterrows():
            name = f"{condition} (control)" if row["control"] else str(condition)
            cells = [self._cell(metric, row) for metric in self.metrics]
            table.append([name, *cells, f"{int(row['n_changed'])} of {int(row['n_fired'])}"])
        return table

    @staticmethod
    def _cell(metric: str, row: pd.Series) -> str:
        value, low, high = (row[f"{metric}{end}"] for end in ("", "_low", "_high"))
        floor = row[f"{metric}_floor"]
        if np.isnan(value):
            return "-"
        sign = "+" if metric in ("loss_change", "logit_diff_change") else ""
        cell = f"{value:{sign}.4g}"
        if not np.isnan(low):
            cell += f" [{low:.3g}, {high:.3g}]"
        if not np.isnan(floor):
            size = 1 - floor if metric == "top1_agreement" else floor
            cell += f" ±{size:.1g}" + ("*" if _is_told(metric, value, low, high, floor) else "")
        return cell


def _is_told(metric: str, value: float, low: float, high: float, floor: float) -> bool:
    """What a filled dot of `plot_effects` is: beyond the floor, and the interval without 0.

    Of one document there is no interval: the floor alone decides.
    """
    none = 1.0 if metric == "top1_agreement" else 0.0
    return exceeds(metric, value, floor) and not low <= none <= high


def by_column(
    tokens: pd.DataFrame, columns: list[str], metric: str, settings: Mapping[str, Any]
) -> pd.DataFrame:
    """Means of a token metric for each value of the columns, with the intervals of `settings`."""
    import pandas as pd

    for name in (*columns, metric):
        if name not in tokens:
            raise KeyError(f"tokens has no column {name!r}; it has {list(tokens)}")
    documents = {name: i for i, name in enumerate(tokens["document"].unique())}
    draws = draws_of(len(documents), settings["n_draws"], settings["seed"])
    rows = []
    for group, part in tokens.groupby(columns, sort=False):
        document_N = part["document"].map(documents).to_numpy()
        values = part[metric].to_numpy(dtype=float)
        # No average over the survivors.
        values = np.full(len(values), np.nan) if lost(part).any() else values
        found = estimate(values, document_N, draws)
        rows.append((*group, found.n, found.value, found.low, found.high))
    names = [*columns, "n_tokens", metric, f"{metric}_low", f"{metric}_high"]
    return pd.DataFrame(rows, columns=pd.Index(names))


def metric_names(own: Mapping[str, Any]) -> None:
    """Raise where a metric of one's own takes the name of another column."""
    taken = {*BUILT_IN, "loss", "loss_base", "logit_diff", "top1", "top1_base", "condition"}
    taken |= {"control", "counted", "sequence", "document", "pos", "id", "text", "bank", "content"}
    if wrong := sorted(taken & own.keys()):
        raise ValueError(f"metrics {wrong} have names that the tables use; choose others")
