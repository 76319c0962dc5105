"""Chat messages to one text, by a jinja2 template that is treated as foreign code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ernie_lab.inputs.errors import ChatTemplateError
from ernie_lab.inputs.media import Kind

Message: TypeAlias = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
_PICTURE_TYPES: Mapping[str, Kind] = {
    "image": "image",
    "image_url": "image",
    "video": "video",
    "video_url": "video",
}
_KEYS = ("path", "url", "base64")


@dataclass(frozen=True, slots=True)
class PicturePart:
    """An image or clip within message `message`; without `data` it is given apart."""

    message: int
    kind: Kind
    data: Any | None


def render_chat(
    messages: Sequence[Message],
    template: str,
    *,
    add_generation_prompt: bool = True,
    template_name: str = "the chat template",
    **variables: Any,
) -> str:
    """The text of a chat, special tokens included, as the model was trained to read it.

    `variables` reach the template by name: pass `**tokenizer.special_tokens`, and whatever
    else it understands (`enable_thinking=False`, `tools=[...]`). Content may be a list of text
    parts; they are joined as they are. All values must be JSON data, so that a template meets
    no object with methods. The whitespace rules and helpers are those of transformers; one
    thing is stricter: printing a variable that does not exist is an error, not nothing.
    """
    return render_messages(
        plain_messages(messages),
        template,
        variables,
        add_generation_prompt=add_generation_prompt,
        template_name=template_name,
    )


def render_messages(
    messages: Sequence[Message],
    template: str,
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool,
    template_name: str,
) -> str:
    """`render_chat` for messages that are already in the form that the template expects."""
    values = {
        "tools": None,
        "documents": None,
        **variables,
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
    }
    values = {name: _json_data(name, value) for name, value in values.items()}
    from ernie_lab.inputs.sandbox import TemplateSyntaxError, compiled, line_of

    try:
        return compiled(template).render(values)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{template_name}: {error}") from error
    except TemplateSyntaxError as error:
        raise ChatTemplateError(
            f"{template_name} is not valid jinja2: {error.message} (line {error.lineno})."
        ) from error
    except Exception as error:  # the template is foreign code and may fail in any way
        problem = str(error) or type(error).__name__
        raise ChatTemplateError(
            f"{template_name} failed{line_of(error.__traceback__)}: {problem}"
        ) from error


def plain_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with each content as one string; raises on what a text model cannot take."""
    return [_plain_message(i, message) for i, message in enumerate(checked_messages(messages))]


def checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, each with a known role; contents are not looked at."""
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ChatTemplateError(
            f"a chat is a {type(messages).__name__}, expected a list of messages such as "
            '[{"role": "user", "content": "Hello"}].'
        )
    if not messages:
        raise ChatTemplateError("the chat has no message; give at least one.")
    return [_checked_message(index, message) for index, message in enumerate(messages)]


def _checked_message(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ChatTemplateError(
            f"message {index} is a {type(message).__name__}, expected a dict with role and content."
        )
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(
            f"message {index} has role {role!r}, expected one of {', '.join(ROLES)}."
        )
    if message.get("content") is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": ""}
    return dict(message)


def _plain_message(index: int, message: Message) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "".join(part_text(index, part) for part in content)
    if not isinstance(content, str):
        found = "no content" if content is None else f"content of type {type(content).__name__}"
        raise ChatTemplateError(
            f"message {index} ({message['role']}) has {found}, expected a string or a list of "
            "text parts."
        )
    return {**message, "content": content}


def take_pictures(messages: Sequence[Message]) -> tuple[list[dict[str, Any]], list[PicturePart]]:
    """The messages as a template may see them, and the pictures that were in them, in order.

    Contents with a picture stay lists of parts, of which a picture's keeps only its type
    ("image" or "video"); all others become one string.
    """
    taken: list[PicturePart] = []
    stripped = []
    for index, message in enumerate(checked_messages(messages)):
        content = message.get("content")
        parts = content if isinstance(content, list | tuple) else []
        pictures = [_picture(index, part) for part in parts]
        if not any(pictures):
            stripped.append(_plain_message(index, message))
            continue
        shown = [
            {"type": picture.kind} if picture else {"type": "text", "text": part_text(index, part)}
            for picture, part in zip(pictures, parts, strict=True)
        ]
        stripped.append({**message, "content": shown})
        taken += [picture for picture in pictures if picture]
    return stripped, taken


def _picture(index: int, part: object) -> PicturePart | None:
    """A picture's part in the formats of transformers or of OpenAI; None for any other part."""
    kind = _PICTURE_TYPES.get(str(part.get("type"))) if isinstance(part, Mapping) else None
    if kind is None or not isinstance(part, Mapping):
        return None
    given = {key: value for key, value in part.items() if key != "type" and value is not None}
    nested = given.get(f"{kind}_url")
    if isinstance(nested, Mapping):
        given |= {
            f"{kind}_url": nested.get("url"),
            **{k: v for k, v in nested.items() if k != "url"},
        }
    where, known = f"message {index} holds a part of type {kind!r}", (kind, f"{kind}_url", *_KEYS)
    if unknown := [key for key in given if key not in known]:
        raise ChatTemplateError(
            f"{where} with the key {unknown[0]!r}, which would have no effect; known are type, "
            f"{', '.join(known)}."
        )
    if len(given) > 1:
        raise ChatTemplateError(f"{where} with {' and '.join(given)}; give its data once.")
    if not given:
        return PicturePart(index, kind, None)
    ((key, data),) = given.items()
    if key == "path" and isinstance(data, str):
        data = Path(data)
    elif key == "base64" and not str(data).startswith("data:"):
        data = f"data:;base64,{data}"
    return PicturePart(index, kind, data)


def part_text(index: int, part: object) -> str:
    """The text of a text part of message `index`; raises on any other part."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(text, str):
        return text
    if kind == "audio":
        raise ChatTemplateError(
            f"message {index} holds a part of type 'audio', which no ERNIE 4.5 model reads."
        )
    if kind in ("image", "image_url", "video", "video_url"):
        raise ChatTemplateError(
            f"message {index} holds a part of type {kind!r}; text models take text parts only."
        )
    raise ChatTemplateError(
        f'message {index} holds the part {part!r}, expected {{"type": "text", "text": "..."}}.'
    )


def _json_data(name: str, value: object) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ChatTemplateError(
            f"{name} must be JSON data (text, numbers, lists, dicts) to enter a template: {error}"
        ) from error
