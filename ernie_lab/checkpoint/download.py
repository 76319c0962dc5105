"""A model on the hub to a folder in its library's cache, with errors that say what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    DryRunError,
    GatedRepoError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ernie_lab.checkpoint.config_json import CONFIG_NAME
from ernie_lab.checkpoint.errors import ModelUnavailable
from ernie_lab.display import in_words

# A checkpoint's folder may hold other formats, and code, beside what is wanted.
UNWANTED = ("*/*", "*.py", "*.bin")


def downloaded(
    model_id: str,
    revision: str | None,
    cache_dir: str | Path | None,
    announce: Callable[[str], None],
    wanted: Sequence[str],
) -> Path:
    """The folder of one commit in the hub library's cache, filled with the `wanted` files.

    Raises:
        ModelUnavailable: and the message says why, and what to do.
    """
    asked: dict[str, Any] = {
        "revision": revision,
        "cache_dir": cache_dir,
        "allow_patterns": list(wanted),
        "ignore_patterns": list(UNWANTED),
    }
    at = f" at revision {revision!r}" if revision else ""
    try:
        _require_disk(model_id, asked, announce)
        folder = Path(snapshot_download(model_id, **asked))
    except GatedRepoError as error:  # before RepositoryNotFoundError, its base class
        raise ModelUnavailable(
            f"{model_id} is gated: accept its licence on its page on the hub, then log in with "
            "`hf auth login` or set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelUnavailable(
            f"the hub has no model {model_id!r}, or it is private: check the spelling "
            "(owner/name), or log in with `hf auth login`. No such folder exists here either"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelUnavailable(
            f"{model_id} has no revision {revision!r}; its page on the hub lists branches and tags"
        ) from error
    except HFValidationError as error:
        raise ModelUnavailable(
            f"{model_id!r} is neither a folder here nor a valid hub id: {error}"
        ) from error
    except IncompleteSnapshotError as error:
        raise ModelUnavailable(
            f"the cached copy of {model_id}{at} is incomplete and the hub cannot be reached; "
            "load it once with network to finish the download"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise ModelUnavailable(
            f"{model_id}{at} is not in the cache and the hub cannot be reached; load it once with "
            "network (and without HF_HUB_OFFLINE), or copy its folder here and give the path"
        ) from error
    if not (folder / CONFIG_NAME).is_file():
        raise ModelUnavailable(f"{model_id}{at} has no {CONFIG_NAME}: it is not a checkpoint")
    return folder


def _require_disk(model_id: str, asked: dict[str, Any], announce: Callable[[str], None]) -> None:
    """Compare what a download would write with what is free, before it starts."""
    try:
        files = snapshot_download(model_id, dry_run=True, **asked)
    except DryRunError:
        return  # the hub cannot be asked; the real call knows the cache and the reason
    needed = sum(file.file_size or 0 for file in files if file.will_download)
    free = _free_disk(Path(asked["cache_dir"] or constants.HF_HUB_CACHE).expanduser())
    if needed > free:
        raise ModelUnavailable(
            f"downloading {model_id} needs {in_words(needed)} on disk, {in_words(free)} are free; "
            "make room or set HF_HOME to a larger disk"
        )
    if needed:
        announce(f"downloading {model_id}: {in_words(needed)}, {in_words(free)} free on disk")


def _free_disk(folder: Path) -> int:
    """Free bytes where `folder` is or would be made."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
