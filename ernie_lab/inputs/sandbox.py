"""The sandbox that chat templates run in; jinja2 is imported with this module, at first use."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache, lru_cache
from types import TracebackType
from typing import NoReturn

import jinja2
from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ernie_lab.inputs.errors import ChatTemplateError

__all__ = ["TemplateSyntaxError", "compiled", "line_of"]

# A tag of transformers that marks the assistant's words for training; here it has no effect.
_GENERATION_TAG = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


@lru_cache(maxsize=32)
def compiled(template: str) -> jinja2.Template:
    """A template, ready to render in the sandbox."""
    return _environment().from_string(_GENERATION_TAG.sub(_without_effect, template))


def _without_effect(tag: re.Match[str]) -> str:
    before, end, after = tag.groups()
    return f"{{%{before} {'endif' if end else 'if true'} {after}%}}"


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
        finalize=_printable,
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _printable(value: object) -> object:
    if isinstance(value, jinja2.Undefined):
        raise ChatTemplateError(
            f"it prints {value._undefined_name!r}, which is not defined. Pass it by name."
        )
    return value


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, >, & and ' for HTML, which models have never seen.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(f"it refuses this chat: {message}")


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def line_of(traceback: TracebackType | None) -> str:
    """The template's line, which jinja2 writes into the traceback."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == "<template>":
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return f" at line {line}" if line else ""
