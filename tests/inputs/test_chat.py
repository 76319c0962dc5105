"""Chats to text: the released formats, transformers' own rendering, and hostile templates."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models

from ernie_lab.inputs import ChatTemplateError, default_template, render_chat, template_kind
from ernie_lab.inputs.chat import PicturePart, render_messages, take_pictures

CHAT = [
    {"role": "system", "content": "You are a helpful chatbot."},
    {"role": "user", "content": "Hello!"},
]
LONG = [
    *CHAT,
    {"role": "assistant", "content": "Nice to meet you."},
    {"role": "user", "content": "<b>5 & 6</b>\n你好 😀"},
]
TEMPLATES = [
    default_template("text"),
    default_template("thinking"),
    default_template("vl"),
    "{{ bos_token }}{% for m in messages %}\n  {% if m.role != 'system' %}\n[{{ m.role }}]\n"
    "{% endif %}\n{{ m['content'] | trim }}{% endfor %}\n",
    "{% for m in messages %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ m.content }}"
    "{% endfor %}{% if tools %}x{% endif %}{% if documents is none %}none{% endif %}",
    "{{ messages | tojson }}{{ {'a': '<é>'} | tojson(indent=2) }}{{ strftime_now('%Y') }}",
    "{% for m in messages %}{%- generation -%} {{ m.content }} {% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ dict(a=1).a }}{% if a is defined %}a{% endif %}{{ enable_thinking }}",
]


@pytest.fixture(scope="module")
def oracle() -> transformers.PreTrainedTokenizerFast:
    backend = Backend(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        cls_token="<|begin_of_sentence|>",
        sep_token="<|end_of_sentence|>",
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", [CHAT, LONG], ids=["short", "long"])
def test_same_text_as_transformers(
    oracle: transformers.PreTrainedTokenizerFast,
    template: str,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
) -> None:
    expected = oracle.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    )
    ours = render_chat(
        messages,
        template,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
        **oracle.special_tokens_map,
    )
    assert ours == expected


def test_text_format() -> None:
    template = default_template()
    begin = "<|begin_of_sentence|>You are a helpful chatbot.\nUser: Hello!\n"
    assert render_chat(CHAT, template, add_generation_prompt=False) == begin
    assert render_chat(CHAT, template) == begin + "Assistant: "
    answer = "Assistant: Nice to meet you.<|end_of_sentence|>"
    assert render_chat(LONG[:3], template, add_generation_prompt=False) == begin + answer
    own = render_chat(CHAT[1:], template, cls_token="[", sep_token="]")
    assert own == "[User: Hello!\nAssistant: "


def test_thinking_format() -> None:
    template = default_template("thinking")
    head = "<|im_start|>system\n<global_setting>\nthink_mode=True\n</global_setting><|im_end|>\n\n"
    user = "<|im_start|>user\nHello!<|im_end|>\n\n"
    answer = "<|im_start|>assistant\n<response>\nHi.\n</response>\n<|im_end|>\n\n"
    tail = "<|im_start|>assistant\n<think>\n"
    chat = [CHAT[1], {"role": "assistant", "content": "Hi."}]
    for add_generation_prompt in (True, False):
        rendered = render_chat(chat, template, add_generation_prompt=add_generation_prompt)
        assert rendered == head + user + answer + tail
    assert render_chat(CHAT, template).startswith(
        "<|im_start|>system\n<system_setting>\nYou are a helpful chatbot.\n</system_setting>\n\n"
        "<global_setting>\n"
    )
    with pytest.raises(ChatTemplateError, match="system message may only come first"):
        render_chat([CHAT[1], CHAT[0]], template)


NO_THINKING = "\nAssistant: <think>\n\n</think>\n\n"
BEGIN = "<|begin_of_sentence|>You are a helpful chatbot.\nUser: Hello!"


def test_visual_format() -> None:
    template = default_template("vl")
    assert render_chat(CHAT, template, add_generation_prompt=False) == BEGIN
    assert render_chat(CHAT, template) == BEGIN + NO_THINKING
    assert render_chat(CHAT, template, enable_thinking=False) == BEGIN + NO_THINKING
    thinking = render_chat(CHAT, template, enable_thinking=True)
    assert thinking == BEGIN + "\nAssistant: <think>"
    long = BEGIN + "\nAssistant: Nice to meet you.<|end_of_sentence|>User: <b>5 & 6</b>\n你好 😀"
    assert render_chat(LONG, template) == long + NO_THINKING
    assert render_chat(CHAT[1:], template, cls_token="[") == "[User: Hello!" + NO_THINKING


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"content": "4"}, "4"),
        ({"content": "4", "reasoning_content": "\n2 + 2\n"}, "<think>\n2 + 2\n</think>\n4"),
        ({"content": "<think>\n2 + 2\n</think>\n\n4"}, "<think>\n2 + 2\n</think>\n4"),
        ({"content": "2 + 2\n</think>\n\n4"}, "<think>\n2 + 2\n</think>\n4"),
        ({"content": "<think>\n\n</think>\n\n4"}, "4"),
        ({"content": "4", "reasoning_content": ""}, "4"),
    ],
)
def test_thinking_of_earlier_answers(answer: dict[str, str], expected: str) -> None:
    """The reference keeps it where a message brings it; an empty pair of tags goes."""
    chat = [CHAT[1], {"role": "assistant", **answer}]
    rendered = render_chat(chat, default_template("vl"), add_generation_prompt=False)
    assert rendered == (
        f"<|begin_of_sentence|>User: Hello!\nAssistant: {expected}<|end_of_sentence|>"
    )


def test_pictures_in_the_visual_format() -> None:
    image, video, text = {"type": "image"}, {"type": "video"}, {"type": "text", "text": "What?"}
    chat = [
        {"role": "system", "content": [text, image]},
        {"role": "user", "content": [image, text, video]},
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": [video, image]},
    ]
    rendered = render_messages(
        chat, default_template("vl"), {}, add_generation_prompt=True, template_name="T"
    )
    picture = "Picture {}:<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>".format
    clip = "Video {}:<|VIDEO_START|><|video@placeholder|><|VIDEO_END|>".format
    assert rendered == (
        f"<|begin_of_sentence|>What?{picture(1)}\nUser: {picture(2)}What?{clip(1)}"
        f"\nAssistant: A cat.<|end_of_sentence|>User: {clip(2)}{picture(3)}{NO_THINKING}"
    )
    chat[2]["content"] = [image]
    with pytest.raises(ChatTemplateError, match="assistant's message has a place for text only"):
        render_messages(
            chat, default_template("vl"), {}, add_generation_prompt=True, template_name="T"
        )


@pytest.mark.parametrize(
    ("part", "kind", "data"),
    [
        ({"type": "image"}, "image", None),
        ({"type": "image", "image": "a.png", "url": None}, "image", "a.png"),
        ({"type": "image", "path": "a.png"}, "image", Path("a.png")),
        ({"type": "image", "url": "https://x.org/a"}, "image", "https://x.org/a"),
        ({"type": "image", "base64": "eA=="}, "image", "data:;base64,eA=="),
        (
            {"type": "image", "base64": "data:image/png;base64,eA=="},
            "image",
            "data:image/png;base64,eA==",
        ),
        ({"type": "image_url", "image_url": {"url": "data:,x"}}, "image", "data:,x"),
        ({"type": "image_url", "image_url": "https://x.org/a"}, "image", "https://x.org/a"),
        ({"type": "video", "video": ["f1", "f2"]}, "video", ["f1", "f2"]),
        (
            {"type": "video_url", "video_url": {"url": "https://x.org/a"}},
            "video",
            "https://x.org/a",
        ),
    ],
)
def test_pictures_are_taken_out_of_messages(part: dict[str, Any], kind: str, data: Any) -> None:
    text = {"type": "text", "text": "What?"}
    chat = [CHAT[0], {"role": "user", "content": [text, part], "name": "x"}]
    messages, pictures = take_pictures(chat)
    assert pictures == [PicturePart(1, kind, data)]  # type: ignore[arg-type]
    assert messages == [
        CHAT[0],
        {"role": "user", "content": [text, {"type": kind}], "name": "x"},
    ]


@pytest.mark.parametrize(
    ("part", "complaint"),
    [
        ({"type": "image", "image": "a", "path": "b"}, "with image and path; give its data once"),
        ({"type": "image", "resized_height": 28}, "the key 'resized_height', which would have no"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "low"}}, "the key 'detail'"),
        ({"type": "image", "video": "a"}, "the key 'video', which would have no effect"),
        ({"type": "audio", "audio": "a"}, "'audio', which no ERNIE 4.5 model reads"),
        ({"type": "picture"}, "message 0 holds the part"),
    ],
)
def test_malformed_pictures(part: dict[str, Any], complaint: str) -> None:
    content = [{"type": "image"}, part]
    with pytest.raises(ChatTemplateError, match=complaint):
        take_pictures([{"role": "user", "content": content}])


def test_template_kind() -> None:
    assert template_kind("baidu/ERNIE-4.5-21B-A3B-Thinking") == "thinking"
    assert template_kind("baidu/ERNIE-4.5-21B-A3B-PT") == "text"
    assert template_kind("baidu/ERNIE-4.5-VL-28B-A3B-PT") == "vl"
    assert template_kind("baidu/ERNIE-4.5-VL-28B-A3B-Thinking/") == "vl"
    assert template_kind("tiny-vl") == "vl"
    assert template_kind("/data/vl/ERNIE-4.5-21B-A3B-PT") == template_kind("evla") == "text"
    assert template_kind("ERNIE-4.5-VL-28B-A3B-Thinking", visual=False) == "thinking"
    assert template_kind("/my/model", visual=True) == "vl"
    with pytest.raises(ChatTemplateError, match="no built-in chat template 'x'; there are"):
        default_template("x")  # type: ignore[arg-type]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo!"}]
    chat = [CHAT[0], {"role": "user", "content": parts}]
    assert render_chat(chat, default_template()) == render_chat(CHAT, default_template())


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        ([], "the chat has no message"),
        ("Hello", "a chat is a str, expected a list of messages"),
        ({"role": "user", "content": "x"}, "a chat is a dict"),
        (["Hello"], "message 0 is a str"),
        ([{"content": "x"}], "message 0 has role None, expected one of system, user"),
        ([CHAT[0], {"role": "human", "content": "x"}], "message 1 has role 'human'"),
        ([{"role": "user"}], r"message 0 \(user\) has no content"),
        ([{"role": "user", "content": 3}], "has content of type int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "part of type 'image'; text models"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part of type 'video'; text models"),
        ([{"role": "user", "content": ["x"]}], "message 0 holds the part 'x', expected"),
        ([{"role": "user", "content": "x", "extra": object()}], "messages must be JSON data"),
    ],
)
def test_malformed_chats(messages: Sequence[Any], complaint: str) -> None:
    with pytest.raises(ChatTemplateError, match=complaint):
        render_chat(messages, default_template())


def test_roles_without_a_place() -> None:
    chat = [{"role": "tool", "content": "x"}]
    for kind in ("text", "thinking"):
        with pytest.raises(ChatTemplateError, match="no place for the role tool"):
            render_chat(chat, default_template(kind))


def test_tool_calls_may_lack_content() -> None:
    chat = [{"role": "assistant", "tool_calls": [{"name": "f"}], "content": None}]
    template = "{{ messages[0].content }}{{ messages[0].tool_calls[0].name }}"
    assert render_chat(chat, template) == "f"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% if %}", "T is not valid jinja2: .*line 1"),
        ("a\n{{ missing }}", "T: it prints 'missing', which is not defined"),
        ("a\n\n{{ missing.name }}", "T failed at line 3: 'missing' is undefined"),
        ("{{ messages[9].content }}", "T failed at line 1"),
        ("{{ raise_exception('no way') }}", "T: it refuses this chat: no way"),
        ("{{ 'a' + 1 }}", "T failed at line 1: can only concatenate str"),
        ("{% include 'other' %}", "T failed"),
    ],
)
def test_broken_templates(template: str, complaint: str) -> None:
    with pytest.raises(ChatTemplateError, match=complaint):
        render_chat(CHAT, template, template_name="T")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'] }}",
        "{{ ''|attr('__class__') }}",
        "{{ ('%s' | format).__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['re'] }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ lipsum.__globals__.os }}",
        "{% for i in range(1000000000) %}{% endfor %}",
    ],
)
def test_templates_cannot_leave_the_sandbox(template: str) -> None:
    with pytest.raises(ChatTemplateError):
        render_chat(CHAT, template)


def test_format_strings_see_no_attributes() -> None:
    assert render_chat(CHAT, "[{{ '{0.__class__}'.format(messages) }}]") == "[]"


def test_messages_are_left_alone() -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
    render_chat(chat, "{% set m = messages[0] %}{{ m.content }}")
    assert chat == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


def test_date_is_today() -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", render_chat(CHAT, "{{ strftime_now('%Y-%m-%d') }}"))
