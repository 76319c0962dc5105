"""Paths against counts by hand; information against what was planted."""

import numpy as np
import pytest
from support.routings import by_lot, routing

from ernie_lab.analysis import frequent_paths, path_counts, path_information, path_steps

# First choices by layer; the second slot must not matter.
FIRST = np.array([[0, 0, 1, 2], [1, 1, 1, 0], [2, 2, 0, 1]])
IDS = np.stack([FIRST, (FIRST + 1) % 3], axis=-1)


def test_steps_by_hand():
    steps = path_steps(routing(IDS, layers=[2, 5, 9]))
    assert steps.layer.values.tolist() == [2, 5] and steps.next_layer.values.tolist() == [5, 9]
    assert steps.sel(layer=2).values.tolist() == [[0, 2, 0], [0, 1, 0], [1, 0, 0]]
    assert steps.sel(layer=5, expert=1, next_expert=2) == 2
    assert int(steps.sel(layer=5).sum()) == 4


def test_path_counts_by_hand():
    table = path_counts(routing(IDS, layers=[2, 5, 9]))
    assert table[[2, 5, 9]].iloc[0].tolist() == [0, 1, 2]
    assert table.n_tokens.tolist() == [2, 1, 1] and table.share.iloc[0] == 0.5


def follow(n=900, n_experts=4, seed=0):
    """The second layer follows the first, the third is by lot, the fourth follows the token."""
    made = by_lot(4, n, n_experts, 2, n_documents=9, seed=seed)
    ids = made.expert_ids.values.copy()
    token = np.random.default_rng(1).integers(0, n_experts, n)
    ids[1] = (ids[0] + 1) % n_experts
    ids[2, :, 0] = ids[3, :, 0] = token
    ids[2:, :, 1] = (token + 1) % n_experts
    return routing(ids, sequence=made.expert_ids.sequence.values, id=token)


def test_information_of_a_copy_of_nothing_and_of_the_token():
    made = follow()
    table = path_information(made, n_permuted=20, n_draws=100).set_index("layer")
    assert table.loc[1, "share"] == pytest.approx(1, abs=0.02)
    assert table.loc[1, "information"] == pytest.approx(2, abs=0.02)  # log2 of 4 experts
    assert table.loc[2, "low"] < 0 < table.loc[2, "high"]  # layer 3 does not know layer 2
    assert table.loc[2, "information"] < table.loc[2, "chance_p95"] + 0.02
    assert table.loc[3, "excess"] == pytest.approx(2, abs=0.05)
    given = path_information(made, given="id", n_permuted=20, n_draws=100).set_index("layer")
    assert given.loc[3, "excess"] == pytest.approx(0, abs=1e-9)  # all of it was the token
    assert given.loc[1, "excess"] == pytest.approx(2, abs=0.06)
    assert given.loc[3, "next_layer"] == 4 and given.loc[3, "n_tokens"] == 900


def test_frequent_paths_are_picked_on_one_half_and_told_of_the_other():
    n = 400
    rng = np.random.default_rng(0)
    first = rng.integers(0, 4, (3, n))
    first[:, ::5] = np.array([[3], [1], [2]])
    made = routing(
        np.stack([first, (first + 1) % 4], -1),
        sequence=np.sort(np.arange(n) % 8),
        text=["the" if i % 5 == 0 else "of" for i in range(n)],
    )
    row = frequent_paths(made, 1, n_draws=100).iloc[0]
    assert row.path == "3 → 1 → 2" and row.n_tokens <= 200
    assert row.low <= row.share <= row.high and row.share > row.by_steps > row.by_loads
    assert row.tokens.startswith("the ×")
    shares = [(first[:, made.expert_ids.sequence.values < 8][i] == e).mean() for i, e in
              enumerate((3, 1, 2))]  # fmt: skip
    assert row.by_loads == pytest.approx(np.prod(shares), rel=0.2)


def test_errors():
    with pytest.raises(ValueError, match="layer 1 alone"):
        path_steps(routing(IDS[:1]))
    with pytest.raises(ValueError, match="run several texts"):
        frequent_paths(routing(IDS))
    with pytest.raises(ValueError, match="no 'domain'"):
        path_information(routing(IDS), given="domain")
