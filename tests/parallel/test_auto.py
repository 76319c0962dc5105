"""Layers over several devices: the plan as a function of sizes, and results over pretended ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint.released_configs import TEXT_21B, VL_28B

import ernie_lab as el
from ernie_lab.checkpoint import NotEnoughMemory, read_config, weight_bytes
from ernie_lab.checkpoint.memory import HEADROOM
from ernie_lab.checkpoint.quantise import Quantisation
from ernie_lab.checkpoint.shapes import parameter_shapes
from ernie_lab.parallel.auto import Room, bytes_by_layer, local_rooms, plan_layers

GB = 10**9
BF16 = torch.bfloat16
CONFIG_21B, CONFIG_28B = read_config(TEXT_21B), read_config(VL_28B)


def rooms(**free: float) -> tuple[Room, ...]:
    """`cuda0=24` in GB."""
    return tuple(
        Room(torch.device("cpu" if name == "cpu" else f"cuda:{name[4:]}"), int(n * GB))
        for name, n in free.items()
    )


def test_bytes_by_layer_are_all_the_bytes() -> None:
    for config in (CONFIG_21B, CONFIG_28B):
        for how in (None, Quantisation("int8")):
            by_layer = bytes_by_layer(config, BF16, how)
            assert sum(by_layer.values()) == weight_bytes(config, BF16, how)
            assert set(by_layer) == {None, *range(config.decoder.n_layers)}
    # The tower and the resampler are in no layer of the decoder.
    beside = bytes_by_layer(CONFIG_28B, BF16)[None]
    assert beside > 2 * 2 * CONFIG_28B.decoder.vocab_size * CONFIG_28B.decoder.width


def test_what_fits_one_device_is_on_it() -> None:
    plan = plan_layers(CONFIG_21B, BF16, rooms(cuda0=80, cuda1=80, cpu=200))
    assert {plan.home, *plan.layers} == {torch.device("cuda:0")}


def test_layers_are_in_order_within_the_room_and_on_as_few_devices_as_can_be() -> None:
    given = rooms(cuda0=24, cuda1=24, cpu=64)
    plan = plan_layers(CONFIG_21B, BF16, given)
    numbers = [[room.device for room in given].index(one) for one in plan.layers]
    assert numbers == sorted(numbers)
    assert set(numbers) == {0, 1, 2}
    held = dict.fromkeys((room.device for room in given), 0)
    for name, shape in parameter_shapes(CONFIG_21B).items():
        itemsize = 4 if ".router." in name else 2
        held[plan.device_of(name)] += torch.Size(shape).numel() * itemsize
    assert held == plan.n_bytes
    needed = bytes_by_layer(CONFIG_21B, BF16)
    for room, following in zip(given, (*given[1:], None), strict=True):
        assert room.free is not None
        assert held[room.device] <= room.free / HEADROOM
        if following is not None:  # not one layer more would have fitted
            first = plan.layers.index(following.device)
            assert held[room.device] + needed[first] > room.free / HEADROOM
    assert "cuda:1" in str(plan)


def test_everything_beside_the_layers_goes_to_the_first_device_that_takes_it() -> None:
    plan = plan_layers(CONFIG_28B, BF16, rooms(cuda0=1, cuda1=80))
    assert {plan.home, *plan.layers} == {torch.device("cuda:1")}
    assert plan.device_of("vision.blocks.3.attn.o.weight") == plan.home


def test_quantised_layers_take_less() -> None:
    with pytest.raises(NotEnoughMemory):
        plan_layers(CONFIG_21B, BF16, rooms(cuda0=16, cuda1=16))
    plan = plan_layers(CONFIG_21B, BF16, rooms(cuda0=16, cuda1=16), Quantisation("int8"))
    assert {*plan.layers} == {torch.device("cuda:0"), torch.device("cuda:1")}


def test_no_room_is_refused_with_figures_and_what_would_help() -> None:
    with pytest.raises(NotEnoughMemory) as refused:
        plan_layers(CONFIG_21B, torch.float32, rooms(cuda0=24, cpu=16))
    said = str(refused.value)
    for part in ("21.8 B", "float32", "24.0 GB on cuda:0", "16.0 GB on cpu", "layers 0-",
                 'dtype="bfloat16"', "quantize=", 'placement="stream"'):  # fmt: skip
        assert part in said, said
    with pytest.raises(NotEnoughMemory, match="not one layer would fit"):
        plan_layers(CONFIG_21B, BF16, rooms(cpu=0.1))


def test_free_memory_that_cannot_be_told_refuses_nothing() -> None:
    plan = plan_layers(CONFIG_21B, BF16, (Room(torch.device("mps"), None),))
    assert {plan.home, *plan.layers} == {torch.device("mps")}


def test_this_machine() -> None:
    assert local_rooms()[-1].device == torch.device("cpu")
    text = "And God said unto him, Behold"
    a, b = el.load("tiny-text").run(text), el.load("tiny-text", placement="auto").run(text)
    assert a.logits is not None and b.logits is not None
    assert torch.equal(a.logits, b.logits.to(a.logits.device))
    with pytest.raises(ValueError, match="leave one out"):
        el.load("tiny-text", placement="auto", device="cpu")
    quantised = el.load("tiny-text", placement="auto", quantize="int8")
    assert quantised.report is not None and quantised.report.held is not None
    assert quantised.report.held.scheme == "int8"


@pytest.mark.slow
def test_results_over_three_devices_are_those_on_one(tmp_path: Path) -> None:
    """Sites, edits, generation and a recording; tensors on different devices never meet unmoved."""
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    script = Path(__file__).with_name("three_devices.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path)],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["recorded"], done.stderr[-4000:]
    assert sum("edit" in line for line in done.stdout.splitlines()) == 19
