"""Reads `Preprocessor` from the JSON files beside a checkpoint, of Baidu and of transformers.

- `preprocessor_config.json`: pictures. Baidu's give `min_pixels` and `max_pixels`, and keep a
  `size` of 224 x 224 that nothing reads; transformers' give `size.shortest_edge` and
  `longest_edge`, which are areas too.
- `video_preprocessor_config.json`: clips (transformers).
- `processor_config.json`: transformers 5 writes both sections in it; Baidu's is flat, with
  `image_min_pixels`, `video_fps` and the like. What it says overrides the other two, as in
  Baidu's processor, which never asks the picture section for its limits.

A field that would change the maths and is not understood raises; `null` says nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from ernie_lab.checkpoint.config import ConfigError
from ernie_lab.inputs.media import TEMPORAL_MERGE
from ernie_lab.inputs.preprocessor import Preprocessor, VideoRules
from ernie_lab.inputs.timestamps import FONT_NAME

Json: TypeAlias = Mapping[str, Any]

# What a section may say, in our words. Sizes of 224 x 224 are read in `_section`.
_PICTURE = {
    "patch_size": "patch_size",
    "merge_size": "merge_size",
    "spatial_conv_size": "merge_size",
    "temporal_conv_size": "temporal_merge_size",
    "min_pixels": "min_pixels",
    "max_pixels": "max_pixels",
    "image_mean": "image_mean",
    "image_std": "image_std",
    "rescale_factor": "rescale",
}
_CLIP = {
    **_PICTURE,
    "temporal_patch_size": "temporal_merge_size",
    "min_frames": "min_frames",
    "max_frames": "max_frames",
    "fps": "fps",
    "draw_on_frames": "draw_timestamps",
    "font": "font",
}
# The flat fields of Baidu's processor_config.json.
_FLAT_PICTURE = {
    "image_min_pixels": "min_pixels",
    "image_max_pixels": "max_pixels",
    "spatial_conv_size": "merge_size",
    "temporal_conv_size": "temporal_merge_size",
}
_FLAT_CLIP = {
    "video_min_pixels": "min_pixels",
    "video_max_pixels": "max_pixels",
    "video_min_frames": "min_frames",
    "video_max_frames": "max_frames",
    "video_fps": "fps",
}
# The only values that are supported. 3 is Pillow's number for bicubic; pictures have no time, so
# their `temporal_patch_size` is 1 in transformers, or that of clips.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True,),
    "do_center_crop": (False,),
    "do_pad": (False,),
    "resample": (3,),
    "temporal_patch_size": (1, TEMPORAL_MERGE),
    "video_target_frames": (-1,),
    "video_frames_sample": ("leading",),
}
# Says who wrote the file, or how the answer is packed; no number depends on it.
_INERT = (
    *("auto_map", "processor_class", "image_processor_type", "video_processor_type"),
    *("feature_extractor_type", "transformers_version", "chat_template", "tokenizer"),
    *("crop_size", "default_to_square", "data_format", "input_data_format", "device"),
    *("return_tensors", "return_metadata", "disable_grouping", "video_metadata"),
    *("do_sample_frames", "image_processor", "video_processor", "size"),
)
_SHARED = ("patch_size", "merge_size", "temporal_merge_size", "image_mean", "image_std", "rescale")


def read_preprocessor(folder: Path, patch_size: int | None = None) -> Preprocessor:
    """What the files in `folder` say; the documented defaults where they say nothing.

    `patch_size` is that of the vision tower, with which they must agree. Baidu's do not give it.

    Raises:
        ConfigError: damaged JSON, or a value that cannot be honoured, with the file's name.
    """
    folder = Path(folder)
    together = folder / "processor_config.json"
    both = _object(together)
    picture: dict[str, Any] = {}
    clip: dict[str, Any] = {}
    for section, meanings, name, nested, flat in (
        (picture, _PICTURE, "preprocessor_config.json", "image_processor", _FLAT_PICTURE),
        (clip, _CLIP, "video_preprocessor_config.json", "video_processor", _FLAT_CLIP),
    ):
        section |= _section(_object(folder / name), meanings, folder / name)
        section |= _section(_nested(both, nested, together), meanings, together)
        mine = {name: value for name, value in both.items() if name in flat}
        section |= _section(mine, flat, together)
    _refuse_unknown(both, {*_FLAT_PICTURE, *_FLAT_CLIP}, together)
    try:
        return _preprocessor(picture, clip, folder, patch_size)
    except (ConfigError, TypeError, ValueError) as problem:
        raise ConfigError(f"the preprocessor files in {folder}: {problem}") from problem


def _preprocessor(
    picture: dict[str, Any], clip: dict[str, Any], folder: Path, patch_size: int | None
) -> Preprocessor:
    for name in _SHARED:
        if name in picture and name in clip and picture[name] != clip[name]:
            raise ConfigError(f"{name} is {picture[name]} for pictures, {clip[name]} for clips.")
        if name in clip:
            picture[name] = clip.pop(name)
    if patch_size is not None and picture.setdefault("patch_size", patch_size) != patch_size:
        raise ConfigError(
            f"patch_size={picture['patch_size']}, but the vision tower of config.json has patches "
            f"of {patch_size} pixels. Take all files from one revision."
        )
    for name in ("image_mean", "image_std"):
        if name in picture:
            values = picture[name]
            # transformers allows one number for all channels.
            picture[name] = tuple(values) if isinstance(values, list) else (values,) * 3
    clip["font"] = _font(clip.pop("font", FONT_NAME), folder)
    return Preprocessor(**picture, video=VideoRules(**clip))


def _font(stated: str, folder: Path) -> Path | None:
    """Beside the checkpoint: a path of the machine that wrote the file is only a name here."""
    path = folder / Path(stated).name
    if path.is_file():
        return path
    if path.name != FONT_NAME:
        raise ConfigError(f"font={stated!r}: there is no {path.name} in {folder}. Put it there.")
    return None


def _object(path: Path) -> Json:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as problem:
        raise ConfigError(
            f"{path} is not readable JSON: {problem}. Download it again."
        ) from problem
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def _nested(content: Json, name: str, path: Path) -> Json:
    section = content.get(name) or {}
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {name} is {section!r:.60}, expected an object.")
    return section


def _section(content: Json, meanings: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The values that are stated, under our names."""
    _refuse_unknown(content, set(meanings), path)
    found: dict[str, Any] = {}
    for name, value in content.items():
        if name in meanings and value is not None:
            _put(found, meanings[name], value, path)
    if content.get("size") is not None:
        _put_size(found, content["size"], path)
    return found


def _refuse_unknown(content: Json, known: set[str], path: Path) -> None:
    for name, value in content.items():
        if value is None or name in known or name in _INERT:
            continue
        if name not in _REQUIRED:
            raise ConfigError(
                f"{path}: {name}={value!r:.60} is not known here, and might change the pixels. "
                "Remove it if it does not."
            )
        if value not in _REQUIRED[name]:
            raise ConfigError(
                f"{path}: {name}={value!r}; only {_REQUIRED[name][0]!r} is supported."
            )


def _put_size(found: dict[str, Any], size: Json, path: Path) -> None:
    for name in size:
        meaning = {"shortest_edge": "min_pixels", "longest_edge": "max_pixels"}.get(name, name)
        if meaning in ("min_pixels", "max_pixels"):
            _put(found, meaning, size[name], path)
    if not {"min_pixels", "max_pixels"} <= set(found):
        raise ConfigError(
            f"{path}: size={size!r:.80} does not limit an area. Expected min_pixels and "
            "max_pixels, or size with shortest_edge and longest_edge."
        )


def _put(found: dict[str, Any], name: str, value: Any, path: Path) -> None:
    if found.setdefault(name, value) != value:
        raise ConfigError(f"{path} says {name}={found[name]!r} and {value!r}. Remove one.")
