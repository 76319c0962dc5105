"""One unit of a corpus, recorded: a pure function of model and unit, and its commit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.corpus.counting import CountingTap, Places
from ernie_lab.corpus.folder import Folder, committed
from ernie_lab.corpus.rows import TokenRows, write_rows
from ernie_lab.corpus.statistics import CONTENT, Shape, Statistics
from ernie_lab.corpus.units import Unit, Window
from ernie_lab.inference.prefill import bound, prefill, prefill_step
from ernie_lab.inputs import pad_batch
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.edits import Edit, EditTap
from ernie_lab.lab import Lab
from ernie_lab.sites import all_sites


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to record of each unit; all of it is in the plan."""

    statistics: tuple[str, ...]
    rows: str | None
    batch_tokens: int
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """A unit's statistics by bank, its rows if wanted, and what an edit did: (fired, changed)."""

    statistics: Mapping[str, Statistics]
    rows: TokenRows | None
    edits: tuple[tuple[int, int], ...]


def shapes(lab: Lab, domains: Sequence[str]) -> dict[str, Shape]:
    """What each bank's statistics look like; raises for a dense model."""
    config = lab.config
    text = config.decoder
    if text.moe is None:
        raise ValueError(f"{lab.model_id} is dense: it has no experts, so there is no routing")
    router = text.moe.router
    shape = Shape(
        text.moe.layers, router.n_experts, router.n_chosen, text.vocab_size, tuple(domains)
    )
    return dict.fromkeys(("text",) if isinstance(config, TextConfig) else BANKS, shape)


@torch.no_grad()
def run_unit(lab: Lab, unit: Unit, wanted: Wanted) -> Recorded:
    """The routing of every token of a unit. Nothing is written, and nothing is left on the model.

    Windows of like length are batched; a window never sees another.
    """
    counted = {
        bank: Statistics.empty(shape, wanted.statistics, lab.device)
        for bank, shape in shapes(lab, unit.domains).items()
    }
    collected: dict[int, _Collected] = {}
    done = [[0, 0] for _ in wanted.edits]
    for members in batches(unit.windows, wanted.batch_tokens):
        windows = [unit.windows[i] for i in members]
        tap, edits = _run_batch(lab, windows, unit.domains, counted, wanted)
        for total, count in zip(done, edits, strict=True):
            total[0] += count.n_fired
            total[1] += count.n_changed
        if wanted.rows is not None:
            _collect(tap, windows, members, collected)
    rows = None if wanted.rows is None else _rows(unit, collected)
    statistics = {
        bank: Statistics(one.shape, {name: x.cpu() for name, x in one.sums.items()})
        for bank, one in counted.items()
    }
    return Recorded(statistics, rows, tuple((fired, changed) for fired, changed in done))


def batches(windows: Sequence[Window], batch_tokens: int) -> list[list[int]]:
    """Numbers of windows, long ones first, at most `batch_tokens` padded tokens together."""
    order = sorted(range(len(windows)), key=lambda i: (-len(windows[i].ids), i))
    found: list[list[int]] = []
    longest = 0
    for i in order:
        if found and (len(found[-1]) + 1) * longest <= batch_tokens:
            found[-1].append(i)
        else:
            found.append([i])
            longest = len(windows[i].ids)
    return found


def _run_batch(
    lab: Lab,
    windows: Sequence[Window],
    domains: Sequence[str],
    counted: Mapping[str, Statistics],
    wanted: Wanted,
) -> tuple[CountingTap, Any]:
    config = lab.config
    visual: dict[str, Any] = {}
    if not isinstance(config, TextConfig):
        media = [window.media for window in windows]
        visual = {"media": media, "ids": config.ids, "positions": lab.positions}
    batch = pad_batch(
        [window.ids for window in windows],
        pad_id=config.decoder.ids.pad or 0,
        vocab_size=config.decoder.vocab_size,
        device=lab.device,
        **visual,
    )
    places = Places.of(batch, windows, domains)
    counting = CountingTap(counted, places, tuple(batch.mask.shape), wanted.rows is not None)  # type: ignore[arg-type]
    tap = EditTap.of(wanted.edits, all_sites(lab.model), counting, lab.model)
    prefill(tap.model, batch, bound(tap if wanted.edits else counting, prefill_step(batch)))
    return counting, tap.counts


@dataclass(frozen=True, slots=True, eq=False)
class _Collected:
    """Of one window: ids and weights `[n k]` by layer, and what its tokens are."""

    content: list[str]
    ids: dict[int, Any]
    weights: dict[int, Any]


def _collect(
    tap: CountingTap,
    windows: Sequence[Window],
    members: Sequence[int],
    into: dict[int, _Collected],
) -> None:
    """The rows of each window, without padding (which is on the left)."""
    grids = {
        layer: tuple(x.view(*tap.shape, -1).cpu().numpy() for x in chosen)
        for layer, chosen in tap.chosen.items()
    }
    for row, (window, member) in enumerate(zip(windows, members, strict=True)):
        n = len(window.ids)
        ids = {layer: ids_BSK[row, -n:] for layer, (ids_BSK, _) in grids.items()}
        weights = {layer: weights_BSK[row, -n:] for layer, (_, weights_BSK) in grids.items()}
        into[member] = _Collected(tap.places.content[row], ids, weights)


def _rows(unit: Unit, collected: Mapping[int, _Collected]) -> TokenRows:
    """All windows' rows in corpus order."""
    windows = unit.windows
    parts = [collected[i] for i in range(len(windows))]
    content = [kind for part in parts for kind in part.content]
    return TokenRows(
        columns_of(unit, content),
        {layer: np.concatenate([part.ids[layer] for part in parts]) for layer in parts[0].ids},
        {layer: np.concatenate([part.weights[layer] for part in parts]) for layer in parts[0].ids},
    )


def columns_of(unit: Unit, content: Sequence[str]) -> dict[str, Any]:
    """Of every token of a unit: where it stands, and what it is."""
    windows = unit.windows
    return {
        "unit": np.full(unit.n_tokens, unit.number),
        "doc": [window.doc for window in windows for _ in window.ids],
        "pos": [window.start + i for window in windows for i in range(len(window.ids))],
        "token": [token for window in windows for token in window.ids],
        "domain": [window.domain for window in windows for _ in window.ids],
        "content": content,
        "bank": ["text" if kind == "text" else "vision" for kind in content],
    }


def commit_unit(
    folder: Folder, unit: Unit, recorded: Recorded, wanted: Wanted, seconds: float
) -> None:
    """Rows first, statistics last: only with these does the unit count."""
    if recorded.rows is not None:
        shape = next(iter(recorded.statistics.values())).shape
        facts = {"plan": "../plan.json", "k": shape.n_chosen, "n_experts": shape.n_experts,
                 "layers": list(shape.layers)}  # fmt: skip
        with committed(folder.rows(unit.number)) as scratch:
            write_rows(scratch, recorded.rows, shape.n_experts, wanted.rows == "ids+weights", facts)
    with committed(folder.statistics(unit.number)) as scratch:
        _write_statistics(scratch, unit, recorded, seconds)


def _write_statistics(path: Path, unit: Unit, recorded: Recorded, seconds: float) -> None:
    tensors: dict[str, Tensor] = {}
    for bank, one in recorded.statistics.items():
        for name, x in one.sums.items():
            if name == "vocabulary":  # nearly all zeros
                place = x.flatten().nonzero().squeeze(1)
                tensors |= {
                    f"{bank}/{name}/place": place,
                    f"{bank}/{name}/count": x.flatten()[place],
                }
            else:
                tensors[f"{bank}/{name}"] = _narrow(x)
    shape = next(iter(recorded.statistics.values())).shape
    facts = {
        "digest": unit.digest,
        "n_tokens": unit.n_tokens,
        "n_windows": len(unit.windows),
        "documents": [unit.windows[0].doc, unit.windows[-1].doc],
        "seconds": round(seconds, 3),
        "edits": recorded.edits,
        "layers": shape.layers,
        "n_experts": shape.n_experts,
        "n_chosen": shape.n_chosen,
        "vocab_size": shape.vocab_size,
        "domains": shape.domains,
        "content": CONTENT,
        "written": time.time(),
    }
    save_file(tensors, path, metadata={"ernie_lab": json.dumps(facts)})


def _narrow(x: Tensor) -> Tensor:
    """In the smallest integers that hold it: a unit's counts need an eighth to a half of int64."""
    low, high = (int(x.min()), int(x.max())) if x.numel() else (0, 0)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        bounds = torch.iinfo(dtype)
        if bounds.min <= low and high <= bounds.max:
            return x.to(dtype)
    return x


def read_facts(folder: Folder, number: int) -> dict[str, Any]:
    """What stands beside a unit's statistics."""
    with _opened(folder, number) as (_, facts):
        return facts


def read_statistics(folder: Folder, number: int) -> dict[str, Statistics]:
    """A committed unit's statistics, by bank."""
    with _opened(folder, number) as (file, facts):
        tensors = {name: file.get_tensor(name).long() for name in file.keys()}  # noqa: SIM118
    shape = Shape(
        tuple(facts["layers"]), facts["n_experts"], facts["n_chosen"], facts["vocab_size"],
        tuple(facts["domains"]),
    )  # fmt: skip
    found: dict[str, dict[str, Tensor]] = {}
    for name, x in tensors.items():
        bank, quantity, *piece = name.split("/")
        if piece == ["place"]:
            size = (len(shape.layers), shape.vocab_size, shape.n_experts)
            dense = torch.zeros(size, dtype=torch.int64)
            dense.view(-1)[x] = tensors[f"{bank}/{quantity}/count"]
            found.setdefault(bank, {})[quantity] = dense
        elif not piece:
            found.setdefault(bank, {})[quantity] = x
    return {bank: Statistics(shape, sums) for bank, sums in found.items()}


@contextmanager
def _opened(folder: Folder, number: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    path = folder.statistics(number)
    try:
        with safe_open(path, framework="pt") as file:
            yield file, dict(json.loads((file.metadata() or {})["ernie_lab"]))
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise folder.damaged(path, error) from error
