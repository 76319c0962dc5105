"""Can this model be opened here and now? Asked before anything is downloaded or read."""

from __future__ import annotations

import html
from dataclasses import dataclass
from pathlib import Path

import torch

from ernie_lab.checkpoint.config import ConfigError, ModelConfig
from ernie_lab.checkpoint.config_json import read_config_file
from ernie_lab.checkpoint.errors import CheckpointError, ModelUnavailable
from ernie_lab.checkpoint.hub import WANTED, locate
from ernie_lab.checkpoint.memory import HEADROOM, free_bytes, weight_bytes
from ernie_lab.checkpoint.quantise import Scheme
from ernie_lab.checkpoint.reader import Reader
from ernie_lab.display import in_words


@dataclass(frozen=True, slots=True, repr=False)
class Readiness:
    """What stands between this machine and a model. `ok` when nothing does.

    `needed` are the bytes of the weights with room beside them, None where no config is at hand;
    `free` those of the device, None where it cannot be told. Nothing was downloaded to know this.
    """

    source: str
    device: str
    dtype: str
    folder: Path | None
    needed: int | None
    free: int | None
    obstacles: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.obstacles

    def _facts(self) -> dict[str, str]:
        unknown = "unknown"
        return {
            "model": self.source,
            "on": f"{self.device}, {self.dtype}",
            "on this disk": "yes, complete" if self.folder else "no",
            "weights and room": unknown if self.needed is None else in_words(self.needed),
            "free there": unknown if self.free is None else in_words(self.free),
        }

    def __repr__(self) -> str:
        facts = "\n".join(f"{name:18}{value}" for name, value in self._facts().items())
        why = "\n".join(f"not ready: {said}" for said in self.obstacles) or "ready"
        return f"{facts}\n{why}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in self._facts().items()
        )
        colour, said = ("#009E73", ("ready",)) if self.ok else ("#D55E00", self.obstacles)
        notes = "".join(
            f"<div style='border-left:4px solid {colour};padding:2px 10px;margin:4px 0'>"
            f"{html.escape('' if self.ok else 'not ready: ')}{html.escape(why)}</div>"
            for why in said
        )
        return f"<div><table>{rows}</table>{notes}</div>"


def readiness(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    quantize: Scheme | None = None,
    cache_dir: str | Path | None = None,
) -> Readiness:
    """Look whether a folder, or the hub's cache, holds all of a model, and whether it would fit.

    No network is used. `device` is the first GPU if there is one, else the CPU. That a model
    fits says nothing of its speed: a model of 21 B parameters on a CPU takes minutes a prompt.
    """
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    obstacles = []
    folder: Path | None = None
    try:
        folder = _complete(source, cache_dir)
    except ModelUnavailable as error:
        obstacles.append(str(error))
    needed, free = None, free_bytes(where)
    if folder is not None:
        try:
            needed = _with_room(read_config_file(folder), dtype, quantize)
            Reader.open(folder)  # headers alone: is every file of weights there, and whole?
        except (ConfigError, CheckpointError) as error:
            obstacles.append(str(error))
    if needed is not None and free is not None and needed > free:
        obstacles.append(f"{in_words(needed)} are needed on {where}, {in_words(free)} are free")
    return Readiness(
        source=str(source),
        device=str(where),
        dtype=str(dtype).removeprefix("torch.") + (f", {quantize} weights" if quantize else ""),
        folder=folder,
        needed=needed,
        free=free,
        obstacles=tuple(obstacles),
    )


def _with_room(config: ModelConfig, dtype: torch.dtype, quantize: Scheme | None) -> int:
    return int(weight_bytes(config, dtype, quantize) * HEADROOM)


def _complete(source: str | Path, cache_dir: str | Path | None) -> Path:
    """The folder of a model that is here in full."""
    if Path(source).expanduser().is_dir() or isinstance(source, Path):
        return locate(source).folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    from ernie_lab.checkpoint.download import UNWANTED

    try:
        found = snapshot_download(
            source,
            cache_dir=cache_dir,
            local_files_only=True,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except HFValidationError as error:
        raise ModelUnavailable(f"{source!r} is neither a folder here nor a hub id") from error
    except IncompleteSnapshotError as error:
        raise ModelUnavailable(
            f"the cached copy of {source} is incomplete; el.load finishes the download"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelUnavailable(
            f"{source} is not in the hub's cache; el.load downloads it (and says first how much)"
        ) from error
    folder = Path(found)
    if not any(folder.glob("*.safetensors")):
        raise ModelUnavailable(
            f"the cached copy of {source} has no weights yet; el.load finishes the download"
        )
    return folder
