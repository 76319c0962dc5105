"""What `el.analysis` asks of traces, asked of the counts of a recording."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


def balance_of_store(counts: xr.DataArray, by: str | None, k: int) -> pd.DataFrame:
    """A `balance_by` table: of all tokens, over units, or of each group by itself."""
    import pandas as pd

    from ernie_lab.analysis import balance_of_counts

    layers = counts.layer.values.tolist()
    if by is None:
        by_unit = counts.transpose("unit", "layer", "expert").values
        return balance_of_counts(by_unit, k=k, layers=layers)
    tables = []
    for group in counts[by].values.tolist():
        mine = counts.sel({by: group})
        if mine.any():
            tables.append(balance_of_counts(mine.values, k=k, layers=layers, group=group))
    if not tables:
        raise ValueError(f"no token was routed in any {by}")
    return pd.concat(tables)


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
