"""Text to token ids and back, without ever losing a byte."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, final

import tokenizers
from tokenizers import AddedToken

from ernie_lab.inputs.errors import TokenizerError
from ernie_lab.inputs.token_bytes import SPACE_MARK, TokenizerKind, spelled_bytes, visible
from ernie_lab.inputs.tokenizer_files import (
    DEFAULT_TEMPLATE,
    AddedSpec,
    TokenizerFiles,
    read_tokenizer_files,
)

SENTENCEPIECE_NAMES = ("tokenizer.model", "spm.model")


@final
class Tokenizer:
    """A vocabulary with its special tokens and chat templates. Build it with `load_tokenizer`.

    Decoding joins the bytes of the tokens and reads them as UTF-8; broken sequences become
    U+FFFD, one for each maximal part, as Python and the Unicode standard have it. (The
    `tokenizers` library differs only there: it gives one U+FFFD for every byte of a run of
    byte tokens that is broken anywhere.) An id without a token, such as a padding row of the
    embedding, reads `<id 103400>`: nothing is dropped in silence. `drops_first_space` says that
    encoding puts a space before a text and decoding removes one; ERNIE's does neither.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, files: TokenizerFiles, *, source: str = "tokenizer"
    ) -> None:
        backend.no_padding()
        backend.no_truncation()
        _register(backend, files.added, source)
        self.source = source
        self.kind, self.drops_first_space = _decoding(backend, source)
        self.special_tokens: Mapping[str, str] = dict(files.special)
        self.chat_templates: Mapping[str, str] = dict(files.chat_templates)
        self._backend = backend
        self._added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in self._added.items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    def __repr__(self) -> str:
        return f"Tokenizer({self.kind}, {self.vocab_size} ids, from {self.source!r})"

    def __getstate__(self) -> dict[str, Any]:
        # `encode_special_tokens` does not survive pickling: a copy makes its own `_plain`.
        return {name: value for name, value in vars(self).items() if name != "_plain"}

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Token ids of `text` as it is: nothing is put before or after it, no BOS either.

        With `special=False` the text of a special token is plain text: `"<s>"` becomes three
        characters instead of one id. Use it for text that must not steer the model.
        """
        backend = self._backend if special else self._plain
        return list(backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of `ids`."""
        raw = b"".join(self.stream_bytes(i, skip_special=skip_special) for i in ids)
        text = raw.decode("utf-8", "replace")
        return text.removeprefix(" ") if self.drops_first_space else text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of a special token are the UTF-8 of its text."""
        token = self._backend.id_to_token(token_id) if token_id >= 0 else None
        if token is None:
            raise TokenizerError(
                f"id {token_id} has no token; {self.source} has ids 0..{self.vocab_size - 1}"
                f"{'' if token_id >= self.vocab_size or token_id < 0 else ', with gaps'}."
            )
        if added := self._added.get(token_id):
            marked = self.kind == "byte-fallback" and not added.special
            return (token.replace(SPACE_MARK, " ") if marked else token).encode()
        return spelled_bytes(token, self.kind)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """One string for display per id; bytes of a split character show as `<0xE4>`."""
        return [visible(self.stream_bytes(token_id)) for token_id in ids]

    def stream_bytes(self, token_id: int, *, skip_special: bool = False) -> bytes:
        """What one id adds to a decoded text: `token_bytes`, or a visible mark for no token."""
        if skip_special and token_id in self.special_ids:
            return b""
        if token_id >= 0 and self._backend.id_to_token(token_id) is None:
            return f"<id {token_id}>".encode()
        return self.token_bytes(token_id)

    def id_of(self, token: str) -> int:
        """The id of a token by its spelling in the vocabulary, such as `"<s>"`."""
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise TokenizerError(
                f"no token is spelled {token!r} in {self.source}. A piece of text is split by "
                "`encode`; this looks up one entry of the vocabulary."
            )
        return token_id

    @property
    def bos_id(self) -> int | None:
        return self._named_id("bos_token")

    @property
    def eos_id(self) -> int | None:
        return self._named_id("eos_token")

    @property
    def pad_id(self) -> int | None:
        return self._named_id("pad_token")

    @property
    def chat_template(self) -> str | None:
        """The checkpoint's own template, or None when it has none."""
        if len(self.chat_templates) == 1:
            return next(iter(self.chat_templates.values()))
        if self.chat_templates and DEFAULT_TEMPLATE not in self.chat_templates:
            raise TokenizerError(
                f"{self.source} has the chat templates {sorted(self.chat_templates)} and none "
                f"called {DEFAULT_TEMPLATE!r}. Pass one of `tokenizer.chat_templates`."
            )
        return self.chat_templates.get(DEFAULT_TEMPLATE)

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.id_of(token)

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        # A copy, because the flag is state of the backend and other threads may be encoding.
        plain = copy.deepcopy(self._backend)
        plain.encode_special_tokens = True
        return plain


def load_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has no tokenizer file.

    `tokenizer.json` is used when present, otherwise `tokenizer.model` or `spm.model`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TokenizerError(f"{folder} is not a folder; expected one with the tokenizer's files.")
    fast = folder / "tokenizer.json"
    if fast.is_file():
        return Tokenizer(_read_fast(fast), read_tokenizer_files(folder), source=str(fast))
    for name in SENTENCEPIECE_NAMES:
        path = folder / name
        if path.is_file():
            # Only such files need sentencepiece, and it takes its time to import.
            from ernie_lab.inputs.sentencepiece_model import (
                convert_sentencepiece,
                read_sentencepiece,
            )

            model = read_sentencepiece(path)
            files = read_tokenizer_files(folder, model.special)
            extra = {spec.text: spec.token_id for spec in files.added if spec.token_id is not None}
            backend = convert_sentencepiece(model, extra, prefix_space=files.prefix_space)
            return Tokenizer(backend, files, source=str(path))
    return None


def _read_fast(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every kind of damage
        raise TokenizerError(
            f"{path} cannot be read ({error}). It may be truncated, a Git LFS pointer, or written "
            f"by a newer `tokenizers` than {tokenizers.__version__}."
        ) from error


def _register(backend: tokenizers.Tokenizer, specs: Sequence[AddedSpec], source: str) -> None:
    """Make the backend find these tokens in text; check that every one has its declared id."""
    known = backend.get_added_tokens_decoder().values()
    plain = {token.content for token in known if not token.special}
    backend.add_tokens(
        [
            AddedToken(
                spec.text,
                special=spec.special,
                normalized=spec.normalized,
                lstrip=spec.lstrip,
                rstrip=spec.rstrip,
                single_word=spec.single_word,
            )
            for spec in specs
            if spec.special or spec.text not in plain
        ]
    )
    for spec in specs:
        found = backend.token_to_id(spec.text)
        if spec.token_id is not None and found != spec.token_id:
            raise TokenizerError(
                f"token {spec.text!r} should have id {spec.token_id} by the JSON files beside "
                f"{source}, but has {found}. Take all tokenizer files from one revision."
            )


def _decoding(backend: tokenizers.Tokenizer, source: str) -> tuple[TokenizerKind, bool]:
    """How this tokenizer spells bytes, and whether decoding drops a leading space."""
    steps = _steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "byte-level", False
    if "ByteFallback" in kinds and set(kinds) <= {"Replace", "ByteFallback", "Fuse", "Strip"}:
        replaces = [step for step in steps if step["type"] == "Replace"]
        strips = [step for step in steps if step["type"] == "Strip"]
        marks = [(step["pattern"], step["content"]) for step in replaces]
        drops = [(step["content"], step["start"], step["stop"]) for step in strips]
        if marks == [({"String": SPACE_MARK}, " ")] and drops in ([], [(" ", 1, 0)]):
            return "byte-fallback", bool(drops)
    raise TokenizerError(
        f"{source} decodes by {kinds or 'nothing'}, which is neither byte-level BPE nor byte "
        "fallback as in ERNIE 4.5 checkpoints; its tokens cannot be turned into bytes exactly."
    )


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
