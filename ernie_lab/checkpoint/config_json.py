"""`config.json` -> config, in every supported style, and back."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from ernie_lab.checkpoint.config import ConfigError, ModelConfig, TextConfig
from ernie_lab.checkpoint.fields import Raw
from ernie_lab.checkpoint.text_config_json import (
    DENSE_TYPE,
    MOE_TYPE,
    read_dense_text,
    read_moe_text,
    write_text,
)
from ernie_lab.checkpoint.vl_baidu_json import BAIDU_TYPE, read_baidu_vl, write_baidu_vl
from ernie_lab.checkpoint.vl_transformers_json import (
    TRANSFORMERS_TYPE,
    read_transformers_vl,
    write_transformers_vl,
)

CONFIG_NAME = "config.json"

Style: TypeAlias = Literal["released", "transformers"]

_READERS: Mapping[str, Callable[[Raw, Collection[str]], ModelConfig]] = MappingProxyType(
    {
        MOE_TYPE: read_moe_text,
        DENSE_TYPE: read_dense_text,
        BAIDU_TYPE: read_baidu_vl,
        TRANSFORMERS_TYPE: read_transformers_vl,
    }
)


def read_config(raw: Raw, ignore: Collection[str] = ()) -> ModelConfig:
    """The config a `config.json` describes; `ignore` names unknown fields to pass over.

    Raises:
        ConfigError: another kind of model; a field that is unknown and might change the maths,
            that has an unsupported value, or that disagrees with another.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _READERS:
        raise ConfigError(
            f"model_type={model_type!r} is not an ERNIE 4.5 model this package knows; "
            f"known: {', '.join(_READERS)}"
        )
    return _READERS[model_type](raw, ignore)


def read_config_file(folder: Path, ignore: Collection[str] = ()) -> ModelConfig:
    """`read_config` of the `config.json` in a folder."""
    path = folder / CONFIG_NAME
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} holds {type(raw).__name__}, expected an object with fields")
    return read_config(raw, ignore)


def write_config(
    config: ModelConfig, dtype: str = "float32", style: Style = "released"
) -> dict[str, Any]:
    """The fields of a `config.json`; `read_config` of them gives `config` back.

    Of a text config there is one style, the released one, which transformers reads too. Of a
    vision-language config `"released"` is Baidu's, which transformers cannot open, and
    `"transformers"` its own, nested one. `dtype` is the weights' (`"bfloat16"`).

    Raises:
        ConfigError: what the style cannot say, such as two placeholders in Baidu's.
    """
    if isinstance(config, TextConfig):
        return write_text(config, dtype)
    write = write_baidu_vl if style == "released" else write_transformers_vl
    written = write(config, dtype)
    unsaid = list(_differences(config, read_config(written)))
    if unsaid:
        raise ConfigError(
            f"model_type={written['model_type']!r} has no fields for this config: "
            f"{'; '.join(unsaid)}. Change it, or write the other style"
        )
    return written


def _differences(config: Any, read: Any, path: str = "") -> Iterator[str]:
    for item in fields(config):
        one, other, name = getattr(config, item.name), getattr(read, item.name), path + item.name
        if is_dataclass(one) and type(one) is type(other):
            yield from _differences(one, other, f"{name}.")
        elif one != other:
            yield f"{name}={one!r} would be read as {other!r}"
