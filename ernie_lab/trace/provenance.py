"""Where a result comes from; every saved result carries it."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

_EDIT = 60  # characters of the first edit that are shown
_LIBRARIES = ("ernie-lab", "torch", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Model, settings and software of a result. `details` is free, but must be JSON."""

    model: str
    revision: str | None = None
    config_hash: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    seed: int | None = None
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def now(
        cls,
        model: str,
        *,
        revision: str | None = None,
        config_hash: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        seed: int | None = None,
        **details: Any,
    ) -> Provenance:
        """With the present time and the installed versions."""
        return cls(
            model=model,
            revision=revision,
            config_hash=config_hash,
            dtype=dtype,
            device=device,
            seed=seed,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            versions=dict(library_versions()),
            details=details,
        )

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @property
    def edited(self) -> str:
        """`edited: …`, the edits of the run in a few words; empty where there were none."""
        edits = list(self.details.get("edits") or ())
        if not edits:
            return ""
        first = edits[0] if len(edits[0]) <= _EDIT else edits[0][: _EDIT - 1] + "…"
        return f"edited: {first}" + (f" and {len(edits) - 1} more" if len(edits) > 1 else "")

    def line(self) -> str:
        """The essentials, for a repr."""
        revision = f" @ {self.revision[:12]}" if self.revision else ""
        seed = "" if self.seed is None else f", seed {self.seed}"
        scheme = self.details.get("quantize")
        held = f" ({scheme} weights)" if scheme else ""
        return f"{self.model}{revision}, {self.dtype}{held} on {self.device}{seed}"


@cache  # 5 ms, and they stay what they are
def library_versions() -> Mapping[str, str]:
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
