"""Parameter and byte figures against the real module, and the refusal with its advice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.released_configs import DENSE_0_3B, TEXT_21B, TEXT_300B, VL_28B, VL_424B
from checkpoint.vl_cases import config_of as small_vl
from support.models import small_config

from ernie_lab.checkpoint.config import AttentionConfig, TextConfig
from ernie_lab.checkpoint.config_json import read_config
from ernie_lab.checkpoint.errors import NotEnoughMemory
from ernie_lab.checkpoint.memory import (
    HEADROOM,
    _container_free,
    _host_free,
    count_parameters,
    free_bytes,
    require_memory,
    weight_bytes,
)
from ernie_lab.checkpoint.names import stays_float32
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import VLModel

GIB = 2**30
BIASED = AttentionConfig(width=32, n_heads=4, n_kv_heads=2, head_dim=8, use_bias=True)


def config_of(raw: dict[str, Any]) -> TextConfig:
    config = read_config(raw)
    assert isinstance(config, TextConfig)
    return config


@pytest.mark.parametrize(
    "config",
    [
        small_config(),
        small_config(tied=False, head_bias=True, attention=BIASED),
        small_config(moe=None),
        config_of(TEXT_21B),
    ],
)
def test_figures_are_those_of_the_module(config: TextConfig) -> None:
    with torch.device("meta"):
        model = TextModel(config)
    counts = count_parameters(config)
    assert counts.total == sum(counts.by_part.values())
    assert counts.total == sum(p.numel() for p in model.parameters())
    n_bytes = sum(
        p.numel() * (4 if stays_float32(name) else 2) for name, p in model.named_parameters()
    )
    assert weight_bytes(config, torch.bfloat16) == n_bytes


def test_the_released_models_are_as_large_as_their_names() -> None:
    small, large = count_parameters(config_of(TEXT_21B)), count_parameters(config_of(TEXT_300B))
    assert small.total == 21_825_437_888
    assert small.active == 3_352_150_208  # 3.09 B without the tied head
    assert large.total / 1e9 == pytest.approx(299.5, abs=0.05)
    assert large.active / 1e9 == pytest.approx(47.1, abs=0.05)
    dense = count_parameters(config_of(DENSE_0_3B))
    assert dense.active == dense.total == 360_748_032


def test_active_by_hand() -> None:
    """Two of eight experts, 3 matrices of 16 x 32 each, in two layers: 6 x 2 are idle."""
    config = small_config()
    counts = count_parameters(config)
    assert counts.by_part["routed_experts"] == 2 * 8 * 3 * 16 * 32
    assert counts.total - counts.active == 2 * 6 * 3 * 16 * 32
    untied = count_parameters(small_config(tied=False))
    assert untied.active == counts.active
    assert untied.by_part["unembed"] == untied.by_part["embed"] == 61 * 32


@pytest.mark.parametrize("variant", ["shared, tied", "as 424B"])
def test_vision_language_figures_are_those_of_the_module(variant: str) -> None:
    config = small_vl(variant)
    with torch.device("meta"):
        model = VLModel(config)
    counts = count_parameters(config)
    assert counts.total == sum(counts.by_part.values())
    assert counts.total == sum(p.numel() for p in model.parameters())
    assert counts.by_part["vision_tower"] == sum(p.numel() for p in model.vision.parameters())
    assert counts.by_part["resampler"] == sum(p.numel() for p in model.resampler.parameters())
    n_bytes = sum(
        p.numel() * (4 if stays_float32(name) else 2) for name, p in model.named_parameters()
    )
    assert weight_bytes(config, torch.bfloat16) == n_bytes


def test_vision_language_models_are_as_large_as_their_names() -> None:
    """Without tower (0.63 B) and resampler (0.14 B) the smaller has 28.6 B."""
    small, large = count_parameters(read_config(VL_28B)), count_parameters(read_config(VL_424B))
    assert small.total == 29_399_294_336
    assert large.total == 423_526_285_184
    text = count_parameters(read_config(TEXT_21B))
    assert small.active == text.active == 3_352_150_208
    assert large.active / 1e9 == pytest.approx(47.1, abs=0.05)
    for part in ("attention", "dense_mlp", "router", "shared_experts", "embed"):
        assert small.by_part[part] == text.by_part[part]
    assert small.by_part["text_experts"] == text.by_part["routed_experts"]
    assert small.by_part["vision_experts"] * 3 == small.by_part["text_experts"]
    assert large.by_part["vision_tower"] == small.by_part["vision_tower"] == 630_433_280
    # What a text token never meets: everything of pictures.
    decoder = count_parameters(small_vl().decoder)
    assert count_parameters(small_vl()).active == decoder.active


def test_memory_of_a_vision_language_model() -> None:
    config = read_config(VL_28B)
    assert require_memory(config, torch.bfloat16, "cpu", free=70 * GIB) > 29.4e9 * 2 * HEADROOM
    with pytest.raises(
        NotEnoughMemory, match=r'29.4 B parameters as bfloat16 .*fit: quantize="int8"'
    ):
        require_memory(config, torch.bfloat16, "cuda", free=48 * GIB)


def test_enough_memory_returns_the_estimate() -> None:
    config = config_of(TEXT_21B)
    needed = require_memory(config, torch.bfloat16, "cpu", free=64 * GIB)
    assert needed == pytest.approx(weight_bytes(config, torch.bfloat16) * HEADROOM, abs=1)


@pytest.mark.parametrize(
    ("free", "fits", "does_not"),
    [
        (60, ['would fit: dtype="bfloat16", quantize="int8", quantize="nf4"'], ["no dtype"]),
        (25, ['would fit: quantize="int8", quantize="nf4"'], ["bfloat16"]),
        (14, ['would fit: quantize="nf4" and dtype="bfloat16"'], ["int8", "no dtype"]),
        (13, ["no dtype or quantisation would fit; take a larger device"], ["bfloat16", "="]),
    ],
)
def test_the_refusal_says_what_would_fit(free: int, fits: list[str], does_not: list[str]) -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        require_memory(config_of(TEXT_21B), torch.float32, "cuda", free=free * 10**9)
    message = str(caught.value)
    assert f"need about 96.0 GB on cuda (weights and 10% room), {free}.0 GB are free" in message
    advice = message.partition("; ")[2]
    assert all(word in advice for word in fits)
    assert not any(word in advice for word in does_not)


def test_of_a_quantised_model_fewer_bits_are_advised_and_never_more() -> None:
    config = config_of(TEXT_21B)
    with pytest.raises(NotEnoughMemory, match=r"bfloat16 with quantize='int8' need.*") as caught:
        require_memory(config, torch.bfloat16, "cuda", quantize="int8", free=20 * 10**9)
    assert str(caught.value).endswith('would fit: quantize="nf4"')
    with pytest.raises(NotEnoughMemory, match=r"no dtype or quantisation would fit"):
        require_memory(config, torch.bfloat16, "cuda", quantize="nf4", free=10 * 10**9)


def test_the_text_model_of_21_b_in_nf4_needs_at_most_14_gb() -> None:
    """By hand: 21.556 B weights in 4 bits and a float32 for each 64, the rest as it is."""
    config = config_of(TEXT_21B)
    counts = count_parameters(config).by_part
    quantised = sum(counts[p] for p in counts if p not in ("embed", "router", "norms"))
    by_hand = quantised * (0.5 + 4 / 64) + 2 * (counts["embed"] + counts["norms"])
    by_hand += 4 * counts["router"]
    assert weight_bytes(config, torch.bfloat16, "nf4") == by_hand
    assert by_hand == pytest.approx(12.67e9, rel=1e-3)
    assert require_memory(config, torch.bfloat16, "cuda", quantize="nf4", free=14 * 10**9) < 14e9
    assert weight_bytes(config, torch.bfloat16, "int8") == pytest.approx(22.14e9, rel=1e-3)


def test_parts_on_request_are_counted() -> None:
    config = read_config(VL_28B)
    always = weight_bytes(config, torch.bfloat16, "nf4")
    tower = weight_bytes(config, torch.bfloat16, Quantisation("nf4", ("vision_tower",)))
    saved = count_parameters(config).by_part["vision_tower"] * (2 - 0.5625)
    assert 0.99 * saved < always - tower < saved  # its norms, biases and patches stay


def test_from_float64_both_smaller_dtypes_are_named() -> None:
    with pytest.raises(NotEnoughMemory, match=r'would fit: dtype="float32", dtype="bfloat16"'):
        require_memory(config_of(TEXT_21B), torch.float64, "cpu", free=100 * GIB)


def test_free_memory_of_this_machine() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 0
    assert free_bytes(torch.device("meta")) is None


def test_free_memory_of_a_host_and_a_container(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  99 kB\nMemAvailable:   64 kB\n")
    assert _host_free(meminfo) == 64 * 1024
    assert _host_free(tmp_path / "none") is None
    for name, text in {
        "memory.max": "1000\n",
        "memory.current": "700\n",
        "memory.stat": "anon 500\nfile 200\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert _container_free(tmp_path) == 500  # the file cache can be reclaimed
    (tmp_path / "memory.max").write_text("max\n")
    assert _container_free(tmp_path) is None
    assert _container_free(tmp_path / "none") is None


def test_where_memory_cannot_be_measured_nothing_is_refused() -> None:
    assert require_memory(config_of(TEXT_300B), torch.float32, "meta") > 10**12
