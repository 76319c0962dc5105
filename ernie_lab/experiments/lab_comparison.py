"""The result of comparing two models: effects beside their uncertainty and two noise floors."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_lab.experiments.noise import Variant
from ernie_lab.interventions.bootstrap import draws_of, estimate, few_drawn
from ernie_lab.interventions.comparison import WORDS, by_column
from ernie_lab.interventions.summary import (
    Layout,
    Measured,
    averages,
    estimates,
    exceeds,
    flips_by_layer,
    floor_of,
    floors,
    routing_rows,
    sequence_rows,
    token_rows,
)
from ernie_lab.interventions.tables import load_tables, save_tables
from ernie_lab.trace.provenance import Provenance

if TYPE_CHECKING:
    import pandas as pd

_KIND = "comparison of labs"
_TABLES = ("summary", "tokens", "sequences", "routing", "noise")
_RENAMED = {"loss_base": "loss_a", "loss": "loss_b", "top1_base": "top1_a", "top1": "top1_b"}
_RENAMED |= {"logit_diff_base": "logit_diff_a", "logit_diff": "logit_diff_b"}
_SIDES = ("a", "b")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class LabComparison:
    """What `el.compare_labs` found: model b against model a.

    - `summary`: one row per metric: `value`, `low` and `high` (95 %, paired bootstrap over
      documents), `floor_a` and `floor_b` (95th percentile of the same metric over equivalent runs
      of each model), and `beyond`: larger than both. The losses themselves have no floor.
    - `tokens`, `sequences`: as in a `Comparison`; `loss_a`, `loss_b`, `top1_a`, `top1_b`.
    - `routing`: set flips by layer, and by bank in a vision-language model.
    - `noise`: the equivalent runs of both models.
    """

    summary: pd.DataFrame
    tokens: pd.DataFrame
    sequences: pd.DataFrame
    routing: pd.DataFrame
    noise: pd.DataFrame
    a: Provenance
    b: Provenance
    settings: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        measured: Measured,
        noisy: Sequence[Sequence[Measured]],
        equivalents: Sequence[Variant],
        layout: Layout,
        of: tuple[Provenance, Provenance],
        settings: Mapping[str, Any],
    ) -> LabComparison:
        """`noisy` are the equivalent runs of each model."""
        import pandas as pd

        draws = draws_of(int(layout.document_M.max()) + 1, settings["n_draws"], settings["seed"])
        told = [
            pd.DataFrame([v.row() | averages(m) for v, m in zip(equivalents, runs, strict=True)])
            for runs in noisy
        ]
        noise = pd.concat([t.assign(model=side) for t, side in zip(told, _SIDES, strict=True)])
        routing = [_routing(measured, layout, draws, runs) for runs in noisy]
        table = routing[0].rename(columns={"flips_floor": "flips_floor_a"})
        if len(table):
            table["flips_floor_b"] = routing[1]["flips_floor"]
        return cls(
            _summary(measured, layout, draws, [floors(t) if len(t) else {} for t in told]),
            _of_pair(token_rows(measured, layout)),
            _of_pair(sequence_rows(measured, layout)),
            table.drop(columns="condition", errors="ignore"),
            noise.reset_index(drop=True),
            *of,
            settings,
        )

    @property
    def names(self) -> tuple[str, str]:
        first, second = self.settings["names"]
        return first, second

    def by(self, column: str, metric: str = "loss_change") -> pd.DataFrame:
        """A token metric apart for each value of a column of `tokens`, such as `bank`."""
        return by_column(self.tokens, [column], metric, self.settings)

    def save(self, folder: str | PathLike[str]) -> Path:
        """Write all tables into `folder`, whole or not at all."""
        facts = {"a": self.a.as_json(), "b": self.b.as_json(), "settings": dict(self.settings)}
        return save_tables(Path(folder), _KIND, {n: getattr(self, n) for n in _TABLES}, facts)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> LabComparison:
        """Reopen what `save` wrote; needs no model."""
        tables, facts = load_tables(Path(folder), _KIND)
        a, b = (Provenance(**facts[side]) for side in _SIDES)
        return cls(**tables, a=a, b=b, settings=facts["settings"])

    def __repr__(self) -> str:
        rows = self._shown()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([self._head(), *lines, self._foot()])

    def _repr_html_(self) -> str:
        def line(cells: Sequence[str], tag: str) -> str:
            made = (f"<{tag} style='text-align:left'>{html.escape(c)}</{tag}>" for c in cells)
            return f"<tr>{''.join(made)}</tr>"

        first, *rest = self._shown()
        rows = "".join(line(row, "td") for row in rest)
        return (
            f"<div>{html.escape(self._head())}<table><thead>{line(first, 'th')}</thead>"
            f"<tbody>{rows}</tbody></table><small>{html.escape(self._foot())}</small></div>"
        )

    def _head(self) -> str:
        # Tables saved before `counted` was have only what was finite.
        counted = self.tokens.get("counted", self.tokens["loss_a"].notna())
        n = int(counted.sum())
        return (
            f"LabComparison, {n} predicted tokens of {self.tokens['document'].nunique()} "
            f"documents. a: {self.names[0]} [{self.a.line()}]; b: {self.names[1]} [{self.b.line()}]"
        )

    def _foot(self) -> str:
        told = "no noise floor was measured (noise=0)"
        if len(self.noise):
            runs = len(self.noise) // 2
            told = (
                f"floors: 95th percentile over {runs} equivalent runs of each; * beyond both "
                "(whether the sign is known, the interval tells)"
            )
        unlike, by_lot = self.settings["other_routing"], self.settings["flips_by_lot"]
        why = f" No set flips: {unlike}." if unlike else f" Flips of two lots: {by_lot:.3g}."
        few = few_drawn(self.tokens["document"].nunique())
        return (
            f"Of b against a; 95 % interval, paired bootstrap over documents; {told}.{few}{why} "
            ".summary, .tokens, .sequences, .routing, .noise, .by(column), .save(folder)"
        )

    def _shown(self) -> list[list[str]]:
        rows = [["", "value", "95 % interval", "floor of a", "floor of b", ""]]
        for name, row in self.summary.iterrows():
            sign = "+" if str(name).endswith("_change") else ""
            cells = [f"{row['value']:{sign}.4g}", f"[{row['low']:.3g}, {row['high']:.3g}]"]
            cells += [_plain(row[f"floor_{side}"]) for side in _SIDES]
            rows.append([_words(str(name)), *cells, "*" if row["beyond"] else ""])
        return rows


def _summary(
    measured: Measured, layout: Layout, draws: Any, floors_of: Sequence[Mapping[str, float]]
) -> pd.DataFrame:
    import pandas as pd

    rows = {}
    for side, name in zip(_SIDES, ("loss_base", "loss"), strict=True):
        found = estimate(measured.whole(name), layout.document_N, draws)
        rows[f"loss_{side}"] = (found, [np.nan, np.nan])
    for name, found in estimates(measured, layout, draws).items():
        rows[name] = (found, [floor.get(name, np.nan) for floor in floors_of])
    table = pd.DataFrame(
        {
            name: {
                "value": found.value,
                "low": found.low,
                "high": found.high,
                "floor_a": floor[0],
                "floor_b": floor[1],
                "beyond": all(exceeds(name, found.value, one) for one in floor),
                "n": found.n,
            }
            for name, (found, floor) in rows.items()
        }
    ).T
    return table.infer_objects().rename_axis("metric")


def _routing(
    measured: Measured, layout: Layout, draws: Any, runs: Sequence[Measured]
) -> pd.DataFrame:
    import pandas as pd

    found = [flips_by_layer(run, layout) for run in runs]
    floor = {
        place: floor_of("flips", [one[place] for one in found])
        for place in (found[0] if found else ())
    }
    return pd.DataFrame(routing_rows(measured, layout, draws, floor))


def _of_pair(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="condition").rename(columns=_RENAMED)


def _plain(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2g}"


def _words(name: str) -> str:
    if name in ("loss_a", "loss_b"):
        return f"loss of {name[-1]} (nats)"
    return {**WORDS, "kl": "KL(a || b) (nats)"}.get(name, name)
