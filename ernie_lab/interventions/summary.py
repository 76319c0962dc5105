"""From what was measured of every token to effects with their uncertainty and noise floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.interventions.bootstrap import Estimate, Floats, estimate

if TYPE_CHECKING:
    import pandas as pd

Array = NDArray[Any]

# What `conditions` shows, in this order; metrics of one's own follow.
BUILT_IN = ("loss_change", "kl", "top1_agreement", "logit_diff_change", "flips")
# Of these, 1 means no effect at all.
_FROM_ONE = frozenset({"top1_agreement"})
FLOOR_PERCENTILE = 95
_NOT_OWN = frozenset({"kl", "top1_base", "top1", "top1_agreement"})


@dataclass(frozen=True, slots=True)
class EditFacts:
    """What an edit did over a whole comparison: how often it was applied and changed a token,
    which others it came `after` at the same sites, and the figures it reports, by name."""

    edit: str
    n_fired: int
    n_changed: int
    after: tuple[str, ...] = ()
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One condition on every token N and sequence M, in reading order; NaN where undefined.

    `tokens` holds counted (1 where a token is predicted and counts, by the targets, whatever the
    loss), loss_base, loss, kl, top1_base, top1, top1_agreement, logit_change (the largest of any
    word) and metrics of one's own; `sequences` holds logit_diff_base and logit_diff where answers
    were given, and metrics of one's own. `flips_LN` are set flips of each routed layer.
    """

    name: str
    tokens: Mapping[str, Array]
    sequences: Mapping[str, Array]
    flips_LN: Array
    edits: tuple[EditFacts, ...] = ()
    control: bool = False

    @property
    def counted(self) -> Array:
        return np.asarray(self.tokens["counted"] == 1)

    @property
    def lost(self) -> Array:
        """Counted tokens whose change of loss is NaN: a prediction of either run is no number."""
        lost_N = np.isnan(self.tokens["loss"] - self.tokens["loss_base"])
        return np.asarray(self.counted & lost_N)

    def whole(self, name: str) -> Array:
        """A loss of every token; NaN throughout where one that counts is."""
        values = self.tokens[name]
        return _none_of(values) if np.isnan(values[self.counted]).any() else values

    @property
    def averaged_flips(self) -> Array:
        return _none_of(self.flips_LN) if self.lost.any() else self.flips_LN

    def averaged(self) -> dict[str, tuple[str, Array]]:
        """`columns`, of NaN where the average would be one over the survivors."""
        none = self.lost.any()
        found = {}
        for name, (per, values) in self.columns().items():
            blank = none or (name == "logit_diff_change" and np.isnan(values).any())
            found[name] = (per, _none_of(values) if blank else values)
        return found

    def columns(self) -> dict[str, tuple[str, Array]]:
        """By metric: whether it has one value for each token or sequence, and the values."""
        found = {"loss_change": ("token", self.tokens["loss"] - self.tokens["loss_base"])}
        found |= {name: ("token", self.tokens[name]) for name in ("kl", "top1_agreement")}
        if "logit_diff" in self.sequences:
            change = self.sequences["logit_diff"] - self.sequences["logit_diff_base"]
            found["logit_diff_change"] = ("sequence", change)
        if len(self.flips_LN):
            found["flips"] = ("token", self.flips_LN.mean(0))
        known = {"counted", "loss_base", "loss", "logit_change", *_NOT_OWN}
        found |= {n: ("token", x) for n, x in self.tokens.items() if n not in known}
        known = {"logit_diff_base", "logit_diff"}
        return found | {n: ("sequence", x) for n, x in self.sequences.items() if n not in known}


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """What the rows are: `tokens` and `sequences` are frames of labels, `layers` those routed.

    `document_N` and `document_M` number the document of each token and sequence from 0.
    """

    tokens: pd.DataFrame
    sequences: pd.DataFrame
    document_N: Array
    document_M: Array
    layers: tuple[int, ...]
    banks: tuple[str, ...] = field(default=())

    def document(self, per: str) -> Array:
        return self.document_N if per == "token" else self.document_M


def estimates(measured: Measured, layout: Layout, draws: Array) -> dict[str, Estimate]:
    """Each metric's average with its interval."""
    return {
        name: estimate(values, layout.document(per), draws)
        for name, (per, values) in measured.averaged().items()
    }


def averages(measured: Measured) -> dict[str, float]:
    """Each metric's average alone."""
    return {name: _mean(values) for name, (_, values) in measured.averaged().items()}


def floor_of(metric: str, values: Floats | Sequence[float]) -> float:
    """The 95th percentile of the metric's size over equivalent runs; NaN without runs.

    Of an agreement, whose no effect is 1, the size is its distance from 1, and the floor is
    again an agreement: what lies above it is not below the noise.
    """
    found = np.asarray(values, dtype=np.float64)
    found = found[~np.isnan(found)]
    if not len(found):
        return float("nan")
    zero = 1.0 if metric in _FROM_ONE else 0.0
    size = float(np.percentile(np.abs(found - zero), FLOOR_PERCENTILE))
    return zero - size if metric in _FROM_ONE else size


def exceeds(metric: str, value: float, floor: float) -> bool:
    """Is an effect larger than equivalent runs differ? False where either is unknown."""
    zero = 1.0 if metric in _FROM_ONE else 0.0
    return bool(abs(value - zero) > abs(floor - zero))


def floors(noise: pd.DataFrame) -> dict[str, float]:
    """By metric, from the table of equivalent runs."""
    told = ("sequences", "tokens", "composition", "padding", "kernel")
    return {
        str(name): floor_of(str(name), noise[name].to_numpy())
        for name in noise.columns.drop([name for name in told if name in noise.columns])
    }


def condition_row(
    measured: Measured, layout: Layout, draws: Array, floor: Mapping[str, float]
) -> dict[str, Any]:
    counted_N = measured.counted
    row: dict[str, Any] = {
        "control": measured.control,
        "n_tokens": int(counted_N.sum()),
        "n_documents": len(np.unique(layout.document_N[counted_N])),
        "n_fired": sum(edit.n_fired for edit in measured.edits),
        "n_changed": sum(edit.n_changed for edit in measured.edits),
        "loss_base": _mean(measured.whole("loss_base")),
        "loss": _mean(measured.whole("loss")),
    }
    for name, found in estimates(measured, layout, draws).items():
        row |= {
            name: found.value,
            f"{name}_low": found.low,
            f"{name}_high": found.high,
            f"{name}_floor": floor.get(name, float("nan")),
        }
    return row


def routing_rows(
    measured: Measured, layout: Layout, draws: Array, floor: Mapping[tuple[int, str], float]
) -> list[dict[str, Any]]:
    """Set flips of each layer, and of each bank's tokens, with interval and floor."""
    rows = []
    for layer, flips_N in zip(layout.layers, measured.averaged_flips, strict=True):
        for bank, here_N in _by_bank(layout):
            found = estimate(np.where(here_N, flips_N, np.nan), layout.document_N, draws)
            rows.append(
                {
                    "condition": measured.name,
                    "layer": layer,
                    "bank": bank,
                    "n_tokens": found.n,
                    "flips": found.value,
                    "flips_low": found.low,
                    "flips_high": found.high,
                    "flips_floor": floor.get((layer, bank), float("nan")),
                }
            )
    return rows


def flips_by_layer(measured: Measured, layout: Layout) -> dict[tuple[int, str], float]:
    return {
        (layer, bank): _mean(np.where(here_N, flips_N, np.nan))
        for layer, flips_N in zip(layout.layers, measured.averaged_flips, strict=True)
        for bank, here_N in _by_bank(layout)
    }


def token_rows(measured: Measured, layout: Layout) -> pd.DataFrame:
    """One row for each token of a condition."""
    table = layout.tokens.copy()
    table.insert(0, "condition", measured.name)
    table["counted"] = measured.counted
    table["loss_base"], table["loss"] = measured.tokens["loss_base"], measured.tokens["loss"]
    table["loss_change"] = table["loss"] - table["loss_base"]
    for name, values in measured.tokens.items():
        if name not in ("counted", "loss_base", "loss"):
            table[name] = values
    if len(measured.flips_LN):
        table["flips"] = measured.flips_LN.mean(0)
    for layer, flips_N in zip(layout.layers, measured.flips_LN, strict=True):
        table[f"flips[{layer}]"] = flips_N
    return table


def sequence_rows(measured: Measured, layout: Layout) -> pd.DataFrame:
    """One row for each sequence of a condition: means over its counted tokens, and its own."""
    table = layout.sequences.copy()
    table.insert(0, "condition", measured.name)
    sequence_N = layout.tokens["sequence"].to_numpy()
    lost_M = np.isin(np.arange(len(table)), sequence_N[measured.lost])
    for name, (per, values) in measured.columns().items():
        if per == "token":
            values = np.where(lost_M, np.nan, _means(values, sequence_N, len(table)))
        table[name] = values
    for name in ("logit_diff_base", "logit_diff"):
        if name in measured.sequences:
            table[name] = measured.sequences[name]
    return table


def lost(tokens: pd.DataFrame) -> NDArray[np.bool_]:
    """`Measured.lost` of a table of tokens; of none in tables saved without `counted`."""
    if "counted" not in tokens:
        return np.zeros(len(tokens), dtype=bool)
    return np.asarray(tokens["counted"].astype(bool) & tokens["loss_change"].isna())


def _none_of(values: Array) -> Array:
    return np.full(values.shape, np.nan)


def _by_bank(layout: Layout) -> list[tuple[str, Array]]:
    if len(layout.banks) < 2:
        return [("text", np.ones(len(layout.document_N), dtype=bool))]
    bank_N = layout.tokens["bank"].to_numpy()
    return [(bank, bank_N == bank) for bank in layout.banks]


def _means(values_N: Array, group_N: Array, n_groups: int) -> Floats:
    there_N = ~np.isnan(values_N)
    sums = np.bincount(group_N[there_N], values_N[there_N], minlength=n_groups)
    counts = np.bincount(group_N[there_N], minlength=n_groups)
    means = np.divide(sums, counts, out=np.full(n_groups, np.nan), where=counts > 0)
    return np.asarray(means)


def _mean(values: Array) -> float:
    there = ~np.isnan(values)
    return float(values[there].mean(dtype=np.float64)) if there.any() else float("nan")
