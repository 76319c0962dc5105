"""What holds for every ready-made edit: counts, files, batches, generation, no trace left."""

import threading
from typing import Any

import edit_cases as labs
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions import Edit, at
from ernie_lab.interventions import catalogue as edits
from ernie_lab.lab import Lab

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
LAB, VL = labs.lab(), labs.vl_lab()
TEXT, VISUAL = labs.text_edits(LAB), labs.vl_edits(VL)
# What depends on the batch by its nature: recorded rows are told by their sequence.
OF_SEQUENCES = ("patch", "routing.replay")


@pytest.mark.parametrize("name", TEXT)
def test_text(name: str) -> None:
    edit = TEXT[name]
    assert isinstance(edit, Edit)
    plain = LAB.run(labs.PROMPTS)
    run = LAB.run(labs.PROMPTS, edits=edit, keep="routing")
    (count,) = run.edits
    n_sites = len(edit.select(el.all_sites(LAB.model)))
    assert count.n_fired == n_sites
    assert 0 < count.n_changed <= n_sites
    assert torch.equal(plain.logits, run.logits) is False
    if name != "shared.permute_neurons":
        assert not torch.allclose(plain.logits[run.mask], run.logits[run.mask], atol=1e-4)
    assert torch.equal(LAB.run(labs.PROMPTS).logits, plain.logits)
    if name not in OF_SEQUENCES:
        for i, prompt in enumerate(labs.PROMPTS):
            try:
                alone = LAB.run(prompt, edits=edit)
            except el.EditChangedNothingWarning:
                continue
            torch.testing.assert_close(run.logits[i][run.mask[i]], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("name", VISUAL)
def test_vision_language(name: str) -> None:
    edit = VISUAL[name]
    plain = VL.run(**labs.VL_PROMPT)
    run = VL.run(**labs.VL_PROMPT, edits=edit, keep="routing")
    (count,) = run.edits
    assert count.n_fired == len(edit.select(el.all_sites(VL.model)))
    assert count.n_changed > 0
    assert not torch.allclose(plain.logits[run.mask], run.logits[run.mask], atol=1e-4)
    assert torch.equal(VL.run(**labs.VL_PROMPT).logits, plain.logits)


def saved(edit: Any, folder: Any, donors: list[Lab]) -> Any:
    edits.save(edit, folder)
    (again,) = edits.load(folder, labs=donors)
    return again


@pytest.mark.parametrize("name", TEXT)
def test_files(name: str, tmp_path: Any) -> None:
    edit = at(TEXT[name], phase="prefill")
    again = saved(edit, tmp_path, [labs.lab(5)])
    assert again == edit
    assert hash(again) == hash(edit)
    assert repr(again).split("<")[0] == repr(edit).split("<")[0]
    if name != "routing.top_k":
        first, second = (LAB.run(labs.PROMPTS, edits=one).logits for one in (edit, again))
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", VISUAL)
def test_files_of_vision_language(name: str, tmp_path: Any) -> None:
    assert saved(VISUAL[name], tmp_path, []) == VISUAL[name]


def whole(lab: Lab, gen: Any) -> list[list[int]]:
    return [[*p, *t[:-1]] for p, t in zip(gen.prompts, gen.tokens, strict=True)]


def same_routing(one: Any, other: Any, lab: Lab) -> None:
    for path in one.values:
        if path.endswith("expert_ids"):
            assert torch.equal(one.tensor(path), other.tensor(path)), path
        else:
            # Rounding is of the size of the largest number: 4.8e-5 was seen where these reach 24.
            found = one.tensor(path)
            largest = float(found.abs().max()) if found.numel() else 0.0
            atol = max(CLOSE["atol"], 4e-6 * largest)
            torch.testing.assert_close(found, other.tensor(path), **CLOSE | {"atol": atol})


@pytest.mark.parametrize("name", [n for n in TEXT if n not in OF_SEQUENCES])
def test_generation_equals_a_forward_of_the_final_text(name: str) -> None:
    """Token by token: what flowed while it was written, and what flows in the final text."""
    keep = ["routing", "blocks.2.resid_post"]
    gen = LAB.generate(
        labs.PROMPTS, max_new_tokens=5, temperature=0.0, stop=[], edits=TEXT[name], keep=keep
    )
    run = LAB.run(whole(LAB, gen), edits=TEXT[name], keep=keep)
    same_routing(gen.trace, run.trace, LAB)


def words_alone(ids: list[list[int]], logits_BV: torch.Tensor) -> torch.Tensor:
    logits_BV[:, 50:56] = -torch.inf
    return logits_BV


@pytest.mark.parametrize("name", VISUAL)
def test_generation_after_pictures(name: str) -> None:
    keep = ["routing", "blocks.2.resid_post"]
    gen = VL.generate(
        **labs.VL_PROMPT,
        max_new_tokens=4,
        temperature=0.0,
        stop=[],
        edits=VISUAL[name],
        keep=keep,
        # A delimiter that it writes is read as text, in a prompt it is of the vision bank.
        logits_processors=words_alone,
    )
    run = VL.run(whole(VL, gen), images=labs.VL_PROMPT["images"], edits=VISUAL[name], keep=keep)
    same_routing(gen.trace, run.trace, VL)


@pytest.mark.parametrize("name", ["shared.swap", "routing.random", "experts.swap", "routing.top_k"])
def test_an_interrupt_leaves_the_next_run_unchanged(name: str) -> None:
    def interrupt(x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    before = LAB.run("hello").logits
    state = {name: x.clone() for name, x in LAB.model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt):
        LAB.run("hello", edits=[TEXT[name], el.edit("blocks.2.moe.moe_out", interrupt)])
    assert torch.equal(LAB.run("hello").logits, before)
    assert state.keys() == LAB.model.state_dict().keys()
    assert all(torch.equal(x, state[name]) for name, x in LAB.model.state_dict().items())


def test_threads_do_not_meet() -> None:
    alone = {
        name: LAB.run("hello", edits=TEXT[name]).logits
        for name in ("shared.swap", "routing.random")
    }
    failures = []

    def work(name: str) -> None:
        runs = [LAB.run("hello", edits=TEXT[name]).logits for _ in range(5)]
        failures.extend(name for found in runs if not torch.equal(found, alone[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_functions_cannot_be_saved(tmp_path: Any) -> None:
    with pytest.raises(el.EditError, match="a function is no value"):
        edits.save([TEXT["zero"], el.edit("embed", torch.neg)], tmp_path)
    with pytest.raises(el.EditError, match="is not among labs="):
        edits.from_json(edits.to_json(TEXT["shared.transplant"]))
    with pytest.raises(el.EditError, match="are not given"):
        edits.from_json(edits.to_json(TEXT["mean"]))
    with pytest.raises(el.EditError, match="no JSON of edits"):
        edits.from_json("[]")
