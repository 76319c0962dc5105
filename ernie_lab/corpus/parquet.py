"""pyarrow, which the extra `tables` brings, at first use."""

from __future__ import annotations

from typing import Any


def pyarrow_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "rows are written and read with pyarrow: pip install 'ernie-lab[tables]'; statistics "
            "alone (rows=None) need nothing more"
        ) from None
    return pyarrow.parquet


def pyarrow() -> Any:
    pyarrow_parquet()
    import pyarrow

    return pyarrow


def duckdb() -> Any:
    try:
        import duckdb
    except ImportError:
        raise ImportError("SQL needs duckdb: pip install 'ernie-lab[tables]'") from None
    return duckdb
