"""A trace on disk: a folder with `values.safetensors` and `trace.json`, no pickle.

The folder is written beside its place and renamed into it, so it is there whole or not at all.
bfloat16 stays bfloat16. JSON is ASCII, so any token text survives, lone surrogates included.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_lab.inputs.media import Grid
from ernie_lab.sites import Site
from ernie_lab.trace.folders import not_there, replacing, require_replaceable
from ernie_lab.trace.pictures import Picture, read_only
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorded import Part, Recorded
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.tokens import Tokens

if TYPE_CHECKING:
    from ernie_lab.trace.trace import Trace

# 1: without `edited`. 2: of text models alone: no pictures, no `bank` of tokens, one router.
SCHEMA = 3
_PICTURE = ("sequence", "start", "kind", "grid", "original_size", "timestamps", "source")
VALUES, HEADER = "values.safetensors", "trace.json"
_WHAT = "a saved trace"


class TraceFileError(ValueError):
    """A trace folder that is damaged, incomplete or from a newer version."""


def save(trace: Trace, folder: Path, overwrite: bool) -> Path:
    folder = folder.expanduser()
    require_replaceable(folder, _WHAT, HEADER, (VALUES, HEADER))
    if (folder / HEADER).exists() and not overwrite:
        raise FileExistsError(f"{folder} exists; choose another name or pass overwrite=True")
    with replacing(folder) as new:
        header, tensors = _packed(trace)
        save_file(tensors, new / VALUES)
        header["sha256"] = _sha256(new / VALUES)
        (new / HEADER).write_text(json.dumps(header, allow_nan=False), encoding="ascii")
    return folder


def load(folder: Path) -> dict[str, Any]:
    """The fields of the `Trace` that was saved there."""
    folder = folder.expanduser()
    if not (folder / HEADER).is_file():
        raise not_there(folder, _WHAT, HEADER, "el.Trace.load", "trace.save(folder)")
    try:
        header = json.loads((folder / HEADER).read_text(encoding="ascii"))
    except ValueError as error:
        raise TraceFileError(f"{folder / HEADER} is damaged: {error}") from error
    _require_schema(header, folder)
    if not (folder / VALUES).is_file():
        raise TraceFileError(f"{folder} is incomplete: it has no {VALUES}")
    if _sha256(folder / VALUES) != header.get("sha256"):
        raise TraceFileError(
            f"{folder / VALUES} is damaged or belongs to another trace: its SHA-256 is not the "
            f"one in {HEADER}"
        )
    try:
        return _unpacked(header, load_file(folder / VALUES))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise TraceFileError(f"{folder} is damaged: {type(error).__name__}: {error}") from error


def _require_schema(header: Any, folder: Path) -> None:
    if not isinstance(header, dict) or header.get("format") != "ernie_lab trace":
        raise TraceFileError(f"{folder / HEADER} is not the header of a trace")
    schema = header.get("schema")
    if not isinstance(schema, int) or schema < 1:
        raise TraceFileError(f"{folder / HEADER} has no valid schema version: {schema!r}")
    if schema > SCHEMA:
        raise TraceFileError(
            f"{folder} has schema {schema}, this ernie_lab reads up to {SCHEMA}: upgrade it"
        )


def _packed(trace: Trace) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {"rows": _own(trace.rows_N)}
    # Most sites have the same rows; they are written once.
    indices = {trace.rows_N.numpy().tobytes(): "rows"}
    listed = []
    for path, kept in trace.values.items():
        parts = []
        for sequence, part in kept.parts.items():
            name = path if sequence is None else f"{path}@{sequence}"
            index = part.rows_N.numpy().tobytes()
            if index not in indices:
                indices[index] = f"rows.{len(indices)}"
                tensors[indices[index]] = _own(part.rows_N)
            tensors[name] = _own(part.values)
            parts.append({"sequence": sequence, "values": name, "rows": indices[index]})
        listed.append({"path": path, "heads": kept.heads, "parts": parts})
    header: dict[str, Any] = {
        "format": "ernie_lab trace",
        "schema": SCHEMA,
        "provenance": trace.provenance.as_json(),
        "keep": trace.keep,
        "edited": trace.edited,
        "tokens": trace.context.columns(),
        "sites": [
            [site.path, site.dims, site.meaning, site.dtype, site.on_demand]
            for site in trace.known_sites
        ],
        "values": listed,
        "routers": {},
        "media": [],
    }
    for bank, routers in trace.routers.items():
        header["routers"][bank] = {
            "n_experts": routers.n_experts,
            "n_chosen": routers.n_chosen,
            "layers": sorted(routers.correction_bias),
        }
        for layer, bias_E in routers.correction_bias.items():
            tensors[f"correction_bias.{bank}.{layer}"] = _own(bias_E)
    for number, picture in enumerate(trace.media):
        facts = {name: getattr(picture, name) for name in _PICTURE}
        header["media"].append(facts | {"has_pixels": picture.frames is not None})
        if picture.frames is not None:
            tensors[f"media.{number}"] = torch.from_numpy(picture.frames.copy())
    return header, tensors


def _unpacked(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    sites = tuple(Site(*fields) for fields in header["sites"])
    by_path = {site.path: site for site in sites}
    columns = {name: tuple(column) for name, column in header["tokens"].items()}
    # Before schema 3 every model was a text model.
    columns.setdefault("bank", ("text",) * len(columns["id"]))
    tokens = Tokens(**columns)
    values = {}
    for kept in header["values"]:
        parts = {
            part["sequence"]: Part(tensors[part["values"]], tensors[part["rows"]])
            for part in kept["parts"]
        }
        heads = None if kept["heads"] is None else tuple(kept["heads"])
        site = by_path[kept["path"]]
        values[site.path] = Recorded(site, parts, heads)
    return {
        "context": tokens,
        "rows_N": tensors["rows"],
        "values": values,
        "known_sites": sites,
        "routers": _routers(header, tensors),
        "provenance": Provenance(**header["provenance"]),
        "keep": header["keep"],
        "edited": _edited(header),
        "media": _media(header, tensors),
    }


def _routers(header: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Routers]:
    by_bank, name = header["routers"], "correction_bias.{bank}.{layer}"
    if header["schema"] < 3:
        by_bank, name = ({"text": by_bank} if by_bank else {}), "correction_bias.{layer}"
    return {
        bank: Routers(
            facts["n_experts"],
            facts["n_chosen"],
            {layer: tensors[name.format(bank=bank, layer=layer)] for layer in facts["layers"]},
        )
        for bank, facts in by_bank.items()
    }


def _media(header: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Picture, ...]:
    pictures = []
    for number, facts in enumerate(header.get("media", [])):
        size = facts["original_size"]
        pictures.append(
            Picture(
                facts["sequence"],
                facts["start"],
                facts["kind"],
                Grid(*facts["grid"]),
                read_only(tensors[f"media.{number}"].numpy()) if facts["has_pixels"] else None,
                None if size is None else (size[0], size[1]),
                tuple(facts["timestamps"]),
                facts["source"],
            )
        )
    return tuple(pictures)


def _edited(header: dict[str, Any]) -> tuple[str, ...]:
    if header["schema"] > 1:
        return tuple(header["edited"])
    # Schema 1 tells that there were edits, but not where: any site may have been changed.
    edits = header["provenance"].get("details", {}).get("edits")
    return tuple(fields[0] for fields in header["sites"]) if edits else ()


def _own(x: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses tensors that share memory."""
    return torch.empty(x.shape, dtype=x.dtype).copy_(x.detach())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
