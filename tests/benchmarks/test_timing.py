"""Ratios are taken pair by pair, and their table shows what it was given."""

from benchmarks.timing import Paired, conditions, paired, table


def test_ratio_is_the_median_over_pairs() -> None:
    found = Paired((1.0, 4.0, 3.0), (2.0, 2.0, 3.0))
    assert found.ratio == 1.0  # of 0.5, 2 and 1; not the ratio of medians, 3 / 2
    row = found.row()
    assert row["ours_ms"] == 3000 and row["theirs_ms"] == 2000 and row["pairs"] == 3
    assert (row["ratio_p25"], row["ratio_p75"]) == (0.75, 1.5)


def test_both_run_in_turn_and_change_places() -> None:
    calls: list[str] = []
    found = paired(lambda: calls.append("a"), lambda: calls.append("b"), pairs=2, warm=1)
    assert len(found.ours) == len(found.theirs) == 2
    assert "".join(calls) == "abbaab"


def test_table_and_conditions() -> None:
    shown = table([{"what": "x", "ratio": 0.5}, {"what": "longer", "ratio": 12}]).splitlines()
    assert shown == ["what    ratio", "x         0.5", "longer     12"]
    under = conditions()
    assert under["threads"] >= 1 and under["versions"]["torch"]
