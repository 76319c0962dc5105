"""One row per token: which experts it went to in every mixture layer, as Parquet.

Schema `ernie_lab.routing/1`: `unit, doc, pos, token, domain, content, bank`, and for each layer
`e{layer}`: k expert ids in the slots of a trace (best selection score first, which need not be the
largest weight where a correction bias spoke), as fixed binary of k bytes (uint8, or uint16 little
endian where there are more than 256 experts); with `ids+weights` also `w{layer}`, k float16.
Lists of numbers take four to six times the room, and longer to write (scale.md, section 3).
In a vision-language model the ids are those of the token's `bank`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.corpus.folder import SCHEMA
from ernie_lab.corpus.parquet import pyarrow, pyarrow_parquet

# Rows of a group: what a reader must hold at once.
_GROUP = 131_072
_SMALL = ("domain", "content", "bank", "unit")


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Columns of a unit's tokens in corpus order; `ids` and `weights` are `[n k]` by layer."""

    columns: Mapping[str, Any]
    ids: Mapping[int, NDArray[np.int64]]
    weights: Mapping[int, NDArray[np.float32]]


def id_type(n_experts: int) -> str:
    return "<u1" if n_experts <= 256 else "<u2"


def write_rows(
    path: Path, rows: TokenRows, n_experts: int, with_weights: bool, facts: Mapping[str, Any]
) -> None:
    """`facts` go into the file's own metadata, so that a file says what it is by itself."""
    arrow = pyarrow()
    columns = {name: _plain(arrow, name, column) for name, column in rows.columns.items()}
    for layer, ids_NK in rows.ids.items():
        columns[f"e{layer}"] = _packed(arrow, ids_NK.astype(id_type(n_experts)))
        if with_weights:
            columns[f"w{layer}"] = _packed(arrow, rows.weights[layer].astype("<f2"))
    table = arrow.table(columns)
    known = {"schema": SCHEMA, **facts}
    table = table.replace_schema_metadata({"ernie_lab": json.dumps(known)})
    pyarrow_parquet().write_table(
        table, path, compression="zstd", compression_level=3, row_group_size=_GROUP,
        use_dictionary=list(_SMALL),
    )  # fmt: skip


def read_rows(
    path: Path, layers: Sequence[int], n_experts: int, k: int, extra: Sequence[str] = ()
) -> TokenRows:
    """The ids (and weights, where the file has them) of some layers, and further columns."""
    file = pyarrow_parquet().ParquetFile(path)
    there = set(file.schema_arrow.names)
    names = [f"e{layer}" for layer in layers]
    weighted = [f"w{layer}" for layer in layers if f"w{layer}" in there]
    table = file.read(columns=[*extra, *names, *weighted])
    ids = {layer: _unpacked(table[f"e{layer}"], id_type(n_experts), k) for layer in layers}
    weights = {
        int(name[1:]): _unpacked(table[name], "<f2", k).astype(np.float32) for name in weighted
    }
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in extra}
    return TokenRows(columns, {layer: x.astype(np.int64) for layer, x in ids.items()}, weights)


def facts_of(path: Path) -> dict[str, Any]:
    """What `write_rows` was told."""
    metadata = pyarrow_parquet().read_metadata(path).metadata or {}
    return dict(json.loads(metadata.get(b"ernie_lab", b"{}")))


def _plain(arrow: Any, name: str, column: Any) -> Any:
    if name in ("domain", "content", "bank"):
        return arrow.array(list(column), type=arrow.string())
    kinds = {
        "unit": arrow.int32(),
        "doc": arrow.int64(),
        "pos": arrow.int32(),
        "token": arrow.int32(),
    }
    return arrow.array(np.asarray(column), type=kinds[name])


def _packed(arrow: Any, values_NK: NDArray[Any]) -> Any:
    n, k = values_NK.shape
    kind = arrow.binary(k * values_NK.dtype.itemsize)
    data = arrow.py_buffer(np.ascontiguousarray(values_NK).tobytes())
    return arrow.FixedSizeBinaryArray.from_buffers(kind, n, [None, data])


def _unpacked(column: Any, dtype: str, k: int) -> NDArray[Any]:
    pieces = []
    for chunk in column.chunks:
        size, start = chunk.type.byte_width, chunk.offset
        data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
        pieces.append(data[start * size : (start + len(chunk)) * size])
    joined = np.concatenate(pieces) if pieces else np.zeros(0, np.uint8)
    return joined.view(np.dtype(dtype)).reshape(-1, k)
