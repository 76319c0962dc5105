"""The thinking of a reasoning model, apart from its answer.

ERNIE writes `<think>` thinking `</think>` answer. Mostly the chat template has already written
`<think>` into the prompt, or the whole of an empty pair. The 21B-Thinking model puts its answer
into `<response>` ... `</response>`. Where the tags are tokens of their own they may be special,
so that a text decoded without special tokens lacks them: then split the ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ernie_lab.inputs.tokenizer import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
RESPONSE_OPEN, RESPONSE_CLOSE = "<response>", "</response>"
# More than the tokens of a tag and of the line breaks after it, where tags are ordinary text.
_TAIL = 32


@dataclass(frozen=True, slots=True)
class Thought:
    """`thinking` is None if there was none; `closed` is False if it never came to an end."""

    thinking: str | None
    answer: str
    closed: bool = True


@dataclass(frozen=True, slots=True)
class ThoughtIds:
    """The same as token ids, without the tags; nothing else is taken away."""

    thinking: tuple[int, ...] | None
    answer: tuple[int, ...]
    closed: bool = True


def split_thinking(text: str, opened: bool = False) -> Thought:
    """Separate a generated text; `opened` says that the prompt ended in `<think>`.

    Thinking counts only at the beginning: tags later on, or `</think>` without an opening, are
    part of the answer. The line breaks around the tags go; a text without thinking stays as it
    is, but for the tags of a response.
    """
    begins = text.lstrip().startswith(OPEN)
    if not (opened or begins):
        return Thought(None, _unwrapped(text))
    inside = text.lstrip().removeprefix(OPEN) if begins else text
    thinking, close, answer = inside.partition(CLOSE)
    if not close:
        return Thought(thinking.strip("\n"), "", closed=False)
    return Thought(thinking.strip("\n"), _unwrapped(answer.lstrip("\n")))


def split_thinking_ids(
    ids: Sequence[int],
    open_id: int | None,
    close_id: int,
    opened: bool = False,
    blank_ids: frozenset[int] = frozenset(),
) -> ThoughtIds:
    """Separate generated ids by the ids of the tags.

    As in `split_thinking`, but exact: text that merely spells a tag does not count. An opening
    tag may come after `blank_ids` (white space) only.
    """
    first = next((place for place, i in enumerate(ids) if i not in blank_ids), len(ids))
    begins = open_id is not None and first < len(ids) and ids[first] == open_id
    if not (opened or begins):
        return ThoughtIds(None, tuple(ids))
    inside = tuple(ids[first + 1 :] if begins else ids)
    if close_id not in inside:
        return ThoughtIds(inside, (), closed=False)
    place = inside.index(close_id)
    return ThoughtIds(inside[:place], inside[place + 1 :])


def read_thinking(
    ids: Sequence[int],
    tokenizer: Tokenizer,
    opened: bool = False,
    *,
    text: str | None = None,
) -> Thought:
    """Separate generated ids into texts without special tokens.

    Tags that are tokens are found as ids, others in the text. `text` is the decoded text where
    it was cut, as before a stop string; the result is cut at the same place.
    """
    whole = tokenizer.decode(ids, skip_special=True)
    excess = 0 if text is None else len(whole) - len(text)
    close_id = tag_id(tokenizer, CLOSE)
    if close_id is None:
        return split_thinking(whole[: len(whole) - excess], opened)
    blank = frozenset(i for i in ids if not tokenizer.stream_bytes(i).strip())
    halves = split_thinking_ids(ids, tag_id(tokenizer, OPEN), close_id, opened, blank)
    answer = tokenizer.decode(halves.answer, skip_special=True)
    beyond = excess - len(answer)
    answer = answer[: max(-beyond, 0)]
    if halves.thinking is None:
        return Thought(None, _unwrapped(answer))
    thinking = tokenizer.decode(halves.thinking, skip_special=True)
    if beyond > 0:
        tag = tokenizer.decode([close_id], skip_special=True) if halves.closed else ""
        kept = len(thinking) - max(beyond - len(tag), 0)
        return Thought(thinking[:kept].strip("\n"), "", closed=False)
    if tag_id(tokenizer, RESPONSE_OPEN) in halves.answer:
        answer = answer.strip("\n")  # its tags may be special, and gone
    return Thought(thinking.strip("\n"), _unwrapped(answer.lstrip("\n")), halves.closed)


def thinking_is_open(prompt_ids: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Does the prompt end in `<think>`, so that what is generated begins as thinking?"""
    return tokenizer.decode(prompt_ids[-_TAIL:]).rstrip().endswith(OPEN)


def tag_id(tokenizer: Tokenizer, tag: str) -> int | None:
    """The id of a tag that is one token, or None where it is ordinary text."""
    ids = tokenizer.encode(tag)
    return ids[0] if len(ids) == 1 else None


def _unwrapped(answer: str) -> str:
    """What `<response>` ... `</response>` holds; the closing tag may not have come yet."""
    if not answer.lstrip().startswith(RESPONSE_OPEN):
        return answer
    inside, _, after = answer.lstrip().removeprefix(RESPONSE_OPEN).partition(RESPONSE_CLOSE)
    return inside.strip("\n") + after.strip("\n")
