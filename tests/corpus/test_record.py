"""A corpus recorded, interrupted, resumed and read back: against traces of the same texts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support.labs import small_lab, small_vl_lab
from support.models import small_model

import ernie_lab as el
from ernie_lab.corpus import CorpusError, CorpusIncomplete, RecordPlan, RoutingStore
from ernie_lab.corpus.statistics import STATISTICS

TEXTS = [
    {"text": "the quick brown fox", "domain": "prose"},
    {"text": "Jumps, over!", "domain": "shout"},
    {"text": "a lazy dog and another lazy dog", "domain": "prose"},
    {"text": "abcabcabcabc"},
    {"text": "Hello, Hello?", "domain": "shout"},
]


@pytest.fixture(scope="module")
def lab():
    return small_lab()


def plan(lab, folder, corpus=TEXTS, **changed):
    settings = {"unit_tokens": 24, "max_length": 16, "rows": "ids+weights", "stats": STATISTICS}
    return RecordPlan(model=lab, corpus=corpus, folder=folder, **settings | changed)


def recorded(lab, folder, corpus=TEXTS, **changed):
    return plan(lab, folder, corpus, **changed).run(progress=False)


def equal(one: RoutingStore, two: RoutingStore, bank=None) -> bool:
    mine, theirs = one.statistics(bank), two.statistics(bank)
    return mine.shape == theirs.shape and all(
        torch.equal(theirs.sums[name], x) for name, x in mine.sums.items()
    )


def test_counts_are_those_of_traces(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path, max_length=999)
    traces = [lab.run(doc["text"], keep="routing").trace for doc in TEXTS]
    domains = [doc.get("domain", "") for doc in TEXTS]
    counts = store.counts("domain")
    for layer in store.layers:
        for domain in set(domains):
            ids = [t.expert_ids.sel(layer=layer).values.ravel()
                   for t, d in zip(traces, domains, strict=True) if d == domain]  # fmt: skip
            expected = np.bincount(np.concatenate(ids), minlength=8)
            assert counts.sel(layer=layer, domain=domain).values.tolist() == expected.tolist()
    probs = np.concatenate([t.router_probs.values for t in traces], axis=1).mean(1)
    np.testing.assert_allclose(store.router_probs().values, probs, atol=1e-6)
    assert store.load().sum("expert").values == pytest.approx(1)
    assert counts.attrs["n_tokens"] == sum(len(t) for t in traces)
    # Rows: the same experts in the same slots, and the weights to half precision.
    sample = store.sample(10**6)
    for doc, trace in enumerate(traces):
        mine = sample.expert_ids["sequence"].values == doc
        assert (sample.expert_ids.values[:, mine] == trace.expert_ids.values).all()
        weights = trace.expert_weights.values
        np.testing.assert_allclose(sample.expert_weights.values[:, mine], weights, atol=1e-3)
        assert sample.expert_ids["pos"].values[mine].tolist() == list(range(len(trace)))
    # First choices are those of the analysis of a trace, also where the bias spoke.
    steps = sum(el.analysis.path_steps(t).values for t in traces)
    heaviest = [t.expert_weights.values.argmax(-1) for t in traces]
    assert any(slots.any() for slots in heaviest), "or both orders would pass"
    assert (store.transitions().values == steps).all()
    assert (el.analysis.path_steps(sample).values == steps).all()


def test_long_documents_are_cut_and_units_hold_whole_windows(lab, tmp_path) -> None:
    made = list(plan(lab, tmp_path).units(lab))
    windows = [window for unit in made for window in unit.windows]
    assert max(len(window.ids) for window in windows) == 16
    assert [(w.doc, w.start) for w in windows if w.doc == 2] == [(2, 0), (2, 16)]
    assert sum(unit.n_tokens for unit in made) == sum(len(doc["text"]) for doc in TEXTS)
    assert all(unit.n_tokens >= 24 for unit in made[:-1])
    assert [unit.digest for unit in made] == [
        unit.digest for unit in plan(lab, tmp_path).units(lab)
    ]


@pytest.mark.parametrize("changed", [{"unit_tokens": 7}, {"batch_tokens": 1}, {"unit_tokens": 999}])
def test_the_cut_changes_no_choice(lab, tmp_path, changed) -> None:
    """Other batches round otherwise, so sums of probabilities agree to rounding alone."""
    one, two = recorded(lab, tmp_path / "a"), recorded(lab, tmp_path / "b", **changed)
    for name in ("tokens", "counts", "coactivation", "transitions", "vocabulary"):
        assert torch.equal(one.statistics().sums[name], two.statistics().sums[name]), name
    np.testing.assert_allclose(one.router_probs().values, two.router_probs().values, atol=1e-6)


def test_resumes_without_losing_or_doubling(lab, tmp_path, monkeypatch) -> None:
    whole = recorded(lab, tmp_path / "whole")
    work = plan(lab, tmp_path / "cut")
    from ernie_lab.corpus import committing as module

    real, n_run = module.run_unit, []

    def stopping(*given):
        n_run.append(given[1].number)
        if len(n_run) == 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "run_unit", stopping)
    with pytest.raises(KeyboardInterrupt):
        work.run(progress=False)
    assert RoutingStore(tmp_path / "cut").status().index.tolist() == [0]
    left = [tmp_path / f"cut/units/.tmp-{age}.parquet" for age in ("old", "new")]
    for scratch in left:
        scratch.write_bytes(b"half")
    os.utime(left[0], (1, 1))
    monkeypatch.setattr(module, "run_unit", real)
    store = work.run(progress=False)
    assert equal(store, whole)
    assert list((tmp_path / "cut/units").glob(".tmp-*")) == left[1:], "a new one may be a worker's"
    assert store.sample(10**6).expert_ids.equals(whole.sample(10**6).expert_ids)
    assert work.run(progress=False).status().equals(store.status()), "nothing was run again"


def test_another_corpus_or_plan_is_refused_and_nothing_lost(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path)
    before = store.status()
    with pytest.raises(CorpusError, match="the corpus has changed: unit 0"):
        recorded(lab, tmp_path, [{**TEXTS[0], "text": "the slow brown fox."}, *TEXTS[1:]])
    with pytest.raises(CorpusError, match="it has become shorter"):
        recorded(lab, tmp_path, TEXTS[:2])
    with pytest.raises(CorpusError, match="unit_tokens: 24, now 25"):
        recorded(lab, tmp_path, unit_tokens=25)
    other = el.Lab(model=small_model(seed=1), tokenizer=lab.tokenizer, model_id="small")
    with pytest.raises(CorpusError, match=r"another plan \(weights:"):
        recorded(other, tmp_path)
    with pytest.raises(CorpusError, match="edits:"):
        recorded(lab, tmp_path, edits=el.shared.zero(layers=[1]))
    assert RoutingStore(tmp_path).status().equals(before)


def test_poison_units_are_set_aside(lab, tmp_path, monkeypatch) -> None:
    from ernie_lab.corpus import committing as module

    real = module.run_unit

    def failing(*given):
        if given[1].number == 1:
            raise RuntimeError("no such luck")
        return real(*given)

    monkeypatch.setattr(module, "run_unit", failing)
    with pytest.raises(CorpusIncomplete, match=r"1 units failed \(1\).*no such luck"):
        recorded(lab, tmp_path)
    store = RoutingStore(tmp_path)
    assert 1 not in store.status().index and store.status().attrs["failed"].keys() == {1}
    assert "Traceback" in json.loads((tmp_path / "failed/000001.json").read_text())["traceback"]
    monkeypatch.setattr(module, "run_unit", real)
    assert equal(recorded(lab, tmp_path), recorded(lab, tmp_path / "whole"))
    assert not list((tmp_path / "failed").glob("*"))


def test_trouble_with_the_disk_stops_at_once(lab, tmp_path, monkeypatch) -> None:
    from ernie_lab.corpus import committing as module

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "commit_unit", full)
    with pytest.raises(CorpusError, match=r"unit 0 could not be written.*No space left"):
        recorded(lab, tmp_path)
    assert RoutingStore(tmp_path).status().empty and not (tmp_path / "failed").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="file is a file; name a folder"):
        recorded(lab, tmp_path / "file")


def test_a_killed_process_is_resumed(tmp_path) -> None:
    """SIGKILL in the middle of a run, then a run to the end: the same store as without."""
    code = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from ernie_lab.corpus import RecordPlan\n"
        "corpus = [f'And God said {i}, let there be light number {i}.' for i in range(600)]\n"
        "RecordPlan(model='tiny-text', corpus=corpus, folder=sys.argv[1], unit_tokens=300,\n"
        "           rows='ids').run(progress=False)"
    )
    run = [sys.executable, "-c", code]
    first = subprocess.Popen([*run, str(tmp_path / "cut")])
    units = tmp_path / "cut/units"
    deadline = time.monotonic() + 120
    while not (units.exists() and len(list(units.glob("0*.safetensors"))) >= 3):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert len(RoutingStore(tmp_path / "cut").status()) >= 3
    for folder in ("cut", "whole"):
        subprocess.run([*run, str(tmp_path / folder)], check=True)
    cut, whole = RoutingStore(tmp_path / "cut"), RoutingStore(tmp_path / "whole")
    assert equal(cut, whole)
    assert cut.sql(
        "select count(*) n, count(distinct (doc, pos)) d from tokens"
    ).values.tolist() == [[whole.statistics().n_tokens] * 2]


def test_edits_are_applied(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path, edits=el.routing.forbid(layer=1, experts=[3]))
    assert store.counts().sel(layer=1, expert=3) == 0
    assert store.counts().sel(layer=2).sum() > 0
    assert "forbid" in store.plan["edits"]


def test_pictures_and_both_banks(tmp_path) -> None:
    lab = small_vl_lab()
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (12, 16, 3), dtype=np.uint8) for _ in range(3)]
    asked = [{"type": "image"}, {"type": "text", "text": "?"}]
    corpus = [
        {"text": "what is this?", "images": [pictures[0]], "domain": "seen"},
        {"text": "nothing to see", "domain": "read"},
        {
            "messages": [{"role": "user", "content": asked}],
            "images": [pictures[1]],
            "domain": "seen",
        },
    ]
    store = recorded(lab, tmp_path, corpus, max_length=500)
    with pytest.raises(ValueError, match="two banks of experts"):
        store.counts()
    for bank in ("text", "vision"):
        ids = []
        for doc in corpus:
            prompt = doc.get("messages") or doc["text"]
            trace = lab.run(prompt, images=doc.get("images"), keep="routing").trace
            if bank in set(trace.tokens["bank"]):
                ids.append(trace.routing(bank).expert_ids.sel(layer=1).values.ravel())
        expected = np.bincount(np.concatenate(ids), minlength=8)
        assert store.counts(bank=bank).sel(layer=1).values.tolist() == expected.tolist()
    content = store.counts("content", bank="vision").sum(("layer", "expert"))
    assert content.sel(content="text") == 0 and content.sel(content="image") > 0
    assert content.sel(content="delimiter") == 2 * 2 * len(store.layers) * store.n_chosen
    rows = store.sql("select bank, content, count(*) n from tokens group by all order by all")
    assert set(rows["content"]) == {"text", "delimiter", "image"}
    assert store.sample(5, bank="vision").expert_ids.sizes["token"] >= 5
    with pytest.raises(CorpusError, match="could not say which bank"):
        recorded(lab, tmp_path / "x", corpus, edits=el.routing.cross_bank(tokens="text"))
    moved = recorded(lab, tmp_path / "y", corpus, rows=None, max_length=500,
                     edits=el.routing.cross_bank(tokens="text"))  # fmt: skip
    assert moved.statistics("text").n_tokens == 0
    with pytest.raises(CorpusError, match="it has pictures"):
        recorded(small_lab(), tmp_path / "z", corpus)


def test_analysis_takes_a_sample_and_counts(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path)
    table = el.analysis.balance_table(store.sample(10**6))
    load = store.load().sel(layer=1).values
    assert table.loc[1, "busiest"] == load.argmax()
    assert table.loc[1, "max_violation"] == pytest.approx(load.max() * 8 - 1)
    both = store.coactivation().sel(layer=1).values
    assert (both == both.T).all() and (np.diag(both) == store.counts().sel(layer=1).values).all()
    assert store.transitions().sel(layer=1).sum() == store.statistics().n_tokens
    assert (store.histogram("margin").sum("bin").sum("domain") == store.statistics().n_tokens).all()
    assert (
        store.histogram("entropy").sum("bin").sum("domain") == store.statistics().n_tokens
    ).all()
    with pytest.raises(ValueError, match="of='entrop' must be"):
        store.histogram("entrop")
    with pytest.raises(CorpusError, match="has no logits"):
        _ = store.sample(5).router_logits


def test_questions_about_tokens(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path)
    busiest = int(store.counts().sel(layer=2).values.argmax())
    found = store.search(2, busiest, limit=3)
    assert len(found) == 3 and found["weight"].is_monotonic_decreasing
    assert found.attrs["n_found"] == store.counts().sel(layer=2, expert=busiest)
    heavy = store.search(2, busiest, min_weight=0.6, limit=999)
    assert (heavy["weight"] >= 0.6).all() and len(heavy) < found.attrs["n_found"]
    first = store.sql(
        "select l2s0 as expert, count(*) as n from tokens group by all order by expert"
    )
    sample = store.sample(10**6).expert_ids.sel(layer=2, slot=0).values
    assert dict(zip(first["expert"], first["n"], strict=True)) == {
        e: n for e, n in enumerate(np.bincount(sample, minlength=8)) if n
    }
    with pytest.raises(ValueError, match="layer=0: this recording has layers"):
        store.search(0, 5)
    with pytest.raises(ValueError, match="expert=8 must be"):
        store.search(1, 8)


def test_without_rows_or_statistics(lab, tmp_path) -> None:
    store = recorded(lab, tmp_path, rows=None, stats=["counts"])
    assert not list((tmp_path / "units").glob("*.parquet")) and "rows: none" in repr(store)
    with pytest.raises(CorpusError, match="record again with rows='ids'"):
        store.sample(5)
    with pytest.raises(CorpusError, match=r"'coactivation' was not counted \(stats=\['counts'\]\)"):
        store.coactivation()
    ids = recorded(lab, tmp_path / "ids", rows="ids")
    with pytest.raises(CorpusError, match="weights were not recorded"):
        ids.search(1, 2, min_weight=0.5)
    with pytest.raises(CorpusError, match="weights were not recorded"):
        _ = ids.sample(5).expert_weights


def test_what_cannot_be_a_plan(lab, tmp_path) -> None:
    with pytest.raises(ValueError, match="unit_tokens=0"):
        plan(lab, tmp_path, unit_tokens=0)
    with pytest.raises(ValueError, match="rows='all'"):
        plan(lab, tmp_path, rows="all")
    with pytest.raises(ValueError, match=r"stats=\['count'\] are unknown"):
        plan(lab, tmp_path, stats=["count"])
    with pytest.raises(ValueError, match="is dense"):
        recorded(small_lab(moe=None), tmp_path)
    with pytest.raises(
        CorpusError, match=r"there is no folder .*nothing; RecordPlan\(…\)\.run\(\) writes one"
    ):
        RoutingStore(tmp_path / "nothing")
    assert not (Path(tmp_path) / "units").exists()
