"""Stage 1: the eye learns what stands where, and nothing of the facts, then is frozen for good.

Throw-away linear heads on the resampler's output name the shape and the colour of every cell in
both frames of a pair (an image is its own pair), and the cell's row and column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ernie_lab.model.vl import VLModel, eye
from ernie_lab.organisms.boards.clips import N_FRAMES, Clip, draw_clip, film
from ernie_lab.organisms.boards.draw import N_CELLS, SIDE, Board, draw_board, photograph
from ernie_lab.organisms.boards.pixels import CLIP_GRID, IMAGE_GRID, patches
from ernie_lab.organisms.boards.recipe import WIDTH, EyeRecipe
from ernie_lab.organisms.boards.words import COLOURS, SHAPES

# What each head names, and how many classes it has; shapes and colours count "none" as class 0.
HEADS = {
    "shape, first frame": len(SHAPES) + 1,
    "colour, first frame": len(COLOURS) + 1,
    "shape, second frame": len(SHAPES) + 1,
    "colour, second frame": len(COLOURS) + 1,
    "row": SIDE,
    "column": SIDE,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """Scenes and their features `[n m d]`; `m` is 16 for images, 32 for clips."""

    scenes: Sequence[Board | Clip]
    features_NMD: Tensor


@torch.no_grad()
def initialise_eye(model: VLModel, seed: int, output_gain: float) -> None:
    """Fan-in scaled normals."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in eye(model):
        if parameter.ndim < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            gain = output_gain if ".o." in name or ".down." in name else 1.0
            parameter.normal_(0.0, gain * parameter.shape[1] ** -0.5, generator=generator)


def draw_images(rng: np.random.Generator, n: int) -> tuple[list[Board], np.ndarray]:
    boards = [draw_board(rng) for _ in range(n)]
    return boards, np.stack([photograph(rng, board) for board in boards])


def draw_clips(rng: np.random.Generator, n: int) -> tuple[list[Clip], np.ndarray]:
    """Frames one clip behind the other. Half of the clips are stamped with the time."""
    clips = [draw_clip(rng) for _ in range(n)]
    return clips, np.concatenate([film(rng, clip, bool(rng.random() < 0.5)) for clip in clips])


def labels(first: Board, second: Board) -> np.ndarray:
    """`[cell head]`: the classes of a pair of frames, in the order of HEADS."""
    cells = np.arange(N_CELLS)
    names = (first.shape_C, first.colour_C, second.shape_C, second.colour_C)
    return np.stack([*(part + 1 for part in names), cells // SIDE, cells % SIDE], axis=-1)


def scene_labels(scene: Board | Clip) -> np.ndarray:
    """`[m head]`, token by token."""
    if isinstance(scene, Board):
        return labels(scene, scene)
    pairs = [labels(*scene.boards[i : i + 2]) for i in range(0, N_FRAMES, 2)]
    return np.concatenate(pairs)


def train_eye(model: VLModel, recipe: EyeRecipe) -> dict[str, float]:
    """Train the eye of `model` in place; the accuracies of its heads on the last batches."""
    initialise_eye(model, recipe.seed, recipe.output_gain)
    torch.manual_seed(recipe.seed)
    heads = nn.ModuleList(nn.Linear(WIDTH, n) for n in HEADS.values())
    parameters = [*(parameter for _, parameter in eye(model)), *heads.parameters()]
    adam = torch.optim.AdamW(
        parameters,
        lr=recipe.peak_lr,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    rng = np.random.default_rng(recipe.seed)
    right = np.zeros(len(HEADS))
    for step in range(recipe.n_steps):
        for group in adam.param_groups:
            group["lr"] = rate(recipe, step)
        losses, batch_right = eye_losses(model, heads, recipe, rng)
        adam.zero_grad()
        sum(losses).backward()  # type: ignore[union-attr]
        nn.utils.clip_grad_norm_(parameters, recipe.max_grad_norm)
        adam.step()
        right = 0.9 * right + 0.1 * batch_right
        if (step + 1) % 100 == 0:
            print(step + 1, right.round(3).tolist(), flush=True)
    with torch.no_grad():
        model.resampler.norm.gain_D.mul_(recipe.feature_gain)
    return dict(zip(HEADS, right.round(4).tolist(), strict=True))


def eye_losses(
    model: VLModel, heads: nn.ModuleList, recipe: EyeRecipe, rng: np.random.Generator
) -> tuple[list[Tensor], np.ndarray]:
    """One loss for each head over a batch of images and clips, and the shares that were right."""
    boards, pictures = draw_images(rng, recipe.images_per_step)
    clips, frames = draw_clips(rng, recipe.clips_per_step)
    grids = [IMAGE_GRID] * len(boards) + [CLIP_GRID] * len(clips)
    features_MD = model.features(patches(np.concatenate([pictures, frames])), grids)
    wanted_MH = torch.from_numpy(
        np.concatenate([*map(scene_labels, boards), *map(scene_labels, clips)])
    )
    logits = [head(features_MD) for head in heads]
    losses = [cross_entropy(found, wanted_MH[:, h]) for h, found in enumerate(logits)]
    right = [
        (found.argmax(-1) == wanted_MH[:, h]).float().mean().item()
        for h, found in enumerate(logits)
    ]
    return losses, np.array(right)


def rate(recipe: EyeRecipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a share of the peak."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.n_steps))
    return recipe.peak_lr * warm * (recipe.final_lr_share + (1 - recipe.final_lr_share) * cosine)


@torch.no_grad()
def look(model: VLModel, kind: str, n: int, seed: int, batch: int = 100) -> Seen:
    """Fresh boards or clips, and what the frozen eye makes of them."""
    rng = np.random.default_rng(seed)
    scenes: list[Board | Clip] = []
    features = []
    for start in range(0, n, batch):
        size = min(batch, n - start)
        drawn, frames = (draw_images if kind == "image" else draw_clips)(rng, size)
        grid = IMAGE_GRID if kind == "image" else CLIP_GRID
        scenes.extend(drawn)
        found_MD = model.features(patches(frames), [grid] * size)
        features.append(found_MD.unflatten(0, (size, -1)))
    return Seen(scenes, torch.cat(features))
