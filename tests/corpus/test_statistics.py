"""Integer statistics: by hand, and the same however the work is cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ernie_lab.corpus.statistics import (
    BUCKETS,
    ENTROPY_BINS,
    FIXED,
    MARGIN_BINS,
    STATISTICS,
    Rows,
    Shape,
    Statistics,
    bucket_of,
    margin_bin,
    normalised_entropy,
)

SHAPE = Shape((1, 3), 4, 2, 10, ("a", "b"))


def random_rows(n: int, seed: int = 0, domains: int = 2):
    generator = torch.Generator().manual_seed(seed)

    def below(high: int) -> torch.Tensor:
        return torch.randint(high, (n,), generator=generator)

    probs = torch.rand(n, 4, generator=generator).softmax(-1)
    scores = probs + 0.1 * torch.rand(4, generator=generator)
    ids = scores.topk(2).indices
    weights = probs.gather(-1, ids)
    rows = Rows(below(domains), below(len(BUCKETS)), below(4), below(10))
    return rows, probs, scores, ids, weights / weights.sum(-1, keepdim=True)


def cut(x, at):
    return Rows(*(getattr(x, f)[at] for f in Rows.__slots__)) if isinstance(x, Rows) else x[at]


def test_by_hand() -> None:
    """Two tokens of two domains, probabilities that are whole powers of two."""
    counted = Statistics.empty(SHAPE, STATISTICS)
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]])
    scores = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.3, 0.1, 0.2, 0.05]])
    ids, weights = torch.tensor([[0, 1], [0, 2]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    rows = Rows(
        torch.tensor([0, 1]), torch.tensor([0, 2]), torch.tensor([0, 2]), torch.tensor([7, 7])
    )
    counted.add(3, rows, probs, scores, ids, weights)
    sums = counted.sums
    assert not sums["counts"][0].any(), "layer 1 saw nothing"
    assert sums["counts"][1, 0, 0].tolist() == [1, 1, 0, 0]
    assert sums["counts"][1, 1, 2].tolist() == [1, 0, 1, 0]
    assert sums["counts"].sum() == 4 and sums["tokens"].sum() == 2
    assert sums["content_counts"][1, 2].tolist() == [1, 0, 1, 0]
    assert (sums["probabilities"][1, 0] / FIXED).tolist() == [0.5, 0.25, 0.125, 0.125]
    assert (sums["weights"][1, 0] / FIXED).tolist() == [0.75, 0.25, 0, 0]
    # H = 1.75 bits of 2, so 0.875 of the scale; the uniform router is in the last bin.
    assert sums["entropy"][1, 0].nonzero().item() == int(0.875 * ENTROPY_BINS)
    assert sums["entropy"][1, 1].nonzero().item() == ENTROPY_BINS - 1
    # Margins 1/8 and 0.1: three whole octaves are 96 bins; -log2(0.1) * 32 = 106.3.
    assert sums["margin"][1, 0].nonzero().item() == 96
    assert sums["margin"][1, 1].nonzero().item() == 106
    assert sums["coactivation"][1].tolist() == [[2, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0] * 4]
    assert sums["vocabulary"][1, 7].tolist() == [2, 1, 1, 0]
    counted.add_transitions(3, torch.tensor([2, 2]), torch.tensor([0, 1]))
    assert sums["transitions"][0, 2].tolist() == [1, 1, 0, 0]
    assert all(x.dtype == torch.int64 for x in sums.values())


def test_edges() -> None:
    assert bucket_of(torch.tensor([0, 1, 15, 16, 63, 64, 99999])).tolist() == [0, 1, 1, 2, 2, 3, 7]
    assert (
        margin_bin(torch.tensor([1.0, 0.0, -0.5, 2.0**-40])).tolist() == [0] + [MARGIN_BINS - 1] * 3
    )
    certain = torch.tensor([[1.0, 0.0, 0.0]])
    assert normalised_entropy(certain).item() == 0
    assert normalised_entropy(torch.full((1, 5), 0.2)).item() == pytest.approx(1)
    assert normalised_entropy(torch.ones(2, 1)).tolist() == [0, 0]
    assert math.log2(FIXED) == 30


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_however_it_is_cut(sizes, rng) -> None:
    """Pieces counted apart, in any order, merge to the integers of one count."""
    n = sum(sizes)
    values = random_rows(n, seed=1)
    whole = Statistics.empty(SHAPE, STATISTICS)
    whole.add(1, *values)
    order = torch.tensor(rng.sample(range(n), n))
    parts = []
    for at in order.split(sizes):
        part = Statistics.empty(SHAPE, STATISTICS)
        part.add(1, *(cut(x, at) for x in values))
        parts.append(part)
    rng.shuffle(parts)
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    assert all(torch.equal(merged.sums[name], x) for name, x in whole.sums.items())


def test_domains_are_joined_by_name() -> None:
    one = Statistics.empty(Shape((1,), 4, 2, 10, ("b",)))
    two = Statistics.empty(Shape((1,), 4, 2, 10, ("a", "c")))
    values = random_rows(12, domains=1)
    one.add(1, *values)
    two.add(1, *values)
    merged = two.merged(one)
    assert merged.shape.domains == ("a", "b", "c")
    assert torch.equal(merged.sums["counts"][:, 1], one.sums["counts"][:, 0])
    assert torch.equal(merged.sums["counts"][:, 0], two.sums["counts"][:, 0])
    assert torch.equal(merged.sums["coactivation"], 2 * one.sums["coactivation"])
    again = one.merged(two)
    assert all(torch.equal(again.sums[name], x) for name, x in merged.sums.items())


def test_what_differs_cannot_be_added() -> None:
    one = Statistics.empty(SHAPE)
    with pytest.raises(ValueError, match="cannot be added"):
        one.merged(Statistics.empty(Shape((1, 3), 8, 2, 10, ("a", "b"))))
    with pytest.raises(ValueError, match="cannot be added"):
        one.merged(Statistics.empty(SHAPE, ["counts"]))
