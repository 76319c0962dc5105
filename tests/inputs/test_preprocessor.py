"""The files beside a checkpoint, in every spelling that is in circulation."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers.models.ernie4_5_vl_moe.image_processing_pil_ernie4_5_vl_moe import (
    Ernie4_5_VLMoeImageProcessorPil,
)

from ernie_lab.checkpoint.config import ConfigError
from ernie_lab.inputs.preprocessor import Preprocessor, VideoRules
from ernie_lab.inputs.preprocessor_files import read_preprocessor

# Of baidu/ERNIE-4.5-VL-28B-A3B-Paddle; the -Thinking file differs in the names of classes only.
BAIDU = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": False,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "processor_class": "CLIPProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
    "min_pixels": 3136,
    "max_pixels": 4816896,
}
# Of tiny-random/ernie-4.5-vl-moe, which Baidu's own code wrote.
FLAT = {
    "auto_map": {"AutoProcessor": "processing_ernie4_5_vl.Ernie4_5_VLProcessor"},
    "image_max_pixels": 4842768,
    "image_min_pixels": 3136,
    "processor_class": "Ernie4_5_VLProcessor",
    "spatial_conv_size": 2,
    "temporal_conv_size": 2,
    "video_max_pixels": 937664,
    "video_min_pixels": 234416,
}
CLIPS = {
    "size": {"shortest_edge": 1000, "longest_edge": 2000},
    "min_frames": 4,
    "max_frames": 8,
    "fps": 1.0,
    "num_frames": None,
    "draw_on_frames": False,
    "temporal_patch_size": 2,
    "patch_size": 14,
    "resample": 3,
    "do_sample_frames": True,
}


def write(folder: Path, **files: object) -> Path:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_defaults_without_files(tmp_path: Path) -> None:
    how = read_preprocessor(tmp_path)
    assert how == Preprocessor()
    assert (how.min_pixels, how.max_pixels, how.factor) == (3136, 4842768, 28)
    assert (how.video.min_pixels, how.video.max_pixels) == (234416, 937664)
    assert (how.video.min_frames, how.video.max_frames, how.video.fps) == (16, 180, None)


def test_baidu(tmp_path: Path) -> None:
    how = read_preprocessor(write(tmp_path, preprocessor_config=BAIDU))
    assert how == replace(Preprocessor(), max_pixels=4816896)


def test_size_in_baidus_spelling(tmp_path: Path) -> None:
    size = {"min_pixels": 3136, "max_pixels": 4816896}
    how = read_preprocessor(write(tmp_path, preprocessor_config={**BAIDU, "size": size}))
    assert how.max_pixels == 4816896


def test_baidus_processor_overrules_its_picture_section(tmp_path: Path) -> None:
    flat = {**FLAT, "video_fps": 1, "video_target_frames": -1, "video_frames_sample": "leading"}
    write(tmp_path, preprocessor_config=BAIDU, processor_config=flat)
    how = read_preprocessor(tmp_path)
    assert how == Preprocessor(video=VideoRules(fps=1))


def test_transformers(tmp_path: Path) -> None:
    size = {"shortest_edge": 784, "longest_edge": 7840}
    Ernie4_5_VLMoeImageProcessorPil(size=size, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    assert (tmp_path / "preprocessor_config.json").is_file()
    how = read_preprocessor(write(tmp_path, video_preprocessor_config=CLIPS))
    rules = {"fps": 1.0, "min_frames": 4, "max_frames": 8, "draw_timestamps": False}
    video = VideoRules(min_pixels=1000, max_pixels=2000, **rules)
    assert how == Preprocessor(
        min_pixels=784, max_pixels=7840, image_mean=(0.5, 0.5, 0.5), video=video
    )
    together = tmp_path / "together"
    together.mkdir()
    picture = json.loads((tmp_path / "preprocessor_config.json").read_text())
    both = {"image_processor": picture, "video_processor": CLIPS, "processor_class": "x"}
    assert read_preprocessor(write(together, processor_config=both)) == how


def test_one_number_for_all_channels(tmp_path: Path) -> None:
    how = read_preprocessor(write(tmp_path, preprocessor_config={"image_std": 0.5}))
    assert how.image_std == (0.5, 0.5, 0.5)


def test_font_beside_the_checkpoint(tmp_path: Path) -> None:
    font = tmp_path / "Roboto-Regular.ttf"
    font.write_bytes(b"")
    assert read_preprocessor(tmp_path).video.font == font
    write(tmp_path, video_preprocessor_config={"font": "/elsewhere/Roboto-Regular.ttf"})
    assert read_preprocessor(tmp_path).video.font == font
    write(tmp_path, video_preprocessor_config={"font": "Other.ttf"})
    with pytest.raises(ConfigError, match=r"no Other\.ttf in .*Put it there"):
        read_preprocessor(tmp_path)


@pytest.mark.parametrize(
    "content, said",
    [
        ({"do_normalize": False}, "do_normalize=False; only True is supported"),
        ({"resample": 2}, "resample=2; only 3"),
        ({"do_center_crop": True}, "do_center_crop=True; only False"),
        ({"sharpen": 2}, "sharpen=2 is not known here, and might change the pixels"),
        ({"merge_size": 3}, "joins 2 x 2 patches"),
        ({"temporal_patch_size": 4}, "temporal_patch_size=4; only 1"),
        ({"patch_size": 0}, "patch_size=0 must be at least 1"),
        ({"image_mean": [1, 2]}, "must be three numbers"),
        ({"image_std": [1, 0, 1]}, "not positive"),
        ({"min_pixels": 9, "max_pixels": 4}, "expected 1 <= 9 <= 4"),
        ({"min_pixels": "many"}, "the preprocessor files in"),
        ({"size": {"height": 224, "width": 224}}, "does not limit an area"),
        ({**BAIDU, "size": {"max_pixels": 1}}, "max_pixels=4816896 and 1. Remove one"),
        ([], "holds a list, expected a JSON object"),
    ],
)
def test_what_cannot_be_honoured(tmp_path: Path, content: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_preprocessor(write(tmp_path, preprocessor_config=content))


def test_other_files_that_cannot_be_honoured(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is not readable JSON"):
        read_preprocessor(tmp_path)
    write(tmp_path, preprocessor_config=BAIDU, processor_config={"image_processor": 3})
    with pytest.raises(ConfigError, match="image_processor is 3, expected an object"):
        read_preprocessor(tmp_path)
    write(tmp_path, processor_config={"video_target_frames": 8})
    with pytest.raises(ConfigError, match="video_target_frames=8; only -1"):
        read_preprocessor(tmp_path)
    write(tmp_path, processor_config={}, video_preprocessor_config={"patch_size": 16})
    write(tmp_path, preprocessor_config={**BAIDU, "patch_size": 14})
    with pytest.raises(ConfigError, match="patch_size is 14 for pictures, 16 for clips"):
        read_preprocessor(tmp_path)


@pytest.mark.parametrize(
    "rules, said",
    [({"rule": "vllm"}, "must be one of"), ({"fps": 0}, "positive"), ({"min_frames": 200}, "180")],
)
def test_impossible_video_rules(rules: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        VideoRules(**rules)
