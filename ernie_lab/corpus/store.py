"""`RoutingStore`: a recording of a corpus, read back. Numbers come from committed files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from ernie_lab.corpus.folder import CorpusError, Folder
from ernie_lab.corpus.questions import (
    balance_of_store,
    blocks_of,
    domain_load_of_store,
    information_of_store,
)
from ernie_lab.corpus.record import read_facts, read_statistics
from ernie_lab.corpus.statistics import BUCKETS, CONTENT, FIXED, PER_OCTAVE, Statistics
from ernie_lab.corpus.stored_rows import StoredRouting, StoredRows

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

# How far an engine whose routing was ingested agrees with the model run here.
REFERENCE = "reference.json"

Counts: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
By: TypeAlias = Literal["domain", "position", "content", "unit"]

_SHOWN = ("n_tokens", "n_windows", "seconds")
# What counts are kept by; domains are those of the corpus.
_AXES: dict[str, Sequence[Any]] = {"domain": (), "position": BUCKETS, "content": CONTENT}


def counted_by(found: Statistics, by: str | None, domains: tuple[str, ...]) -> Counts:
    """Slots `[layer expert]`, or `[layer by expert]` with the axis of `domains` laid out."""
    if by == "content":
        values: Counts = found.sums["content_counts"].numpy()
        return values
    counts_LGPE: Counts = found.spread("counts", domains).numpy()
    over = {"domain": (2,), "position": (1,)}
    return np.asarray(counts_LGPE.sum((1, 2) if by is None else over[by]))


class RoutingStore:
    """What `RecordPlan.run` committed into a folder; opens without the model, also while it runs.

    Statistics are merged once, at first use, a unit at a time. In a vision-language model every
    question takes `bank="text"` or `"vision"`.
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self._folder = Folder(Path(folder).expanduser())
        self.plan = self._folder.plan()

    @property
    def path(self) -> Path:
        return self._folder.path

    def status(self) -> pd.DataFrame:
        """One row per committed unit: tokens, windows, seconds, rate; `attrs` has the failed."""
        import pandas as pd

        rows = []
        for number in self._folder.committed():
            facts = read_facts(self._folder, number)
            rows.append({"unit": number, **{name: facts[name] for name in _SHOWN}})
        table = pd.DataFrame(rows, columns=pd.Index(["unit", *_SHOWN]))
        table = table.set_index("unit")
        table["tokens_per_second"] = table["n_tokens"] / table["seconds"]
        table.attrs["failed"] = {n: told["error"] for n, told in self._folder.failures().items()}
        return table

    @cached_property
    def units(self) -> tuple[int, ...]:
        """The units that all answers are about: those that were committed when it was first asked.

        While a run goes on, open the store anew for more.
        """
        if numbers := tuple(self._folder.committed()):
            return numbers
        raise CorpusError(f"{self.path} holds no committed unit yet")

    @cached_property
    def _merged(self) -> dict[str, Statistics]:
        merged = read_statistics(self._folder, self.units[0])
        for number in self.units[1:]:
            other = read_statistics(self._folder, number)
            merged = {bank: one.merged(other[bank], in_place=True) for bank, one in merged.items()}
        return merged

    @property
    def banks(self) -> tuple[str, ...]:
        return tuple(self._merged)

    def _bank(self, bank: str | None) -> str:
        if bank is None and len(self.banks) > 1:
            raise ValueError(
                "this model has two banks of experts, and expert 5 of the one is not expert 5 of "
                "the other; give bank='text' or bank='vision'"
            )
        if bank is not None and bank not in self.banks:
            raise ValueError(f"bank={bank!r}: this recording has {' and '.join(self.banks)}")
        return bank or self.banks[0]

    def statistics(self, bank: str | None = None) -> Statistics:
        """The integers themselves, of one bank."""
        return self._merged[self._bank(bank)]

    @property
    def layers(self) -> tuple[int, ...]:
        return self._merged[self.banks[0]].shape.layers

    @property
    def n_experts(self) -> int:
        return self._merged[self.banks[0]].shape.n_experts

    @property
    def n_chosen(self) -> int:
        return self._merged[self.banks[0]].shape.n_chosen

    def counts(self, by: By | None = None, bank: str | None = None) -> xr.DataArray:
        """Slots that went to each expert, (layer, expert), or (layer, domain | position | content |
        unit, expert); `attrs["n_tokens"]` are the tokens of the bank.

        The rest of `el.analysis` takes counts as they are:
        `el.plots.plot_expert_load(store.counts(), n_tokens=…, k=store.n_chosen)`.
        """
        import xarray as xr

        found = self.statistics(bank)
        shape = found.shape
        coords: dict[str, Any] = {"layer": list(shape.layers), "expert": np.arange(shape.n_experts)}
        dims: tuple[str, ...] = ("layer", "expert") if by is None else ("layer", by, "expert")
        if by != "unit" and by is not None and by not in _AXES:
            raise ValueError(f"by={by!r} must be None, 'domain', 'position', 'content' or 'unit'")
        if by != "unit":
            values = counted_by(found, by, shape.domains)
        else:
            name = self._bank(bank)
            values = np.stack(
                [
                    read_statistics(self._folder, number)[name].sums["counts"].sum((1, 2)).numpy()
                    for number in self.units
                ],
                axis=1,
            )
            coords["unit"] = list(self.units)
        if by in _AXES:
            coords[by] = list(shape.domains if by == "domain" else _AXES[by])
        attrs = {"n_tokens": found.n_tokens, "k": shape.n_chosen, "bank": bank or ""}
        return xr.DataArray(values, dims=dims, coords=coords, name="slots", attrs=attrs)

    def load(self, by: By | None = None, bank: str | None = None) -> xr.DataArray:
        """`counts` as shares of all slots of the layer (and group): they sum to 1 over experts."""
        counts = self.counts(by, bank)
        total = counts.sum("expert")
        return (counts / total.where(total > 0)).rename("load").assign_attrs(counts.attrs)

    def balance(self, by: By | None = None, bank: str | None = None) -> pd.DataFrame:
        """`el.analysis.balance_by` of the whole recording: by layer and group, each statistic
        beside what uniform routing of as many tokens gives; `el.plots.plot_balance` draws it.

        What is drawn for the intervals are blocks: the units, which mix neighbouring documents,
        so `n_blocks` and `block_max_violation` stand in the place of those of documents. They are
        for corpora put together of such stretches of text; one in order of its domains makes them
        wide, and for documents longer than a unit its units are one block. With fewer than 8
        blocks of a group there are none; `attrs["intervals"]` says so.
        """
        return balance_of_store(self._by_block(by, self._bank(bank)), by, self.n_chosen)

    def _by_block(self, by: By | None, bank: str) -> xr.DataArray:
        """`counts` of each block of units, (block, layer, expert) or (block, layer, by, expert)."""
        import xarray as xr

        if by == "unit":
            raise ValueError("by='unit': blocks of units are what intervals are over; leave by out")
        like = self.counts(by, bank)
        documents = [read_facts(self._folder, number)["documents"] for number in self.units]
        blocks = blocks_of([(first, last) for first, last in documents])
        values = np.zeros((len(blocks), *like.shape), dtype=np.int64)
        for place, block in enumerate(blocks):
            for number in self.units[block.start : block.stop]:
                found = read_statistics(self._folder, number)[bank]
                values[place] += counted_by(found, by, self._merged[bank].shape.domains)
        coords = {name: like[name].values for name in like.dims}
        return xr.DataArray(values, dims=("block", *like.dims), coords=coords)

    def information(self, by: By = "domain", bank: str | None = None) -> pd.DataFrame:
        """Bits that an expert tells of the domain (or position, content) of its token, by layer.

        Of (token, slot) rows, Miller-Madow corrected (`el.analysis.information_of_counts`), beside
        `label_bits`, which bounds them. No null stands beside them here: permuted labels give 0 at
        such numbers, but routers that learned nothing do not; see `el.analysis.specialisation`.
        """
        return information_of_store(self.counts(by, bank), by)

    def domain_load(self, bank: str | None = None) -> xr.Dataset:
        """`el.analysis.domain_specialisation` of the whole recording, without intervals: the share
        of a domain's tokens that have the expert among their k; `el.plots.plot_domain_load`."""
        return domain_load_of_store(self.counts("domain", bank), self.n_chosen)

    def router_probs(self, by_domain: bool = False, bank: str | None = None) -> xr.DataArray:
        """Mean probability of each expert, (layer, expert) or (layer, domain, expert)."""
        import xarray as xr

        found = self.statistics(bank)
        sums_LGE = self._sum(found, "probabilities").astype(np.float64) / FIXED
        tokens_LG = found.sums["tokens"].sum(-1).numpy()
        dims: tuple[str, ...] = ("layer", "domain", "expert")
        coords: dict[str, Any] = {
            "layer": list(found.shape.layers), "domain": list(found.shape.domains),
            "expert": np.arange(found.shape.n_experts),
        }  # fmt: skip
        if not by_domain:
            sums_LGE, tokens_LG = sums_LGE.sum(1), tokens_LG.sum(1)
            dims = ("layer", "expert")
            del coords["domain"]
        with np.errstate(invalid="ignore", divide="ignore"):
            values = sums_LGE / tokens_LG[..., None]
        return xr.DataArray(values, dims=dims, coords=coords, name="router_probs")

    def coactivation(self, bank: str | None = None) -> xr.DataArray:
        """Tokens that went to both experts, (layer, expert, other); on the diagonal, to one."""
        import xarray as xr

        found = self.statistics(bank)
        numbers = np.arange(found.shape.n_experts)
        coords = {"layer": list(found.shape.layers), "expert": numbers, "other": numbers}
        values = self._sum(found, "coactivation")
        return xr.DataArray(values, dims=("layer", "expert", "other"), coords=coords, name="tokens")

    def transitions(self, bank: str | None = None) -> xr.DataArray:
        """First choices of consecutive mixture layers, (layer, expert, next): `layer` the first."""
        import xarray as xr

        found = self.statistics(bank)
        numbers = np.arange(found.shape.n_experts)
        coords = {"layer": list(found.shape.layers[:-1]), "expert": numbers, "next": numbers}
        values = self._sum(found, "transitions")
        return xr.DataArray(values, dims=("layer", "expert", "next"), coords=coords, name="tokens")

    def histogram(self, of: Literal["entropy", "margin"], bank: str | None = None) -> xr.DataArray:
        """Tokens by entropy of the router (over log E) or margin, (layer, domain, bin).

        The coordinate `bin` is the lower end of each bin.
        """
        import xarray as xr

        if of not in ("entropy", "margin"):
            raise ValueError(f"of={of!r} must be 'entropy' or 'margin'")
        found = self.statistics(bank)
        values = self._sum(found, of)
        n_bins = values.shape[-1]
        low = (
            np.arange(n_bins) / n_bins
            if of == "entropy"
            else 2.0 ** (-(np.arange(n_bins) + 1) / PER_OCTAVE)
        )
        coords = {
            "layer": list(found.shape.layers),
            "domain": list(found.shape.domains),
            "bin": low,
        }
        return xr.DataArray(values, dims=("layer", "domain", "bin"), coords=coords, name="tokens")

    @property
    def reference(self) -> pd.DataFrame:
        """Of an ingested recording, by layer: how far its experts are those of the same documents
        run here, see `ernie_lab.corpus.agreement`; `attrs` has `n_documents` and `n_tokens`."""
        import pandas as pd

        path = self.path / REFERENCE
        if not path.exists():
            raise CorpusError(
                f"{self.path} was not compared: that takes ingest_routed_experts with a Lab"
            )
        told = json.loads(path.read_text())
        table = pd.DataFrame({name: told[name] for name in ("slots", "sets", "large_margin")})
        table.index = pd.Index(table.index.astype(int), name="layer")
        table.attrs |= {name: told[name] for name in ("n_documents", "n_tokens")}
        return table

    def _sum(self, found: Statistics, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        if name not in found.sums and "ingested" in self.plan:
            raise CorpusError(
                f"{name!r} is not known: {self.plan['ingested']} told expert ids alone. Record "
                "with RecordPlan for it"
            )
        if name not in found.sums:
            raise CorpusError(
                f"{name!r} was not counted (stats={self.plan['stats']}); record again with it"
            )
        values: np.ndarray[Any, np.dtype[np.int64]] = found.sums[name].numpy()
        return values

    @property
    def _rows(self) -> StoredRows:
        shape = self._merged[self.banks[0]].shape
        return StoredRows(
            self._folder, self.units, shape.layers, shape.n_experts, shape.n_chosen,
            self.plan["rows"],
        )  # fmt: skip

    def sql(self, query: str) -> pd.DataFrame:
        """DuckDB over the rows, as the view `tokens`; see `ernie_lab.corpus.rows` for its columns.

        Each slot of a layer is also a column of its own: `l3s0` is the first choice in layer 3.
        """
        return self._rows.sql(query)

    def search(
        self,
        layer: int,
        expert: int,
        *,
        min_weight: float | None = None,
        bank: str | None = None,
        limit: int = 100,
    ) -> pd.DataFrame:
        """Tokens that went to an expert: unit, doc, pos, token, domain, slot and weight, heaviest
        first where weights were recorded; `attrs["n_found"]` counts all of them."""
        return self._rows.search(layer, expert, self._bank(bank), min_weight, limit)

    def sample(self, n_tokens: int, *, bank: str | None = None, seed: int = 0) -> StoredRouting:
        """Documents drawn at random until they have `n_tokens` tokens: a routing that the functions
        of `el.analysis` take in the place of a trace. `sequence` is the document.

        They come from up to 32 units, drawn too, in about equal parts; of a long document that
        lies in several units, the part in a drawn one."""
        return self._rows.sample(n_tokens, self._bank(bank), seed)

    def __repr__(self) -> str:
        found = self._merged
        lines = [
            f"RoutingStore({self.path}): {self.plan['model']}, "
            f"{len(self.units)} units, {len(self._folder.failures())} failed"
        ]
        for bank, one in found.items():
            lines.append(
                f"  {bank} bank: {one.n_tokens:,} tokens x {one.shape.n_chosen} of "
                f"{one.shape.n_experts} experts, {len(one.shape.layers)} layers, "
                f"domains: {', '.join(filter(None, one.shape.domains)) or 'none'}"
            )
        rows = self.plan["rows"]
        if "ingested" in self.plan:
            lines.append(f"  routed by {self.plan['ingested']}: expert ids alone")
        lines.append(f"  rows: {rows or 'none'}; counted: {', '.join(self.plan['stats'])}")
        return "\n".join(lines)
