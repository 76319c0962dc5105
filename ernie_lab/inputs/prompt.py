"""Everything a user may call a prompt, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeGuard

from torch import Tensor

from ernie_lab.inputs.chat import Message, render_chat
from ernie_lab.inputs.chat_templates import TemplateKind, default_template
from ernie_lab.inputs.errors import PromptError
from ernie_lab.inputs.media import Media
from ernie_lab.inputs.tokenizer import SENTENCEPIECE_NAMES, Tokenizer

Ids: TypeAlias = Sequence[int] | Tensor
Chat: TypeAlias = Sequence[Message]
Form: TypeAlias = Literal["text", "ids", "chat"]
Prompt: TypeAlias = str | Sequence[str] | Ids | Sequence[Ids] | Chat | Sequence[Chat]

_FORMS = (
    "a string, a list of strings, token ids (list or tensor), a list of id lists, chat messages "
    '([{"role": "user", "content": "..."}]), or a list of chats'
)


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """One sequence, with the text it was made from (None when ids were given).

    `media` are its pictures and clips in reading order; `text` shows one marker for each.
    """

    ids: tuple[int, ...]
    text: str | None
    media: tuple[Media, ...] = ()


def read_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> tuple[EncodedPrompt, ...]:
    """One entry for every sequence in `prompt`.

    Strings are encoded as they are, without BOS; text that spells a special token becomes
    that token. A chat is rendered by `template`, else by the checkpoint's own, else by our
    template for text models; `variables` go to it.
    """
    if not is_chat(prompt):
        refuse_options(template, add_generation_prompt, variables)
    form, items = prompt_items(prompt)
    if form == "text":
        return tuple(from_text(text, tokenizer, where) for where, text in items)
    if form == "ids":
        return tuple(from_ids(ids, where) for where, ids in items)
    return tuple(
        _from_chat(chat, tokenizer, template, add_generation_prompt, variables) for _, chat in items
    )


def prompt_items(prompt: Prompt) -> tuple[Form, list[tuple[str, Any]]]:
    """The form of a prompt, and one (name for errors, item) for every sequence in it."""
    if isinstance(prompt, str):
        return "text", [("the prompt", prompt)]
    if isinstance(prompt, Tensor):
        rows = [prompt] if prompt.ndim == 1 else list(prompt) if prompt.ndim == 2 else None
        if rows is None:
            raise PromptError(
                f"the prompt is a tensor of shape {tuple(prompt.shape)}, expected 1-D token ids "
                "or 2-D (batch, sequence)."
            )
        return "ids", _numbered("sequence", rows)
    if not _is_list(prompt):
        raise PromptError(f"the prompt is a {type(prompt).__name__}, expected {_FORMS}.")

    match _kind_of_items(prompt):
        case "text":
            return "text", _numbered("prompt", prompt)
        case "id":
            return "ids", [("the prompt", prompt)]
        case "ids":
            return "ids", _numbered("sequence", prompt)
        case "message":
            return "chat", [("the chat", prompt)]
        case _:
            return "chat", _numbered("chat", prompt)


def refuse_options(
    template: str | None, add_generation_prompt: bool, variables: Mapping[str, Any]
) -> None:
    """Raise if anything was said about the rendering of a chat, where there is none."""
    given = [*variables]
    given += ["template"] if template is not None else []
    given += [] if add_generation_prompt else ["add_generation_prompt"]
    if given:
        raise PromptError(
            f"{', '.join(given)} would have no effect: the prompt is no chat. Give messages "
            '([{"role": "user", "content": "..."}]) or leave it out.'
        )


def is_single(prompt: Prompt) -> bool:
    """Is this one sequence (a string, one list of ids, one chat), not a batch of one?"""
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, Tensor):
        return prompt.ndim == 1
    return bool(prompt) and (_is_id(prompt[0]) or isinstance(prompt[0], Mapping))


def is_chat(prompt: Prompt) -> bool:
    """Messages, or a list of chats: what a template renders."""
    first = prompt[0] if _is_list(prompt) and prompt else None
    return isinstance(first, Mapping) or (
        _is_list(first) and bool(first) and isinstance(first[0], Mapping)
    )


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    *,
    template: str | None = None,
    add_generation_prompt: bool = True,
    **variables: Any,
) -> list[list[int]]:
    """The ids of `read_prompt`, one list for every sequence."""
    sequences = read_prompt(
        prompt,
        tokenizer,
        template=template,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    return [list(sequence.ids) for sequence in sequences]


def _numbered(noun: str, items: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(f"{noun} {index}", item) for index, item in enumerate(items)]


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _kind_of_item(item: object) -> str:
    """text, id, message, ids or chat; otherwise the name of the type, for the error."""
    if isinstance(item, str):
        return "text"
    if _is_id(item):
        return "id"
    if isinstance(item, Mapping):
        return "message"
    if isinstance(item, Tensor):
        return "ids"
    if _is_list(item):
        if not item:
            return "empty list"
        inner = {_kind_of_item(part) for part in item}
        return (
            {"id": "ids", "message": "chat"}.get(inner.pop(), "list")
            if len(inner) == 1
            else ("mixed list")
        )
    return type(item).__name__


def _kind_of_items(prompt: Sequence[Any]) -> str:
    if not prompt:
        raise PromptError(f"the prompt is empty, expected {_FORMS}.")
    kinds = [_kind_of_item(item) for item in prompt]
    for index, kind in enumerate(kinds):
        if kind not in ("text", "id", "message", "ids", "chat"):
            raise PromptError(
                f"item {index} of the prompt ({prompt[index]!r:.60}) is a {kind}; "
                f"expected {_FORMS}."
            )
        if kind != kinds[0]:
            raise PromptError(
                f"the prompt mixes {kinds[0]} (item 0) and {kind} (item {index}); "
                f"expected one form: {_FORMS}."
            )
    return kinds[0]


def from_ids(ids: Ids, where: str) -> EncodedPrompt:
    """Token ids as they are; `where` names them in errors."""
    if isinstance(ids, Tensor):
        if ids.ndim != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype.itemsize < 2:
            raise PromptError(
                f"{where} is a tensor of {ids.dtype} and shape {tuple(ids.shape)}, expected "
                "1-D integer token ids."
            )
        ids = ids.tolist()
    if not ids:
        raise PromptError(f"{where} has no token; start from at least one, for example BOS.")
    if negative := [i for i in ids if i < 0]:
        raise PromptError(f"{where} holds the token id {negative[0]}; ids are not negative.")
    return EncodedPrompt(tuple(int(i) for i in ids), None)


def from_text(text: str, tokenizer: Tokenizer | None, where: str) -> EncodedPrompt:
    """Text as it is; `where` names it in errors."""
    known = required_tokenizer(tokenizer)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where} holds {text[error.start]!r} at {error.start}, half of a surrogate pair, "
            "which is no character; was it cut inside an emoji?"
        ) from error
    ids = known.encode(text)
    if not ids:
        raise PromptError(f"{where} is {text!r}, which has no token; there is nothing to run.")
    return EncodedPrompt(tuple(ids), text)


def _from_chat(
    chat: Chat,
    tokenizer: Tokenizer | None,
    template: str | None,
    add_generation_prompt: bool,
    variables: Mapping[str, Any],
) -> EncodedPrompt:
    known = required_tokenizer(tokenizer)
    chosen, name = choose_template(known, template, "text")
    text = render_chat(
        chat,
        chosen,
        add_generation_prompt=add_generation_prompt,
        template_name=name,
        **{**known.special_tokens, **variables},
    )
    return from_text(text, known, "the rendered chat")


def choose_template(
    tokenizer: Tokenizer, template: str | None, kind: TemplateKind
) -> tuple[str, str]:
    """The template given, else the checkpoint's own, else ours of `kind`; and its name."""
    own = None if template is not None else tokenizer.chat_template
    name = f"the chat template of {tokenizer.source}" if own else "the chat template"
    return template or own or default_template(kind), name


def required_tokenizer(tokenizer: Tokenizer | None) -> Tokenizer:
    """The tokenizer, or an error that says how to do without."""
    if tokenizer is None:
        files = ", ".join(("tokenizer.json", *SENTENCEPIECE_NAMES))
        raise PromptError(
            f"text needs a tokenizer, and the checkpoint folder holds none of {files}. Add one of "
            "them, or pass token ids: a list of numbers, a list of such lists, or a tensor."
        )
    return tokenizer
