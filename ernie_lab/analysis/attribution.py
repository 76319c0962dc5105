"""A number as an exact sum over the components of the residual stream."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.components import Component, Written
from ernie_lab.inputs.visual_layout import BANKS

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Attribution:
    """`values[r, c]` is what component c adds to number r.

    `targets` has one row per number: its token, what it is, and `value`, the number as the model
    had it. `components` has one row per component: component, kind, layer, index (the head, slot
    or neuron). `experts[r, c]` is the expert in a slot and `banks[r, c]` the number of its bank,
    -1 for what is no slot. `title` says what the numbers are.
    """

    title: str
    targets: pd.DataFrame
    components: pd.DataFrame
    values: Array
    experts: Array
    banks: Array

    @property
    def residual_error(self) -> float:
        """max |sum of components - value| / max |value|: how far the sum is from closing."""
        exact = self.targets["value"].to_numpy()
        largest = np.abs(exact).max()
        return float(np.abs(self.values.sum(1) - exact).max() / largest) if largest else 0.0

    def to_frame(self) -> pd.DataFrame:
        """Tidy: one row per number and component, `contribution` last."""
        n_targets, n_components = self.values.shape
        rows = np.repeat(np.arange(n_targets), n_components)
        columns = np.tile(np.arange(n_components), n_targets)
        table = self.targets.iloc[rows].reset_index(drop=True)
        for name in self.components:
            table[name] = self.components[name].to_numpy()[columns]
        experts = self.experts.ravel()
        table["slot_expert"] = pd.Series(experts, dtype="Int64").mask(experts < 0)
        table["slot_bank"] = pd.Series(_bank_names(self.banks.ravel()), dtype=object)
        table["contribution"] = self.values.ravel()
        return table

    def by(self, *columns: str, of: str | Sequence[str] = ()) -> pd.DataFrame:
        """Contributions summed over the components of each kind, or layer, or both, and averaged
        over all numbers: `by("kind")`, `by("kind", "layer")`. `of` are columns of `targets`, to
        average over each of their values apart: `by("kind", of="expert")`.

        `mean_size` is the mean of the absolute sums, which does not cancel over tokens.
        """
        for name in columns:
            if name not in self.components:
                raise KeyError(f"components have no {name!r}; they have {list(self.components)}")
        apart = [of] if isinstance(of, str) else list(of)
        groups = self.components.groupby(list(columns), dropna=False, sort=False).indices
        sums = pd.concat(
            [
                self._labelled(columns, key, apart, self.values[:, places].sum(1))
                for key, places in groups.items()
            ]
        )
        grouped = sums.groupby([*apart, *columns], dropna=False, sort=False)["contribution"]
        agg = grouped.agg(mean="mean", mean_size=lambda x: x.abs().mean(), n="size")
        table = pd.DataFrame(agg).reset_index()
        for name in {"layer", "index"} & set(columns):
            table[name] = table[name].astype("Int64")
        return table

    def _labelled(
        self, columns: Sequence[str], key: Any, apart: list[str], sums: Array
    ) -> pd.DataFrame:
        table = self.targets[apart].reset_index(drop=True)
        for name, value in zip(columns, key if isinstance(key, tuple) else (key,), strict=True):
            table[name] = value
        table["contribution"] = sums
        return table

    def by_expert(self) -> pd.DataFrame:
        """One row per layer, bank and expert: how many of the numbers it was in a slot for, its
        mean contribution there, and its contribution averaged over all numbers."""
        places = np.flatnonzero(self.components["kind"] == "slot")
        layer = self.components["layer"].to_numpy()[places]
        table = pd.DataFrame(
            {
                "layer": np.broadcast_to(layer, (len(self.values), len(places)))
                .ravel()
                .astype(int),
                "bank": _bank_names(self.banks[:, places].ravel()),
                "expert": self.experts[:, places].ravel(),
                "contribution": self.values[:, places].ravel(),
            }
        )
        grouped = table.groupby(["layer", "bank", "expert"], sort=True)["contribution"]
        out = grouped.agg(n="size", mean_when_chosen="mean", total="sum").reset_index()
        out["mean"] = out.pop("total") / len(self.values)
        return out

    def top(self, n: int = 10, row: int = 0) -> pd.DataFrame:
        """The components that add most to one number, in size."""
        order = np.argsort(-np.abs(self.values[row]))[:n]
        table = self.components.iloc[order].copy()
        experts = self.experts[row, order]
        table["expert"] = pd.Series(experts, dtype="Int64", index=table.index).mask(experts < 0)
        table["contribution"] = self.values[row, order]
        return table

    def __repr__(self) -> str:
        return f"{self._head()}\n{self._summary().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<div>{html.escape(self._head())}{self._summary().to_html(index=False)}</div>"

    def _head(self) -> str:
        return (
            f"{self.title}: {len(self.targets)} numbers over {len(self.components)} components; "
            f"the sums close to {self.residual_error:.1e} of the largest. "
            ".to_frame(), .by(…), .by_expert(), .top(n, row)"
        )

    def _summary(self) -> pd.DataFrame:
        return self.by("kind").round(4)


def component_table(components: Sequence[Component]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "component": [str(c) for c in components],
            "kind": [c.kind for c in components],
            "layer": pd.array([c.layer for c in components], dtype="Int64"),
            "index": pd.array([c.index for c in components], dtype="Int64"),
        }
    )


def slot_columns(written: Sequence[Written], rows: Array) -> tuple[Array, Array]:
    """Experts and banks `[r c]` of the components, at the tokens `rows`; -1 where there is none."""
    experts = np.full((len(rows), len(written)), -1)
    banks = np.full((len(rows), len(written)), -1)
    for column, one in enumerate(written):
        if one.expert_N is not None and one.bank_N is not None:
            experts[:, column] = one.expert_N.numpy()[rows]
            banks[:, column] = one.bank_N.numpy()[rows]
    return experts, banks


def _bank_names(banks: Array) -> list[str | None]:
    return [BANKS[bank] if bank >= 0 else None for bank in banks]
