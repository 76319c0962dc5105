"""Round trips through a folder, and everything that can be wrong with one."""

import ast
import json
from pathlib import Path

import pytest
import torch
from trace_driver import SITES, as_schema_2, drive, generation, one_step, provenance

from ernie_lab.trace import folders, storage
from ernie_lab.trace.keep import Keep, keep
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.storage import TraceFileError
from ernie_lab.trace.trace import Trace


def same(a, b):
    assert a.sites == b.sites and a.known_sites == b.known_sites
    assert a.context == b.context and torch.equal(a.rows_N, b.rows_N)
    assert (a.keep, a.provenance) == (b.keep, b.provenance)
    for path in a.sites:
        mine, other = a.values[path], b.values[path]
        assert mine.site == other.site and mine.heads == other.heads
        assert mine.parts.keys() == other.parts.keys()
        for sequence, part in mine.parts.items():
            loaded = other.parts[sequence]
            assert part.values.dtype == loaded.values.dtype
            assert torch.equal(part.values, loaded.values)
            assert torch.equal(part.rows_N, loaded.rows_N)


def test_round_trip(tmp_path):
    wish = ["all", keep("attention", heads=[0, 2], positions=slice(1, None)), "attn.scores"]
    trace, _ = generation(wish, dtype="bfloat16")
    assert trace.save(tmp_path / "run1") == tmp_path / "run1"
    loaded = Trace.load(str(tmp_path / "run1"))
    same(trace, loaded)
    assert sorted(p.name for p in (tmp_path / "run1").iterdir()) == [
        "trace.json",
        "values.safetensors",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["run1"], "no scratch left behind"
    assert loaded.tokens.equals(trace.tokens)
    assert loaded.to_frame().equals(trace.to_frame())
    assert loaded.pattern(1, 1).identical(trace.pattern(1, 1))
    assert (loaded.n_experts, loaded.n_chosen) == (trace.n_experts, trace.n_chosen)
    assert loaded.provenance.seed == 7 and loaded.provenance.details == {"note": "driver"}
    assert loaded.provenance.versions["torch"] == torch.__version__
    with pytest.raises(KeyError, match="exists but was not kept"):
        _ = loaded.sel(layer=1)["resid_pre", 2]


def test_a_folder_of_traces_names_them(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no trace.json; trace.save\(folder\) writes one"):
        Trace.load(tmp_path)
    generation("routing")[0].save(tmp_path / "run1")
    with pytest.raises(FileNotFoundError, match=r"no trace\.json; did you mean .*/run1\?"):
        Trace.load(tmp_path)
    generation("routing")[0].save(tmp_path / "run2")
    with pytest.raises(FileNotFoundError, match=r"no trace\.json; in it are run1, run2"):
        Trace.load(tmp_path)


def test_round_trip_of_slices_and_of_dense_models(tmp_path):
    trace, _ = generation(["routing", "attention"])
    part = trace.sel(sequence=1, position=[1, 3], layer=2)
    part.save(tmp_path / "part")
    loaded = Trace.load(tmp_path / "part")
    same(part, loaded)
    assert loaded.tokens.pos.tolist() == [1, 3]
    assert loaded.pattern(2).identical(trace.pattern(2, 1).isel(query=[1, 3]))

    recorder = Recorder(Keep.of("embed", SITES))
    drive(recorder, [one_step((2,))])
    recorder.trace([[1, 2]], sites=SITES, provenance=provenance()).save(tmp_path / "dense")
    dense = Trace.load(tmp_path / "dense")
    assert dense.routers == {} and dense.banks == ()


def test_overwriting(tmp_path):
    first, _ = generation("routing")
    second, _ = generation("embed")
    first.save(tmp_path / "run")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        second.save(tmp_path / "run")
    second.save(tmp_path / "run", overwrite=True)
    assert Trace.load(tmp_path / "run").sites == ("embed",)
    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"holds thesis\.txt and is not a saved trace"):
            second.save(other, overwrite=overwrite)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["precious", "run"]


def test_other_files_beside_a_trace_are_not_overwritten(tmp_path):
    trace, _ = generation("routing")
    folder = trace.save(tmp_path / "run")
    (folder / "notes.txt").write_text("mine")
    (folder / "units").mkdir()
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"besides a saved trace, notes\.txt, units, "):
            generation("embed")[0].save(folder, overwrite=overwrite)
    same(Trace.load(folder), trace)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [p.name for p in tmp_path.iterdir()] == ["run"], "no scratch left behind"


def test_an_empty_folder_takes_a_trace(tmp_path):
    (tmp_path / "run").mkdir()
    trace, _ = generation("routing")
    same(Trace.load(trace.save(tmp_path / "run")), trace)


def test_a_file_is_no_place_for_a_trace(tmp_path):
    trace, _ = generation("routing")
    (tmp_path / "c.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"c\.txt is a file; name a folder$"):
            trace.save(tmp_path / "c.txt", overwrite=overwrite)
        with pytest.raises(FileExistsError, match=r"c\.txt is a file, so there can be no .*/t;"):
            trace.save(tmp_path / "c.txt" / "t", overwrite=overwrite)
    assert (tmp_path / "c.txt").read_text() == "mine"


def test_what_is_loaded_in_place_of_a_trace_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trace, _ = generation("routing")
    trace.save("run")
    with pytest.raises(FileNotFoundError, match=r"there is no folder nowhere in /.*trace\.save"):
        Trace.load("nowhere")
    with pytest.raises(FileNotFoundError, match=r"give its folder: el\.Trace\.load\('run'\)"):
        Trace.load("run/trace.json")
    (tmp_path / "c.txt").write_text("mine")
    with pytest.raises(FileNotFoundError, match=r"c\.txt is a file; a saved trace is a folder"):
        Trace.load("c.txt")
    (tmp_path / "rec").mkdir()
    (tmp_path / "rec" / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"a recording, which el\.RoutingStore\('rec'\)"):
        Trace.load("rec")


@pytest.mark.parametrize(
    ("room", "failing"), [(storage, "save_file"), (storage, "_sha256"), (folders, "put")]
)
def test_an_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch, room, failing):
    trace, _ = generation("routing")
    trace.save(tmp_path / "run")

    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(room, failing, interrupt)
    with pytest.raises(KeyboardInterrupt):
        generation("embed")[0].save(tmp_path / "run", overwrite=True)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    same(Trace.load(tmp_path / "run"), trace)


def test_a_failed_move_puts_the_old_one_back(tmp_path):
    trace, _ = generation("routing")
    folder = trace.save(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        folders.put(tmp_path / "absent", folder, aside=tmp_path / "aside")
    same(Trace.load(folder), trace)


def damaged(folder, **changes):
    header = json.loads((folder / "trace.json").read_text())
    (folder / "trace.json").write_text(json.dumps({**header, **changes}))


def test_traces_of_older_versions_open(tmp_path):
    trace, _ = generation(["routing", "attention"])
    as_schema_2(trace.save(tmp_path / "old"))
    loaded = Trace.load(tmp_path / "old")
    same(trace, loaded)
    assert loaded.to_frame().equals(trace.to_frame())
    assert loaded.banks == ("text",) and loaded.media == ()


def test_damage(tmp_path):
    folder = tmp_path / "run"
    trace, _ = generation("routing")

    def fresh():
        trace.save(folder, overwrite=True)

    with pytest.raises(FileNotFoundError, match="there is no folder"):
        Trace.load(tmp_path / "nothing")
    fresh()
    damaged(folder, schema=4)
    with pytest.raises(TraceFileError, match="schema 4, this ernie_lab reads up to 3: upgrade"):
        Trace.load(folder)
    damaged(folder, schema="x")
    with pytest.raises(TraceFileError, match="no valid schema"):
        Trace.load(folder)
    damaged(folder, format="something else")
    with pytest.raises(TraceFileError, match="not the header"):
        Trace.load(folder)
    fresh()
    damaged(folder, sites=[])
    with pytest.raises(TraceFileError, match=r"damaged: KeyError.*router_logits"):
        Trace.load(folder)
    fresh()
    header = json.loads((folder / "trace.json").read_text())
    damaged(folder, tokens={**header["tokens"], "id": [1]})
    with pytest.raises(TraceFileError, match="differ in length"):
        Trace.load(folder)
    fresh()
    values = folder / "values.safetensors"
    values.write_bytes(values.read_bytes()[:-3])
    with pytest.raises(TraceFileError, match="SHA-256"):
        Trace.load(folder)
    fresh()
    values.unlink()
    with pytest.raises(TraceFileError, match="incomplete"):
        Trace.load(folder)
    fresh()
    text = (folder / "trace.json").read_text()
    (folder / "trace.json").write_text(text[: len(text) // 2])
    with pytest.raises(TraceFileError, match=r"trace\.json is damaged"):
        Trace.load(folder)


@pytest.mark.parametrize(
    "path", sorted(Path(storage.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_stays_cheap_to_import(path):
    top_level = ast.parse(path.read_text(encoding="utf-8")).body
    imported = {
        name.partition(".")[0]
        for node in top_level
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in [getattr(node, "module", None) or node.names[0].name]
    }
    assert not imported & {"pandas", "xarray", "matplotlib"}
