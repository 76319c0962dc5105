"""From what a user types to a folder on this machine: a path, or a model on the hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ernie_lab.checkpoint.config_json import CONFIG_NAME
from ernie_lab.checkpoint.errors import ModelUnavailable

# Weights, configs, tokenizer, chat template, the font of clips' times. No pickles and no code,
# at the top level alone.
WANTED = ("*.safetensors", "*.json", "tokenizer*", "*.model", "*.jinja", "*.ttf")

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True, slots=True)
class Located:
    """A checkpoint on disk. `revision` is the commit it came from, None for a plain folder."""

    folder: Path
    model_id: str
    revision: str | None


def locate(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    announce: Callable[[str], None] = print,
) -> Located:
    """The folder of a checkpoint, downloaded from the hub unless `source` is a folder.

    Before a download its size is compared with the free disk space. Without network the cached
    copy is taken, complete or not at all.

    Args:
        source: a folder, or a hub id such as `"baidu/ERNIE-4.5-21B-A3B-PT"`.
        revision: branch, tag or commit on the hub.
        cache_dir: where downloads are kept; the hub library's own choice by default.
        announce: told how much will be downloaded, when anything will.

    Raises:
        ModelUnavailable: and the message says why, and what to do.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _located_folder(folder, revision)
    if folder.exists():
        raise ModelUnavailable(f"{folder} is a file; give the folder that holds config.json")
    if isinstance(source, Path) or _looks_like_path(source):
        raise ModelUnavailable(f"folder {folder} does not exist (from {Path.cwd()})")
    return _located_hub(str(source), revision, cache_dir, announce)


def locate_config(source: str | Path, *, revision: str | None = None) -> Path:
    """A folder that holds the config of `source`: no weights are downloaded for it.

    Raises:
        ModelUnavailable: as `locate`.
    """
    folder = Path(source).expanduser()
    if folder.exists() or isinstance(source, Path) or _looks_like_path(source):
        return locate(source, revision=revision).folder
    return _located_hub(source, revision, None, print, wanted=(CONFIG_NAME,)).folder


def _located_folder(folder: Path, revision: str | None) -> Located:
    if revision is not None:
        raise ModelUnavailable(
            f"{folder} is a folder, which has no revision {revision!r}; drop revision= or give a "
            "hub id"
        )
    if not (folder / CONFIG_NAME).is_file():
        raise ModelUnavailable(
            f"{folder} has no {CONFIG_NAME}; give the folder of a checkpoint, with its "
            f"{CONFIG_NAME} and safetensors weights"
        )
    return Located(folder.resolve(), folder.resolve().name, None)


def _looks_like_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or not _HUB_ID.fullmatch(source)


def _located_hub(
    model_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    announce: Callable[[str], None],
    wanted: Sequence[str] = WANTED,
) -> Located:
    # Half of what importing this package would cost is the hub's library; most runs need none.
    from ernie_lab.checkpoint.download import downloaded

    folder = downloaded(model_id, revision, cache_dir, announce, wanted)
    # The hub library keeps each commit in a folder named after it.
    return Located(folder, model_id, folder.name)
