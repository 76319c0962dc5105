"""Where a picture or clip comes from: a path, bytes, a `data:` URI, or a URL if allowed."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias
from urllib import request
from urllib.parse import unquote_to_bytes

Source: TypeAlias = str | Path | bytes

# Seconds without an answer, and bytes of one download. A clip may be large, an endless stream not.
TIMEOUT, MAX_DOWNLOAD = 30.0, 512 * 2**20
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+)://")
_DATA_URI = re.compile(r"data:([^,]*),", re.IGNORECASE)


def describe(thing: object) -> str:
    """A short name of a picture or clip for messages and labels."""
    if isinstance(thing, bytes | bytearray):
        return f"{len(thing)} bytes"
    if isinstance(thing, str | Path):
        text = str(thing)
        return text if len(text) <= 80 else f"{text[:60]}… ({len(text)} characters)"
    shape = getattr(thing, "shape", None)
    if shape is not None:
        return f"{type(thing).__name__} {tuple(shape)}"
    size = getattr(thing, "size", None)
    if isinstance(size, tuple):
        return f"picture {size[1]} x {size[0]}"
    return f"list of {len(thing)}" if isinstance(thing, list | tuple) else type(thing).__name__


def resolve(
    source: Source, name: str, error: Callable[[str], Exception], *, allow_url: bool = False
) -> Path | bytes:
    """The file, or the bytes. `error` makes the exception; `name` is what it calls the thing."""
    if isinstance(source, str):
        if data := _DATA_URI.match(source):
            return _data_uri(data.group(1), source[data.end() :], name, error)
        if scheme := _SCHEME.match(source):
            return _download(source, scheme.group(1).lower(), name, error, allow_url)
    elif not isinstance(source, Path):
        return bytes(source)
    try:
        path = Path(source).expanduser()
        is_file, is_folder = path.is_file(), path.is_dir()
    except (OSError, ValueError, RuntimeError) as problem:
        raise error(
            f"{name}: not a path ({problem}). Base64 needs `data:…;base64,` in front."
        ) from problem
    if is_folder:
        raise error(f"{name} is a folder, expected a file. Pass the files in it, in order.")
    if not is_file:
        raise error(f"{name}: no such file (looked in {Path.cwd()}).")
    return path


def _data_uri(header: str, payload: str, name: str, error: Callable[[str], Exception]) -> bytes:
    content = unquote_to_bytes(payload)
    if not header.lower().endswith(";base64"):
        return content
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error as problem:
        raise error(f"{name}: the data URI is not valid base64 ({problem}).") from problem


def _download(
    url: str, scheme: str, name: str, error: Callable[[str], Exception], allowed: bool
) -> bytes:
    if scheme not in ("http", "https"):
        raise error(f"{name}: {scheme}:// is not supported. Pass the path of a local file.")
    if not allowed:
        raise error(
            f"{name}: nothing is downloaded unless you say so. Read it with allow_url=True, as in "
            "lab.read_image(url, allow_url=True), and pass what that returns; or save the file and "
            "pass its path."
        )
    # Not build_opener: its ftp, file and data handlers would follow a redirect off the web.
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPRedirectHandler,
        request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    asked = request.Request(url, headers={"User-Agent": "ernie-lab"})
    try:
        with opener.open(asked, timeout=TIMEOUT) as answer:
            content: bytes = answer.read(MAX_DOWNLOAD + 1)
    except (OSError, ValueError, AttributeError) as problem:
        # AttributeError: `open` returns None when no handler knows where a redirect leads.
        raise error(f"{name}: the download failed ({problem}).") from problem
    if len(content) > MAX_DOWNLOAD:
        raise error(f"{name} is larger than {MAX_DOWNLOAD} bytes. Save it and pass its path.")
    return content
