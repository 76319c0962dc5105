"""The counts of a recording answer what a trace of the same texts does."""

import numpy as np
import pytest
from corpus.test_record import TEXTS, lab, recorded  # noqa: F401

import ernie_lab as el


@pytest.fixture(scope="module")
def store(lab, tmp_path_factory):  # noqa: F811
    return recorded(lab, tmp_path_factory.mktemp("store"), max_length=999, rows="ids")


def test_as_a_trace_of_the_same_texts(lab, store) -> None:  # noqa: F811
    trace = lab.run([doc["text"] for doc in TEXTS], keep="routing").trace
    labels = [TEXTS[i].get("domain", "") for i in trace.expert_ids.sequence.values]
    ours, theirs = store.balance(), el.analysis.balance_by(trace)
    for name in ("n_tokens", "busiest", "max_violation", "max_violation_uniform_p95", "entropy"):
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name)
    assert np.isfinite(ours["max_violation_low"]).all(), "intervals over units"
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
