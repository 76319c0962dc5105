"""Sums over keys without a map equal the sums of the map; what cannot be told is refused."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

import ernie_lab as el
from ernie_lab.analysis import attention_rows, attention_summary
from ernie_lab.analysis.attention_blocks import blocks, distance_edges, summands
from ernie_lab.trace.keys import NotKept

READ = ["attn.q_rot", "attn.k_rot"]
TEXTS = ["And God said unto him, Behold, I", "def read(self, name):\n    return"]


@pytest.fixture(scope="module")
def lab() -> el.Lab:
    return el.load("tiny-text")


@pytest.fixture(scope="module")
def trace(lab: el.Lab) -> el.Trace:
    """Two texts of unequal length, prompt and generated tokens, with the maps to compare to."""
    return lab.generate(
        TEXTS, max_new_tokens=4, min_new_tokens=4, keep=[*READ, "attn.pattern"]
    ).trace


def test_by_hand() -> None:
    """Two keys with scores 0 and ln 3 under a query at position 1: weights 1/4 and 3/4."""
    q_SHA = torch.tensor([[[1.0]], [[1.0]]])
    k_TGA = torch.tensor([[[0.0]], [[math.log(3)]]])
    columns_TC = torch.tensor([[1.0], [0.0]])
    (block,) = blocks(q_SHA, k_TGA, torch.arange(2), 2**20)
    summed_CT = summands(columns_TC)
    assert summed_CT[:, :2].tolist() == [[0, 1], [1, 0]] and not summed_CT[:, 2:].any()
    found = {name: x[0] for name, x in block.reduced(summed_CT, 2, distance_edges(2)).items()}
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert found["entropy"].tolist() == pytest.approx([0, entropy], abs=1e-6)
    assert found["first"].tolist() == pytest.approx([1, 0.25])
    assert found["own"].tolist() == pytest.approx([1, 0.75])
    assert found["largest"].tolist() == pytest.approx([1, 0.75])
    assert found["distance"].tolist() == pytest.approx([0, 0.25])
    assert found["mass"][:, 0].tolist() == pytest.approx([1, 0.25])
    assert found["top_key"].tolist() == [[0, -1], [1, 0]]
    assert found["top_weight"].tolist() == [pytest.approx([1, 0]), pytest.approx([0.75, 0.25])]
    assert found["distance_mass"].tolist() == [pytest.approx([1, 0]), pytest.approx([0.75, 0.25])]


def test_edges_double() -> None:
    assert distance_edges(1) == [0] and distance_edges(2) == [0, 1]
    assert distance_edges(9) == [0, 1, 2, 4, 8] and distance_edges(8) == [0, 1, 2, 4]


@pytest.mark.parametrize("sequence", [0, 1])
@pytest.mark.parametrize("block_bytes", [1, 1500, 2**24])
def test_equals_the_map(trace: el.Trace, sequence: int, block_bytes: int) -> None:
    found = attention_summary(
        trace, 3, sequence, groups="phase", top=3, histogram=True, block_bytes=block_bytes
    )
    pattern = trace.pattern(3, sequence)
    weights = pattern.values.astype(np.float64)
    n = weights.shape[-1]
    back = np.arange(n)[:, None] - np.arange(n)
    logs = np.log(np.where(weights > 0, weights, 1))
    order = np.argsort(-weights, axis=-1, kind="stable")[..., :3]
    decode = pattern["key_phase"].values == "decode"
    expected = {
        "entropy": -(weights * logs).sum(-1),
        "largest": weights.max(-1),
        "first": weights[..., 0],
        "own": np.einsum("hqq -> hq", weights),
        "distance": (weights * back).sum(-1),
        "mass": np.stack([weights[..., ~decode].sum(-1), weights[..., decode].sum(-1)], axis=-1),
        "top_weight": np.take_along_axis(weights, order, axis=-1),
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].values, values, atol=1e-5, err_msg=name)
    assert found["group"].values.tolist() == ["prefill", "decode"]
    assert (found["top_key"].values[:, 3:] == order[:, 3:]).all()
    edges = [*found["bin"].values.tolist(), n]
    for i, (low, high) in enumerate(pairwise(edges)):
        there = (weights * ((back >= low) & (back < high))).sum(-1)
        np.testing.assert_allclose(found["distance_mass"].values[..., i], there, atol=1e-5)
    assert found.attrs == {"layer": 3, "sequence": sequence}
    assert found["query_text"].values.tolist() == pattern["query_text"].values.tolist()


@pytest.mark.parametrize("asked", [slice(None), slice(130, 510), slice(5, None, 7)])
@pytest.mark.parametrize("n_rows", [1, 32, 64, 50, 512])
def test_long_rows_in_blocks(asked: slice, n_rows: int) -> None:
    """Lengths at which keys are looked at in chunks and distances along skewed rows."""
    random = torch.Generator().manual_seed(n_rows)
    n_keys, n_heads, n_groups, width = 520, 4, 2, 8
    q_SHA = 3 * torch.randn(n_keys, n_heads, width, generator=random)
    k_TGA = torch.randn(n_keys, n_groups, width, generator=random)
    pos_S = torch.arange(n_keys)[asked]
    given = q_SHA[asked], k_TGA, pos_S, 4 * n_heads * n_keys * n_rows
    columns_TC = torch.rand(n_keys, 2, generator=random)
    edges = distance_edges(n_keys)
    summed_CT = summands(columns_TC)
    parts = [block.reduced(summed_CT, 3, edges) for block in blocks(*given)]
    found = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}

    k_THA = k_TGA.double().repeat_interleave(n_heads // n_groups, dim=1)
    scores_HST = torch.einsum("sha,tha->hst", q_SHA[asked].double(), k_THA) / math.sqrt(width)
    back_ST = pos_S[:, None] - torch.arange(n_keys)
    map_HST = scores_HST.masked_fill(back_ST < 0, -math.inf).softmax(-1)
    largest = map_HST.topk(3)
    expected = {
        "entropy": torch.special.entr(map_HST).sum(-1),
        "largest": largest.values[..., 0],
        "first": map_HST[..., 0],
        "distance": (map_HST * back_ST).sum(-1),
        "mass": map_HST @ columns_TC.double(),
        "top_weight": largest.values,
        "distance_mass": torch.stack(
            [
                (map_HST * ((back_ST >= low) & (back_ST < high))).sum(-1)
                for low, high in pairwise([*edges, n_keys])
            ],
            dim=-1,
        ),
    }
    for name, values in expected.items():
        relative = n_keys if name == "distance" else 1
        torch.testing.assert_close(
            found[name].double() / relative, values / relative, rtol=0, atol=1e-5, msg=name
        )
    several_S = pos_S >= 2
    weight_HSN = map_HST.gather(-1, found["top_key"].clamp(min=0))
    torch.testing.assert_close(
        weight_HSN[:, several_S], largest.values[:, several_S], rtol=0, atol=1e-5
    )
    assert torch.equal(found["top_key"] < 0, found["top_weight"] == 0)
    rows = torch.cat(
        [pad(b.pattern(), (0, n_keys - b.pattern().shape[-1])) for b in blocks(*given)], 1
    )
    torch.testing.assert_close(rows.double(), map_HST, rtol=0, atol=1e-5)


@pytest.mark.parametrize("offset", [0.0, 100.0, -1000.0])
def test_entropy_does_not_mind_large_scores(offset: float) -> None:
    """What all scores of a query have in common cancels, and may be a hundred times the rest."""
    n_keys = 300
    random = torch.Generator().manual_seed(0)
    q_SHA, k_TGA = (torch.randn(n_keys, 1, 4, generator=random) for _ in range(2))
    q_SHA[..., 0], k_TGA[..., 0] = 1, 2 * offset
    (block,) = blocks(q_SHA, k_TGA, torch.arange(n_keys), 2**22)
    later_ST = torch.arange(n_keys) > torch.arange(n_keys)[:, None]
    scores_ST = block.scores_GXT[0, :, :n_keys].double().masked_fill(later_ST, -math.inf)
    expected_S = torch.special.entr(scores_ST.softmax(-1)).sum(-1)
    found_S = block.reduced(summands(torch.zeros(n_keys, 0)), 0, [])["entropy"][0]
    torch.testing.assert_close(found_S.double(), expected_S, rtol=0, atol=1e-5)


def test_rows_are_the_maps_rows(trace: el.Trace) -> None:
    rows = attention_rows(trace, -1, [2, 5, 9], sequence=1)
    pattern = trace.pattern(-1, 1)
    np.testing.assert_allclose(rows.values, pattern.values[:, [2, 5, 9]], atol=1e-5)
    assert rows.dims == pattern.dims and rows["query_pos"].values.tolist() == [2, 5, 9]
    assert rows["key_text"].values.tolist() == pattern["key_text"].values.tolist()


def test_chosen_queries_are_rows_of_all(trace: el.Trace) -> None:
    every = attention_summary(trace, 2, 0)
    some = attention_summary(trace, 2, 0, queries=[7, 1])
    assert some["query_pos"].values.tolist() == [1, 7]
    np.testing.assert_allclose(
        some["entropy"].values, every["entropy"].values[:, [1, 7]], atol=1e-5
    )


def test_queries_kept_alone_and_pictures_as_groups() -> None:
    lab = el.load("tiny-vl")
    from ernie_lab.organisms.boards import samples

    board = samples.boards()[0]
    keep = [el.keep("attn.q_rot", positions=[-1]), "attn.k_rot", "attn.pattern"]
    trace = lab.run(board.questions[0].text, images=[board.picture], keep=keep).trace
    found = attention_summary(trace, 2, groups="content")
    assert found.sizes["query"] == 1
    last = trace.pattern(2)[:, -1]
    image = (trace.tokens["content"] == "image").to_numpy()
    np.testing.assert_allclose(
        found["mass"].sel(group="image").values[:, 0], last.values[:, image].sum(-1), atol=1e-5
    )
    np.testing.assert_allclose(found["mass"].sum("group").values, 1, atol=1e-5)


def test_survives_saving(trace: el.Trace, tmp_path) -> None:
    again = el.Trace.load(trace.save(tmp_path / "t"))
    assert attention_summary(again, 1, 0).equals(attention_summary(trace, 1, 0))


def test_what_cannot_be_told_is_refused(lab: el.Lab, trace: el.Trace) -> None:
    with pytest.raises(NotKept, match=r"blocks\.1\.attn\.q_rot exists but was not kept"):
        attention_summary(lab.run("And God", keep="attn.k_rot").trace, 1)
    with pytest.raises(ValueError, match=r"sequence=None: this trace has sequences \[0, 1\]"):
        attention_summary(trace, 1)
    with pytest.raises(ValueError, match="lacks 3 of the"):
        attention_summary(trace.sel(sequence=0, position=slice(3, None)), 1)
    with pytest.raises(ValueError, match=r"queries=\[99\]"):
        attention_summary(trace, 1, 0, queries=[99])
    with pytest.raises(ValueError, match="2 labels for the"):
        attention_summary(trace, 1, 0, groups=["a", "b"])
    with pytest.raises(KeyError, match="'nothing' is no column"):
        attention_summary(trace, 1, 0, groups="nothing")
    with pytest.raises(ValueError, match="top=99"):
        attention_summary(trace, 1, 0, top=99)
    one_head = lab.run("And God said", keep=el.keep(*READ, heads=[1])).trace
    with pytest.raises(ValueError, match=r"kept for heads \[1\] alone"):
        attention_summary(one_head, 1)


def test_an_edited_map_is_not_derived(lab: el.Lab) -> None:
    flat = el.edit("blocks.2.attn.pattern", lambda x: (x > 0).to(x) / (x > 0).sum(-1, keepdim=True))
    trace = lab.run("And God said unto him", keep=READ, edits=[flat]).trace
    with pytest.raises(ValueError, match=r"an edit changed blocks\.2\.attn\.pattern"):
        attention_summary(trace, 2)
    assert attention_summary(trace, 3).sizes["head"] == 4
