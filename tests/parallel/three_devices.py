"""Run by test_auto.py in a process of its own: one model on one pretended device, and over three.

Prints what agreed, one line each.
"""

import sys
from typing import Any

import numpy as np
import torch
from support.pretend import PretendDevices, setup

setup()

import ernie_lab as el  # noqa: E402
from ernie_lab.corpus import RecordPlan  # noqa: E402
from ernie_lab.lab import Lab  # noqa: E402
from ernie_lab.parallel.auto import Room, bytes_by_layer  # noqa: E402

TEXT = ["And God said unto him, Behold, I will give thee the land.", "Plants generate energy."]


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")


def rooms(source: str, n: int) -> tuple[Room, ...]:
    """Pretended devices that take a model's layers in equal runs, and no more."""
    config = el.load(source).config
    needed, n_layers = bytes_by_layer(config, torch.float32), config.decoder.n_layers
    size = -(-n_layers // n)
    found = []
    for number in range(n):
        mine = range(number * size, min(n_layers, (number + 1) * size))
        taken = sum(needed[layer] for layer in mine) + (needed[None] if number == 0 else 0)
        found.append(Room(torch.device("pretend", number), int(1.1 * taken) + 1000))
    return tuple(found)


def opened(source: str, n: int) -> Lab:
    import ernie_lab.loading as loading

    loading.local_rooms = lambda: rooms(source, n)  # type: ignore[assignment]
    return el.load(source, placement="auto")


def media(source: str) -> dict[str, Any]:
    if source == "tiny-text":
        return {}
    board = np.random.default_rng(0).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return {"images": [[board], [board]]}


def same_trace(a: el.Trace, b: el.Trace) -> int:
    assert a.values.keys() == b.values.keys()
    for path, recorded in a.values.items():
        for one, other in zip(recorded, b.values[path], strict=True):
            assert torch.equal(one.values, other.values), path
    return len(a.values)


def edits(source: str, lab: Lab, trace: el.Trace) -> dict[str, Any]:
    last = lab.config.decoder.n_layers - 1
    bank: dict[str, Any] = {} if source == "tiny-text" else {"bank": "text"}
    found = {
        "swap": el.shared.swap(1, last),
        "swap, narrowed": el.shared.swap(1, last, norm_matched=True, positions=slice(1, 5)),
        "permuted": el.shared.permute_neurons(),
        "random direction": el.shared.random_direction(seed=1),
        "forbid": el.routing.forbid(layer=last, experts=[1], **bank),
        "random router": el.routing.random(seed=1, **bank),
        "replay": el.routing.replay(trace),
        "mean": el.shared.mean(trace),
        "patched": el.edits.patch(f"blocks.{last}.resid_post", trace, positions=[1]),
    }
    if source == "tiny-vl":
        found["share router"] = el.routing.share_router()
    return found


def compare(source: str) -> None:
    one, many = opened(source, 1), opened(source, 3)
    assert len({p.device for p in many.model.parameters()}) == 3, many
    given = media(source)
    a, b = (lab.run(TEXT, keep="all", max_bytes=10**10, **given) for lab in (one, many))
    assert a.logits is not None and b.logits is not None
    assert b.logits.device == many.device == torch.device("pretend:0")
    assert torch.equal(a.logits.cpu(), b.logits.cpu())
    assert a.loss is not None and b.loss is not None and torch.equal(a.loss.cpu(), b.loss.cpu())
    say(source, "sites", same_trace(a.trace, b.trace))
    assert "pretend:2" in b.trace.provenance.details["placement"]
    for name, edit in edits(source, many, a.trace).items():
        kept = [lab.run(TEXT, keep="routing", edits=[edit], **given).trace for lab in (one, many)]
        same_trace(*kept)
        say(source, "edit", name)
    how: dict[str, Any] = {"max_new_tokens": 4, "temperature": 0, "keep": "routing"} | given
    said = [lab.generate(TEXT, **how) for lab in (one, many)]
    assert said[0].tokens == said[1].tokens
    same_trace(said[0].trace, said[1].trace)
    say(source, "generated")


def record(folder: str) -> None:
    stores = []
    for n in (1, 3):
        lab = opened("tiny-text", n)
        plan = RecordPlan(model=lab, corpus=TEXT, folder=f"{folder}/{n}", rows=None)
        stores.append(plan.run(progress=False))
    one, other = (store.counts() for store in stores)
    assert np.array_equal(np.asarray(one), np.asarray(other))
    say("recorded")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with PretendDevices():
        for source in ("tiny-text", "tiny-vl"):
            compare(source)
        record(sys.argv[1])
