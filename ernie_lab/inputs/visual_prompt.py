"""Prompts with images and clips: every picture becomes its placeholders, and nothing else does.

A picture is written `Picture N:<|IMAGE_START|>` + placeholders + `<|IMAGE_END|>`, a clip
`Video N:<|VIDEO_START|>` + placeholders + `<|VIDEO_END|>`; N counts each kind from 1 over the
whole conversation. Before expansion one marker stands for all placeholders of a picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.inputs.chat import Message, PicturePart, render_messages, take_pictures
from ernie_lab.inputs.errors import BatchError, ChatTemplateError, PromptError
from ernie_lab.inputs.media import Kind, Media
from ernie_lab.inputs.prompt import (
    EncodedPrompt,
    Form,
    Prompt,
    choose_template,
    from_ids,
    from_text,
    is_single,
    prompt_items,
    refuse_options,
    required_tokenizer,
)
from ernie_lab.inputs.tokenizer import Tokenizer
from ernie_lab.inputs.visual_layout import Block, visual_layout

KINDS: tuple[Kind, Kind] = ("image", "video")
# As Baidu's templates and processor write a picture before expansion; no tokens of their own.
MARKERS: Mapping[Kind, str] = {
    "image": "<|image@placeholder|>",
    "video": "<|video@placeholder|>",
}

# What users gave, and what was read from it, of each kind in order.
Pictures: TypeAlias = dict[Kind, list[Any]]
Ready: TypeAlias = dict[Kind, list[Media]]


class MediaReader(Protocol):
    """Turns what a user calls a picture into what the model reads; `source` names it."""

    def image(self, picture: Any, source: str, /) -> Media: ...

    def video(self, clip: Any, source: str, /) -> Media: ...


class Mark(NamedTuple):
    """A place in a text that stands for a picture; `native` if spelled as the model's own token."""

    kind: Kind
    start: int
    stop: int
    native: bool


def read_visual_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    media: MediaReader,
    ids: VisualIds,
    *,
    images: Any = None,
    videos: Any = None,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> tuple[EncodedPrompt, ...]:
    """One entry for every sequence in `prompt`, its pictures in reading order.

    - Chat messages hold pictures as parts of their content (`{"type": "image", "image": x}`,
      or with `path`, `url`, `base64`, `image_url`; the same for videos). A part without data
      takes the next of `images` or `videos`.
    - A string with markers (`<|image@placeholder|>`, `<|video@placeholder|>`, or the model's
      own placeholder, once per picture or already once per token) is kept as it is, except
      that the markers are expanded: labels and delimiters around them are the caller's.
    - A string without markers, but with pictures, is rendered as one chat message of a user:
      images, videos, then the text. Without pictures it stays a plain string.
    - Token ids hold all placeholders.

    For one sequence `images` is one picture or a list; for several, a list with one list for
    each. The chat template is `template`, else the checkpoint's own, else our `"vl"`. Text in a
    chat that spells a marker, a placeholder or a delimiter is refused: it could not be told
    from a picture.

    Raises:
        PromptError: pictures that do not match their places, with both counts.
    """
    form, items = prompt_items(prompt)
    given = _shared_out(images, videos, len(items), is_single(prompt))
    reader = _Reader(tokenizer, media, ids, template, add_generation_prompt, variables)
    plans: list[tuple[Form, Any]] = [
        reader.plan(form, item, pictures) for (_, item), pictures in zip(items, given, strict=True)
    ]
    forms = {form for form, _ in plans}
    if len(forms) > 1:
        raise PromptError(
            "some of these strings have pictures, and would be rendered as chats, and some have "
            "none, and would not, so that their formats would differ. Write all of them as chats."
        )
    if "chat" not in forms:
        refuse_options(template, add_generation_prompt, variables)
    return tuple(
        reader.read(form, item, pictures, where)
        for (where, _), (form, item), pictures in zip(items, plans, given, strict=True)
    )


def spellings(tokenizer: Tokenizer, ids: VisualIds) -> dict[str, str]:
    """The text of each placeholder and delimiter that the tokenizer knows, by its field's name."""
    texts = {field.name: tokenizer.decode([getattr(ids, field.name)]) for field in fields(ids)}
    return {
        name: text for name, text in texts.items() if tokenizer.encode(text) == [getattr(ids, name)]
    }


def find_marks(text: str, spelled: Mapping[str, str]) -> list[Mark]:
    """Every place in `text` that stands for a picture, in order; `spelled` is of `spellings`.

    Where one placeholder serves both kinds, the delimiter before it decides.
    """
    words = {text: name for name, text in [*spelled.items(), *MARKERS.items()]}
    shared = "image" in spelled and spelled["image"] == spelled.get("video")
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    marks, opened = [], KINDS[0]
    for match in re.finditer(pattern, text):
        name, native = words[match.group()], match.group() not in MARKERS.values()
        if name not in KINDS:
            opened = "video" if name == "video_start" else "image"
            continue
        kind: Kind = "video" if name == "video" else "image"
        marks.append(Mark(opened if native and shared else kind, *match.span(), native))
    return marks


@dataclass(frozen=True, slots=True)
class _Reader:
    """The arguments of `read_visual_prompt` that are the same for all of its sequences."""

    tokenizer: Tokenizer | None
    media: MediaReader
    ids: VisualIds
    template: str | None
    add_generation_prompt: bool
    variables: Mapping[str, Any]

    def plan(self, form: Form, item: Any, pictures: Pictures) -> tuple[Form, Any]:
        """What the item is read as: a string with pictures, but without markers, as a chat."""
        if form != "text" or not any(pictures.values()) or find_marks(item, self._spelled()):
            return form, item
        parts = [{"type": kind} for kind in KINDS for _ in pictures[kind]]
        return "chat", [{"role": "user", "content": [*parts, {"type": "text", "text": item}]}]

    def read(self, form: Form, item: Any, pictures: Pictures, where: str) -> EncodedPrompt:
        if form == "ids":
            return self._matched(from_ids(item, where), self._prepared(pictures), where)
        if form == "chat":
            return self._chat(item, pictures, where)
        return self._text(item, pictures, where)

    def _chat(self, chat: Sequence[Message], given: Pictures, where: str) -> EncodedPrompt:
        messages, parts = take_pictures(chat)
        pictures = _filled(parts, given, where)
        spelled = self._spelled(part.kind for part in parts)
        _refuse_forgeries(messages, self.variables, spelled)
        text, marks = self._rendered(messages, [part.kind for part in parts], spelled)
        ready = self._prepared(pictures)
        full = _expanded(text, marks, ready, spelled)
        sequence = replace(from_text(full, self.tokenizer, "the rendered chat"), text=text)
        return self._matched(sequence, ready, where, delimited=True)

    def _text(self, text: str, given: Pictures, where: str) -> EncodedPrompt:
        spelled = self._spelled(kind for kind in KINDS if given[kind])
        marks = find_marks(text, spelled)
        there = {kind: sum(mark.kind == kind for mark in marks) for kind in KINDS}
        one_each = all(there[kind] == len(given[kind]) for kind in KINDS)
        # The model's own placeholders may already be there once for every token.
        if not one_each and not all(mark.native for mark in marks):
            raise PromptError(
                f"{where} has markers for {there['image']} images and {there['video']} videos, "
                f"but {len(given['image'])} images and {len(given['video'])} videos were given."
            )
        ready = self._prepared(given)
        full = _expanded(text, marks, ready, spelled) if one_each else text
        return self._matched(
            replace(from_text(full, self.tokenizer, where), text=text), ready, where
        )

    def _spelled(self, needed: Iterable[Kind] = ()) -> dict[str, str]:
        known = required_tokenizer(self.tokenizer)
        spelled = spellings(known, self.ids)
        for kind in needed:
            for name in (kind, f"{kind}_start", f"{kind}_end"):
                if name not in spelled:
                    raise PromptError(
                        f"{kind}s need a token for id {getattr(self.ids, name)} (the config's "
                        f"{name}), but no text of {known.source} makes it. Take the tokenizer of "
                        "the same revision as the config."
                    )
        return spelled

    def _rendered(
        self, messages: Sequence[Message], kinds: list[Kind], spelled: Mapping[str, str]
    ) -> tuple[str, list[Mark]]:
        """The text of a chat, with exactly one marker for every picture."""
        known = required_tokenizer(self.tokenizer)
        template, name = choose_template(known, self.template, "vl")
        problems = []
        # Templates look for parts of type "image", or for "image_url" only, as Baidu's examples.
        for suffix in ("", "_url") if kinds else ("",):
            try:
                text = render_messages(
                    [_with_types(message, suffix) for message in messages],
                    template,
                    {**known.special_tokens, **self.variables},
                    add_generation_prompt=self.add_generation_prompt,
                    template_name=name,
                )
            except ChatTemplateError as error:
                if not kinds:
                    raise
                problems.append(str(error))
                continue
            marks = find_marks(text, spelled)
            if [mark.kind for mark in marks] == kinds:
                return text, marks
            problems.append(f"{name} wrote {len(marks)} markers for {len(kinds)} pictures")
        raise PromptError(
            f"{problems[0]}. The chat has {', '.join(kinds) or 'no picture'}, and each needs its "
            'own place, in this order; our template has them: template=default_template("vl").'
        )

    def _prepared(self, given: Pictures) -> Ready:
        read = {"image": self.media.image, "video": self.media.video}
        return {
            kind: [read[kind](x, _source(x, kind, n)) for n, x in enumerate(given[kind], 1)]
            for kind in KINDS
        }

    def _matched(
        self, sequence: EncodedPrompt, ready: Ready, where: str, *, delimited: bool = False
    ) -> EncodedPrompt:
        """The sequence with its pictures in reading order; raises unless they match exactly."""
        images, videos = ([medium.grid for medium in ready[kind]] for kind in KINDS)
        try:
            layout = visual_layout(torch.tensor([sequence.ids]), self.ids, images, videos)
        except BatchError as error:
            raise PromptError(f"{where}: {error}") from error
        if delimited:
            self._check_delimiters(sequence.ids, layout.blocks, where)
        media = tuple(ready[block.kind][block.media] for block in layout.blocks)
        return replace(sequence, media=media)

    def _check_delimiters(self, ids: Sequence[int], blocks: Iterable[Block], where: str) -> None:
        """Every picture lies between its two delimiters, and there are no others."""
        wanted = {}
        for block in blocks:
            wanted[block.start - 1] = getattr(self.ids, f"{block.kind}_start")
            wanted[block.stop] = getattr(self.ids, f"{block.kind}_end")
        every = {self.ids.image_start, self.ids.image_end, self.ids.video_start, self.ids.video_end}
        found = {place: token for place, token in enumerate(ids) if token in every}
        if found != wanted:
            raise PromptError(
                f"{where}: the rendered chat has the delimiters {_listed(found)}, expected "
                f"{_listed(wanted)} around its pictures (id at position). Does the chat template "
                "write them, and does the tokenizer give them the ids of the config?"
            )


def _shared_out(images: Any, videos: Any, n: int, single: bool) -> list[Pictures]:
    """The pictures of each of `n` sequences."""
    per_kind = [_for_each("images", images, n, single), _for_each("videos", videos, n, single)]
    return [dict(zip(KINDS, row, strict=True)) for row in zip(*per_kind, strict=True)]


def _for_each(name: str, given: Any, n: int, single: bool) -> list[list[Any]]:
    flat = list(given) if isinstance(given, list | tuple) else [given]
    if given is None or not flat:
        return [[] for _ in range(n)]
    # In a batch None is "none here"; for one sequence it is a picture that was not found.
    nested = len(flat) == n and all(
        isinstance(x, list | tuple) or (x is None and not single) for x in flat
    )
    # An image is never a list, but a clip may be a list of frames.
    if nested and (not single or name == "images"):
        return [list(x or ()) for x in flat]
    if n == 1:
        return [flat]
    raise PromptError(
        f"{name} of {n} sequences must be a list with one list for each of them, such as "
        f"[[first, second], []]; this one has {len(flat)} items."
    )


def _filled(parts: Sequence[PicturePart], given: Pictures, where: str) -> Pictures:
    """The data of all pictures of a chat: their own, or the next of those given apart."""
    filled: Pictures = {}
    for kind in KINDS:
        mine = [part for part in parts if part.kind == kind]
        waiting = sum(part.data is None for part in mine)
        if waiting != len(given[kind]):
            raise PromptError(
                f"{where} has {waiting} {kind} parts without data, but {kind}s= gives "
                f'{len(given[kind])}. Give one for each part that is only {{"type": "{kind}"}}.'
            )
        rest = iter(given[kind])
        filled[kind] = [next(rest) if part.data is None else part.data for part in mine]
    return filled


def _refuse_forgeries(
    messages: Sequence[Message], variables: Mapping[str, Any], spelled: Mapping[str, str]
) -> None:
    """Text of a chat that would be read as a picture raises."""
    named = [(f"message {i}", message) for i, message in enumerate(messages)]
    for where, value in [*named, *variables.items()]:
        try:
            written = json.dumps(value)
        except (TypeError, ValueError, RecursionError):
            continue  # rendering refuses it, and says why
        for word in (*MARKERS.values(), *spelled.values()):
            if json.dumps(word)[1:-1] in written:
                raise PromptError(
                    f"{where} holds the text {word!r}, which stands for a picture or a border of "
                    'one. Give pictures as parts ({"type": "image", "image": ...}); to place '
                    "tokens yourself, give a plain string or ids."
                )


def _with_types(message: Message, suffix: str) -> dict[str, Any]:
    """The message with its pictures called `image` and `video`, each with the suffix."""
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    renamed = [
        {"type": part["type"] + suffix} if part["type"] in KINDS else part for part in content
    ]
    return {**message, "content": renamed}


def _expanded(text: str, marks: Iterable[Mark], ready: Ready, spelled: Mapping[str, str]) -> str:
    """The text with as many placeholders for each marker as its picture makes tokens."""
    pieces, done = [], 0
    rest = {kind: iter(ready[kind]) for kind in KINDS}
    for mark in marks:
        n_tokens = next(rest[mark.kind]).grid.n_tokens
        pieces += [text[done : mark.start], spelled[mark.kind] * n_tokens]
        done = mark.stop
    return "".join([*pieces, text[done:]])


def _source(picture: object, kind: Kind, number: int) -> str:
    """A name for errors and plots: the path or address, else the number."""
    name = str(picture) if isinstance(picture, str | Path) else ""
    return name if 0 < len(name) <= 200 and not name.startswith("data:") else f"{kind} {number}"


def _listed(tokens: Mapping[int, int]) -> str:
    return ", ".join(f"{token} at {place}" for place, token in tokens.items()) or "none"
