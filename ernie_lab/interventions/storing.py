"""Edits as JSON, and back. Tensors go beside it, in safetensors, under their SHA-256."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_lab.interventions.donors import Donor
from ernie_lab.interventions.experts import ExpertSwap, OtherOutput, WithoutWeight
from ernie_lab.interventions.general import Add, Mean, Patch, Resample, Scale
from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.knockout import Knockout
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.replay import Replay
from ernie_lab.interventions.routers import (
    RandomRouter,
    ShareRouter,
    TopK,
    WithoutCorrectionBias,
)
from ernie_lab.interventions.routing import CrossBank, Forbid, Force, Steer, Temperature, Uniform
from ernie_lab.interventions.shared import (
    PermuteNeurons,
    RandomDirection,
    SharedSwap,
    SharedTransplant,
)
from ernie_lab.interventions.targets import Target
from ernie_lab.interventions.values import Values
from ernie_lab.interventions.where import At, AtPart, Where
from ernie_lab.trace.positions import Positions

FORMAT, SCHEMA = "ernie_lab edits", 1
JSON, TENSORS = "edits.json", "edits.safetensors"

_EDITS = (
    *(At, AtPart, Scale, Mean, Resample, Patch, Add, Knockout),
    *(SharedSwap, SharedTransplant, PermuteNeurons, RandomDirection),
    *(WithoutWeight, OtherOutput, ExpertSwap),
    *(Forbid, Force, Steer, Temperature, Uniform, CrossBank, Replay),
    *(TopK, WithoutCorrectionBias, RandomRouter, ShareRouter),
)
KINDS: Mapping[str, type[Any]] = {cls.kind: cls for cls in _EDITS} | {
    "tokens": Where,
    "positions": Positions,
    "target": Target,
}
_NAMES = {cls: name for name, cls in KINDS.items()}


def to_json(edits: Edit | Iterable[Edit]) -> str:
    """The edits as JSON. Tensors and donors stand in it by SHA-256; `save` writes the tensors."""
    several = [edits] if isinstance(edits, Edit) else list(edits)
    content = {"format": FORMAT, "schema": SCHEMA, "edits": [_packed(one) for one in several]}
    return json.dumps(content, indent=1, allow_nan=False)


def from_json(
    text: str, *, values: Iterable[Values] = (), labs: Sequence[Any] = ()
) -> tuple[Edit, ...]:
    """The edits of `to_json`. `values` and `labs` (donors) are found by their SHA-256."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise EditError("this is no JSON of edits: it was not written by el.edits")
    if content["schema"] > SCHEMA:
        raise EditError(f"these edits have schema {content['schema']}, this ernie_lab reads 1")
    known = {one.sha256: one for one in values}
    donors = [Donor.of(lab) for lab in labs]
    return tuple(_unpacked(one, known, donors) for one in content["edits"])


def save(edits: Edit | Iterable[Edit], folder: str | Path) -> Path:
    """Write `edits.json` and, if there are any, their tensors into a folder."""
    folder = Path(folder).expanduser()
    several = [edits] if isinstance(edits, Edit) else list(edits)
    text = to_json(several)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for one in _values_in(several):
        for name, x in one.tensors.items():
            tensors[f"{one.sha256}/{name}"] = x.detach().cpu().clone().contiguous()
    if tensors:
        save_file(tensors, folder / TENSORS)
    (folder / JSON).write_text(text, encoding="utf-8")
    return folder


def load(folder: str | Path, *, labs: Sequence[Any] = ()) -> tuple[Edit, ...]:
    """The edits of `save`. A transplant needs its donor among `labs`."""
    folder = Path(folder).expanduser()
    by_digest: dict[str, dict[str, Tensor]] = {}
    if (folder / TENSORS).is_file():
        for key, x in load_file(folder / TENSORS).items():
            digest, _, name = key.partition("/")
            by_digest.setdefault(digest, {})[name] = x
    values = [Values(tensors, "loaded") for tensors in by_digest.values()]
    for digest, one in zip(by_digest, values, strict=True):
        if one.sha256 != digest:
            raise EditError(f"{folder / TENSORS} is damaged: {digest[:8]} holds other numbers")
    text = (folder / JSON).read_text(encoding="utf-8")
    return from_json(text, values=values, labs=labs)


def _packed(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple):
        return [_packed(one) for one in value]
    if isinstance(value, Values):
        return {"values": value.sha256, "source": value.source}
    if isinstance(value, Donor):
        return {"donor": value.sha256, "name": value.name}
    if type(value) in _NAMES:
        fields = {f.name: _packed(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"kind": _NAMES[type(value)], **fields}
    raise EditError(
        f"{value!r} cannot be saved: a function is no value. Ready-made edits (el.edits, el.shared,"
        " el.experts, el.routing) can"
    )


def _unpacked(value: Any, known: Mapping[str, Values], donors: Sequence[Donor]) -> Any:
    if isinstance(value, list):
        return tuple(_unpacked(one, known, donors) for one in value)
    if not isinstance(value, dict):
        return value
    if "values" in value and "kind" not in value:
        if value["values"] not in known:
            raise EditError(
                f"the tensors {value['values'][:8]} ({value['source']}) are not given; use "
                "el.edits.load on the folder of el.edits.save, or pass values="
            )
        return Values(known[value["values"]].tensors, value["source"])
    if "donor" in value and "kind" not in value:
        found = [donor for donor in donors if donor.sha256 == value["donor"]]
        if not found:
            raise EditError(
                f"the donor {value['name']} is not among labs=; load it, and pass labs=[donor]"
            )
        return found[0]
    if value.get("kind") not in KINDS:
        raise EditError(f"unknown edit {value.get('kind')!r}; known: {', '.join(KINDS)}")
    fields = {name: _unpacked(v, known, donors) for name, v in value.items() if name != "kind"}
    return KINDS[value["kind"]](**fields)


def _values_in(value: Any) -> list[Values]:
    if isinstance(value, Values):
        return [value]
    if isinstance(value, list | tuple):
        return [found for one in value for found in _values_in(one)]
    if type(value) in _NAMES:
        return [
            found
            for field in dataclasses.fields(value)
            for found in _values_in(getattr(value, field.name))
        ]
    return []
