"""transformers' video processor on given clips, in a process of its own.

    python video_oracle.py WORK

reads WORK/jobs.json and WORK/{name}.npy, and writes WORK/answers.npz.

That processor wants torchvision, whose published build breaks CPU torch. It calls five small
functions of it, which are put in its place here; with the real ones (torchvision 0.28.0) the
answers were equal in every bit. Only this process sees them.
"""

import json
import sys
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


def to_pil_image(frame: torch.Tensor) -> Image.Image:
    return Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


def pil_to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def resize(
    frames: torch.Tensor, size: Any, interpolation: InterpolationMode, antialias: bool
) -> torch.Tensor:
    """On uint8, as torchvision does for bicubic."""
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    flat = torch.nn.functional.interpolate(
        frames.reshape(-1, *frames.shape[-3:]),
        size=list(size),
        mode=interpolation.value,
        align_corners=False,
        antialias=antialias,
    )
    return flat.reshape(*frames.shape[:-2], *size)


def normalize(frames: torch.Tensor, mean: Any, std: Any, inplace: bool = False) -> torch.Tensor:
    shape = (-1, 1, 1)
    return (frames - torch.as_tensor(mean).view(shape)) / torch.as_tensor(std).view(shape)


def install() -> None:
    made = {}
    for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2"):
        made[name] = ModuleType(f"torchvision{name}")
    made[".transforms.v2.functional"] = ModuleType("torchvision.transforms.v2.functional")
    for name, module in made.items():
        module.__spec__ = ModuleSpec(module.__name__, None)
        module.__path__ = []  # type: ignore[attr-defined]
        sys.modules[module.__name__] = module
        if name:
            parent, _, leaf = name.rpartition(".")
            setattr(made[parent], leaf, module)
    made[""].__version__ = "0.28.0"  # type: ignore[attr-defined]
    for name in (".transforms", ".transforms.functional", ".transforms.v2.functional"):
        for thing in (InterpolationMode, to_pil_image, pil_to_tensor, resize, normalize):
            setattr(made[name], thing.__name__, thing)


def main(work: Path) -> None:
    from transformers.models.ernie4_5_vl_moe.video_processing_ernie4_5_vl_moe import (
        Ernie4_5_VLMoeVideoProcessor,
    )
    from transformers.video_utils import VideoMetadata, read_video_pyav

    answers = {}
    jobs = json.loads((work / "jobs.json").read_text())
    processor = Ernie4_5_VLMoeVideoProcessor(font=jobs["font"])
    for name, (n_frames, rate, fps) in jobs["samples"].items():
        metadata = VideoMetadata(total_num_frames=n_frames, fps=rate)
        answers[name] = processor.sample_frames(metadata, fps=fps).numpy()
    for name, text in jobs["times"].items():
        answers[name] = np.array(processor._convert_timestamp(text))
    for name, path in jobs["files"].items():
        frames, metadata = read_video_pyav(path, processor.sample_frames)
        answers[f"{name}.frames"] = frames
        answers[f"{name}.seconds"] = np.array(metadata.timestamps)
    for name, rate in jobs["clips"].items():
        clip = np.load(work / f"{name}.npy")
        metadata = VideoMetadata(len(clip), fps=rate, frames_indices=list(range(len(clip))))
        (stamped,) = processor._prepare_input_videos([clip.copy()], video_metadata=[metadata])
        answers[f"{name}.stamped"] = stamped.permute(0, 2, 3, 1).numpy()
        out = processor(
            videos=[clip.copy()], video_metadata=[dict(metadata)], do_sample_frames=False
        )
        answers[f"{name}.patches"] = out["pixel_values_videos"].numpy()
        answers[f"{name}.grid"] = out["video_grid_thw"].numpy()
    np.savez(work / "answers.npz", **answers)


if __name__ == "__main__":
    try:
        import torchvision  # noqa: F401
    except ImportError:
        install()
    main(Path(sys.argv[1]))
