"""Chat templates for checkpoints that bring none of their own."""

from __future__ import annotations

import re
from typing import Literal, TypeAlias

from ernie_lab.inputs.errors import ChatTemplateError

TemplateKind: TypeAlias = Literal["text", "thinking", "vl"]

# ERNIE 4.5 0.3B, 21B-A3B-PT and 300B. Turns are marked by words, not by special tokens; the
# whole chat starts with cls (not BOS) and every answer ends with sep (not EOS).
_TEXT = """\
{%- set begin = cls_token if cls_token is defined else "<|begin_of_sentence|>" -%}
{%- set end = sep_token if sep_token is defined else "<|end_of_sentence|>" -%}
{{- begin -}}
{%- for message in messages -%}
    {%- if message.role == "system" -%}
        {{- message.content + "\\n" -}}
    {%- elif message.role == "user" -%}
        {{- "User: " + message.content + "\\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "Assistant: " + message.content + end -}}
    {%- else -%}
        {{- raise_exception("this template has no place for the role " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "Assistant: " -}}
{%- endif -%}
"""

# ERNIE 4.5 21B-A3B-Thinking. The released template opens the reasoning of a new answer
# whether or not a generation prompt is asked for, and so does this one.
_THINKING = """\
{%- set has_system = messages[0].role == "system" -%}
{{- "<|im_start|>system\\n" -}}
{%- if has_system -%}
    {{- "<system_setting>\\n" + messages[0].content + "\\n</system_setting>\\n\\n" -}}
{%- endif -%}
{{- "<global_setting>\\nthink_mode=True\\n</global_setting><|im_end|>\\n\\n" -}}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if message.role == "user" -%}
        {{- "<|im_start|>user\\n" + message.content + "<|im_end|>\\n\\n" -}}
    {%- elif message.role == "assistant" -%}
        {{- "<|im_start|>assistant\\n<response>\\n" + message.content -}}
        {{- "\\n</response>\\n<|im_end|>\\n\\n" -}}
    {%- elif message.role == "system" -%}
        {{- raise_exception("a system message may only come first") -}}
    {%- else -%}
        {{- raise_exception("this template has no place for the role " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{{- "<|im_start|>assistant\\n<think>\\n" -}}
"""


# ERNIE 4.5 VL. Pictures and clips are counted apart, over the whole conversation, and written
# as the originals do: one marker each, which `visual_prompt` expands. Without `enable_thinking`
# an answer begins after an empty reasoning, which the history does not repeat; the reasoning of
# an earlier answer stays in the history when the message brings it.
_VL = """\
{%- set begin = cls_token if cls_token is defined else "<|begin_of_sentence|>" -%}
{%- set end = sep_token if sep_token is defined else "<|end_of_sentence|>" -%}
{%- set seen = namespace(images=0, videos=0) -%}
{{- begin -}}
{%- for message in messages -%}
    {%- if message.role == "assistant" -%}
        {%- if message.content is not string -%}
            {{- raise_exception("an assistant's message has a place for text only") -}}
        {%- endif -%}
        {%- set said = namespace(thinking="", answer=message.content) -%}
        {%- if "</think>" in message.content -%}
            {%- set halves = message.content.split("</think>", 1) -%}
            {%- set said.thinking = halves[0].split("<think>")[-1] -%}
            {%- set said.answer = halves[1].lstrip("\\n") -%}
        {%- elif message.reasoning_content is defined and message.reasoning_content -%}
            {%- set said.thinking = message.reasoning_content -%}
            {%- set said.answer = message.content.lstrip("\\n") -%}
        {%- endif -%}
        {{- "\\nAssistant: " -}}
        {%- if said.thinking.strip() -%}
            {{- "<think>\\n" + said.thinking.strip("\\n") + "\\n</think>\\n" -}}
        {%- endif -%}
        {{- said.answer + end -}}
    {%- elif message.role in ["system", "user"] -%}
        {%- if message.role == "user" -%}
            {{- "User: " -}}
        {%- endif -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if part.type == "image" -%}
                    {%- set seen.images = seen.images + 1 -%}
                    {{- "Picture " ~ seen.images ~ ":<|IMAGE_START|>" -}}
                    {{- "<|image@placeholder|><|IMAGE_END|>" -}}
                {%- elif part.type == "video" -%}
                    {%- set seen.videos = seen.videos + 1 -%}
                    {{- "Video " ~ seen.videos ~ ":<|VIDEO_START|>" -}}
                    {{- "<|video@placeholder|><|VIDEO_END|>" -}}
                {%- else -%}
                    {{- part.text -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        {%- if message.role == "system" -%}
            {{- "\\n" -}}
        {%- endif -%}
    {%- else -%}
        {{- raise_exception("this template has no place for the role " + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "\\nAssistant: <think>" -}}
    {%- if enable_thinking is not defined or not enable_thinking -%}
        {{- "\\n\\n</think>\\n\\n" -}}
    {%- endif -%}
{%- endif -%}
"""
# A part of a name, such as "-VL-"; "evla" is none.
_VL_NAME = re.compile(r"(^|[^a-z])vl([^a-z]|$)")


def default_template(kind: TemplateKind = "text") -> str:
    """Our template for a family of checkpoints; see `template_kind` for choosing one.

    Written from the rendered text of the released templates. Tools are not supported, and
    the `<system_setting>` block of `"thinking"` rests on one secondary source. `"vl"` takes
    `enable_thinking`: an answer begins with an empty reasoning unless it is true.
    """
    templates = {"text": _TEXT, "thinking": _THINKING, "vl": _VL}
    if kind not in templates:
        known = ", ".join(f'"{name}"' for name in templates)
        raise ChatTemplateError(f"no built-in chat template {kind!r}; there are {known}.")
    return templates[kind]


def template_kind(name: str, *, visual: bool | None = None) -> TemplateKind:
    """The family of a checkpoint: `visual` says whether its config is that of a VL model.

    The rest is guessed from a hub id or folder name, for the text families share one
    architecture: "baidu/ERNIE-4.5-21B-A3B-Thinking" is a thinking model, every other name a
    plain one. With `visual=None` a name like "ERNIE-4.5-VL-28B-A3B-PT" is taken for a VL model.
    """
    last = re.split(r"[/\\]", name.lower().rstrip("/\\"))[-1]
    if visual if visual is not None else _VL_NAME.search(last):
        return "vl"
    return "thinking" if "thinking" in name.lower() else "text"
