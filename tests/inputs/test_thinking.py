"""Thinking apart from the answer: as text, as ids, and not fooled by tags that are not there."""

import json
from pathlib import Path

import pytest

from ernie_lab.inputs import Tokenizer, load_tokenizer
from ernie_lab.inputs.thinking import (
    Thought,
    ThoughtIds,
    read_thinking,
    split_thinking,
    split_thinking_ids,
    thinking_is_open,
)

TAGS = ["<think>", "</think>", "<response>", "</response>"]


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("4", False, Thought(None, "4")),
        ("\n4\n", False, Thought(None, "\n4\n")),
        ("", False, Thought(None, "")),
        ("use </think> to close", False, Thought(None, "use </think> to close")),
        ("so: <think>hm</think> 4", False, Thought(None, "so: <think>hm</think> 4")),
        ("<think>\nhm\n</think>\n\n4", False, Thought("hm", "4")),
        ("\n<think>hm</think>4", False, Thought("hm", "4")),
        ("\nhm\n</think>\n\n4\n", True, Thought("hm", "4\n")),
        ("<think>\nhm\n</think>\n\n4", True, Thought("hm", "4")),
        ("\n</think>\n4", True, Thought("", "4")),
        ("a</think>b</think>c", True, Thought("a", "b</think>c")),
        ("\nhm, 4", True, Thought("hm, 4", "", closed=False)),
        ("<think>hm", False, Thought("hm", "", closed=False)),
        ("", True, Thought("", "", closed=False)),
        ("hm\n</think>\n\n<response>\n4\n</response>\n", True, Thought("hm", "4")),
        ("hm</think><response>\n4 an", True, Thought("hm", "4 an")),
        ("hm</think><response>4</response>\nmore", True, Thought("hm", "4more")),
        ("<response>\n4\n</response>", False, Thought(None, "4")),
    ],
)
def test_text(text: str, opened: bool, expected: Thought) -> None:
    assert split_thinking(text, opened) == expected


@pytest.mark.parametrize(
    ("ids", "opened", "expected"),
    [
        ([5, 6], False, ThoughtIds(None, (5, 6))),
        ([5, 9, 6], False, ThoughtIds(None, (5, 9, 6))),
        ([5, 8, 6, 9], False, ThoughtIds(None, (5, 8, 6, 9))),
        ([8, 5, 9, 6], False, ThoughtIds((5,), (6,))),
        ([0, 8, 5, 9, 6], False, ThoughtIds((5,), (6,))),
        ([5, 9, 6, 9], True, ThoughtIds((5,), (6, 9))),
        ([8, 5, 9, 6], True, ThoughtIds((5,), (6,))),
        ([9], True, ThoughtIds((), ())),
        ([5], True, ThoughtIds((5,), (), closed=False)),
        ([], False, ThoughtIds(None, ())),
        ([], True, ThoughtIds((), (), closed=False)),
    ],
)
def test_ids(ids: list[int], opened: bool, expected: ThoughtIds) -> None:
    found = split_thinking_ids(ids, 8, 9, opened, blank_ids=frozenset({0}))
    assert found == expected


@pytest.fixture(scope="module", params=["special tokens", "plain tokens", "text"])
def tokenizer(
    request: pytest.FixtureRequest, bare_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    folder = tmp_path_factory.mktemp("thinking")
    (folder / "tokenizer.model").write_bytes((bare_folder / "tokenizer.model").read_bytes())
    bare = load_tokenizer(folder)
    assert bare is not None
    if request.param != "text":
        added = {tag: bare.vocab_size + i for i, tag in enumerate(TAGS)}
        (folder / "added_tokens.json").write_text(json.dumps(added))
    if request.param == "special tokens":
        special = {"additional_special_tokens": TAGS}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    loaded = load_tokenizer(folder)
    assert loaded is not None
    is_special = loaded.encode("<think>")[0] in loaded.special_ids
    assert is_special == (request.param == "special tokens")
    assert (len(loaded.encode("<think>")) == 1) == (request.param != "text")
    return loaded


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("hm 2\n</think>\n\n4 你好</s>", True, Thought("hm 2", "4 你好")),
        ("\n<think>\nhm\n</think>\n\n4", False, Thought("hm", "4")),
        ("hm, 4</s>", True, Thought("hm, 4", "", closed=False)),
        ("plain answer</s>", False, Thought(None, "plain answer")),
        ("hm\n</think>\n\n<response>\n4\n</response>\n</s>", True, Thought("hm", "4")),
    ],
)
def test_generated_ids(tokenizer: Tokenizer, text: str, opened: bool, expected: Thought) -> None:
    ids = tokenizer.encode(text)
    assert ids[-1] == 2 or "</s>" not in text
    assert read_thinking(ids, tokenizer, opened) == expected


@pytest.mark.parametrize(
    ("text", "opened", "removed", "expected"),
    [
        ("hm</think>4 and STOP", True, "STOP", Thought("hm", "4 and ")),
        ("hm STOP", True, " STOP", Thought("hm", "", closed=False)),
        ("4 and STOP", False, "STOP", Thought(None, "4 and ")),
    ],
)
def test_cut_before_a_stop_string(
    tokenizer: Tokenizer, text: str, opened: bool, removed: str, expected: Thought
) -> None:
    ids = tokenizer.encode(text)
    cut = tokenizer.decode(ids, skip_special=True).removesuffix(removed)
    assert read_thinking(ids, tokenizer, opened, text=cut) == expected


def test_cut_within_the_thinking(tokenizer: Tokenizer) -> None:
    """A stop string that reaches over the closing tag."""
    ids = tokenizer.encode("hm STOP</think>4")
    assert read_thinking(ids, tokenizer, True, text="hm") == Thought("hm", "", closed=False)


def test_ids_without_a_token(tokenizer: Tokenizer) -> None:
    beyond = tokenizer.vocab_size
    expected = Thought(None, f"<id {beyond}>4")
    assert read_thinking([beyond, *tokenizer.encode("4")], tokenizer) == expected


def test_open_prompts(tokenizer: Tokenizer) -> None:
    for text, expected in [
        ("\nAssistant: <think>", True),
        ("<|im_start|>assistant\n<think>\n", True),
        ("\nAssistant: <think>\n\n</think>\n\n", False),
        ("Assistant: ", False),
        ("What does <think> mean?", False),
    ]:
        assert thinking_is_open(tokenizer.encode(text), tokenizer) is expected
