"""Frozen configs, one per component. They hold meaning, not checkpoint spellings.

`checkpoint.config_json` reads them from a `config.json` of any supported style and writes
them back. Everything is resolved there: no field keeps a sentinel such as -1 or None for
"default", and every check that two fields agree is made here, once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias


class ConfigError(ValueError):
    """A config that cannot be honoured: unknown field, impossible value, disagreement."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearScaling:
    """Frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamicScaling:
    """NTK-aware base, growing once the sequence is longer than `max_positions`."""

    factor: float


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): low frequencies interpolated, high ones kept, a ramp between."""

    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv 2402.13753): one divisor per frequency, two sets by length."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_positions: int
    factor: float | None = None
    attention_factor: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's rule: long wavelengths divided by `factor`, short kept, smooth between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


def _require_sizes(config: object, *names: str) -> None:
    for name in names:
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}={getattr(config, name)} must be at least 1")


RopeScaling: TypeAlias = (
    LinearScaling | DynamicScaling | YarnScaling | LongRopeScaling | Llama3Scaling
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary positions. `sections` is (height, width, time) of the VL models' 3-D form."""

    theta: float
    max_positions: int
    scaling: RopeScaling | None = None
    sections: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise ConfigError(f"rope theta={self.theta} must be positive")
        _require_sizes(self, "max_positions")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """Grouped-query attention: `n_heads` queries share `n_kv_heads` keys and values."""

    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    use_bias: bool = False

    def __post_init__(self) -> None:
        _require_sizes(self, "width", "n_heads", "n_kv_heads", "head_dim")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for rotary pairs")


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterConfig:
    """`n_chosen` of `n_experts`; weights are divided by their sum, at least `min_weight_sum`."""

    width: int
    n_experts: int
    n_chosen: int
    min_weight_sum: float = 1e-12

    def __post_init__(self) -> None:
        _require_sizes(self, "width", "n_experts")
        if not 0 < self.n_chosen <= self.n_experts:
            raise ConfigError(f"n_chosen={self.n_chosen} must be in 1..{self.n_experts}")


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEConfig:
    """The mixture layers: which they are, their router, and the widths of their experts.

    `expert_hidden` is one routed expert's width. `shared_hidden` is the fused width of all
    shared experts together (0: none, as in 300B and VL-424B).
    """

    layers: tuple[int, ...]
    router: RouterConfig
    expert_hidden: int
    n_shared: int
    aux_loss_coef: float = 0.001

    @property
    def shared_hidden(self) -> int:
        return self.n_shared * self.expert_hidden

    def __post_init__(self) -> None:
        _require_sizes(self, "expert_hidden")
        if self.n_shared < 0:
            raise ConfigError(f"n_shared={self.n_shared} must be at least 0 (0: none)")
        if not self.layers:
            raise ConfigError("a mixture without any layer: start, end and interval select none")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpecialIds:
    """Token ids with a role in generation. `eos` may be several; empty: nothing ends a text."""

    pad: int | None = 0
    bos: int | None = 1
    eos: tuple[int, ...] = (2,)


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """The text decoder, dense (`moe=None`) or with mixture layers.

    `head_bias` adds a bias to the unembedding (transformers gives it to the MoE class alone).
    """

    vocab_size: int
    width: int
    n_layers: int
    dense_hidden: int
    attention: AttentionConfig
    rope: RopeConfig
    moe: MoEConfig | None
    norm_eps: float = 1e-5
    tied: bool = True
    head_bias: bool = False
    ids: SpecialIds = field(default_factory=SpecialIds)

    def __post_init__(self) -> None:
        _require_sizes(self, "vocab_size", "width", "n_layers", "dense_hidden")
        for name, ids in (
            ("pad", [self.ids.pad]),
            ("bos", [self.ids.bos]),
            ("eos", list(self.ids.eos)),
        ):
            for i in ids:
                # An embedding or a choice of such a token could only fail, later and far away.
                if i is not None and not 0 <= i < self.vocab_size:
                    raise ConfigError(
                        f"{name}_token_id={i} is outside the vocabulary of {self.vocab_size} "
                        f"tokens; correct {name}_token_id in config.json, or set it to null if "
                        "there is no such token"
                    )
        if self.moe and not set(self.moe.layers) <= set(range(self.n_layers)):
            raise ConfigError(
                f"mixture layers {self.moe.layers} exceed the {self.n_layers} layers of the model"
            )

    @property
    def decoder(self) -> TextConfig:
        """The text decoder's config, whichever kind of model this is."""
        return self

    @property
    def use_bias(self) -> bool:
        """Biases in the projections of attention and MLPs (never in routed experts)."""
        return self.attention.use_bias

    def is_moe(self, layer: int) -> bool:
        return self.moe is not None and layer in self.moe.layers


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """The vision tower and its resampler."""

    depth: int
    width: int
    hidden: int
    n_heads: int
    patch_size: int
    merge_size: int
    temporal_merge_size: int
    in_channels: int = 3
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    activation: Literal["quick_gelu"] = "quick_gelu"

    def __post_init__(self) -> None:
        _require_sizes(self, "depth", "width", "hidden", "n_heads", "patch_size", "merge_size")
        _require_sizes(self, "temporal_merge_size", "in_channels")
        if self.width % (4 * self.n_heads):
            raise ConfigError(
                f"vision width={self.width} must be a multiple of 4 x n_heads={self.n_heads}: "
                "a head rotates pairs along the height and pairs along the width"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class VisualIds:
    """Placeholder and delimiter token ids of images and videos."""

    image: int
    video: int
    image_start: int
    image_end: int
    video_start: int
    video_end: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VLConfig:
    """A vision-language model. `vision_expert_hidden` is the width of the vision bank."""

    text: TextConfig
    vision: VisionConfig
    ids: VisualIds
    vision_expert_hidden: int

    def __post_init__(self) -> None:
        _require_sizes(self, "vision_expert_hidden")
        if self.text.moe is None:
            raise ConfigError("a vision-language model has mixture layers, its text has none")
        if self.text.rope.sections is None:
            raise ConfigError("a vision-language model needs the rope sections of 3-D positions")

    @property
    def decoder(self) -> TextConfig:
        """The text decoder's config, whichever kind of model this is."""
        return self.text


ModelConfig: TypeAlias = TextConfig | VLConfig
