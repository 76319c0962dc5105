"""Specialisation beside its nulls: what each null does, and routers whose answer is known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from support.labs import small_lab, small_vl_lab

from ernie_lab.analysis.beside_nulls import PERMUTED, REDRAWN, Question, layer_specialisation
from ernie_lab.analysis.expert_information import expert_information, share_comparable
from ernie_lab.analysis.information import mutual_information
from ernie_lab.analysis.nulls import (
    Choice,
    balanced,
    constant_within,
    halves,
    permuted,
    redrawn,
    untrained_twin,
)
from ernie_lab.analysis.specialisation import specialisation
from ernie_lab.model.redraw import (
    OtherRouter,
    choose,
    gaussian_gate,
    matched_bias,
    max_violation,
    router_probs,
)

PROMPTS = [
    "abcabcabcabc", "ABCABCDEABCD", "bcabcadabcab", "HIJABCHIJABC", "cabcabcbbbca", "DEFGHIJDEFGH",
    "aabbccddeeff", "AABBCCDDEEFF",
]  # fmt: skip
CASES = ["lower", "upper"] * 4
LAB = small_lab()


@pytest.fixture(scope="module")
def trace():
    return LAB.run(PROMPTS, keep=["routing", "moe.in"]).trace


def case_of(trace) -> list[str]:
    return [CASES[s] for s in trace.expert_ids.sequence.values]


def test_labels_of_documents_are_permuted_over_documents() -> None:
    document, label = np.array([4, 4, 4, 9, 9, 7]), np.array([0, 0, 0, 1, 1, 2])
    assert constant_within(label, document) and not constant_within(label, np.zeros(6, int))
    rng = np.random.default_rng(0)
    for _ in range(5):
        found = permuted(label, document, "documents", rng)
        assert constant_within(found, document)
        assert sorted(found[[0, 3, 5]]) == [0, 1, 2]


def test_other_labels_are_permuted_within_their_documents() -> None:
    within, label = np.array([1, 0, 1, 0, 1, 1]), np.array([0, 5, 1, 6, 2, 3])
    rng = np.random.default_rng(0)
    found = np.array([permuted(label, within, "tokens of a document", rng) for _ in range(50)])
    assert (np.sort(found[:, within == 0], 1) == [5, 6]).all()
    assert (np.sort(found[:, within == 1], 1) == [0, 1, 2, 3]).all()
    assert all(len(np.unique(found[:, i])) > 1 for i in range(6))


def test_halves_share_out_the_documents_of_every_label() -> None:
    document = np.repeat(np.arange(8), 3)
    label = np.repeat([0, 0, 1, 1, -1, -1, 2, 2], 3)
    first = halves(label, document)
    for value in (-1, 0, 1, 2):
        assert first[label == value].sum() == 3
    assert all(len(set(first[document == d])) == 1 for d in range(8))


def test_a_redrawn_choice_has_the_learned_load_where_it_was_fitted() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3000, 16, generator=generator) + torch.arange(16) / 8
    gate = 0.3 * torch.randn(8, 16, generator=generator)
    fitted = np.arange(3000) < 1500
    for target in (0.1, 1.5):  # more balanced, and less, than a gate without bias
        choice = redrawn(gate, states, fitted, 2, target, 0, "norm")
        assert choice.max_violation == pytest.approx(target, abs=0.051)
        on_fitted = max_violation(torch.from_numpy(choice.ids_NK[fitted]), 8)
        assert choice.max_violation == on_fitted
        assert np.allclose(choice.weights_NK.sum(1), 1) and choice.ids_NK.shape == (3000, 2)
    probs = router_probs(states, gate)
    assert balanced(probs, fitted, 2, 0.3).max_violation == pytest.approx(0.3, abs=0.051)
    again = redrawn(gate, states, fitted, 2, 0.1, 0, "norm")
    other = redrawn(gate, states, fitted, 2, 0.1, 1, "norm")
    first = redrawn(gate, states, fitted, 2, 0.1, 0, "norm")
    assert (again.ids_NK == first.ids_NK).all() and (other.ids_NK != first.ids_NK).any()


def test_a_bias_meets_loads_on_both_sides() -> None:
    probs = router_probs(torch.randn(4000, 16, generator=torch.Generator().manual_seed(3)),
                         gaussian_gate(torch.ones(8, 16), 0))  # fmt: skip
    for target in (0.0, 0.2, 1.0, 2.5):
        bias = matched_bias(probs, 2, target)
        found = max_violation((probs + bias).topk(2).indices, 8)
        assert found == pytest.approx(target, abs=0.051)
    with pytest.raises(ValueError, match="need states_ND"):
        gaussian_gate(torch.ones(8, 16), 0, "variance")


def planted(along: bool) -> tuple[Question, Choice, torch.Tensor, torch.Tensor]:
    """160 documents of 4 labels; the label moves the state along 4 of 12 axes. The gate looks at
    these axes, or only at the others."""
    rng = np.random.default_rng(0)
    document = np.repeat(np.arange(160), 10)
    label = document % 4
    states = torch.from_numpy(rng.normal(0, 1, (1600, 12)).astype(np.float32))
    states[np.arange(1600), label] += 1.5
    gate = torch.zeros(8, 12)
    seen = np.arange(4) if along else np.arange(4, 8)
    for expert in range(8):
        gate[expert, seen[expert % 4]] = 2.0
        gate[expert, 8 + expert % 4] = 0.5 * (-1) ** (expert // 4)
    ids = choose(states, OtherRouter(gate, torch.zeros(8)), 2).numpy()
    question = Question.of(label, document, n_redrawn=20, n_permuted=40, n_draws=60)
    return question, Choice(ids, np.full(ids.shape, 0.5)), states, gate


def test_a_router_that_looks_at_the_label_beats_random_ones_and_a_blind_one_does_not() -> None:
    question, learned, states, gate = planted(along=True)
    assert question.by == "documents"
    told, nulls = layer_specialisation(question, learned, states, gate)
    assert told["above"] and told["norm_percentile"] == told["variance_percentile"] == 100
    assert told["permuted_p95"] < told["norm_median"] < told["bits"]
    assert 0 < told["excess_low"] < told["excess"] < told["excess_high"]
    assert abs(told["redrawn_max_violation"] - told["max_violation"]) <= 0.051
    assert np.isnan(told["untrained"]) and not told["above_twins"]
    assert nulls.groupby("null").size().to_dict() == {
        PERMUTED: 40, REDRAWN["norm"]: 20, REDRAWN["variance"]: 20
    }  # fmt: skip
    mine = question.measured_N
    expected = mutual_information(question.label_N[mine], learned.ids_NK[mine], 8)
    assert told["bits"] == pytest.approx(expected)
    question, learned, states, gate = planted(along=False)
    told, _ = layer_specialisation(question, learned, states, gate)
    assert not told["above"] and told["norm_percentile"] == 0
    assert told["norm_median"] > 3 * told["permuted_p95"], "a random router tells a great deal"


def test_no_two_seeds_layers_or_kinds_share_a_redrawn_router() -> None:
    question, learned, states, gate = planted(along=True)
    question = dataclasses.replace(question, n_permuted=1)

    def drawn(seed: int, layer: int) -> list[float]:
        asked = dataclasses.replace(question, seed=seed, n_redrawn=4)
        nulls = layer_specialisation(asked, learned, states, gate, layer=layer)[1]
        return nulls.loc[nulls["null"] != PERMUTED, "bits"].tolist()

    found = [bits for seed in (0, 1) for layer in (1, 2) for bits in drawn(seed, layer)]
    assert len(set(found)) == 2 * 2 * 2 * 4
    assert drawn(0, 1) == found[:8]


def test_labels_are_measured_on_documents_that_no_bias_was_fitted_on() -> None:
    question, *_ = planted(along=True)
    fitted, measured = (question.document_N[m] for m in (question.fitted_N, question.measured_N))
    assert not set(fitted) & set(measured) and len(fitted) + len(measured) == 1600
    new = question.permuted_labels(0)
    assert (new[question.fitted_N] == question.label_N[question.fitted_N]).all()
    with pytest.raises(ValueError, match="fewer than two labels"):
        Question.of(np.array([0, 0, 1, 1]), np.array([0, 1, 2, 2]))


def test_of_a_trace(trace) -> None:
    twins = [untrained_twin(LAB, seed).run(PROMPTS, keep="routing").trace for seed in (0, 1)]
    how = {"n_redrawn": 5, "n_permuted": 10, "n_draws": 30}
    found = specialisation(trace, case_of(trace), LAB, label="case", untrained=twins, **how)
    assert found.layers == (1, 2) and found.by == "documents" and found.n_redrawn == 5
    assert found.n_tokens == 48 and found.n_fitted == 48 and found.n_documents == 4
    assert (found.nulls.groupby("layer").size() == 10 + 2 + 2 * 5).all()
    assert set(found.above) <= {1, 2}
    text = repr(found)
    assert text.startswith("small: bits between expert and case, 48 tokens of 4 documents")
    assert "Permuted: documents" in text and "untrained max" in text and "percentiles" in text
    assert "Intervals are over 4 documents only: too narrow for 95 %." in text
    table, twin = found.table, found.nulls[found.nulls["null"] == "untrained twin"]
    most = twin.groupby("layer")["bits"].max()
    assert found.n_twins == 2 and (table["untrained_max"] == most).all()
    assert found.above_twins == tuple(table.index[table["bits"] > most])
    assert "above both untrained twins in " in text.splitlines()[-1]
    assert text.splitlines()[-1].startswith("Above 95 % of the redrawn routers of both kinds in ")
    gates = {layer: router.weight_ED for layer, router in LAB.model.routers().items()}
    again = specialisation(trace, case_of(trace), gates, label="case", untrained=twins, **how)
    assert again.table.equals(found.table)
    one = specialisation(trace, case_of(trace), LAB, layers=[2], untrained=twins[0], **how)
    assert one.layers == (2,)
    assert one.table.loc[2, "bits"] == found.table.loc[2, "bits"]
    beyond = specialisation(trace, case_of(trace), LAB, given="pos", weighted=True, **how)
    assert "untrained twins were not asked" in repr(beyond) and "untrained max" not in repr(beyond)
    assert beyond.by == "tokens of equal given" and beyond.subject == "expert and label given pos"
    within = specialisation(trace, "id", LAB, **how)
    assert within.by == "tokens of a document" and within.label == "id"


def test_of_a_bank() -> None:
    lab = small_vl_lab()
    pictures = [[np.full((8, 8, 3), shade, np.uint8)] for shade in (0, 60, 120, 250)]
    trace = lab.run(["ab", "cd", "ef", "gh"], images=pictures, keep=["routing", "moe.in"]).trace
    labels = trace.routing("vision").expert_ids.pos.values % 2
    how = {"n_redrawn": 3, "n_permuted": 5, "n_draws": 10}
    found = specialisation(trace, labels, lab, bank="vision", label="parity", **how)
    assert found.bank == "vision" and found.subject == "vision expert and parity"
    with pytest.raises(ValueError, match="two banks"):
        specialisation(trace, labels, lab, **how)


def test_refusals(trace) -> None:
    labels = case_of(trace)
    other = small_lab().run(PROMPTS[::-1], keep="routing").trace
    with pytest.raises(ValueError, match="in the other; run the same prompts"):
        specialisation(trace, labels, LAB, untrained=other)
    gates = {1: torch.randn(8, 32), 2: torch.randn(8, 32)}
    with pytest.raises(ValueError, match="Pass the lab that the trace is of"):
        specialisation(trace, labels, gates)
    with pytest.raises(ValueError, match="gates has nothing for layer 1"):
        specialisation(trace, labels, {2: gates[2]})
    with pytest.raises(ValueError, match=r"layer 0 has no routing here; layers 1\.\.2"):
        specialisation(trace, labels, LAB, layers=[0])
    with pytest.raises(ValueError, match="this is one: run several texts"):
        specialisation(trace.sel(sequence=0), "id", LAB)
    bare = LAB.run(PROMPTS, keep="routing").trace
    with pytest.raises(Exception, match=r"moe\.in"):
        specialisation(bare, labels, LAB)


def test_a_twin_has_the_same_shape_and_learned_nothing() -> None:
    twin = untrained_twin(LAB, 3)
    assert twin.model_id == "small, untrained, std 0.02, seed 3" and twin.tokenizer is LAB.tokenizer
    assert twin.model.config == LAB.model.config and not twin.model.training
    routers = twin.model.routers()
    assert all((router.correction_bias_E == 0).all() for router in routers.values())
    assert not torch.equal(routers[1].weight_ED, LAB.model.routers()[1].weight_ED)
    same = untrained_twin(LAB, 3).model.routers()[1].weight_ED
    assert torch.equal(routers[1].weight_ED, same)


def test_bits_by_layer_with_intervals(trace) -> None:
    table = expert_information(trace, case_of(trace), n_draws=50)
    assert table.index.tolist() == [1, 2]
    row = table.loc[1]
    expected = mutual_information(case_of(trace), trace.expert_ids.sel(layer=1).values, 8)
    assert row["bits"] == pytest.approx(expected)
    assert row["low"] < row["bits"] < row["high"]
    assert (row["n_tokens"], row["n_documents"], row["n_labels"]) == (96, 8, 2)
    assert row["bits"] < row["label_bits"] < 1.1 and row["expert_bits"] < 3.1
    beyond = expert_information(trace, case_of(trace), given="id", weighted=True, n_draws=20)
    assert beyond["share_comparable"].iloc[0] == 0, "no letter is of both cases"
    assert share_comparable(np.array([0, 1, 0, -1]), np.array([5, 5, 6, 6])) == pytest.approx(2 / 3)
