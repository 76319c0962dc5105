"""Expert search: what is found, in which order, and what is said when nothing is."""

import re

import numpy as np
import pytest
from support.routings import routing

from ernie_lab.analysis import find
from ernie_lab.trace.tokens import Tokens

TEXT = ["The", " cat", "\n", "The", " dog", "<b>"]
MADE = routing(
    [[[0, 1]] * 6, [[3, 1], [1, 3], [0, 2], [3, 0], [2, 0], [3, 2]]],
    weights=[[[0.5, 0.5]] * 6,
             [[0.9, 0.1], [0.6, 0.4], [0.7, 0.3], [0.8, 0.2], [0.5, 0.5], [0.45, 0.55]]],
    layers=[1, 12], text=TEXT, sequence=[0, 0, 0, 1, 1, 1],
)  # fmt: skip


def test_hits_by_falling_weight_with_their_context():
    found = find(MADE, layer=12, expert=3)
    assert found.table.weight.tolist() == [0.9, 0.8, 0.45, 0.4]
    assert found.table.slot.tolist() == [0, 0, 0, 1]
    assert found.table.text.tolist() == ["The", "The", "<b>", " cat"]
    assert found.table.after.tolist() == ["␣cat⏎", "␣dog<b>", "", "⏎"]
    assert found.table.before.tolist() == ["", "", "The␣dog", "The"]  # no other sequence's
    assert (found.table.layer == 12).all() and (found.table.expert == 3).all()
    assert found.reading.weight.tolist() == [0.9, 0.4, 0, 0.8, 0, 0.45]
    assert "4 of 6 tokens (66.7%)" in found.summary and "up to 0.900" in found.summary
    assert "[The] ␣dog<b>" in repr(found) and "1:0" in repr(found)


def test_bounds_slots_texts_and_windows():
    def texts(**how):
        return find(MADE, layer=12, expert=3, **how).table.text.tolist()

    assert texts(weight=">0.45") == ["The", "The"]
    assert texts(weight=">= 0.45") == texts(weight=0.45) == ["The", "The", "<b>"]
    assert texts(weight="<0.5") == ["<b>", " cat"]
    assert texts(slot=1) == [" cat"] and len(texts(slot=[0, 1])) == 4
    assert texts(text="a") == [" cat"] and texts(text=re.compile("^T|b")) == ["The", "The", "<b>"]
    found = find(MADE, layer=12, expert=3, n=1, window=1)
    assert len(found) == 1 and found.n_found == 4 and found.table.after[0] == "␣cat"
    assert "the 1 of largest weight shown" in found.summary


def test_nothing_found_says_what_there_is():
    with pytest.raises(ValueError) as told:
        find(MADE, layer=12, expert=3, weight=">0.95", text="dog")
    for part in (
        "no context for layer 12, expert 3, weight > 0.95, text with “dog”",
        "4 of 6 tokens", "from 0.400 to 0.900", "slot 0 3 times, slot 1 1 times", "The ×2",
    ):  # fmt: skip
        assert part in str(told.value)
    with pytest.raises(ValueError, match="chosen for none of 6 tokens"):
        find(MADE, layer=1, expert=3)
    with pytest.raises(ValueError, match="layer 2 has no routing here; layers 1, 12"):
        find(MADE, layer=2, expert=3)
    with pytest.raises(ValueError, match="experts are 0 to 3"):
        find(MADE, layer=1, expert=4)
    with pytest.raises(ValueError, match="weight='often'"):
        find(MADE, layer=1, expert=0, weight="often")


def test_the_reading_holds_tokens_of_other_banks_and_names_pictures():
    """Rows 1 and 2 of four tokens are this bank's: a picture of two tokens amid text."""
    pair = routing([[[0, 1], [1, 0]]], weights=[[[0.7, 0.3], [0.6, 0.4]]], text=["<p>", "<p>"])
    pair.expert_ids = pair.expert_ids.assign_coords(pos=("token", [1, 2]))
    pair.context = Tokens.of(
        [[9, 5, 5, 8]], [["prefill"] * 4], [["a", "<p>", "<p>", "b"]],
        {"content": [["text", "image", "image", "text"]], "image": [[None, 0, 0, None]],
         "row": [[None, 0, 0, None]], "col": [[None, 0, 1, None]], "frame": [[None, 0, 0, None]]},
    )  # fmt: skip
    found = find(pair, layer=1, expert=0)
    assert found.table.before.tolist() == ["a", "a[image 0]"]
    assert found.table.after.tolist() == ["[image 0]b", "b"]
    assert found.table.col.tolist() == [0, 1]
    assert np.isnan(found.reading.weight).tolist() == [True, False, False, True]
    assert "[image 0, frame 0, row 0, column 1]" in repr(found)
