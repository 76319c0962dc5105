"""Questions about single tokens of a recording: from its Parquet rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.corpus.folder import CorpusError, Folder
from ernie_lab.corpus.parquet import duckdb, pyarrow
from ernie_lab.corpus.rows import TokenRows, facts_of, read_rows

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

_SEARCHED = ("unit", "doc", "pos", "token", "domain", "bank")
# Units that a sample is drawn from.
_SPREAD = 32
_SAMPLED = ("doc", "pos", "token", "domain", "content", "bank")


@dataclass(frozen=True, slots=True)
class StoredRows:
    """The row files of a recording, and how many experts their bytes stand for."""

    folder: Folder
    units: tuple[int, ...]
    layers: tuple[int, ...]
    n_experts: int
    n_chosen: int
    kind: str | None

    def numbers(self) -> tuple[int, ...]:
        """The units that have rows."""
        if self.kind is None:
            raise CorpusError(
                "this recording has statistics alone; record again with rows='ids' for questions "
                "about single tokens"
            )
        return self.units

    def require_weights(self) -> None:
        if self.kind != "ids+weights":
            raise CorpusError("weights were not recorded; record again with rows='ids+weights'")

    def read(self, number: int, layers: Sequence[int], columns: Sequence[str]) -> TokenRows:
        path = self.folder.rows(number)
        try:
            return read_rows(path, layers, self.n_experts, self.n_chosen, columns)
        except (pyarrow().ArrowInvalid, OSError) as error:
            raise self.folder.damaged(path, error) from error

    def sql(self, query: str) -> pd.DataFrame:
        engine = duckdb()
        connection = engine.connect()
        try:
            connection.execute(f"create view tokens as {self._view()}")
            answer: pd.DataFrame = connection.execute(query).df()
            return answer
        except engine.Error:
            self._require_whole()  # the query is not to blame for a file
            raise
        finally:
            connection.close()

    def _require_whole(self) -> None:
        for number in self.numbers():
            path = self.folder.rows(number)
            try:
                facts_of(path)
            except (pyarrow().ArrowInvalid, OSError) as error:
                raise self.folder.damaged(path, error) from error

    def _view(self) -> str:
        files = [str(self.folder.rows(number)) for number in self.numbers()]
        names = ", ".join("'" + name.replace("'", "''") + "'" for name in files)
        width = 1 if self.n_experts <= 256 else 2
        slots = [
            f"{_number(f'e{layer}', slot * width, width)} as l{layer}s{slot}"
            for layer in self.layers
            for slot in range(self.n_chosen)
        ]
        return f"select *, {', '.join(slots)} from read_parquet([{names}])"

    def search(
        self, layer: int, expert: int, bank: str, min_weight: float | None, limit: int
    ) -> pd.DataFrame:
        import pandas as pd

        if layer not in self.layers:
            raise ValueError(f"layer={layer}: this recording has layers {list(self.layers)}")
        if not 0 <= expert < self.n_experts:
            raise ValueError(f"expert={expert} must be in 0..{self.n_experts - 1}")
        if min_weight is not None:
            self.require_weights()
        weighed = self.kind == "ids+weights"
        best, n_found = pd.DataFrame(), 0
        for number in self.numbers():
            rows = self.read(number, [layer], _SEARCHED)
            hit_N, slot_N = np.nonzero(rows.ids[layer] == expert)
            table = pd.DataFrame({name: rows.columns[name][hit_N] for name in _SEARCHED})
            table["slot"] = slot_N
            table["weight"] = rows.weights[layer][hit_N, slot_N] if rows.weights else np.nan
            kept = table["bank"] == bank
            found = table[kept if min_weight is None else kept & (table["weight"] >= min_weight)]
            n_found += len(found)
            joined = found if best.empty else pd.concat([best, found], ignore_index=True)
            best = joined.sort_values(
                "weight" if weighed else "slot", ascending=not weighed, kind="stable"
            ).head(limit)
        shown = best.reset_index(drop=True)
        shown.attrs["n_found"] = n_found
        return shown

    def sample(self, n_tokens: int, bank: str, seed: int) -> StoredRouting:
        import xarray as xr

        pieces = list(self._drawn(n_tokens, bank, seed))
        if not pieces:
            raise CorpusError(f"no token of the {bank} bank is in {self.folder.path}")
        columns = {
            name: np.concatenate([piece.columns[name] for piece in pieces]) for name in _SAMPLED
        }
        names = {"sequence": "doc", "pos": "pos", "id": "token"}
        names |= {"domain": "domain", "content": "content"}
        coords: dict[str, Any] = {name: ("token", columns[of]) for name, of in names.items()}
        coords |= {"layer": list(self.layers), "slot": np.arange(self.n_chosen)}

        def array(name: str, parts: Sequence[dict[int, NDArray[Any]]]) -> xr.DataArray:
            values = [np.concatenate([part[layer] for part in parts]) for layer in self.layers]
            dims = ("layer", "token", "slot")
            return xr.DataArray(np.stack(values), dims=dims, coords=coords, name=name)

        ids = array("expert_ids", [dict(piece.ids) for piece in pieces])
        weights = None
        if self.kind == "ids+weights":
            weights = array("expert_weights", [dict(piece.weights) for piece in pieces])
        return StoredRouting(ids, self.n_experts, self.n_chosen, weights)

    def _drawn(self, n_tokens: int, bank: str, seed: int) -> Iterator[TokenRows]:
        """Documents in random order, units too, until there are enough tokens."""
        rng = np.random.default_rng(seed)
        numbers = rng.permutation(self.numbers())
        left, share = n_tokens, -(-n_tokens // min(len(numbers), _SPREAD))
        for number in numbers:
            if left <= 0:
                return
            rows = self.read(int(number), self.layers, _SAMPLED)
            in_bank = rows.columns["bank"] == bank
            # A unit may hold a single domain, so no unit gives all of them.
            enough = max(left - share, 0)
            for doc in rng.permutation(np.unique(rows.columns["doc"][in_bank])):
                if left <= enough:
                    break
                mine = in_bank & (rows.columns["doc"] == doc)
                left -= int(mine.sum())
                yield TokenRows(
                    {name: column[mine] for name, column in rows.columns.items()},
                    {layer: ids[mine] for layer, ids in rows.ids.items()},
                    {layer: weights[mine] for layer, weights in rows.weights.items()},
                )


@dataclass(frozen=True, slots=True, eq=False)
class StoredRouting:
    """Rows of a recording as arrays (layer, token, slot), like the ledger of a trace.

    Logits, probabilities and scores of single tokens are in no recording: what needs them
    refuses.
    """

    expert_ids: xr.DataArray
    n_experts: int
    n_chosen: int
    _weights: xr.DataArray | None = field(default=None, repr=False)

    @property
    def expert_weights(self) -> xr.DataArray:
        if self._weights is None:
            raise CorpusError("weights were not recorded; record again with rows='ids+weights'")
        return self._weights

    def _absent(self) -> Any:
        raise CorpusError(
            "a recording of a corpus has no logits and no probabilities of single tokens; run "
            "some of its documents with keep='routing'"
        )

    router_logits = router_probs = selection_scores = margin = property(_absent)


def _number(column: str, start: int, width: int) -> str:
    """SQL for the unsigned number of `width` bytes, little endian, from this byte of a blob."""
    digits = [f"substr(hex({column}), {2 * (start + i) + 1}, 2)" for i in reversed(range(width))]
    return f"cast('0x' || {' || '.join(digits)} as integer)"
