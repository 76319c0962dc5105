"""Streamed models: the results of loaded ones, what is refused, and what is left behind."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.files import random_tensors, write_sharded
from support.models import small_config
from torch.nn.functional import linear

import ernie_lab as el
from ernie_lab.checkpoint import CheckpointError, NotEnoughMemory, save_model, write_config
from ernie_lab.checkpoint.on_disk import OnDisk, on_disk
from ernie_lab.corpus import RecordPlan
from ernie_lab.interventions.fingerprint import fingerprint
from ernie_lab.lab import Lab
from ernie_lab.parallel.stream import Shelf, require_room, stream_bytes

TEXTS = ["And God said unto him, Behold, I will give thee the land.", "Plants make sugar."]
IDS = [[5, 17, 23, 8, 40, 3, 9, 11, 30, 2], [7, 7, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint as the released ones are stored, a layer's tensors in several shards."""
    where = tmp_path_factory.mktemp("released")
    config = small_config(tied=False)
    write_sharded(where, {key: 0.3 * x for key, x in random_tensors(config).items()}, 3)
    (where / "config.json").write_text(json.dumps(write_config(config, "float32")))
    return where


@cache
def opened(source: str | Path, dtype: str = "float32", placement: str | None = None) -> Lab:
    """Not to be changed: tests share it."""
    return el.load(source, dtype=dtype, placement=placement)


def both(source: str | Path, dtype: str = "float32") -> tuple[Lab, Lab]:
    return opened(source, dtype), opened(source, dtype, "stream")


def prompt_for(source: str) -> tuple[Any, dict[str, Any]]:
    if source == "released":
        return IDS, {}
    if source == "tiny-text":
        return TEXTS, {}
    board = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return TEXTS, {"images": [[board], [board]]}


def require_same_traces(a: el.Trace, b: el.Trace) -> None:
    assert a.values.keys() == b.values.keys()
    for path, recorded in a.values.items():
        for one, other in zip(recorded, b.values[path], strict=True):
            assert torch.equal(one.values, other.values), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["tiny-text", "tiny-vl", "released"])
def test_every_site_is_that_of_a_loaded_model(source: str, dtype: str, folder: Path) -> None:
    plain, streamed = both(folder if source == "released" else source, dtype)
    prompt, media = prompt_for(source)
    a, b = (lab.run(prompt, keep="all", max_bytes=10**10, **media) for lab in (plain, streamed))
    assert a.logits is not None and b.logits is not None
    assert torch.equal(a.logits, b.logits)
    require_same_traces(a.trace, b.trace)
    weight = on_disk(streamed.model)[-1]
    assert weight.read() is not weight.read(), "still held"
    assert "on disk" in b.trace.provenance.details["placement"]
    assert "on disk" in repr(streamed)


@pytest.mark.parametrize("source", ["tiny-text", "tiny-vl"])
def test_edits_and_generation_are_those_of_a_loaded_model(source: str) -> None:
    prompt, media = prompt_for(source)
    bank: dict[str, Any] = {} if source == "tiny-text" else {"bank": "text"}
    for edit in (
        el.shared.swap(1, 3),
        el.shared.swap(1, 3, norm_matched=True, positions=slice(0, 4)),
        el.shared.permute_neurons(seed=1),
        el.routing.forbid(layer=2, experts=[1], **bank),
        el.routing.random(seed=1, **bank),
    ):
        a, b = (lab.run(prompt, edits=[edit], **media) for lab in both(source))
        assert a.logits is not None and b.logits is not None
        assert torch.equal(a.logits, b.logits), edit
        assert [c.measured for c in a.edits] == [c.measured for c in b.edits], edit
    how: dict[str, Any] = {"max_new_tokens": 6, "temperature": 0, "keep": "routing"} | media
    c, d = (lab.generate(prompt, **how) for lab in both(source))
    assert c.tokens == d.tokens
    require_same_traces(c.trace, d.trace)


def test_parts_go_from_a_streamed_model_to_a_loaded_one_and_back(folder: Path) -> None:
    plain, streamed = both(folder)
    for receiver, donor in ((plain, streamed), (streamed, plain)):
        with pytest.warns(el.EditChangedNothingWarning):
            run = receiver.run(IDS, edits=[el.shared.transplant(donor)])
        assert run.logits is not None
        expected = plain.run(IDS).logits
        assert expected is not None
        assert torch.equal(run.logits, expected)


def test_weights_read_outside_of_their_turn_are_the_checkpoints(folder: Path) -> None:
    plain, streamed = both(folder)
    theirs = dict(streamed.model.named_parameters())
    left = on_disk(streamed.model)
    assert len(left) == 3 * 4 + 3 + 2 * 5
    for name, weights in plain.model.named_parameters():
        assert torch.equal(theirs[name].float(), weights), name
    assert fingerprint(streamed.model) == fingerprint(plain.model)
    assert not any(isinstance(x, OnDisk) for x in streamed.model.routers().values())
    # The trap: `linear` of a CPU tensor with one on meta returns memory as it is found.
    weight, x = streamed.model.blocks[0].attn.q.weight, torch.ones(2, 32)  # type: ignore[union-attr]
    assert isinstance(weight, OnDisk)
    expected = linear(x, plain.model.blocks[0].attn.q.weight)  # type: ignore[union-attr, arg-type]
    for product in (linear(x, weight), x @ weight.T, torch.einsum("nd,fd->nf", x, weight)):
        assert not product.is_meta
        assert torch.allclose(product, expected)
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(RuntimeError, match="on disk"):
        linear(x, weight)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lab: lab.run(IDS, grad=True), "graph would hold the weights of every layer"),
        (lambda lab: lab.model.to(torch.bfloat16), "neither moved nor cast"),
        (lambda lab: lab.model.blocks[0].attn.q.weight.mul_(2), "blocks.0.attn.q.weight is on"),
        (lambda lab: lab.model.requires_grad_(True), "takes no gradient"),
        (lambda lab: lab.model.load_state_dict(lab.model.state_dict()), "it is only read"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable[[Lab], Any], said: str, folder: Path) -> None:
    lab = el.load(folder, placement="stream")
    with pytest.raises((ValueError, RuntimeError), match=said):
        change(lab)
    assert lab.model.embed_VD.dtype == torch.float32


def test_refusals_of_load_and_save_name_the_next_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="streamed from disk and is not saved"):
        save_model(opened(folder, placement="stream").model, small_config(), tmp_path / "new")
    with pytest.raises(ValueError, match="packed anew in every pass"):
        el.load(folder, placement="stream", quantize="int8")
    with pytest.raises(ValueError, match=r'"auto": .*"stream": .*"ep:N"'):
        el.load(folder, placement="streams")
    config = small_config()
    stays, left = stream_bytes(config, torch.float32)
    two = max(a + b for a, b in pairwise(left))
    require_room(config, torch.float32, torch.device("cpu"), free=int(1.2 * (stays + two)))
    with pytest.raises(NotEnoughMemory, match=r'for two layers, .* dtype="bfloat16"'):
        require_room(config, torch.float32, torch.device("cpu"), free=stays + two)


def test_a_checkpoint_that_does_not_fit_is_refused_at_load(tmp_path: Path) -> None:
    config = small_config(tied=False)
    tensors = random_tensors(config)
    tensors.pop(
        next(key for key in tensors if key.endswith("layers.2.mlp.experts.3.up_proj.weight"))
    )
    write_sharded(tmp_path, tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "float32")))
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
        el.load(tmp_path, placement="stream")


def test_a_nan_is_found_in_the_first_pass(tmp_path: Path) -> None:
    config = small_config(tied=False)
    tensors = random_tensors(config)
    key = next(key for key in tensors if key.endswith("layers.2.self_attn.o_proj.weight"))
    tensors[key][3, 4] = torch.nan
    write_sharded(tmp_path, tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "float32")))
    lab = el.load(tmp_path, placement="stream")
    with pytest.raises(CheckpointError, match=r"layers\.2\.self_attn\.o_proj\.weight"):
        lab.run(IDS)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_nothing(error: type[BaseException], folder: Path) -> None:
    plain, streamed = both(folder)
    n_threads = threading.active_count()

    def stop(x: torch.Tensor, hook: object) -> None:
        raise error("now")

    with pytest.raises(error, match="now"):
        streamed.run_with_hooks(IDS, [("blocks.1.hook_resid_mid", stop)])
    assert threading.active_count() == n_threads
    weight = on_disk(streamed.model)[-1]
    assert weight.read() is not weight.read(), "still held"
    a, b = plain.run(IDS).logits, streamed.run(IDS).logits
    assert a is not None and b is not None and torch.equal(a, b)


def test_two_passes_at_a_time_and_one_within_another(folder: Path) -> None:
    plain, streamed = both(folder)
    expected = plain.run(IDS).logits
    assert expected is not None
    found: list[torch.Tensor | None] = []

    def again(x: torch.Tensor, hook: object) -> None:
        found.append(streamed.run(IDS).logits)

    found.append(streamed.run_with_hooks(IDS, [("blocks.1.hook_resid_mid", again)]))
    threads = [
        threading.Thread(target=lambda: found.append(streamed.run(IDS).logits)) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 5
    assert all(one is not None and torch.equal(one, expected) for one in found)


def test_each_layer_is_read_once_a_pass(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = opened(folder, placement="stream")
    read: list[str] = []
    whole = Shelf.read

    def counted(self: Shelf, parameters: Any, *rest: Any) -> Any:
        read.extend(parameter.path for parameter in parameters)
        return whole(self, parameters, *rest)

    monkeypatch.setattr(Shelf, "read", counted)
    lab.run(IDS)
    assert read == [parameter.path for parameter in on_disk(lab.model)]
    read.clear()
    lab.run(IDS, edits=[el.shared.swap(1, 2)])
    part = [f"blocks.{n}.moe.shared.{p}.weight" for n in (2, 1) for p in ("gate", "up", "down")]
    assert [path for path in read if "shared" in path][-12:].count(part[0]) >= 1
    assert not any(".experts." in path for path in read[: -len(on_disk(lab.model)) - 24])


def test_a_corpus_is_recorded_as_by_a_loaded_model(tmp_path: Path) -> None:
    stores = [
        RecordPlan(
            model="tiny-text",
            corpus=TEXTS * 3,
            folder=tmp_path / name,
            load_options=options,
        ).run(progress=False)
        for name, options in (("plain", {}), ("stream", {"placement": "stream"}))
    ]
    a, b = (store.counts() for store in stores)
    assert a.equals(b)


MEASURE = """
import json, sys, threading, torch
from pathlib import Path
import ernie_lab as el

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("RssAnon"))

def watch():
    while not done.wait(0.001):
        seen.append(anonymous())

torch.set_num_threads(1)
el.load("tiny-text", placement="stream").run([[5]])  # imports, threads
seen, done, watcher = [anonymous()], threading.Event(), threading.Thread(target=watch)
watcher.start()
lab = el.load(sys.argv[1], placement="stream", progress=False)
loaded = anonymous()
for _ in range(2):
    lab.run([list(range(8))])
done.set(); watcher.join()
print(json.dumps({"peak": max(seen) - seen[0], "loaded": loaded - seen[0],
                  "n": len(seen)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_two_layers_are_in_memory_and_no_more(tmp_path: Path) -> None:
    from checkpoint.test_load_memory import CONFIG

    write_sharded(tmp_path, random_tensors(CONFIG), 3)
    (tmp_path / "config.json").write_text(json.dumps(write_config(CONFIG)))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    measured = json.loads(ran.stdout)
    stays, left = stream_bytes(CONFIG, torch.float32)
    assert measured["n"] > 20, "too few samples to speak of a peak"
    assert measured["loaded"] <= 1.1 * stays + 2**23, measured
    assert measured["peak"] <= 1.1 * (stays + 2 * max(left)) + 2**23, (measured, left)
    assert measured["peak"] < 0.8 * (stays + sum(left))
