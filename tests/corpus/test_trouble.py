"""What goes wrong in a run of days: damaged files, two processes, odd documents, a poor disk."""

import json
import tempfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from corpus.test_record import TEXTS, equal, lab, plan, recorded  # noqa: F401
from support.labs import small_lab

import ernie_lab as el
from ernie_lab.corpus import CorpusError, RoutingStore, committing, record, units
from ernie_lab.corpus.folder import Folder, write
from ernie_lab.corpus.progress import shown
from ernie_lab.corpus.statistics import DEFAULT, Shape, Statistics


def halved(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_damaged_file_is_named_and_recorded_again(lab, tmp_path, suffix) -> None:  # noqa: F811
    whole = recorded(lab, tmp_path / "whole")
    folder = tmp_path / "cut"
    recorded(lab, folder)
    damaged = folder / f"units/000001.{suffix}"
    halved(damaged)
    said = rf"000001\.{suffix} is damaged: .*Delete it and run the plan again"
    asks = {
        "parquet": [
            lambda: RoutingStore(folder).search(1, 2),
            lambda: RoutingStore(folder).sql("select sum(l1s0) from tokens"),
        ],
        "safetensors": [
            lambda: RoutingStore(folder).status(),
            lambda: RoutingStore(folder).counts(),
            lambda: recorded(lab, folder),
        ],
    }
    for ask in asks[suffix]:
        with pytest.raises(CorpusError, match=said):
            ask()
    damaged.unlink()
    store = recorded(lab, folder)
    assert equal(store, whole)
    assert store.sample(10**6).expert_ids.equals(whole.sample(10**6).expert_ids)


def test_killed_between_rows_and_statistics(lab, tmp_path, monkeypatch) -> None:  # noqa: F811
    real = record._write_statistics

    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(record, "_write_statistics", stopped)
    with pytest.raises(KeyboardInterrupt):
        recorded(lab, tmp_path)
    assert (tmp_path / "units/000000.parquet").exists()
    assert RoutingStore(tmp_path).status().empty, "rows alone are no unit"
    assert not list(tmp_path.rglob(".tmp-*")), "an interrupt leaves no half file"
    with pytest.raises(CorpusError, match="holds no committed unit yet"):
        RoutingStore(tmp_path).sql("select 1 from tokens")
    monkeypatch.setattr(record, "_write_statistics", real)
    store = recorded(lab, tmp_path)
    assert len(store.sql("select * from tokens")) == store.statistics().n_tokens


def test_two_processes_on_one_folder_do_not_repeat_units(lab, tmp_path, monkeypatch) -> None:  # noqa: F811
    """The second is simulated: it commits everything while the first is at its first unit."""
    real, n_run = committing.run_unit, []
    work, whole = plan(lab, tmp_path / "two"), recorded(lab, tmp_path / "whole")

    def counting(*given):
        n_run.append(given[1].number)
        if len(n_run) == 1:
            work.run(progress=False)
        return real(*given)

    monkeypatch.setattr(committing, "run_unit", counting)
    store = work.run(progress=False)
    assert equal(store, whole)
    assert sorted(n_run) == [0, *range(len(store.units))], "unit 0 was at work in both"


def test_the_first_of_two_plans_stays(tmp_path) -> None:
    Folder(tmp_path).open({"model": "one"})
    with pytest.raises(FileExistsError):
        write(tmp_path / "plan.json", b"two", replace=False)
    with pytest.raises(CorpusError, match="another plan"):
        Folder(tmp_path).open({"model": "two"})
    assert Folder(tmp_path).plan()["model"] == "one" and not list(tmp_path.glob(".tmp-*"))


def test_a_folder_of_other_things_is_no_place_for_a_recording(lab, tmp_path) -> None:  # noqa: F811
    """It is refused before the model is loaded, and nothing is written into it."""
    trace = lab.run("the cat", keep="routing").trace
    folder = trace.save(tmp_path / "trA")
    (folder / "notes.txt").write_text("mine")
    there = sorted(folder.rglob("*"))
    work = el.RecordPlan(model="no-such-model", corpus=["a b c"], folder=folder)
    with pytest.raises(CorpusError, match="trA holds a saved trace; name another folder"):
        work.run(progress=False)
    assert sorted(folder.rglob("*")) == there
    (tmp_path / "c.txt").touch()
    with pytest.raises(CorpusError, match=r"holds c\.txt, trA; name another folder"):
        Folder(tmp_path).open({"model": "one"})
    with pytest.raises(CorpusError, match=r"a recording: it holds a saved trace, which el\.Trace"):
        RoutingStore(folder)
    with pytest.raises(CorpusError, match=r"there is no folder .*nowhere"):
        RoutingStore(tmp_path / "nowhere")


def test_a_recording_that_is_just_begun_is_gone_on_with(tmp_path) -> None:
    """A process was killed, or is at work, before it had written the plan."""
    (tmp_path / "units").mkdir()
    (tmp_path / "units/.tmp-x").touch()
    (tmp_path / ".tmp-y.json").touch()
    Folder(tmp_path).open({"model": "one"})
    assert Folder(tmp_path).plan()["model"] == "one"
    (tmp_path / "plan.json").unlink()
    (tmp_path / "units/000000.parquet").touch()
    with pytest.raises(CorpusError, match=r"has units but no plan\.json"):
        Folder(tmp_path).open({"model": "one"})


def test_a_corpus_that_is_not_there_leaves_no_folder(lab, tmp_path) -> None:  # noqa: F811
    for corpus in ("no-such.txt", tmp_path / "no-such.txt"):
        with pytest.raises(CorpusError, match="no such file or folder"):
            el.RecordPlan(model=lab, corpus=corpus, folder=tmp_path / "out").run(progress=False)
    assert not (tmp_path / "out").exists()


def test_status_while_others_write(lab, tmp_path) -> None:  # noqa: F811
    store = recorded(lab, tmp_path)
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed/.tmp-x.json").write_text("{")
    (tmp_path / "units/.tmp-y.safetensors").write_text("half")
    assert store.status().attrs["failed"] == {} and len(store.status()) == len(store.units)
    later = tmp_path / f"units/{len(store.units):06d}.safetensors"
    later.write_bytes((tmp_path / "units/000000.safetensors").read_bytes())
    assert len(store.status()) == len(store.units) + 1
    assert len(store.sample(10**6).expert_ids.token) == store.statistics().n_tokens, (
        "all answers of a store are about the same units"
    )
    assert len(RoutingStore(tmp_path).units) == len(store.units) + 1


def test_a_folder_that_cannot_be_written_to_says_so_before_the_work(lab, tmp_path, monkeypatch):  # noqa: F811
    store = recorded(lab, tmp_path)

    def refused(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    assert equal(recorded(lab, tmp_path), store), "nothing is missing: it is read alone"
    (tmp_path / "units/000001.safetensors").unlink()
    monkeypatch.setattr(committing, "run_unit", None)
    with pytest.raises(CorpusError, match="cannot be written to, and units are missing in it"):
        recorded(lab, tmp_path)


def test_iterators_are_read_once(lab, tmp_path) -> None:  # noqa: F811
    work = plan(lab, tmp_path, corpus=iter(TEXTS))
    work.run(progress=False)
    with pytest.raises(CorpusError, match=r"become shorter\. A list_iterator gives its documents "):
        work.run(progress=False)
    other = ({**text, "text": text["text"][::-1]} for text in TEXTS)
    with pytest.raises(CorpusError, match="the corpus has changed: unit 0"):
        recorded(lab, tmp_path, other)
    for empty in ([], iter([])):
        with pytest.raises(CorpusError, match="the corpus holds no token"):
            recorded(lab, tmp_path / "empty", empty)


def test_empty_documents_keep_their_number(lab, tmp_path) -> None:  # noqa: F811
    store = recorded(lab, tmp_path, [TEXTS[0], "", {"text": "", "domain": "x"}, {"ids": []}, "abc"])
    assert set(store.sql("select distinct doc from tokens")["doc"]) == {0, 4}


def test_domains_that_are_none(lab, tmp_path) -> None:  # noqa: F811
    (tmp_path / "x.jsonl").write_text('{"text": "abc", "domain": "caf\\ud800"}')
    with pytest.raises(CorpusError, match=r"x\.jsonl, line 1: domain .* is no valid Unicode"):
        recorded(lab, tmp_path / "out", tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").write_text('{"text": "ab\\ud800c"}')
    with pytest.raises(CorpusError, match=r"x\.jsonl, line 1 cannot be read"):
        recorded(lab, tmp_path / "out", tmp_path / "x.jsonl")
    odd = "日本\u2028'; drop table tokens; --\x00\n🙂"
    store = recorded(lab, tmp_path / "odd", [{"text": "abcd", "domain": odd}])
    assert store.counts("domain").domain.values.tolist() == [odd]
    assert store.search(1, int(store.counts().sel(layer=1).values.argmax()))["domain"][0] == odd
    many = [{"text": "a", "domain": str(i)} for i in range(units.MAX_DOMAINS + 1)]
    with pytest.raises(CorpusError, match=r"brings domain '256' after 256 others"):
        recorded(lab, tmp_path / "many", many)


def test_more_than_256_experts(tmp_path) -> None:
    from support.models import small_config

    config = small_config()
    from dataclasses import replace

    router = replace(config.moe.router, n_experts=300)
    lab = small_lab(moe=replace(config.moe, router=router))  # noqa: F811
    store = recorded(lab, tmp_path, rows="ids", edits=el.routing.without_correction_bias())
    counts = store.counts().sel(layer=1)
    high = int(counts.values[256:].argmax()) + 256
    assert counts[high] > 0, "some expert beyond one byte is chosen"
    assert store.search(1, high).attrs["n_found"] == counts[high]
    ids = store.sample(10**6).expert_ids.sel(layer=1)
    assert (np.bincount(ids.values.ravel(), minlength=300) == counts.values).all()
    found = store.sql("select l1s0 e, count(*) n from tokens group by all")
    first = np.bincount(ids.sel(slot=0).values, minlength=300)
    assert dict(zip(found["e"], found["n"], strict=True)) == {
        int(e): int(first[e]) for e in np.flatnonzero(first)
    }


def test_probabilities_that_are_no_numbers_are_poison(tmp_path) -> None:
    broken = small_lab()
    broken.model.routers()[2].weight_ED.data[0] = torch.nan
    with pytest.raises(el.corpus.CorpusIncomplete, match="layer 2: the router's probabilities are"):
        recorded(broken, tmp_path)


def test_an_edit_that_changed_nothing_is_told(tmp_path) -> None:
    from support.labs import small_vl_lab

    idle = el.routing.forbid(layer=1, experts=[3], bank="vision")
    with pytest.warns(el.interventions.edits.EditChangedNothingWarning, match="in all 1 units"):
        recorded(small_vl_lab(), tmp_path, ["only text"], max_length=500, edits=idle)


def test_a_sample_is_drawn_from_all_units(lab, tmp_path) -> None:  # noqa: F811
    texts = [{"text": "abcdefgh" * 2, "domain": "ab"[i // 20]} for i in range(40)]
    store = recorded(lab, tmp_path, texts, unit_tokens=320)
    sample = store.sample(64)
    assert set(sample.expert_ids["domain"].values) == {"a", "b"}
    assert 64 <= sample.expert_ids.sizes["token"] <= 96


def test_small_integers_and_merging_in_place_change_nothing() -> None:
    for top in (3, 300, 70_000, 2**40):
        x = torch.tensor([[0, top], [1, 2]])
        narrow = record._narrow(x)
        assert torch.equal(narrow.long(), x)
        assert narrow.element_size() == {3: 1, 300: 2, 70_000: 4, 2**40: 8}[top]
    shapes = [Shape((1,), 4, 2, 10, domains) for domains in (("a", "b"), ("b",), ("c",))]
    parts = [Statistics.empty(shape, DEFAULT) for shape in shapes]
    for n, part in enumerate(parts, start=1):
        for x in part.sums.values():
            x += n
    pure = parts[0].merged(parts[1])
    assert int(parts[0].sums["counts"][0, 1, 0, 0]) == 1
    one = parts[0].merged(parts[1], in_place=True)
    assert one is parts[0] and torch.equal(one.sums["counts"], pure.sums["counts"])
    assert one.merged(parts[2], in_place=True).shape.domains == ("a", "b", "c")


def test_time_left_where_the_corpus_has_a_length(lab, tmp_path, monkeypatch) -> None:  # noqa: F811
    import tqdm.auto

    totals = []

    class Bar:
        total = None

        def __init__(self, **_): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def update(self, n):
            totals.append(self.total)

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    every = sum(unit.n_tokens for unit in plan(lab, tmp_path).units(lab))
    lines = tmp_path / "corpus/x.jsonl"
    lines.parent.mkdir()
    lines.write_text("\n".join(map(json.dumps, TEXTS[:3])) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TEXTS[3:]), lines.parent / "y.parquet")
    for corpus in (TEXTS, lines.parent, [lines, *TEXTS[3:]]):
        totals.clear()
        made = list(plan(lab, tmp_path, corpus).units(lab))
        list(shown(made))
        assert totals[-1] == every and every / 3 < totals[0] < every * 3
        assert made[0].span[0] == 0 and made[-1].span[1] == pytest.approx(1)
        list(shown(made[1:]))
        assert totals[-1] == every - made[0].n_tokens, "of what is left"
    # A text that fills units by itself moves on inside itself.
    spans = [unit.span for unit in plan(lab, tmp_path, ["ab" * 60]).units(lab)]
    assert spans == [pytest.approx((at / 120, min(at + 32, 120) / 120)) for at in range(0, 120, 32)]
    totals.clear()
    list(shown(plan(lab, tmp_path, iter(TEXTS)).units(lab)))
    assert set(totals) == {None}


def test_facts_of_a_unit_are_plain(lab, tmp_path) -> None:  # noqa: F811
    recorded(lab, tmp_path)
    facts = record.read_facts(Folder(tmp_path), 0)
    assert json.loads(json.dumps(facts)) == facts


def test_another_quantisation_is_another_plan(tmp_path) -> None:
    def run(**options):
        return el.RecordPlan(
            model="tiny-text", corpus=["And God said"], folder=tmp_path, load_options=options
        ).run(progress=False)

    run(quantize="int8")
    said = r"another plan .*quantised: \{'quantize': 'int8', .*\}, now None"
    with pytest.raises(CorpusError, match=said):
        run()
    run(quantize="int8")


def test_a_plan_of_before_there_was_quantisation_goes_on(lab, tmp_path) -> None:  # noqa: F811
    store = recorded(lab, tmp_path)
    asked = json.loads((tmp_path / "plan.json").read_text())
    assert asked.pop("quantised") is None
    (tmp_path / "plan.json").write_text(json.dumps(asked))
    assert equal(recorded(lab, tmp_path), store)
