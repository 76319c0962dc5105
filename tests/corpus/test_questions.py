"""The counts of a recording answer what a trace of the same texts does."""

import numpy as np
import pytest
from corpus.test_record import TEXTS, lab, recorded  # noqa: F401

import ernie_lab as el
from ernie_lab.corpus.questions import blocks_of


@pytest.fixture(scope="module")
def store(lab, tmp_path_factory):  # noqa: F811
    return recorded(lab, tmp_path_factory.mktemp("store"), max_length=999, rows="ids")


def test_as_a_trace_of_the_same_texts(lab, store) -> None:  # noqa: F811
    trace = lab.run([doc["text"] for doc in TEXTS], keep="routing").trace
    labels = [TEXTS[i].get("domain", "") for i in trace.expert_ids.sequence.values]
    ours, theirs = store.balance(), el.analysis.balance_by(trace)
    for name in ("n_tokens", "busiest", "max_violation", "max_violation_uniform_p95", "entropy"):
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name)
    assert ours["max_violation_low"].isna().all(), "no interval over so few units"
    assert ours.attrs["intervals"].startswith("none: 3 blocks of documents, and 8 are needed")
    ours, theirs = store.balance("domain"), el.analysis.balance_by(trace, labels)
    ours = ours.reindex(theirs.index)
    np.testing.assert_allclose(ours["max_violation"], theirs["max_violation"])
    together = el.analysis.coactivation(store.coactivation(), "share")
    np.testing.assert_allclose(together, el.analysis.coactivation(trace, "share"))
    bits = store.information()
    for layer in store.layers:
        ids = trace.expert_ids.sel(layer=layer).values
        expected = el.analysis.mutual_information(labels, ids, store.n_experts)
        assert bits.loc[layer, "bits"] == pytest.approx(expected)
    shares = el.analysis.domain_specialisation(trace, labels)
    found = store.domain_load().sel(label=shares.label)
    np.testing.assert_allclose(found["share"], shares["share"])
    assert (found["n_tokens"] == shares["n_tokens"]).all()


def test_intervals_of_groups_are_over_blocks(lab, tmp_path) -> None:  # noqa: F811
    """A unit for each document: then blocks are documents, and a trace of them says the same."""
    docs = [{**TEXTS[i % 5], "domain": "ab"[i % 2]} for i in range(18)] + [{"text": "fox"}]
    store = recorded(lab, tmp_path, docs, unit_tokens=1, max_length=999)
    trace = lab.run([doc["text"] for doc in docs], keep="routing").trace
    labels = [docs[i].get("domain", "") for i in trace.expert_ids.sequence.values]
    theirs = el.analysis.balance_by(trace, labels)
    ours = store.balance("domain").reindex(theirs.index)
    assert ours["n_blocks"].tolist() == theirs["n_documents"].tolist()
    many = theirs["n_documents"] >= 8
    assert many.any() and not many.all()
    for name in ("max_violation_low", "max_violation_high", "entropy_low", "gini_high"):
        np.testing.assert_allclose(ours.loc[many, name], theirs.loc[many, name], err_msg=name)
        assert ours.loc[~many, name].isna().all()
    np.testing.assert_allclose(ours["block_max_violation"], theirs["document_max_violation"])
    assert ours["block_max_violation_low"].notna().equals(many)
    assert "NaN for a domain that fewer than 8" in store.balance("domain").attrs["intervals"]
    alt = el.plots.plot_balance(store.balance("domain"))
    assert "intervals over blocks" in alt.caption and "9 blocks of neighbouring" in alt.caption
    for by in ("position", "content"):
        assert store.balance(by)["n_tokens"].groupby("layer").sum().nunique() == 1
    with pytest.raises(ValueError, match="leave by out"):
        store.balance("unit")


def test_blocks_of_units() -> None:
    def blocks(*documents):
        return [(block.start, block.stop) for block in blocks_of(documents)]

    assert blocks((0, 3), (4, 4), (5, 9)) == [(0, 1), (1, 2), (2, 3)]
    # Document 3 lies across a border; 5 fills unit 2 and the parts beside it.
    assert blocks((0, 3), (3, 5), (5, 5), (5, 7), (8, 9)) == [(0, 1), (1, 4), (4, 5)]
    assert blocks((0, 0), (0, 0), (0, 4)) == [(0, 3)]
    many = blocks(*((i, i) for i in range(1000)))
    assert len(many) == 250 and many[0] == (0, 4) and many[-1] == (996, 1000)


def test_figures(store) -> None:
    counts = store.counts()
    told = {"n_tokens": counts.attrs["n_tokens"], "k": store.n_chosen}
    view = el.plots.plot_expert_load(counts, **told)
    assert "over 87 tokens" in view.alt
    assert "prose" in el.plots.plot_balance(store.balance("domain")).alt
    assert "prose to expert" in el.plots.plot_domain_load(store.domain_load(), layer=1).alt
    lift = el.analysis.coactivation(store.coactivation())
    assert "over 87 tokens" in el.plots.plot_coactivation(lift, layer=2).alt


def test_by_unit(store) -> None:
    assert (store.counts("unit").sum("unit") == store.counts()).all()
    assert store.counts("unit").unit.values.tolist() == list(store.units)
    with pytest.raises(ValueError, match="by='day' must be"):
        store.counts("day")
