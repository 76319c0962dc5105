"""Data frames on disk: numbers in `tables.npz`, words in `tables.json`; no pickle, no engine.

Written beside their place and renamed into it, so that they are there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_lab.trace.folders import (
    TABLES,
    TABLES_OPEN,
    holds,
    not_there,
    replacing,
    require_replaceable,
)

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
_NUMBERS, _HEADER = "tables.npz", TABLES


class TablesFileError(ValueError):
    """A folder of tables that is damaged, incomplete or from a newer version."""


def save_tables(
    folder: Path, kind: str, tables: Mapping[str, pd.DataFrame], facts: Mapping[str, Any]
) -> Path:
    """`facts` must be JSON. A folder that is not of this `kind`, or has other files too, is not
    overwritten."""
    folder = folder.expanduser()
    require_replaceable(folder, f"a saved {kind}", _HEADER, (_NUMBERS, _HEADER))
    if (folder / _HEADER).exists() and _header(folder, kind) is None:
        raise FileExistsError(f"{folder} {holds(folder)}, no {kind}; choose another name")
    columns: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, table in tables.items():
        columns[name] = {"index": list(table.index.names), "columns": []}
        plain = table.reset_index() if table.index.names != [None] else table
        for place, (column, values) in enumerate(plain.items()):
            words = values.dtype.kind not in "iufb" if hasattr(values.dtype, "kind") else True
            entry: dict[str, Any] = {"name": column, "words": None}
            if words:
                entry["words"] = [None if _missing(x) else str(x) for x in values]
            else:
                numbers[f"{name}/{place}"] = values.to_numpy()
            columns[name]["columns"].append(entry)
    header = {"format": f"ernie_lab {kind}", "schema": SCHEMA, "facts": facts, "tables": columns}
    with replacing(folder) as new:
        np.savez_compressed(new / _NUMBERS, **numbers)
        (new / _HEADER).write_text(json.dumps(header), encoding="ascii")
    return folder


def load_tables(folder: Path, kind: str) -> tuple[dict[str, pd.DataFrame], dict[str, Any]]:
    """The tables and the facts of `save_tables`."""
    import pandas as pd

    folder = folder.expanduser()
    header = _header(folder, kind)
    if header is None:
        opens = TABLES_OPEN.get(kind, "load")
        raise not_there(folder, f"a saved {kind}", _HEADER, opens, "comparison.save(folder)")
    if header["schema"] > SCHEMA:
        raise TablesFileError(
            f"{folder} has schema {header['schema']}, this ernie_lab reads up to {SCHEMA}: "
            "upgrade it"
        )
    tables = {}
    try:
        with np.load(folder / _NUMBERS, allow_pickle=False) as numbers:
            for name, known in header["tables"].items():
                data = {
                    column["name"]: pd.Series(column["words"], dtype=object)
                    if column["words"] is not None
                    else numbers[f"{name}/{place}"]
                    for place, column in enumerate(known["columns"])
                }
                table = pd.DataFrame(data)
                named = known["index"] != [None]
                tables[name] = table.set_index(known["index"]) if named else table
    except (OSError, KeyError, ValueError) as error:
        raise TablesFileError(f"{folder} is damaged: {type(error).__name__}: {error}") from error
    return tables, header["facts"]


def _header(folder: Path, kind: str) -> dict[str, Any] | None:
    try:
        header = json.loads((folder / _HEADER).read_text(encoding="ascii"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise TablesFileError(f"{folder / _HEADER} is damaged: {error}") from error
    return header if header.get("format") == f"ernie_lab {kind}" else None


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))
