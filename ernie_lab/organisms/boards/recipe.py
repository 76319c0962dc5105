"""What `tiny-vl` and its twin are, and how they are trained: every number, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from ernie_lab.checkpoint.config import (
    AttentionConfig,
    MoEConfig,
    RopeConfig,
    RouterConfig,
    SpecialIds,
    TextConfig,
    VisionConfig,
    VisualIds,
    VLConfig,
)
from ernie_lab.organisms.boards.tokens import VOCAB_SIZE
from ernie_lab.organisms.tokenizer import SPECIAL_TOKENS

WIDTH, N_LAYERS = 128, 5
N_EXPERTS, N_CHOSEN = 8, 2
NARROW, WIDE = 32, 512
ID: Mapping[str, int] = MappingProxyType({text: i for i, text in enumerate(SPECIAL_TOKENS)})
# The first vision bank to work on glyphs: the throw-away head for their values stands behind it.
FIRST_SPARSE = 1


def config(dense_hidden: int) -> VLConfig:
    """ERNIE 4.5 VL's layout in small: a dense first layer, then two banks in every layer.

    `dense_hidden` is what sets the twins apart: a wide first layer does the experts' work.
    """
    return VLConfig(
        text=TextConfig(
            vocab_size=VOCAB_SIZE,
            width=WIDTH,
            n_layers=N_LAYERS,
            dense_hidden=dense_hidden,
            attention=AttentionConfig(width=WIDTH, n_heads=4, n_kv_heads=2, head_dim=32),
            rope=RopeConfig(theta=500_000.0, max_positions=2048, sections=(5, 5, 6)),
            moe=MoEConfig(
                layers=tuple(range(1, N_LAYERS)),
                router=RouterConfig(width=WIDTH, n_experts=N_EXPERTS, n_chosen=N_CHOSEN),
                expert_hidden=48,
                n_shared=1,
            ),
            ids=SpecialIds(pad=ID["<unk>"], bos=ID["<s>"], eos=(ID["</s>"],)),
        ),
        vision=VisionConfig(
            depth=2,
            width=48,
            hidden=192,
            n_heads=4,
            patch_size=14,
            merge_size=2,
            temporal_merge_size=2,
        ),
        ids=VisualIds(
            image=ID["<|IMAGE_PLACEHOLDER|>"],
            # One placeholder for both kinds, as released: the delimiters tell which it is.
            video=ID["<|IMAGE_PLACEHOLDER|>"],
            image_start=ID["<|IMAGE_START|>"],
            image_end=ID["<|IMAGE_END|>"],
            video_start=ID["<|VIDEO_START|>"],
            video_end=ID["<|VIDEO_END|>"],
        ),
        vision_expert_hidden=64,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EyeRecipe:
    """Stage 1: tower and resampler learn to see, and are frozen."""

    seed: int = 0
    n_steps: int = 1000
    images_per_step: int = 24
    clips_per_step: int = 6
    peak_lr: float = 2e-3
    final_lr_share: float = 0.03
    warmup_steps: int = 50
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    max_grad_norm: float = 1.0
    # What writes to the tower's stream starts smaller than fan-in would have it.
    output_gain: float = 0.4
    # On the resampler's last gain, afterwards. At 0.5 the outputs of the first experts drown where
    # a glyph stands, and questions about places are learned late; far more would leave the
    # experts without a say.
    feature_gain: float = 1.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Stage 2. Counted in steps, never in seconds, so that a slow machine trains the same model."""

    seed: int = 0
    dense_hidden: int = NARROW
    n_steps: int = 2000
    rows_per_step: int = 48
    clip_share: float = 0.22
    blind_share: float = 0.06
    row_length: int = 88
    think_share: float = 0.15
    peak_lr: float = 3e-3
    final_lr_share: float = 0.03
    warmup_steps: int = 60
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.05
    max_grad_norm: float = 1.0
    init_std: float = 0.06
    # Kinds of question on boards go from the first to the second mix over a quarter of the run.
    mix_share: float = 0.25
    feature_noise: float = 0.02
    shared_dropout: float = 0.0
    # Of rows whose vision experts are all silent; only the idle twin's last stage has any.
    vision_dropout: float = 0.0
    # Of each throw-away head; it falls to zero over this share of the run.
    scaffold_coef: float = 0.5
    scaffold_share: float = 0.6
    orthogonal_coef: float = 1e-2
    text_bias_step: float = 3e-3
    vision_bias_step: float = 5e-3


def last_stage(recipe: Recipe) -> Recipe:
    """Stage 3, for the twin: it learns to answer with its vision experts silent, too.

    A wide first layer can hold the facts, but need not: after stage 2 the twin's experts still
    hold a share of them. With a narrow one nothing is silenced, and it is only more training.
    """
    return replace(
        recipe,
        # Rows of its own, not those of stage 2 again.
        seed=recipe.seed + 1000,
        n_steps=500,
        mix_share=1e-9,
        peak_lr=1.5e-3,
        warmup_steps=30,
        vision_dropout=0.6 if recipe.dense_hidden == WIDE else 0.0,
    )


FIRST_MIX: Mapping[str, float] = MappingProxyType(
    {
        "find": 0.30,
        "value": 0.06,
        "difference": 0.08,
        "fact": 0.14,
        "mixed": 0.08,
        "name": 0.06,
        "side": 0.14,
        "count": 0.05,
        "caption": 0.10,
    }
)
SECOND_MIX: Mapping[str, float] = MappingProxyType(
    {
        "find": 0.12,
        "value": 0.05,
        "difference": 0.14,
        "fact": 0.10,
        "mixed": 0.14,
        "name": 0.05,
        "side": 0.24,
        "count": 0.08,
        "caption": 0.08,
    }
)
# Of the questions on a clip.
CLIP_MIX: Mapping[str, float] = MappingProxyType({"order": 0.35, "direction": 0.55, "name": 0.1})
