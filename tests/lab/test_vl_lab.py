"""A lab of a vision-language model: what users pass, what comes back, what is refused."""

import json
import random
import threading
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.labs import IMAGE, VIDEO, clip, picture, save_vl_lab, small_vl_lab
from torch import Tensor

import ernie_lab as el
from ernie_lab.analysis import isolation_report
from ernie_lab.checkpoint.config import ConfigError, RopeConfig
from ernie_lab.inputs import Preprocessor, PromptError, VideoError, prepare_image
from ernie_lab.interventions.edits import EditChangedNothingWarning
from ernie_lab.lab import Lab
from ernie_lab.model.text import TextModel
from ernie_lab.sites import Site

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
RECORDED = [
    *("routing", "residual", "embed_in", "blocks.*.moe.*out", "moe.text.expert_act"),
    *("vision.blocks.*.attn.pattern", "vision.out", "resampler.*"),
]


@pytest.fixture(scope="module")
def lab() -> Lab:
    return small_vl_lab()


def ask(*parts: object) -> list[dict[str, Any]]:
    """A chat of one message: text, and pictures (clips are lists)."""
    content: list[dict[str, Any]] = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "video" if isinstance(part, list) else "image"
        content.append({"type": kind, kind: part})
    return [{"role": "user", "content": content}]


def random_chat(rng: random.Random) -> list[dict[str, Any]]:
    makers: list[Callable[[], object]] = [
        lambda: "".join(rng.choices("abc dé", k=rng.randint(1, 6))),
        lambda: picture(rng.randint(0, 99), rng.choice([4, 8, 12]), rng.choice([4, 8, 16])),
        lambda: clip(rng.randint(0, 99), rng.randint(1, 4), rng.choice([4, 8]), 4),
    ]
    return ask(*(rng.choices(makers, [2, 1, 1])[0]() for _ in range(rng.randint(1, 4))))


def visual_site(trace: el.Trace, path: str) -> Site:
    return next(site for site in trace.known_sites if site.path == path)


# What is computed.


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_equals_its_prompts_alone(lab: Lab, seed: int) -> None:
    """Chats with and without pictures, of unequal length: logits, losses and every kind of row."""
    rng = random.Random(seed)
    chats = [random_chat(rng) for _ in range(rng.randint(2, 3))]
    both, n_before = lab.run(chats, keep=RECORDED), 0
    assert torch.equal(both.logits, lab.run(chats).logits), "recording changed the run"
    for i, chat in enumerate(chats):
        alone, mask = lab.run(chat, keep=RECORDED), both.mask[i]
        torch.testing.assert_close(both.logits[i][mask], alone.logits[0], **CLOSE)
        losses = both.token_loss[i][mask]
        torch.testing.assert_close(losses, alone.token_loss[0], equal_nan=True, **CLOSE)
        part, own = both.trace.sel(sequence=i), alone.trace
        places = ["pos", "id", "text", "modality", "content", "bank", "row", "col", "frame"]
        assert part.tokens[places].equals(own.tokens[places])
        columns = ["pos", "layer", "bank", "slot", "expert"]
        assert part.to_frame()[columns].equals(own.to_frame()[columns])
        for path in own.sites:
            if visual_site(own, path).row == "i":
                continue
            np.testing.assert_allclose(part[path], own[path], atol=5e-4, rtol=1e-4, err_msg=path)
        for image, medium in enumerate(own.media):
            for frame in range(medium.grid.t):
                mine = own.vision_pattern(-1, image, frame)
                theirs = part.vision_pattern(-1, n_before + image, frame)
                np.testing.assert_allclose(theirs, mine, atol=1e-5)
                np.testing.assert_allclose(mine.sum("key"), 1, atol=1e-5)
            chosen, again = (
                t.folded(t.routing("vision").expert_ids, image + at)
                for t, at in ((own, 0), (part, n_before))
            )
            assert np.array_equal(chosen, again)
        n_before += len(own.media)


@pytest.mark.parametrize(("seed", "temperature"), [(0, 0.0), (1, 1.0), (2, 0.0)])
def test_a_generation_is_that_of_its_whole_text(lab: Lab, seed: int, temperature: float) -> None:
    """Recorded under the cache, step by step, against all tokens at once."""
    rng = random.Random(seed)
    chats = [random_chat(rng) for _ in range(2)]

    def no_placeholders(ids: list[list[int]], logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.arange(5, 11), -1e9)

    kept = ["routing", "attention", "residual"]
    how: dict[str, Any] = {"max_new_tokens": 5, "stop": [], "temperature": temperature}
    how["logits_processors"] = no_placeholders
    gen = lab.generate(chats, keep=kept, seed=[3, 4], **how)
    for i, chat in enumerate(chats):
        assert lab.generate(chat, seed=3 + i, **how).tokens[0] == gen.tokens[i]
        visual = lab.prepare(chat).visual
        assert visual is not None
        images, videos = ([m for m in visual.media if m.kind == k] for k in ("image", "video"))
        text = [[*gen.prompts[i], *gen.tokens[i][:-1]]]
        whole = lab.run(text, images=[images], videos=[videos], keep=kept).trace
        part = gen.trace.sel(sequence=i)
        for bank in whole.banks:
            written, read = part.routing(bank), whole.routing(bank)
            assert np.array_equal(written.expert_ids, read.expert_ids)
            np.testing.assert_allclose(written.router_logits, read.router_logits, atol=1e-4)
        np.testing.assert_allclose(part.pattern(2), whole.pattern(2), atol=5e-5)
        assert set(part.tokens.query("phase == 'decode'")["bank"]) == {"text"}


def test_text_alone_is_the_text_model(lab: Lab) -> None:
    """The same weights in a `TextModel`, bit for bit: M-RoPE is RoPE where no picture is."""
    config = replace(lab.config.decoder, rope=RopeConfig(theta=500000.0, max_positions=512))
    text, weights = TextModel(config).eval(), dict(lab.model.named_parameters())
    with torch.no_grad():
        for name, parameter in text.named_parameters():
            in_bank = name.replace(".moe.router", ".moe.text.router")
            in_bank = in_bank.replace(".moe.experts", ".moe.text.experts")
            parameter.copy_(weights[in_bank])
    plain = Lab(model=text, tokenizer=lab.tokenizer)
    here, there = (one.run("hello é", keep="routing") for one in (lab, plain))
    assert torch.equal(here.logits, there.logits)
    assert np.array_equal(here.trace.routing("text").expert_ids, there.trace.expert_ids)
    assert here.trace.routing("vision").expert_ids.sizes["token"] == 0
    assert set(here.aux_loss) == {"text"}
    assert torch.equal(here.aux_loss["text"], there.aux_loss)
    assert lab.generate("hello", stop=[]).tokens == plain.generate("hello", stop=[]).tokens


def test_losses_of_both_banks(lab: Lab) -> None:
    run = lab.run("hi", images=picture(), keep="routing")
    for bank, aux in run.aux_loss.items():
        ledger = run.trace.routing(bank)
        load = np.bincount(ledger.expert_ids.values.ravel(), minlength=8) / ledger.expert_ids.size
        probs = ledger.router_probs.values.reshape(-1, 8).mean(0)
        assert float(aux) == pytest.approx(2 * 8 * (load * probs).sum(), rel=1e-5)
    both = sum(run.aux_loss.values())
    torch.testing.assert_close(run.loss_with_aux, run.loss + 0.001 * both)
    is_picture = run.batch.visual.layout.modality_BS[0] != 0
    assert run.token_loss[0, is_picture].isnan().all()
    assert run.token_loss[0, ~is_picture][1:].isfinite().all()


@pytest.mark.parametrize(
    "path", ["vision.blocks.0.attn.pattern", "blocks.1.moe.vision.expert_weights", "resampler.out"]
)
def test_gradients_are_the_slopes_of_the_loss(lab: Lab, path: str) -> None:
    given: dict[str, Any] = {"images": picture(), "videos": [clip()]}
    run = lab.run("hi", keep=path, grad=True, **given)
    generator = torch.Generator().manual_seed(0)
    is_map = visual_site(run.trace, path).row == "i"
    gradient = run.trace.gradient(run.loss, path, **({"image": 0, "frame": 0} if is_map else {}))
    towards = torch.randn(gradient.shape, generator=generator)

    def moved(step: float) -> float:
        def move(x: Tensor) -> Tensor:
            mine = x[0, :, : towards.shape[1], : towards.shape[2]] if is_map else x
            mine += step * towards
            return x

        return float(lab.run("hi", edits=el.edit(path, move), **given).loss)

    slope = (moved(2e-4) - moved(-2e-4)) / 4e-4
    expected = float((torch.from_numpy(gradient.values.copy()) * towards).sum())
    assert slope == pytest.approx(expected, rel=0.1, abs=0.01)


def test_moving_a_layers_pictures_to_the_text_bank(lab: Lab) -> None:
    edit = el.edit("blocks.1.moe.bank", torch.zeros_like)
    trace = lab.run("hi", images=picture(), edits=edit, keep="routing").trace
    n, n_vision = len(trace), int((trace.tokens["bank"] == "vision").sum())
    rows = trace.to_frame().groupby(["layer", "bank"]).size() // 2
    assert rows.to_dict() == {
        (1, "text"): n,
        (2, "text"): n - n_vision,
        (2, "vision"): n_vision,
    }
    assert "expected bank (an edit of moe.bank may have moved some)" in repr(trace)
    with pytest.raises(ValueError, match=r"an edit of moe\.bank moved some"):
        _ = trace.routing("text").expert_ids
    moved = trace.sel(layer=1)
    assert moved.folded(moved.routing("text").expert_ids).shape == (1, 1, 3, 4, 2)
    batch = lab.prepare("hi", images=picture())
    report = isolation_report(lab.model, batch, edits=[edit])
    assert len(report.leaks) == n_vision
    assert isolation_report(lab.model, batch).isolated


# What users pass.


def test_pictures_in_every_form(lab: Lab) -> None:
    """One picture, or one in a list, as PIL, array or tensor, apart or as a part of a message."""
    pixels, frames = np.asarray(picture()), np.stack([np.asarray(frame) for frame in clip()])
    wanted = lab.run(ask(picture(), "hi")).logits
    for given in (picture(), pixels, torch.tensor(pixels), lab.read_image(picture())):
        for images in (given, [given], (given,)):
            assert torch.equal(lab.run("hi", images=images).logits, wanted)
    wanted = lab.run(ask(clip(), "hi")).logits
    for given in ([clip()], frames, [frames], torch.tensor(frames), lab.read_video(clip())):
        assert torch.equal(lab.run("hi", videos=given).logits, wanted)
    nested = lab.run(["hi", "ho"], images=[[pixels], [pixels, picture(1)]])
    assert nested.batch.lengths[0] == lab.run("hi", images=pixels).batch.lengths[0]


def test_pictures_follow_their_places(lab: Lab) -> None:
    """Images and clips of three turns; those without data take the next of `images`."""
    chat = [
        {"role": "system", "content": "be kind"},
        *ask("a", picture(1), "b", picture(2, 8, 8)),
        {"role": "assistant", "content": "ok"},
        {"role": "user", "content": [{"type": "video", "video": clip()}, {"type": "image"}]},
    ]
    trace = lab.run(chat, images=picture(3, 4, 8), keep="routing").trace
    assert [(m.kind, tuple(m.grid)) for m in trace.media] == [
        ("image", (1, 6, 8)),
        ("image", (1, 4, 4)),
        ("video", (4, 4, 6)),
        ("image", (1, 2, 4)),
    ]
    for medium in trace.media:
        before = trace.tokens["text"][: medium.start - 1].str.cat()
        assert before.endswith(("Picture 1:", "Picture 2:", "Picture 3:", "Video 1:"))
    pixels = trace.media[3].frames
    assert pixels is not None
    assert np.array_equal(pixels[0], np.asarray(picture(3, 4, 8)))
    assert len(trace.boxes()) == 12 + 4 + 2 * 6 + 2


@pytest.mark.parametrize(
    ("prompt", "given", "says"),
    [
        ("hi", {"videos": clip()}, r"list of frames needs a list around it: videos=\[frames\]"),
        ("hi", {"videos": picture()}, "is of type Image, expected a path"),
        (["hi", "ho"], {"images": picture()}, "must be a list with one list for each of them"),
        (["hi", "ho"], {"images": [[picture()], []]}, "Write all of them as chats"),
        (ask("hi"), {"images": picture()}, "has 0 image parts without data, but images= gives 1"),
        ([20, IMAGE, IMAGE], {"images": picture()}, "2 image placeholders, but 1 images"),
        ([20, IMAGE, VIDEO], {}, "1 image placeholders, but 0 images were given"),
        ("<|IMAGE_PLACEHOLDER|>", {}, "1 image placeholders, but 0 images were given"),
        (
            "x <|IMAGE_END|>",
            {"images": picture()},
            "holds the text '<|IMAGE_END|>'".replace("|", r"\|"),
        ),
        ("hi", {"images": [None]}, "image 1 is a NoneType, expected a path"),
        ("hi", {"images": "none.png"}, "no such file"),
        ("hi", {"images": "https://x.y/z.png"}, r"lab.read_image\(url, allow_url=True\)"),
        ("hi", {"images": picture(0, 1, 300)}, "an aspect of 300"),
        ("hi", {"chat": {"enable_thinking": True}}, "the prompt is no chat"),
    ],
)
def test_what_does_not_fit_is_refused(lab: Lab, prompt: Any, given: Any, says: str) -> None:
    with pytest.raises((PromptError, VideoError, ValueError), match=says):
        lab.run(prompt, **given)


def test_pictures_of_another_kind_or_another_model(lab: Lab) -> None:
    with pytest.raises(ValueError, match="was prepared as an image"):
        lab.run("hi", videos=lab.read_image(picture()))
    theirs = prepare_image(picture(0, 56, 56), Preprocessor())
    with pytest.raises(ValueError, match=r"\[16, 588\], expected \[p, 12\].*for another model"):
        lab.run("hi", images=theirs)


def test_names_of_one_bank_or_the_other(lab: Lab) -> None:
    trace = lab.run("hi", images=picture(), keep="routing").trace
    with pytest.raises(ValueError, match=r"take t.routing\('text'\).expert_ids or"):
        _ = trace.expert_ids
    with pytest.raises(ValueError, match="bank='image': this model has banks text and vision"):
        trace.routing("image")
    with pytest.raises(KeyError, match=r"layer 0 is dense; layers with experts: 1\.\.2"):
        _ = trace["moe.text.router_logits", 0]
    with pytest.raises(KeyError, match=r"name one: blocks\.1\.moe\.text\.router_logits or"):
        lab.run("hi", keep="blocks.1.moe.router_logits")
    assert trace["router_logits", -1, "vision"].sizes["token"] == 14
    with pytest.raises(KeyError, match=r"or 'vision.blocks.\*.attn.pattern' for every layer\)"):
        trace.vision_pattern(0)


def test_a_prompt_without_pictures_has_no_tower(lab: Lab) -> None:
    trace = lab.run("hi", keep=["vision.out", "routing"]).trace
    with pytest.raises(KeyError, match="this run has no pictures"):
        _ = trace["vision.out"]
    with pytest.warns(EditChangedNothingWarning, match="applied 0 times"):
        lab.run("hi", edits=el.edit("vision.out", torch.zeros_like))
    with pytest.warns(EditChangedNothingWarning, match="was never called"):
        lab.run_with_hooks("hi", [("vision.out", lambda x, hook: None)])
    _, cache = lab.run_with_cache("hi")
    with pytest.raises(KeyError, match="or pass pictures: it fires with them alone"):
        _ = cache["vision.out"]
    with pytest.raises(ValueError, match=r"has a gradient \(integers\? no pictures\?\)"):
        lab.run_with_cache("hi", "vision.out", incl_bwd=True)


def test_a_long_text_is_measured_in_positions() -> None:
    """A picture of 5 x 5 tokens takes up 5 positions, so this prompt stays inside."""
    small = small_vl_lab()
    chat = ask(*[picture(0, 20, 20)] * 12)
    n_tokens, end = (b := small.prepare(chat)).lengths[0], int(b.next_positions_B)
    assert end < 512
    crowded = ask(*[picture(0, 20, 20)] * 12, "x" * (512 - end))
    assert small.prepare(crowded).lengths[0] > 512 > n_tokens - end
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small.run(crowded, logits="last")
    with pytest.warns(UserWarning, match="reaches 513 positions; the model was made for 512"):
        small.generate(crowded, max_new_tokens=2, stop=[])


# Generation, files, threads.


def test_thinking_and_the_end_of_a_text(lab: Lab) -> None:
    close = 12

    def closes_after_two(ids: list[list[int]], logits: Tensor) -> Tensor:
        done = len(ids[0]) - n_prompt
        return logits.index_fill(-1, torch.tensor([close if done == 2 else 70 + done]), 1e4)

    thinks = {"enable_thinking": True}
    n_prompt = lab.prepare("hi", thinks, images=picture()).lengths[0]
    gen = lab.generate(
        "hi",
        images=picture(),
        chat=thinks,
        max_new_tokens=5,
        stop=[],
        logits_processors=closes_after_two,
    )
    assert lab.tokenizer is not None
    assert gen.thinking == lab.tokenizer.decode([70, 71])
    assert gen.answer == lab.tokenizer.decode([73, 74])
    free = lab.generate("hi", images=picture(), max_new_tokens=8, stop=[])
    assert free.thinking is None
    ended = lab.generate("hi", images=picture(), max_new_tokens=8, stop=[free.tokens[0][3]])
    assert (ended.finish, ended.tokens[0]) == (("stop",), free.tokens[0][:4])


def test_without_a_tokenizer_there_are_ids_alone(lab: Lab) -> None:
    gen = replace(lab, tokenizer=None).generate([20, 21], max_new_tokens=2, stop=[])
    assert (gen.text, gen.thinking, gen.answer) == ("", None, "")
    assert len(gen.tokens[0]) == 2


@pytest.mark.parametrize("layout", ["released", "transformers-released", "transformers"])
def test_load_opens_what_was_saved(tmp_path: Path, layout: Any) -> None:
    """The patch size is the tower's where the preprocessor's files do not give it."""
    lab = small_vl_lab(shared_placeholder=layout == "released")
    folder = save_vl_lab(lab, tmp_path / "m", layout)
    again = el.load(folder, progress=False)
    assert (again.config, again.preprocessor) == (lab.config, lab.preprocessor)
    chat = ask("a", picture(), clip())
    assert torch.equal(again.run(chat).logits, lab.run(chat).logits)
    half = el.load(folder, progress=False, dtype="bfloat16")
    run = half.run(chat, keep=["routing", "vision.out"])
    torch.testing.assert_close(run.loss, lab.run(chat).loss, rtol=0.05, atol=0)
    assert run.trace.tensor("blocks.1.moe.vision.router_logits").dtype == torch.float32
    assert run.trace.tensor("vision.out").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="positions='theirs' must be"):
        el.load(folder, progress=False, positions="theirs")
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 14}))
    with pytest.raises(ConfigError, match=r"patch_size=14, but the vision tower .* of 2 pixels"):
        el.load(folder, progress=False)


def test_positions_of_transformers_are_those_of_a_long_clip(lab: Lab) -> None:
    long = clip(0, 16, 4, 4)
    theirs = replace(lab, positions="transformers")
    for one in (lab, theirs):
        details = one.run("hi", keep="routing").trace.provenance.details
        assert details["positions"] == one.positions
    ours_end, theirs_end = (
        int(one.prepare("hi", videos=[long]).next_positions_B) for one in (lab, theirs)
    )
    assert ours_end > theirs_end
    assert not torch.equal(
        lab.run("hi", videos=[long]).logits, theirs.run("hi", videos=[long]).logits
    )
    assert torch.equal(
        lab.run("hi", images=picture()).logits, theirs.run("hi", images=picture()).logits
    )


def test_a_saved_trace_is_the_same(lab: Lab, tmp_path: Path) -> None:
    chats = [ask("hi", picture(), clip()), ask("yo", picture(1, 8, 8))]
    trace = lab.generate(chats, max_new_tokens=3, stop=[], keep=["all", *RECORDED]).trace
    again = el.Trace.load(trace.save(tmp_path / "t"))
    assert again.tokens.equals(trace.tokens)
    assert again.to_frame().equals(trace.to_frame())
    assert again.boxes().equals(trace.boxes())
    assert again.folded("vision.out", 2).identical(trace.folded("vision.out", 2))
    assert again.vision_pattern(1, 1, 3).identical(trace.vision_pattern(1, 1, 3))
    for path in trace.sites:
        if visual_site(trace, path).row != "i":
            assert torch.equal(again.tensor(path), trace.tensor(path)), path
    second = again.sel(sequence=1)
    assert second.vision_pattern(0, 2).shape == (2, 16, 16)
    with pytest.raises(ValueError, match="picture 0 belongs to sequence 0"):
        second.vision_pattern(0, 0)


def test_threads_and_interrupts_leave_nothing(lab: Lab) -> None:
    def written(seed: int) -> list[list[int]]:
        gen = lab.generate("hi", images=picture(seed), max_new_tokens=4, stop=[], keep="routing")
        return [*gen.tokens, gen.trace.to_frame()["expert"].tolist()]

    def interrupt(x: Tensor) -> Tensor:
        raise KeyboardInterrupt

    expected, found = [written(seed) for seed in range(3)], {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: written(seed)}))
        for seed in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[seed] for seed in range(3)] == expected
    next(lab.stream("hi", images=picture(5), stop=[]))
    with pytest.raises(KeyboardInterrupt):
        lab.generate("hi", images=picture(), edits=el.edit("blocks.2.resid_post", interrupt))
    assert written(0) == expected[0]
