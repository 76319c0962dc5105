"""Experts over two ranks: every bit as in one process, whatever is recorded and edited."""

import json
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint.files import random_tensors, write_sharded
from parallel.conftest import Load
from support.labs import picture
from support.models import small_config, small_model, small_vl_model
from torch import Tensor, nn

import ernie_lab as el
from ernie_lab.checkpoint import Reader, detect, fill, save_model, write_config
from ernie_lab.checkpoint.config import AttentionConfig, VisualIds
from ernie_lab.checkpoint.names import LAYOUTS, VL_LAYOUTS
from ernie_lab.interventions.fingerprint import fingerprint
from ernie_lab.lab import Lab
from ernie_lab.model.experts import ExpertBank
from ernie_lab.model.kinds import build
from ernie_lab.parallel.experts import SplitExpertBank, held_by, split_experts
from ernie_lab.parallel.messages import Kind, Link, Message
from ernie_lab.parallel.ranks import RankError, Ranks
from ernie_lab.parallel.serving import PARTS

TEXT = "And God said unto him, Behold, I will give thee the land."
SHORT = "Plants generate energy through"


def everything(lab: Lab) -> list[str]:
    return [site.path for site in el.all_sites(lab.model)]


def assert_alike(one: el.Run, other: el.Run) -> None:
    """Logits, losses and all that was kept, bit for bit."""
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.loss, other.loss)
    assert_recorded_alike(one.trace, other.trace)


def assert_recorded_alike(one: el.Trace, other: el.Trace) -> None:
    assert one.values.keys() == other.values.keys()
    for path, kept in one.values.items():
        parts = other.values[path].parts
        assert kept.parts.keys() == parts.keys()
        for i, part in kept.parts.items():
            assert torch.equal(part.values, parts[i].values), path
            assert torch.equal(part.rows_N, parts[i].rows_N), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_text(load_over_two: Load, dtype: str) -> None:
    one, split = el.load("tiny-text", dtype=dtype), load_over_two("tiny-text", dtype=dtype)
    for prompt in (TEXT, [TEXT, SHORT]):
        runs = [lab.run(prompt, keep=everything(one)) for lab in (one, split)]
        assert_alike(*runs)
    assert "blocks.3.moe.expert_act" in runs[0].trace.values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pictures(load_over_two: Load, dtype: str) -> None:
    """The vision bank has tokens in the one and none in the other."""
    one, split = el.load("tiny-vl", dtype=dtype), load_over_two("tiny-vl", dtype=dtype)
    image = picture(0, 56, 84)
    for images in ([image], None):
        runs = [
            lab.run("What is this?", images=images, keep=everything(one)) for lab in (one, split)
        ]
        assert_alike(*runs)


@pytest.mark.parametrize("layout", ["released", "transformers"])
def test_random_weights_with_biases(load_over_two: Load, tmp_path: Path, layout: Any) -> None:
    folder = random_text(tmp_path, layout)
    one, split = el.load(folder), load_over_two(folder)
    ids = torch.randint(3, 61, (3, 40)).tolist()
    assert_alike(*(lab.run(ids, keep=everything(one)) for lab in (one, split)))


def random_text(folder: Path, layout: Any = "released", **overrides: Any) -> Path:
    attention = AttentionConfig(width=32, n_heads=4, n_kv_heads=2, head_dim=8, use_bias=True)
    config = small_config(tied=False, attention=attention, head_bias=True, **overrides)
    model = build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return save_model(model, config, folder / "model", layout=layout)


EDITS = {
    "head": el.edits.zero("attn.z", layers=2, heads=1),
    "router": el.routing.forbid(2, [0, 1, 2, 9]),
    "expert off": el.experts.off([1, 3], [5, 12]),
    "swap over the ranks": el.experts.swap(3, 2, 13),
    "inside": el.edit("blocks.2.moe.expert_act", lambda x: 1.5 * x),
    "gate": el.edit("blocks.4.moe.expert_gate", lambda x: x.roll(1, -1)),
    "one slot": el.edit("blocks.3.moe.slot_out", lambda x: x * (torch.arange(4) != 1)[:, None]),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits(load_over_two: Load, name: str) -> None:
    one, split = el.load("tiny-text"), load_over_two("tiny-text")
    edits = EDITS[name]
    runs = [lab.run(TEXT, edits=edits, keep=everything(one)) for lab in (one, split)]
    assert_alike(*runs)
    assert not torch.equal(runs[0].logits, one.run(TEXT).logits)
    assert runs[0].edits[0].n_changed == runs[1].edits[0].n_changed > 0


def test_generation(load_over_two: Load) -> None:
    one, split = el.load("tiny-text"), load_over_two("tiny-text")
    keep = ["moe.expert_ids", "moe.expert_up", "resid_post"]
    gens = [
        lab.generate(
            [TEXT, SHORT], max_new_tokens=12, temperature=0.8, keep=keep, edits=EDITS["head"]
        )
        for lab in (one, split)
    ]
    assert gens[0].tokens == gens[1].tokens
    assert_recorded_alike(gens[0].trace, gens[1].trace)


@pytest.mark.parametrize("placement", ["ep:2", "ep:2+tp"])
def test_weights_of_other_ranks_count_in_a_fingerprint(
    load_over_two: Load, tmp_path: Path, placement: str
) -> None:
    folder = random_text(tmp_path)
    one, again = (fingerprint(load_over_two(folder, placement).model) for _ in range(2))
    assert one == again
    other = el.load(folder)
    with torch.no_grad():
        if placement == "ep:2":
            experts = other.model.blocks[1].moe.experts
            experts.down_EDF[-1, 0, 0] += 1  # the last expert is held by rank 1
        else:
            other.model.blocks[0].attn.q.weight[-1, 0] += 1  # and so is the last head
    changed = save_model(other.model, other.config, tmp_path / "other", layout="released")
    assert fingerprint(load_over_two(changed, placement).model) != one


def test_a_corpus(load_over_two: Load, tmp_path: Path) -> None:
    """Recorded on rank 0 alone, as by one process."""
    found = []
    for name, lab in (("one", el.load("tiny-text")), ("split", load_over_two("tiny-text"))):
        plan = el.RecordPlan(model=lab, corpus=[TEXT, SHORT] * 4, folder=tmp_path / name)
        found.append(plan.run(progress=False).load())
    assert found[0].equals(found[1])
    with pytest.raises(ValueError, match="rank 0 records all of it, with runner='local'"):
        plan.run(runner="torchrun", progress=False)


# ------------------------------------------------------------------ what each rank holds


def test_each_rank_reads_and_holds_its_experts_alone(load_over_two: Load, two_ranks: Ranks) -> None:
    one = el.load("tiny-text")
    split = load_over_two("tiny-text")
    report = two_ranks.reports[1]
    experts = sum(p.numel() for n, p in one.model.named_parameters() if ".experts." in n)
    assert report["bytes_held"] == experts // 2 * 4
    assert report["bytes_read"] == experts // 2 * 2  # bf16 in the file
    assert one.report.n_bytes - split.report.n_bytes == experts // 2 * 2
    assert one.report.held.total - split.report.held.total == experts // 2 * 4
    assert all(bank.own.down_EDF.shape[0] == 8 for bank in banks_of(split))
    assert not any(p.is_meta for p in split.model.parameters())


def banks_of(lab: Lab) -> list[SplitExpertBank]:
    return [part for part in lab.model.modules() if isinstance(part, SplitExpertBank)]


# As in the released checkpoints.
ONE_PLACEHOLDER = VisualIds(
    image=50, video=50, image_start=52, image_end=53, video_start=54, video_end=55
)


@pytest.mark.parametrize("layout", [*LAYOUTS, *(f"vl {name}" for name in VL_LAYOUTS)])
def test_slices_together_are_the_whole(tmp_path: Path, layout: str) -> None:
    """Over three ranks, which eight experts do not divide by: 2, 3 and 3."""
    is_text = not layout.startswith("vl ")
    model = small_model() if is_text else small_vl_model(ids=ONE_PLACEHOLDER)
    folder = save_model(model, model.config, tmp_path / "model", layout=layout.removeprefix("vl "))  # type: ignore[arg-type]
    reader, n_read = Reader.open(folder), 0
    parts: dict[str, list[Tensor]] = {}
    for rank in range(3):
        with torch.device("meta"):
            own = build(model.config)
            banks = split_experts(own, rank, 3)
        mine = {id(p) for bank in banks for p in bank.own.parameters()}
        leave = {name for name, p in own.named_parameters() if id(p) not in mine}
        report = fill(
            own, reader, detect(reader.tensors.keys()), device="cpu", dtype=torch.float32,
            progress=False, leave=leave,
        )  # fmt: skip
        n_read += report.n_bytes
        for name, parameter in own.named_parameters():
            if not parameter.is_meta:
                parts.setdefault(name.replace(".own.", "."), []).append(parameter)
    whole = {name: p for name, p in model.named_parameters() if ".experts." in name}
    assert parts.keys() == whole.keys()
    for name, parameter in whole.items():
        assert [len(part) for part in parts[name]] == [2, 3, 3]
        assert torch.equal(torch.cat(parts[name]), parameter), name
    assert n_read == sum(p.nbytes for p in whole.values())


@pytest.mark.parametrize(("n_experts", "n_ranks"), [(64, 8), (64, 6), (5, 5), (7, 2)])
def test_every_expert_is_on_one_rank(n_experts: int, n_ranks: int) -> None:
    held = [held_by(rank, n_experts, n_ranks) for rank in range(n_ranks)]
    assert [e for one in held for e in one] == list(range(n_experts))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_weights_do_not_travel(load_over_two: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is sent and received are rows of tokens, far less than the experts they meet."""
    split, sizes = load_over_two("tiny-text"), []
    send, receive = Link.send, Link.receive

    def counted_send(link: Link, messages: dict[int, Message]) -> None:
        sizes.extend(x.nbytes for message in messages.values() for x in message.tensors)
        send(link, messages)

    def counted_receive(link: Link, *arguments: Any) -> Message:
        message = receive(link, *arguments)
        sizes.extend(x.nbytes for x in message.tensors)
        return message

    monkeypatch.setattr(Link, "send", counted_send)
    monkeypatch.setattr(Link, "receive", counted_receive)
    batch = split.prepare("And")
    split.run("And")
    n_tokens, d, k, layers = batch.mask.numel(), 128, 4, 5
    # Each token at most once, k outputs, two numbers for each slot.
    most = layers * n_tokens * (4 * d + k * (4 * d + 16))
    assert (
        0 < sum(sizes) <= most < sum(p.nbytes for b in banks_of(split) for p in b.parameters()) / 20
    )


def test_a_rank_without_tokens_is_not_asked(
    load_over_two: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, split = el.load("tiny-text"), load_over_two("tiny-text")
    sent: list[int] = []
    send = Link.send
    monkeypatch.setattr(Link, "send", lambda link, m: (sent.extend(m), send(link, m)))
    ours, theirs = range(8), range(8, 16)
    runs = [lab.run(TEXT, edits=el.routing.forbid(None, theirs)) for lab in (one, split)]
    assert torch.equal(runs[0].logits, runs[1].logits)
    assert not sent
    keep = everything(one)  # with something to show, of no rows on rank 0
    assert_alike(
        *(lab.run(TEXT, edits=el.routing.forbid(None, ours), keep=keep) for lab in (one, split))
    )
    assert sent


# ------------------------------------------------------------------------------- refusals


def test_what_cannot_be(load_over_two: Load, tmp_path: Path) -> None:
    split = load_over_two("tiny-text")
    with pytest.raises(ValueError, match=r"several ranks, and gradients through them are refused"):
        split.run(TEXT, grad=True)
    with pytest.raises(ValueError, match=r"held by 2 ranks, and rank 0 has 8 of 16"):
        _ = banks_of(split)[0].down_EDF
    with pytest.raises(el.CheckpointError, match="over several ranks and is not saved"):
        save_model(split.model, split.config, tmp_path / "saved")
    with pytest.raises(ValueError, match=r"several ranks, torch\.float32 on cpu here: choose"):
        split.model.to(torch.bfloat16)
    load_over_two("tiny-text").model.to("cpu", torch.float32)


def test_a_fork_does_not_wait_for_ever(load_over_two: Load) -> None:
    split = load_over_two("tiny-text")
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python warns of forks of a process with threads
        pid = os.fork()
    if pid == 0:
        try:
            with split.model.blocks[1].moe.experts.ranks.talk():  # type: ignore[union-attr]
                os.write(write, b"talked")
        except RankError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert b"not of its forks" in os.read(read, 200)


@pytest.mark.parametrize(
    ("placement", "words"),
    [
        ("ep:1", "at least 2"),
        ("ep", "such as ep:2"),
        ("ep:two", "such as ep:2"),
        ("ep:17", "there are 16 experts in a bank, and every rank needs one"),
        ("ep:4+tp", "2 key/value heads cannot be shared equally by 4 ranks"),
        ("ep:2+pp", r"ep:N\+tp"),
    ],
)
def test_placements_that_are_none(placement: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        el.load("tiny-text", placement=placement)


def test_a_dense_model_has_no_experts_to_share(tmp_path: Path) -> None:
    config = small_config(moe=None)
    model = build(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    folder = save_model(model, config, tmp_path / "dense")
    with pytest.raises(ValueError, match="dense, it has no experts"):
        el.load(folder, placement="ep:2")


def test_quantised_models_are_not_split() -> None:
    with pytest.raises(ValueError, match="quantize="):
        el.load("tiny-text", placement="ep:2", quantize="int8")


# ------------------------------------------------------------------------------- failures


def test_a_rank_that_raises_shows_its_own_traceback(
    load_over_two: Load, two_ranks: Ranks, tmp_path: Path
) -> None:
    """A NaN in an expert that only rank 1 reads. What the ranks held before works on."""
    split = load_over_two("tiny-text")
    before = split.run(SHORT).logits
    config = small_config()
    tensors = random_tensors(config)
    tensors["model.layers.1.mlp.experts.7.up_proj.weight"][0, 0] = np.nan
    write_sharded(tmp_path, tensors, 2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, "float32")))
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed:.*experts\.7\.up_proj.*NaN"):
        load_over_two(tmp_path)
    with two_ranks.talk() as talk, pytest.raises(RankError, match=r"(?s)serving.py.*KeyError: 999"):
        talk.ask({1: Message(Kind.EXPERTS, 999 * PARTS)}).result()
    assert torch.equal(split.run(SHORT).logits, before)


class _Stop(Exception):
    pass


@pytest.mark.parametrize("error", [_Stop, KeyboardInterrupt])
@pytest.mark.parametrize("site", ["expert_gate", "expert_act", "expert_out"])
def test_a_tap_that_raises_leaves_nothing_behind(
    load_over_two: Load, error: type[BaseException], site: str
) -> None:
    split = load_over_two("tiny-text")
    before = split.run(SHORT, keep=f"blocks.2.moe.{site}")

    def stop(x: Tensor) -> Tensor:
        raise error

    with pytest.raises(error):
        split.run(TEXT, edits=el.edit(f"blocks.2.moe.{site}", stop))
    assert_alike(split.run(SHORT, keep=f"blocks.2.moe.{site}"), before)


def test_running_the_model_from_inside_an_expert(load_over_two: Load) -> None:
    split = load_over_two("tiny-text")

    def again(x: Tensor) -> Tensor:
        split.run(SHORT)
        return x

    with pytest.raises(RankError, match="run from inside a tap"):
        split.run(TEXT, edits=el.edit("blocks.2.moe.expert_up", again))
    split.run(TEXT, edits=el.edit("blocks.2.moe.routed_out", lambda x: again(x) * 2))


def test_threads_take_turns(load_over_two: Load) -> None:
    one, split = el.load("tiny-text"), load_over_two("tiny-text")
    prompts = [TEXT[:n] for n in range(10, 40, 5)]
    with ThreadPoolExecutor(3) as pool:
        keep = ["moe.expert_act"]
        runs = list(pool.map(lambda prompt: split.run(prompt, keep=keep), prompts))
    for prompt, run in zip(prompts, runs, strict=True):
        assert_alike(one.run(prompt, keep=keep), run)


def test_a_bank_of_one_process_is_as_it_was(load_over_two: Load) -> None:
    """Splitting a model leaves no trace on the next one that is loaded."""
    load_over_two("tiny-text")
    assert all(type(m) is not SplitExpertBank for m in el.load("tiny-text").model.modules())
    assert any(isinstance(m, ExpertBank) for m in el.load("tiny-text").model.modules())
