"""What `el.analysis` asks of traces, asked of the counts of a recording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


# Units are put together into no more blocks than this: their counts are held at once.
_MOST_BLOCKS = 256
# With fewer, intervals held the true value in too few simulations (`el.analysis.balance_by`).
FEWEST_BLOCKS = 8


def blocks_of(documents: Sequence[tuple[int, int]]) -> list[range]:
    """Neighbouring units that are drawn as one, from the (first, last) document of each unit.

    A document that fills a unit by itself and goes on in the next is no two independent texts, so
    its units are one block. One that merely lies across a border leaves its units apart.
    """
    found: list[range] = []
    for number, (first, last) in enumerate(documents):
        before = documents[number - 1] if number else None
        if before is not None and before[1] == first and first in (last, before[0]):
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    each = -(-len(found) // _MOST_BLOCKS)
    starts = range(0, len(found), each)
    return [range(found[i].start, found[min(i + each, len(found)) - 1].stop) for i in starts]


def balance_of_store(counts: xr.DataArray, by: str | None, k: int) -> pd.DataFrame:
    """A `balance_by` table of counts (block, layer, …, expert): of all, or of each group by itself.

    `attrs["intervals"]` says what they cover, or why there are none.
    """
    import pandas as pd

    from ernie_lab.analysis import balance_of_counts

    layers, tables = counts.layer.values.tolist(), []
    groups = ["all"] if by is None else counts[by].values.tolist()
    for group in groups:
        mine = counts if by is None else counts.sel({by: group})
        values = mine.transpose("block", "layer", "expert").values
        values = values[values.any((1, 2))]
        if len(values):
            table = balance_of_counts(values, k=k, layers=layers, group=group)
            few = table["n_documents"] < FEWEST_BLOCKS
            ends = [name for name in table if str(name).endswith(("_low", "_high"))]
            table.loc[few, ends] = np.nan
            tables.append(table)
    if not tables:
        raise ValueError(f"no token was routed in any {by}")
    found = pd.concat(tables)
    names = {str(name): str(name).replace("document", "block") for name in found}
    found = found.rename(columns=names)
    n_blocks = counts.sizes["block"]
    found.attrs["intervals"] = (
        f"95 %, {n_blocks} blocks of neighbouring documents drawn with replacement"
        + ("" if by is None else f"; NaN for a {by} that fewer than {FEWEST_BLOCKS} of them have")
        if n_blocks >= FEWEST_BLOCKS
        else f"none: {n_blocks} blocks of documents, and {FEWEST_BLOCKS} are needed. A recording "
        "with smaller unit_tokens has more"
    )
    return found


def information_of_store(counts: xr.DataArray, by: str) -> pd.DataFrame:
    """By layer: `bits` between expert and group, and the groups' own `label_bits`."""
    import pandas as pd

    from ernie_lab.analysis import information_of_counts

    rows: list[dict[str, Any]] = []
    for layer in counts.layer.values:
        table = counts.sel(layer=layer).transpose(by, "expert").values
        share = table.sum(1) / table.sum()
        entropy = -(share[share > 0] * np.log2(share[share > 0])).sum()
        rows.append({"bits": information_of_counts(table), "label_bits": float(entropy)})
    index = pd.Index(counts.layer.values, name="layer")
    return pd.DataFrame(rows, index=index)


def domain_load_of_store(counts: xr.DataArray, k: int) -> xr.Dataset:
    """As `domain_specialisation` returns it, `low` and `high` NaN."""
    import xarray as xr

    tokens = counts.isel(layer=0).sum("expert").rename(domain="label") // k
    named = counts.rename(domain="label")
    share = (named / (named.sum("expert") / k)).transpose("layer", "expert", "label")
    unknown = xr.full_like(share, np.nan)
    found = xr.Dataset(
        {"share": share, "low": unknown, "high": unknown, "n_tokens": tokens.drop_vars("layer")}
    )
    n_experts = counts.sizes["expert"]
    found.attrs = {"k": k, "fair_share": k / n_experts, "n_documents": 0}
    return found
