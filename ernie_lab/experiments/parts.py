"""Finished parts of an experiment, in memory and, if a folder is given, on disk.

A part's name is the fingerprint of all that it depends on. Whoever calls again with the same
folder gets what is there; what was asked otherwise has another name and is computed.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ernie_lab.interventions.fingerprint import fingerprint

Arrays: TypeAlias = dict[str, NDArray[Any]]


class Parts:
    """`key(...)` names a part by its inputs; without a folder a plain number does."""

    def __init__(self, folder: str | os.PathLike[str] | None, *context: Any) -> None:
        self.folder = None if folder is None else Path(folder).expanduser() / "parts"
        self._context = None if folder is None else fingerprint(*context)
        self._held: dict[str, Arrays] = {}
        self.n_found = 0
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def key(self, *plain: Any, depends: Any) -> str:
        """`plain` tells parts of this call apart; `depends` is all that it is computed from."""
        if self.folder is None:
            return "/".join(map(str, plain))
        return fingerprint(self._context, depends)

    def get(self, key: str) -> Arrays | None:
        if key not in self._held and self.folder is not None:
            try:
                with np.load(self._path(key), allow_pickle=False) as file:
                    self._held[key] = dict(file)
                self.n_found += 1
            except (FileNotFoundError, zipfile.BadZipFile, EOFError, ValueError):
                return None
        return self._held.get(key)

    def put(self, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """On disk whole or not at all, whenever the session is interrupted."""
        self._held[key] = dict(arrays)
        if self.folder is None:
            return
        handle, name = tempfile.mkstemp(dir=self.folder, suffix=".partial")
        scratch = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            scratch.replace(self._path(key))
        finally:
            scratch.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{key}.npz"
