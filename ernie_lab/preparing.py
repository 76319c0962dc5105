"""From what a user passes to a `Lab` to the batch that its model reads."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from ernie_lab.checkpoint.config import TextConfig, VLConfig
from ernie_lab.inputs import (
    Batch,
    EncodedPrompt,
    ImageLike,
    Media,
    Preprocessor,
    Prompt,
    VideoLike,
    default_template,
    is_chat,
    pad_batch,
    prepare_image,
    prepare_video,
    read_prompt,
    read_visual_prompt,
    template_kind,
)
from ernie_lab.inputs.media import Kind
from ernie_lab.inputs.prompt import prompt_items
from ernie_lab.inputs.visual_prompt import find_marks, spellings
from ernie_lab.session import Opened

Images: TypeAlias = ImageLike | Media | Sequence[Any]
Videos: TypeAlias = VideoLike | Media | Sequence[Any]


class Reads(Opened, Protocol):
    """What preparing needs of a `Lab` beyond what a call needs."""

    @property
    def preprocessor(self) -> Preprocessor | None: ...


def prepare(
    lab: Reads,
    prompt: Prompt,
    chat: Mapping[str, Any] | None,
    images: Images | None,
    videos: Videos | None,
) -> Batch:
    """Read, render, tokenise and pad; what `chat` holds goes to the chat template."""
    options = dict(chat or {})
    config = lab.config
    if isinstance(config, TextConfig):
        sequences = _read_text(lab, prompt, options, {"images": images, "videos": videos})
        visual: dict[str, Any] = {}
    else:
        sequences = _read_visual(lab, config, prompt, options, images, videos)
        visual = {
            "media": [sequence.media for sequence in sequences],
            "ids": config.ids,
            "positions": lab.positions,
        }
    return pad_batch(
        [sequence.ids for sequence in sequences],
        pad_id=config.decoder.ids.pad or 0,
        vocab_size=config.decoder.vocab_size,
        device=lab.device,
        texts=[sequence.text for sequence in sequences],
        **visual,
    )


def _read_text(
    lab: Reads, prompt: Prompt, options: dict[str, Any], pictures: Mapping[str, object]
) -> Sequence[EncodedPrompt]:
    for name, given in pictures.items():
        if given is not None:
            raise ValueError(
                f"{name}= needs a vision-language model, such as el.load('tiny-vl'); "
                f"{lab.model_id} reads text alone"
            )
    if is_chat(prompt) and _lacks_template(lab, options):
        options["template"] = default_template(template_kind(lab.model_id, visual=False))
    return read_prompt(prompt, lab.tokenizer, **options)


def _lacks_template(lab: Reads, options: Mapping[str, Any]) -> bool:
    """Warn where neither checkpoint nor caller brings a chat template."""
    if lab.tokenizer is None or lab.tokenizer.chat_template or "template" in options:
        return False
    warnings.warn(
        f"{lab.model_id} has no chat template; the general one of ERNIE 4.5 is used. "
        "Was it trained on chats at all?",
        stacklevel=6,
    )
    return True


def _read_visual(
    lab: Reads,
    config: VLConfig,
    prompt: Prompt,
    options: dict[str, Any],
    images: Images | None,
    videos: Videos | None,
) -> Sequence[EncodedPrompt]:
    if is_chat(prompt) or _becomes_chat(lab, config, prompt, images, videos):
        _lacks_template(lab, options)
    reader = PictureReader(preprocessor_of(lab.preprocessor, config))
    return read_visual_prompt(
        prompt, lab.tokenizer, reader, config.ids, images=images, videos=videos, **options
    )


def preprocessor_of(own: Preprocessor | None, config: VLConfig) -> Preprocessor:
    """The lab's own; without one, the documented defaults for patches of the tower's size."""
    return own or Preprocessor(patch_size=config.vision.patch_size)


def _becomes_chat(
    lab: Reads, config: VLConfig, prompt: Prompt, images: object, videos: object
) -> bool:
    """Strings with pictures, but without a place for them, are read as users' messages."""
    form, items = prompt_items(prompt)
    if form != "text" or not (_any_given(images) or _any_given(videos)) or lab.tokenizer is None:
        return False
    spelled = spellings(lab.tokenizer, config.ids)
    return any(not find_marks(text, spelled) for _, text in items)


def _any_given(pictures: object) -> bool:
    if isinstance(pictures, list | tuple):
        return any(_any_given(one) for one in pictures)
    return pictures is not None


@dataclass(frozen=True, slots=True)
class PictureReader:
    """Prepares pictures as one checkpoint's preprocessor says; prepared ones pass as they are."""

    how: Preprocessor

    def image(self, picture: Any, source: str, /) -> Media:
        if isinstance(picture, Media):
            return _of_kind("image", picture, source)
        return prepare_image(picture, self.how, source=source)

    def video(self, clip: Any, source: str, /) -> Media:
        if isinstance(clip, Media):
            return _of_kind("video", clip, source)
        return prepare_video(clip, self.how, source=source)


def _of_kind(kind: Kind, media: Media, source: str) -> Media:
    if media.kind != kind:
        raise ValueError(
            f"{source} was prepared as {'an' if media.kind == 'image' else 'a'} {media.kind}; pass "
            f"it as one, or prepare it with lab.read_{kind}(...)"
        )
    return media
