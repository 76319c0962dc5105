"""Memory plans against models built on meta, tensors that were alive, and figures by hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from checkpoint.released_configs import DENSE_0_3B, TEXT_21B, TEXT_300B, VL_28B, VL_424B
from support.live_bytes import most_alive
from support.models import small_config, small_vl_config

import ernie_lab as el
from ernie_lab.checkpoint import read_config, weight_bytes
from ernie_lab.checkpoint.config import AttentionConfig, MoEConfig, RouterConfig, TextConfig
from ernie_lab.checkpoint.names import stays_float32
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.model.initial import initialise
from ernie_lab.model.kinds import build
from ernie_lab.model.text import TextModel
from ernie_lab.parallel.activations import activation_bytes, cache_bytes
from ernie_lab.parallel.memory import (
    Asked,
    MemoryPlan,
    memory_plans,
    one_device,
    over_ranks,
    streamed,
    whole_layers,
)
from ernie_lab.parallel.memory_table import plan_lines
from ernie_lab.parallel.serving import split
from ernie_lab.parallel.stream import stream_bytes

RELEASED = {"21B": TEXT_21B, "300B": TEXT_300B, "28B": VL_28B, "424B": VL_424B}
BF16 = Asked(torch.bfloat16)
GB = 10**9


def held(plan: MemoryPlan) -> int:
    return sum(need.held for need in plan.needs)


@pytest.mark.parametrize("raw", RELEASED.values(), ids=RELEASED)
def test_totals_are_those_of_the_model_built_on_meta(raw: dict[str, Any]) -> None:
    config = read_config(raw)
    with torch.device("meta"):
        parameters = dict(build(config).named_parameters())
    size = {n: p.numel() * (4 if stays_float32(n) else 2) for n, p in parameters.items()}
    total, experts = sum(size.values()), sum(size[n] for n in size if ".experts." in n)
    assert held(one_device(config, 80 * GB, BF16)) == total
    for devices in ([80 * GB] * 8, [24 * GB, 80 * GB], [10**13] * 2):
        spread = whole_layers(config, devices, BF16)
        assert held(spread) == total
        assert [layer for need in spread.needs for layer in need.layers] == list(
            range(config.decoder.n_layers)
        )
    assert held(over_ranks(config, [80 * GB] * 7, BF16)) == total
    assert held(over_ranks(config, [80 * GB] * 4, BF16, heads=True)) == total
    others = over_ranks(config, [80 * GB] * 8, BF16).needs[1:]
    assert [need.held for need in others] == [experts // 8] * 7


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("n_ranks", [2, 3])
def test_ranks_hold_what_the_plan_says(n_ranks: int, heads: bool) -> None:
    biased = AttentionConfig(width=32, n_heads=6, n_kv_heads=6, head_dim=8, use_bias=True)
    config = small_config(attention=biased)
    plan = over_ranks(config, [GB] * n_ranks, Asked(torch.float32, 64), heads=heads)
    for rank, need in enumerate(plan.needs):
        with torch.device("meta"):
            model = build(config)
            split(model, rank, n_ranks, heads=heads)
        kept = [p for n, p in model.named_parameters() if rank == 0 or ".own." in n]
        assert need.held == sum(p.nbytes for p in kept)


@pytest.mark.parametrize("raw", RELEASED.values(), ids=RELEASED)
def test_streaming_holds_what_it_says(raw: dict[str, Any]) -> None:
    config = read_config(raw)
    stays, left = stream_bytes(config, torch.bfloat16)
    assert held(streamed(config, GB, BF16)) == stays + max(a + b for a, b in pairwise(left))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantised_totals_are_the_estimates_of_load(scheme: Any) -> None:
    for config in (read_config(TEXT_21B), small_vl_config()):
        asked = Asked(torch.bfloat16, 64, scheme=scheme)
        expected = weight_bytes(config, torch.bfloat16, scheme)
        assert held(one_device(config, GB, asked)) == expected
        assert held(whole_layers(config, [GB] * 3, asked)) == expected


def test_sizes_by_hand() -> None:
    """300B: 287.5 B parameters are experts, so on each of 8 ranks 72 GB; 24 GB are all else."""
    config = read_config(TEXT_300B)
    rank = over_ranks(config, [80 * GB] * 8, BF16).needs[0]
    assert rank.weights["experts"] == 51 * 8 * 3 * 8192 * 3584 * 2
    assert rank.weights["experts"] / GB == pytest.approx(71.9, abs=0.05)
    assert rank.held / GB == pytest.approx(96, abs=0.2)
    assert not over_ranks(config, [80 * GB] * 8, BF16).fits
    assert over_ranks(config, [141 * GB] * 8, BF16).fits
    sixteen = over_ranks(config, [80 * GB] * 16, BF16)
    assert sixteen.needs[0].held / GB == pytest.approx(60, abs=0.2)
    assert sixteen.fits
    assert [need.held for need in sixteen.needs[1:]] == [sixteen.needs[0].weights["experts"]] * 15
    layers = streamed(config, 80 * GB, BF16).needs[0].weights
    assert layers["experts"] == 2 * 64 * 3 * 8192 * 3584 * 2
    assert one_device(read_config(TEXT_21B), 80 * GB, BF16).fits
    # Keys and values of 8 heads of 128, in 54 layers.
    assert rank.cache == 2 * 54 * 4096 * 8 * 128 * 2
    heads = over_ranks(config, [80 * GB] * 8, BF16, heads=True)
    assert [need.cache for need in heads.needs] == [rank.cache // 8] * 8
    assert over_ranks(config, [80 * GB] * 8, BF16).needs[1].cache == 0


def test_a_device_fits_to_the_byte() -> None:
    config = read_config(TEXT_21B)
    need = one_device(config, 0, BF16).needs[0]
    assert need.needed == need.missing > weight_bytes(config, torch.bfloat16) * 1.0999
    assert one_device(config, need.needed, BF16).fits
    assert one_device(config, need.needed - 1, BF16).needs[0].missing == 1
    long = one_device(config, 0, Asked(torch.bfloat16, 131_072)).needs[0]
    assert long.needed == long.held + long.cache + long.activations > need.needed


def test_the_cache_is_what_a_cache_holds() -> None:
    config = small_config()
    model = TextModel(config)
    initialise(model, 0)
    ids = torch.zeros(3, 17, dtype=torch.int64)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    assert cache is not None
    tensors = [x for x in (*cache._keys, *cache._values) if x is not None]
    assert sum(x.nbytes for x in tensors) == 3 * cache_bytes(config, 17, 3, torch.float32)


def shaped(width: int, heads: int, hidden: int, k: int, n_experts: int, **rest: Any) -> TextConfig:
    attention = AttentionConfig(width=width, n_heads=heads, n_kv_heads=1, head_dim=64)
    moe = MoEConfig(
        layers=(1, 2), router=RouterConfig(width=width, n_experts=n_experts, n_chosen=k),
        expert_hidden=hidden, n_shared=0,
    )  # fmt: skip
    return small_config(**{"width": width, "attention": attention, "moe": moe} | rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        shaped(256, 4, 154, 6, 64, dense_hidden=1228),  # a tenth of 21B
        shaped(256, 4, 112, 8, 64, dense_hidden=896),  # a thirtieth of 300B
        shaped(128, 2, 512, 1, 8, dense_hidden=512),
        shaped(128, 2, 64, 2, 8, dense_hidden=2048),
        shaped(64, 2, 64, 2, 8, vocab_size=9000),
        shaped(128, 4, 1, 1, 8, dense_hidden=384, moe=None),
    ],
    ids=["21B", "300B", "wide experts", "wide MLP", "vocabulary", "dense"],
)
def test_activations_are_what_was_alive(config: TextConfig, dtype: torch.dtype) -> None:
    model = TextModel(config)
    initialise(model, 0)
    model = model.to(dtype).eval()
    ids = torch.randint(0, config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alive = most_alive(lambda: model(ids), list(model.parameters()))
    assert 1 <= activation_bytes(config, 256, 1, dtype) / alive <= 1.25


def test_activations_of_what_is_dequantised() -> None:
    """Gate and up of one expert together in bf16, and one of them in float32 twice."""
    config, how = read_config(TEXT_21B), Quantisation("int8")
    more = activation_bytes(config, 1, 1, torch.bfloat16, how)
    dense = 12288 * 2560
    assert more - activation_bytes(config, 1, 1, torch.bfloat16) == dense * 2 + dense * 8


def test_padding_needs_masks() -> None:
    config = small_config()
    one, two = (activation_bytes(config, 100, n, torch.bfloat16) for n in (1, 2))
    assert two - 2 * one == 2 * 100 * 100 * 3


def test_layers_that_no_device_takes_go_to_memory() -> None:
    config = read_config(TEXT_21B)
    plan = whole_layers(config, [24 * GB], BF16)
    device, memory = plan.needs
    assert (device.where, memory.where, memory.available) == ("device 0", "memory", None)
    assert not plan.fits and plan.in_memory == memory.needed > 0
    assert device.missing == 0 and device.held > 20 * GB
    assert not whole_layers(config, [24 * GB] * 3, BF16).in_memory


def test_what_cannot_be_is_said() -> None:
    dense = over_ranks(read_config(DENSE_0_3B), [GB] * 2, BF16)
    assert not dense.fits and dense.refused == "a dense model has no experts to share out"
    text = read_config(TEXT_21B)
    assert "64 experts for 65 ranks" in over_ranks(text, [GB] * 65, BF16).refused
    assert "4 key/value heads" in over_ranks(text, [GB] * 8, BF16, heads=True).refused
    few_bits = BF16.quantised("nf4")
    assert "packs nothing" in streamed(text, GB, few_bits).refused
    assert "no packed weights" in over_ranks(text, [GB] * 2, few_bits).refused
    with pytest.raises(ValueError, match="positions for 131,072 tokens"):
        memory_plans(text, [GB], Asked(torch.bfloat16, 131_073))
    with pytest.raises(ValueError, match="batch=0 must be at least 1"):
        Asked(torch.bfloat16, batch=0)


@pytest.mark.parametrize("placement", ["ep:2", "stream"])
def test_load_refuses_what_the_plan_does(placement: str) -> None:
    with pytest.raises(ValueError, match=f'placement="{placement}" with quantize='):
        el.load("tiny-text", placement=placement, quantize="int8")


def lines(raw: dict[str, Any], devices: list[int], *schemes: Any) -> str:
    return "\n".join(plan_lines(read_config(raw), "M", devices, BF16, schemes))


def test_the_table_and_what_to_take() -> None:
    large = lines(TEXT_300B, [80 * GB] * 8)
    ranks = next(line for line in large.splitlines() if line.startswith("ep:8, rank 0"))
    assert ranks.split()[3:6] == ["71.9", "16.3", "4.2"]
    assert ranks.endswith("25.5 GB missing")
    assert 'On these devices only load("M", placement="stream")' in large
    assert 'With 50.9 GB of the machine\'s memory also load("M", placement="auto")' in large
    assert 'Would fit: load("M", placement="auto", quantize="int8")' in large
    assert 'placement="auto" on 9 x 80.0 GB; placement="ep:11" on 11 x 80.0 GB' in large
    assert 'Take load("M", placement="auto").' in lines(TEXT_300B, [141 * GB] * 8)
    small = lines(TEXT_21B, [80 * GB] * 8)
    assert 'Take load("M").' in small and "workers=8, gpus_per_worker=1" in small
    assert "ep:8+tp                 no: 4 key/value heads cannot be shared" in small
    few_bits = lines(TEXT_21B, [24 * GB], "nf4")
    assert 'Take load("M", quantize="nf4").' in few_bits and "stream, nf4" in few_bits
    tiny = lines(VL_424B, [GB])
    assert "pictures" in tiny and "On these devices nothing fits, streaming neither." in tiny
