"""The models that ship inside the package: where they are, and that they are what was shipped.

Standard library alone, so that finding a model never needs torch.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

HERE = Path(__file__).parent
WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Builtin:
    """`sha256` is that of the weights; the small files beside them are plain text."""

    folder: str
    sha256: str


BUILTIN: Mapping[str, Builtin] = MappingProxyType(
    {
        "tiny-text": Builtin(
            folder="tiny_text",
            sha256="d6f7036e15b12eeffa0039eac5971d9a6f28d3e7f72051bead9ac8ed4113f125",
        ),
        "tiny-vl": Builtin(
            folder="tiny_vl",
            sha256="84b2a5c06c9f201cd9201dde4d5b39f614ca25782c3007833fbdafca748f57fd",
        ),
        "tiny-vl-idle": Builtin(
            folder="tiny_vl_idle",
            sha256="b2be12b2ed7b3fe10ba7fb5c71b9034ca311ae660bcfd4eb65945cf79548443a",
        ),
    }
)


class BuiltinError(RuntimeError):
    """A built-in model that is not there, or not the one that was shipped."""


def unknown_name(name: str) -> str:
    """That there is no such built-in model, which is nearest, and which there are.

    Case and the choice of hyphen, underscore or space do not count against a name.
    """
    alike = difflib.get_close_matches(re.sub(r"[\s_]", "-", name.lower()), BUILTIN, n=1)
    nearest = f"; nearest: {alike[0]!r}" if alike else ""
    return f"no built-in model {name!r}{nearest}; there are: {', '.join(BUILTIN)}"


def builtin_path(name: str) -> Path:
    """The folder of a built-in model, once its weights have been checked.

    Raises:
        BuiltinError: no such name; weights missing; weights with another SHA-256.
    """
    if name not in BUILTIN:
        raise BuiltinError(unknown_name(name))
    model = BUILTIN[name]
    weights = HERE / model.folder / WEIGHTS
    if not weights.is_file():
        raise BuiltinError(f"built-in model {name!r}: {weights} is missing; reinstall ernie_lab")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != model.sha256:
        raise BuiltinError(
            f"built-in model {name!r}: {weights} has SHA-256 {found}, expected {model.sha256}. "
            "It was changed or cut short: reinstall ernie_lab, or load a folder of your own by path"
        )
    return weights.parent
