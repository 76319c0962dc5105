"""Each statistic of a comparison on cases that can be done by hand."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import ernie_lab as el
from ernie_lab.interventions.bootstrap import (
    basic_interval,
    centred_interval,
    draws_of,
    ends,
    estimate,
    few_drawn,
    interval,
)
from ernie_lab.interventions.fingerprint import CannotFingerprint, fingerprint
from ernie_lab.interventions.metrics import (
    at_predictors,
    banked_flips,
    kl_divergence,
    logit_difference,
    set_flips,
)
from ernie_lab.interventions.summary import exceeds, floor_of
from ernie_lab.interventions.tables import TablesFileError, load_tables, save_tables


def test_kl_by_hand() -> None:
    base = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.9, 0.1]]).log() + 3
    edited = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.1, 0.9]]).log() - 1
    expected = [0.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.8 * math.log(9)]
    torch.testing.assert_close(kl_divergence(base, edited), torch.tensor(expected))


def test_kl_of_words_that_are_forbidden() -> None:
    inf = math.inf
    base = torch.tensor([[0.0, 0.0, -inf], [0.0, 0.0, 0.0]])
    edited = torch.tensor([[0.0, 0.0, -inf], [0.0, -inf, 0.0]])
    assert kl_divergence(base, edited).tolist() == [0.0, inf]


def test_set_flips_by_hand() -> None:
    base = torch.tensor([[0, 1], [0, 1], [0, 1]])
    edited = torch.tensor([[1, 0], [1, 2], [3, 2]])
    assert set_flips(base, edited).tolist() == [0.0, 0.5, 1.0]
    banks = torch.tensor([0, 1, 1]), torch.tensor([1, 1, 1])
    assert banked_flips(banks[0], base, banks[1], edited).tolist() == [1.0, 0.5, 1.0]


def test_logit_difference_by_hand() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0], [0.0, 0.0, 7.0]])
    assert logit_difference(logits, torch.tensor([[1, 2], [0, 2]])).tolist() == [3.0, -7.0]


def test_a_prediction_is_made_one_position_earlier() -> None:
    base = torch.arange(4.0)[None, :, None].expand(1, 4, 2)
    counted = torch.tensor([[False, True, False, True]])
    ((first, second),) = at_predictors(base, -base, counted)
    assert first[:, 0].tolist() == [0.0, 2.0]
    assert second[:, 0].tolist() == [0.0, -2.0]
    with pytest.raises(ValueError, match="nothing stands before"):
        list(at_predictors(base, base, ~counted))


def test_the_bootstrap_draws_documents() -> None:
    """Two documents: the only means are of (a, a), (a, b) and (b, b), at 1/4, 1/2 and 1/4."""
    draws = draws_of(2, 4000, seed=3)
    assert (draws.sum(1) == 2).all()
    values, document = [1.0, 1.0, 1.0, 5.0, math.nan], [0, 0, 0, 1, 1]
    found = estimate(values, document, draws)
    assert (found.value, found.n) == (2.0, 4)
    assert (found.low, found.high) == (1.0, 5.0)
    both = (draws[:, 0] == 1).mean()
    assert abs(both - 0.5) < 0.03
    assert np.array_equal(draws, draws_of(2, 4000, seed=3))


def test_the_bootstrap_agrees_with_the_formula_for_many_documents() -> None:
    """One value each: the interval is mean +- 1.96 s / sqrt(n)."""
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = estimate(values, np.arange(400), draws_of(400, 4000, seed=0))
    half = 1.96 * values.std() / 20
    assert abs(found.low - (values.mean() - half)) < 0.02
    assert abs(found.high - (values.mean() + half)) < 0.02


def test_one_document_has_no_interval() -> None:
    found = estimate([1.0, 2.0], [0, 0], draws_of(1, 10, seed=0))
    assert found.value == 1.5
    assert math.isnan(found.low)
    assert math.isnan(estimate([math.nan], [0], draws_of(1, 10, seed=0)).value)


def test_intervals_of_draws_by_hand() -> None:
    drawn = np.linspace(1, 2, 1001)
    assert interval([*drawn, math.nan, math.inf], 2) == pytest.approx((1.025, 1.975))
    assert np.isnan([*interval(drawn, 1), *interval([math.nan], 2)]).all()
    both = np.stack([drawn, 10 * drawn], axis=1)
    assert ends(both) == pytest.approx(np.array([[1.025, 10.25], [1.975, 19.75]]))
    both[0, 0] = math.nan
    assert ends(both)[:, 1] == pytest.approx([10.25, 19.75])
    assert ends(both)[0, 0] == pytest.approx(1.001 + 0.025 * 0.999)


def test_few_documents_are_said_to_be_too_few() -> None:
    said = " Intervals are over 3 documents only: too narrow for 95 %."
    assert few_drawn(3) == said
    assert [few_drawn(n) for n in (1, 6, 40)] == ["", "", ""], "one has none; six are not few"


def test_the_basic_interval_turns_the_draws_round_the_value() -> None:
    drawn = np.linspace(1, 2, 1001)
    assert basic_interval(1.2, drawn, (0, np.inf)) == pytest.approx((2.4 - 1.975, 2.4 - 1.025))
    assert basic_interval(0.5, drawn, (0, np.inf)) == (0, 0)
    assert basic_interval(0.5, drawn)[0] == pytest.approx(1 - 1.975)


def test_the_centred_interval_lies_around_what_was_found() -> None:
    drawn = [*np.linspace(10, 20, 1001), math.nan]
    assert centred_interval(1.0, drawn) == pytest.approx((1 - 4.75, 1 + 4.75))
    assert np.isnan([*centred_interval(1.0, None), *centred_interval(1.0, [math.nan])]).all()


def test_the_floor_is_the_95th_percentile_of_the_size() -> None:
    values = [-20.0, *range(20)]
    assert floor_of("loss_change", values) == 19.0
    assert floor_of("top1_agreement", [1.0, 1.0, 0.5]) == pytest.approx(0.55)
    assert exceeds("loss_change", -0.2, 0.1) and not exceeds("loss_change", 0.1, 0.1)
    assert exceeds("top1_agreement", 0.5, 0.9) and not exceeds("top1_agreement", 0.95, 0.9)
    assert not exceeds("kl", 1.0, math.nan)


def test_fingerprints_tell_apart_what_computes_otherwise() -> None:
    def scaled(by: float):
        return lambda x: x * by

    prints = {
        fingerprint(value)
        for value in (
            scaled(2.0),
            scaled(3.0),
            lambda x: x + 2.0,
            torch.zeros_like,
            torch.ones_like,
            torch.zeros(2),
            torch.zeros(2, dtype=torch.int64),
            torch.zeros(1, 2),
            [1, 2],
            (1, 2),
            [[1], 2],
            "1",
            1,
            None,
        )
    }
    assert len(prints) == 14
    assert fingerprint(scaled(2.0)) == fingerprint(scaled(2.0))
    with pytest.raises(CannotFingerprint, match="folder="):
        fingerprint(object())


def test_tables_survive_a_file(tmp_path) -> None:
    table = pd.DataFrame(
        {
            "text": pd.Series(["é\udce4", None, "☃"], dtype=object),
            "x": [0.1, math.nan, 1 / 3],
            "n": [1, 2, 3],
            "is": [True, False, True],
        }
    )
    named = pd.DataFrame({"x": [1.5]}, index=pd.Index(["a b"], name="condition"))
    save_tables(tmp_path / "t", "thing", {"one": table, "two": named}, {"seed": 3})
    save_tables(tmp_path / "t", "thing", {"one": table, "two": named}, {"seed": 4})
    tables, facts = load_tables(tmp_path / "t", "thing")
    assert facts == {"seed": 4}
    pd.testing.assert_frame_equal(tables["one"], table, check_dtype=False)
    pd.testing.assert_frame_equal(tables["two"], named, check_index_type=False)
    with pytest.raises(FileNotFoundError, match="not a saved other: it holds a saved thing"):
        load_tables(tmp_path / "t", "other")
    (tmp_path / "t" / "tables.npz").write_bytes(b"cut")
    with pytest.raises(TablesFileError, match="damaged"):
        load_tables(tmp_path / "t", "thing")
    with pytest.raises(FileExistsError, match="holds a saved thing, no other; choose"):
        save_tables(tmp_path / "t", "other", {"one": table}, {})
    (tmp_path / "t" / "parts").mkdir()
    with pytest.raises(FileExistsError, match="besides a saved thing, parts, which would be lost"):
        save_tables(tmp_path / "t", "thing", {"one": table}, {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="choose another name"):
        save_tables(tmp_path / "mine", "thing", {"one": table}, {})


def test_a_failed_move_keeps_the_tables_that_were_there(tmp_path, monkeypatch) -> None:
    table = pd.DataFrame({"n": [1]})
    save_tables(tmp_path / "t", "thing", {"one": table}, {"seed": 3})
    real = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("the disk is full")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="full"):
        save_tables(tmp_path / "t", "thing", {"one": table}, {"seed": 4})
    assert load_tables(tmp_path / "t", "thing")[1] == {"seed": 3}


def test_a_comparison_and_a_trace_are_told_apart(tmp_path) -> None:
    save_tables(tmp_path / "c", "comparison", {"one": pd.DataFrame({"n": [1]})}, {})
    with pytest.raises(FileNotFoundError, match=r"a saved comparison, which el\.Comparison\.load"):
        el.Trace.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError, match=r"which el\.Comparison\.load\('.*c'\) opens"):
        el.LabComparison.load(tmp_path / "c")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "trace.json").touch()
    with pytest.raises(FileNotFoundError, match=r"holds a saved trace, which el\.Trace\.load"):
        el.Comparison.load(tmp_path / "t")
    with pytest.raises(FileNotFoundError, match=r"give its folder: el\.Comparison\.load"):
        el.Comparison.load(tmp_path / "c" / "tables.json")
