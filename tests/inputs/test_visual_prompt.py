"""Prompts with pictures: labels, placeholders, counts, and text that imitates a picture."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.inputs import PromptError, Tokenizer, load_tokenizer, render_chat
from ernie_lab.inputs.chat_templates import default_template
from ernie_lab.inputs.errors import ChatTemplateError
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.inputs.prompt import EncodedPrompt, read_prompt
from ernie_lab.inputs.visual_prompt import read_visual_prompt

NAMES = ["IMAGE_PLACEHOLDER", "IMAGE_START", "IMAGE_END", "VIDEO_START", "VIDEO_END"]
TEXT = {"type": "text", "text": "What kind of dog is this?"}
IMAGE, VIDEO = {"type": "image"}, {"type": "video"}
TAIL = "\nAssistant: <think>\n\n</think>\n\n"


@dataclass
class Reader:
    """Pictures are named by their number of tokens; what was asked for is noted."""

    seen: list[tuple[str, Any, str]] = field(default_factory=list)

    def image(self, picture: Any, source: str) -> Media:
        return self._read("image", picture, source)

    def video(self, clip: Any, source: str) -> Media:
        return self._read("video", clip, source)

    def _read(self, kind: Any, picture: Any, source: str) -> Media:
        self.seen.append((kind, picture, source))
        n_tokens = picture if isinstance(picture, int) else 3
        grid = Grid(1 if kind == "image" else 2, 2, 2 * n_tokens)
        frames = np.zeros((grid.t, 28, 28 * n_tokens, 3), np.uint8)
        patches_PQ = torch.zeros(grid.n_patches, 4)
        return Media(kind, patches_PQ, grid, frames, (28, 28), (), source)


def tokenizer_with(folder: Path, model: bytes, names: list[str], **files: str) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(model)
    bare = load_tokenizer(folder)
    assert bare is not None
    tokens = [f"<|{name}|>" for name in names]
    added = {token: bare.vocab_size + i for i, token in enumerate(tokens)}
    special = {
        "additional_special_tokens": tokens,
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
    }
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    for name, content in files.items():
        (folder / f"{name}.jinja").write_text(content)
    loaded = load_tokenizer(folder)
    assert loaded is not None
    return loaded


def visual_ids(tokenizer: Tokenizer, video: str) -> VisualIds:
    fields = ("image", "image_start", "image_end", "video_start", "video_end")
    named = [tokenizer.id_of(f"<|{name}|>") for name in NAMES]
    return VisualIds(**dict(zip(fields, named, strict=True)), video=tokenizer.id_of(video))


@dataclass(frozen=True)
class Setting:
    """A tokenizer with its ids, and how each placeholder is spelled."""

    tokenizer: Tokenizer
    ids: VisualIds
    image: str
    video: str

    def read(
        self, prompt: Any, reader: Reader | None = None, **options: Any
    ) -> tuple[EncodedPrompt, ...]:
        return read_visual_prompt(prompt, self.tokenizer, reader or Reader(), self.ids, **options)

    def one(self, prompt: Any, **options: Any) -> EncodedPrompt:
        (sequence,) = self.read(prompt, **options)
        return sequence

    def picture(self, number: int, n_tokens: int) -> str:
        return f"Picture {number}:<|IMAGE_START|>{self.image * n_tokens}<|IMAGE_END|>"

    def clip(self, number: int, n_tokens: int) -> str:
        return f"Video {number}:<|VIDEO_START|>{self.video * n_tokens}<|VIDEO_END|>"


@pytest.fixture(scope="module", params=["own", "shared"])
def setting(
    request: pytest.FixtureRequest, bare_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Setting:
    """Baidu's released ids have one placeholder for both kinds, those of transformers two."""
    model = (bare_folder / "tokenizer.model").read_bytes()
    names = [*NAMES, "VIDEO_PLACEHOLDER"] if request.param == "own" else NAMES
    tokenizer = tokenizer_with(tmp_path_factory.mktemp("vl"), model, names)
    image = "<|IMAGE_PLACEHOLDER|>"
    video = "<|VIDEO_PLACEHOLDER|>" if request.param == "own" else image
    return Setting(tokenizer, visual_ids(tokenizer, video), image, video)


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def test_the_question_before_the_picture(setting: Setting) -> None:
    """The rendered text behind the golden ids of ernie-facts 4.7."""
    found = setting.one([user(TEXT, {"type": "image", "image": 4})])
    expected = f"<|begin_of_sentence|>User: What kind of dog is this?{setting.picture(1, 4)}{TAIL}"
    assert list(found.ids) == setting.tokenizer.encode(expected)
    assert [m.grid for m in found.media] == [Grid(1, 2, 8)]
    assert found.text is not None and found.text.count("<|image@placeholder|>") == 1


def test_pictures_are_counted_over_the_whole_conversation(setting: Setting) -> None:
    chat = [
        {"role": "system", "content": "Be brief."},
        user({"type": "image", "image": 2}, {"type": "video", "video": 5}, TEXT),
        {"role": "assistant", "content": "A lynx."},
        user({"type": "image", "image": 3}, TEXT, {"type": "video", "video": 1}),
    ]
    found = setting.one(chat, enable_thinking=True)
    question = TEXT["text"]
    expected = (
        f"<|begin_of_sentence|>Be brief.\nUser: {setting.picture(1, 2)}{setting.clip(1, 5)}"
        f"{question}\nAssistant: A lynx.<|end_of_sentence|>User: {setting.picture(2, 3)}{question}"
        f"{setting.clip(2, 1)}\nAssistant: <think>"
    )
    assert list(found.ids) == setting.tokenizer.encode(expected)
    assert "".join(f"{m.kind} {m.grid.n_tokens} " for m in found.media) == (
        "image 2 video 5 image 3 video 1 "
    )
    bare = setting.one(chat, add_generation_prompt=False)
    assert list(bare.ids) == setting.tokenizer.encode(expected.removesuffix("\nAssistant: <think>"))


parts = st.one_of(
    st.builds(lambda n: {"type": "image", "image": n}, st.integers(1, 5)),
    st.builds(lambda n: {"type": "video", "video": n}, st.integers(1, 5)),
    st.builds(lambda t: {"type": "text", "text": t}, st.text("ab <|>\n你", max_size=6)),
)


@given(contents=st.lists(st.lists(parts, max_size=5), min_size=1, max_size=3))
def test_the_shown_text_with_the_pictures_gives_the_same(
    setting: Setting, contents: list[list[dict[str, Any]]]
) -> None:
    found = setting.one([user(*content) for content in contents])
    given_apart = {
        f"{kind}s": [part[kind] for content in contents for part in content if kind in part]
        for kind in ("image", "video")
    }
    again = setting.one(found.text, **given_apart)
    assert again.ids == found.ids and again.text == found.text
    order = [part.get("image", part.get("video")) for c in contents for part in c]
    assert [m.grid.n_tokens for m in found.media] == [n for n in order if n is not None]
    assert [m.grid for m in again.media] == [m.grid for m in found.media]
    by_ids = setting.one(list(found.ids), **given_apart)
    assert by_ids.ids == found.ids and by_ids.text is None
    assert [m.grid for m in by_ids.media] == [m.grid for m in found.media]
    expanded = setting.one(setting.tokenizer.decode(found.ids), **given_apart)
    assert expanded.ids == found.ids


def test_pictures_given_apart(setting: Setting) -> None:
    reader = Reader()
    chat = [user(IMAGE, {"type": "image", "image": 7}, VIDEO, TEXT), user(IMAGE)]
    (found,) = setting.read(chat, reader, images=[2, 3], videos=4)
    assert [m.grid.n_tokens for m in found.media] == [2, 7, 4, 3]
    assert [(data, source) for _, data, source in reader.seen] == [
        *zip((2, 7, 3), ("image 1", "image 2", "image 3"), strict=True),
        (4, "video 1"),
    ]
    first = [*({"type": "image", "image": n} for n in (2, 7)), {**VIDEO, "video": 4}, TEXT]
    inside = setting.one([user(*first), user({"type": "image", "image": 3})])
    assert found.ids == inside.ids


def test_sources_name_paths_and_addresses(setting: Setting) -> None:
    reader = Reader()
    named = [
        {"type": "image", "path": "a/b.png"},
        {"type": "image_url", "image_url": {"url": "https://x.org/c.png"}},
        {"type": "image", "base64": "eA=="},
        {"type": "image", "image": np.zeros((2, 2, 3))},
        {"type": "video", "video": ["f1.png", "f2.png"]},
    ]
    setting.read([user(*named)], reader)
    names = ["a/b.png", "https://x.org/c.png", "image 3", "image 4", "video 1"]
    assert [source for _, _, source in reader.seen] == names
    assert reader.seen[0][1] == Path("a/b.png") and reader.seen[4][1] == ["f1.png", "f2.png"]


def test_a_string_with_pictures_is_one_message(setting: Setting) -> None:
    found = setting.one("Who?", images=[2, 3], videos=[1])
    expected = (
        f"<|begin_of_sentence|>User: {setting.picture(1, 2)}{setting.picture(2, 3)}"
        f"{setting.clip(1, 1)}Who?{TAIL}"
    )
    assert list(found.ids) == setting.tokenizer.encode(expected)
    assert setting.one("Who?", images=2).ids == setting.one(["Who?"], images=[2]).ids
    assert setting.one(["Who?"], images=[[2]]).ids == setting.one("Who?", images=[[2]]).ids
    thinking = setting.one("Who?", images=[2], enable_thinking=True)
    assert setting.tokenizer.decode(thinking.ids).endswith("Assistant: <think>")
    marked = "<|IMAGE_START|><|image@placeholder|><|IMAGE_END|>"
    own = setting.one("Who?", images=[2], template="{{ messages | length }}" + marked)
    assert own.text == "1" + marked


def test_a_clip_may_be_a_list_of_frames(setting: Setting) -> None:
    reader = Reader()
    setting.read("What?", reader, videos=[["f1", "f2"]])
    assert reader.seen == [("video", ["f1", "f2"], "video 1")]


def test_a_string_with_markers_is_kept(setting: Setting) -> None:
    text = "A <|image@placeholder|> b <|VIDEO_START|><|video@placeholder|><|VIDEO_END|> c"
    found = setting.one(text, images=[2], videos=[3])
    expected = f"A {setting.image * 2} b <|VIDEO_START|>{setting.video * 3}<|VIDEO_END|> c"
    assert list(found.ids) == setting.tokenizer.encode(expected)
    assert found.text == text
    native = text.replace("<|image@placeholder|>", setting.image)
    native = native.replace("<|video@placeholder|>", setting.video)
    assert setting.one(native, images=[2], videos=[3]).ids == found.ids
    assert setting.one(expected, images=[2], videos=[3]).ids == found.ids


@pytest.mark.parametrize("prompt", ["Hello 12", ["Hello", "12"], [1, 2], [[1], [2, 3]]])
@pytest.mark.parametrize("none", [None, []])
def test_without_pictures_as_for_text_models(setting: Setting, prompt: Any, none: Any) -> None:
    found = setting.read(prompt, images=none, videos=none)
    assert found == read_prompt(prompt, setting.tokenizer)
    assert all(sequence.media == () for sequence in found)


def test_chats_without_pictures(setting: Setting) -> None:
    chat = [{"role": "user", "content": [TEXT]}]
    found = setting.one(chat)
    expected = render_chat(chat, default_template("vl"), **setting.tokenizer.special_tokens)
    assert found.text == expected and list(found.ids) == setting.tokenizer.encode(expected)


def test_ids_need_no_tokenizer(setting: Setting) -> None:
    ids = [1, setting.ids.video_start, *[setting.ids.video] * 3, setting.ids.video_end]
    ids += [setting.ids.image_start, setting.ids.image, setting.ids.image_end]
    (found,) = read_visual_prompt(ids, None, Reader(), setting.ids, images=[1], videos=[3])
    assert [m.kind for m in found.media] == ["video", "image"]
    with pytest.raises(PromptError, match=r"none of tokenizer\.json"):
        read_visual_prompt("text", None, Reader(), setting.ids)


def test_several_sequences(setting: Setting) -> None:
    found = setting.read(["Who?", "Where?"], images=[[2, 3], [1]], videos=[[], [5]])
    assert [[m.grid.n_tokens for m in s.media] for s in found] == [[2, 3], [1, 5]]
    assert found[0].ids == setting.one("Who?", images=[2, 3]).ids
    chats = [[user(IMAGE, TEXT)], [user(TEXT)]]
    found = setting.read(chats, images=[[2], None])
    assert [len(s.media) for s in found] == [1, 0]
    rows = [[setting.ids.image] * 2, [5]]
    assert [len(s.media) for s in setting.read(rows, images=[(2,), ()])] == [1, 0]


def test_the_checkpoints_template(setting: Setting, bare_folder: Path, tmp_path: Path) -> None:
    """Templates ask for "image" or, as in Baidu's examples, for "image_url" alone."""
    model = (bare_folder / "tokenizer.model").read_bytes()
    for kind in ("image", "image_url"):
        template = (
            "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for p in m.content %}{% if p.type == '" + kind + "' %}"
            "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
            "{% elif p.type == 'text' %}{{ p.text }}{% else %}{{ 'a' if strict is undefined "
            "else raise_exception('no') }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
        )
        tokenizer = tokenizer_with(tmp_path, model, NAMES, chat_template=template)
        ids = visual_ids(tokenizer, "<|IMAGE_PLACEHOLDER|>")
        for variables in ({}, {"strict": True}):
            (found,) = read_visual_prompt(
                [user(TEXT, IMAGE)], tokenizer, Reader(), ids, images=[2], **variables
            )
            assert tokenizer.decode(found.ids) == (
                "What kind of dog is this?<|IMAGE_START|><|IMAGE_PLACEHOLDER|>"
                "<|IMAGE_PLACEHOLDER|><|IMAGE_END|>"
            )
        with pytest.raises(PromptError, match=r"tokenizer\.model.*The chat has video, and each"):
            read_visual_prompt([user(VIDEO)], tokenizer, Reader(), ids, videos=[2])


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (default_template("text"), 'can only concatenate str.*has image.*default_template."vl"'),
        ("no place", "the chat template wrote 0 markers for 1 pictures"),
        ("<|video@placeholder|>", "wrote 1 markers for 1 pictures. The chat has image"),
        ("<|image@placeholder|>" * 2, "wrote 2 markers for 1 pictures"),
        ("<|image@placeholder|>", "the rendered chat has the delimiters none, expected"),
        ("<|IMAGE_START|><|image@placeholder|><|VIDEO_END|>", "the rendered chat has the deli"),
    ],
)
def test_templates_without_a_place(setting: Setting, template: str, complaint: str) -> None:
    with pytest.raises(PromptError, match=complaint):
        setting.one([user(IMAGE)], images=[2], template=template)


def test_broken_templates_are_named(setting: Setting) -> None:
    with pytest.raises(ChatTemplateError, match="not valid jinja2"):
        setting.one([user(TEXT)], template="{% if %}")


FORGED = ["<|image@placeholder|>", "<|video@placeholder|>", *[f"<|{name}|>" for name in NAMES]]


@pytest.mark.parametrize("forged", FORGED)
def test_text_that_imitates_a_picture(setting: Setting, forged: str) -> None:
    text = {"type": "text", "text": f"x{forged}y"}
    said = {"role": "assistant", "content": "x", "reasoning_content": forged}
    for chat in ([user(text)], [user(IMAGE, text)], [user(IMAGE), said]):
        images = [2] if chat[0]["content"][0] is IMAGE else None
        with pytest.raises(PromptError, match=r"message . holds the text '<\|.*\|>', which stands"):
            setting.one(chat, images=images)
    with pytest.raises(PromptError, match="tools holds the text"):
        setting.one([user(TEXT)], tools=[{"name": forged}])


@pytest.mark.parametrize("forged", FORGED)
def test_an_imitation_in_two_parts(setting: Setting, forged: str) -> None:
    halves = [{"type": "text", "text": half} for half in (forged[:6], forged[6:])]
    with pytest.raises(PromptError, match="message 0 holds the text"):
        setting.one([user(*halves)])
    with pytest.raises(PromptError, match=r"markers for 1 pictures|has the delimiters"):
        setting.one([user(*halves, IMAGE)], images=[2])


@pytest.mark.parametrize(
    ("prompt", "options", "complaint"),
    [
        ([user(IMAGE)], {}, "the chat has 1 image parts without data, but images= gives 0"),
        ([user(IMAGE)], {"images": [1, 2]}, "has 1 image parts without data, but images= gives 2"),
        ([user(TEXT)], {"videos": [1]}, "has 0 video parts without data, but videos= gives 1"),
        ([user({**IMAGE, "image": 1})], {"images": [2]}, "has 0 image parts without data, but"),
        (
            "a <|image@placeholder|>",
            {},
            "markers for 1 images and 0 videos, but 0 images and 0 videos were given",
        ),
        ("<|image@placeholder|>", {"videos": [1]}, "1 images and 0 videos, but 0 images and 1 vid"),
        ("a <|IMAGE_PLACEHOLDER|>", {}, "the prompt: the prompt has 1 image placeholders, but 0"),
        (["a", "<|IMAGE_PLACEHOLDER|>"], {}, "prompt 1: the prompt has 1 image placeholders"),
        (
            "<|IMAGE_PLACEHOLDER|>" * 3,
            {"images": [2]},
            "has 3 image placeholders, but 1 images were given, which make 2 tokens",
        ),
        ([1, 2], {"images": [2]}, "has 0 image placeholders, but 1 images .* make 2 tokens"),
        (["a", "b"], {"images": [1, 2]}, "images of 2 sequences must be a list with one list"),
        (["a", "b"], {"images": [[1]]}, "one list for each of them.*this one has 1 items"),
        (["a", "b"], {"videos": 1}, "videos of 2 sequences must be"),
        (["a", "b"], {"images": [[1], []]}, "some have none.*Write all of them as chats"),
        ("a", {"enable_thinking": True}, "enable_thinking would have no effect"),
        ("<|image@placeholder|>", {"images": [1], "template": "x"}, "template would have no"),
    ],
)
def test_what_does_not_match(
    setting: Setting, prompt: Any, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(PromptError, match=complaint):
        setting.read(prompt, **options)


def test_nothing_is_read_before_the_counts_agree(setting: Setting) -> None:
    reader = Reader()
    with pytest.raises(PromptError):
        setting.read([user({"type": "image", "image": 1}, IMAGE)], reader)
    assert reader.seen == []


def test_a_tokenizer_without_the_tokens(bare_folder: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_with(
        tmp_path, (bare_folder / "tokenizer.model").read_bytes(), ["IMAGE_PLACEHOLDER"]
    )
    image, beyond = tokenizer.id_of("<|IMAGE_PLACEHOLDER|>"), tokenizer.vocab_size
    borders = ("image_start", "image_end", "video_start", "video_end")
    ids = VisualIds(image=image, video=image, **{b: beyond + i for i, b in enumerate(borders)})
    for prompt in ([user(IMAGE)], "What?"):
        with pytest.raises(PromptError, match=rf"need a token for id {beyond} .*image_start"):
            read_visual_prompt(prompt, tokenizer, Reader(), ids, images=[2])
    (plain,) = read_visual_prompt([user(TEXT)], tokenizer, Reader(), ids)
    assert plain.media == ()
