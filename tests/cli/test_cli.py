"""The command line, as a user calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint.released_configs import TEXT_21B
from PIL import Image
from support.models import small_model

import ernie_lab as el
from ernie_lab.cli import main
from ernie_lab.describe import layers_in_words


def test_info_lists_figures_and_sites(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "tiny-text", "--sites"]) == 0
    out = capsys.readouterr().out
    assert "16 of width 64; 4 chosen, 2 shared" in out
    assert "in layers 1 to 5\n" in out
    assert "blocks.1.moe.router_logits" in out
    assert "quantised     2.0 MB as nf4, 3.2 MB as int8, the rest bfloat16" in out


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        ((3,), "layer 3"),
        ((1, 2), "layers 1, 2"),
        (tuple(range(1, 28)), "layers 1 to 27"),
        ((3, 7, 11), "layers 3 to 11 by 4"),
        ((1, 2, 5), "layers 1, 2, 5"),
    ],
)
def test_mixture_layers_in_few_words(layers: tuple[int, ...], said: str) -> None:
    assert layers_in_words(layers) == said


def test_info_of_a_folder_needs_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    el.save_model(model, model.config, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert main(["info", str(tmp_path / "m")]) == 0
    n = sum(p.numel() for p in model.parameters())
    assert f"{n:,} in all" in capsys.readouterr().out


def test_info_plans_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TEXT_21B))
    assert main(["info", str(tmp_path), "--devices", "2x24GB", "--quantize", "nf4"]) == 0
    out = capsys.readouterr().out
    assert "2 x 24.0 GB" in out and "1 sequence of 4,096 tokens, bfloat16" in out
    assert "one device, nf4" in out and "ep:2, rank 0" in out
    assert f'Take load("{tmp_path}"' in out
    assert main(["info", "tiny-text", "--devices", "1GiB", "--batch", "2"]) == 0
    out = capsys.readouterr().out
    assert "2 sequences of 2,048 tokens, float32" in out, "no more than it has positions for"
    assert 'Take load("tiny-text").' in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--context", "512"], "--context is about a memory plan: say --devices too"),
        (["--devices", "80"], "80 of what?"),
        (["--devices", "1GB", "--context", "4096"], "this model has positions for 2,048 tokens"),
        (["--devices", "1GB", "--dtype", "int4"], "dtype='int4' must be one of float32"),
        (["--devices", "1GB", "--batch", "0"], "batch=0 must be at least 1"),
    ],
)
def test_slips_in_a_memory_plan_are_all_that_is_said(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", "tiny-text", *arguments]) == 2
    said = capsys.readouterr()
    assert problem in said.err and said.err.count("\n") == 1
    assert not said.out


def test_run_saves_trace_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert (
        main(["run", "tiny-text", "And God said", "--out", str(out), "--max-new-tokens", "3"]) == 0
    )
    trace = el.Trace.load(out / "trace")
    assert trace.provenance.model == "tiny-text"
    assert (trace.tokens["phase"] == "decode").sum() == 2
    page = (out / "report.html").read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("<img") >= 3
    assert "report.html" in capsys.readouterr().out


def test_run_refuses_a_used_folder_before_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "trace").mkdir()
    assert main(["run", "no-such-model", "And", "--out", str(tmp_path)]) == 2
    assert "choose another --out" in capsys.readouterr().err


def test_run_keeps_what_is_asked(tmp_path: Path) -> None:
    arguments = ["run", "tiny-text", "And", "--out", str(tmp_path), "--keep", "resid_post"]
    assert main([*arguments, "--keep", "blocks.2.attn.pattern"]) == 0
    assert "blocks.2.attn.pattern" in el.Trace.load(tmp_path / "trace").sites
    assert not (tmp_path / "report.html").exists()


def test_run_quantised(tmp_path: Path) -> None:
    arguments = ["run", "tiny-text", "And", "--out", str(tmp_path), "--quantize", "int8"]
    assert main(arguments) == 0
    assert el.Trace.load(tmp_path / "trace").provenance.details["quantize"] == "int8"


def test_run_streamed(tmp_path: Path) -> None:
    assert main(["run", "tiny-text", "a b", "--placement", "stream", "--out", str(tmp_path)]) == 0
    provenance = el.Trace.load(tmp_path / "trace").provenance
    assert "on disk" in provenance.details["placement"]


def test_no_report_of_half_a_routing(tmp_path: Path) -> None:
    arguments = ["run", "tiny-text", "And", "--out", str(tmp_path), "--keep", "moe.router_logits"]
    assert main(arguments) == 0
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["info", "./nowhere"], "does not exist"),
        (["info", "baidu/ERNIE-4.5-21B-A3B-PT"], "hub cannot be reached"),
        (["run", "tiny-text", "a", "--keep", "nonsense", "--out", "x"], "no site matches"),
        (["run", "tiny-text", "a", "--dtype", "int7", "--out", "x"], "must be one of float32"),
        (["run", "tiny-text", "a", "--device", "gpu", "--out", "x"], "device='gpu' is not on this"),
        (["info", "tiny_txt"], "nearest: 'tiny-text'"),
        (["info", "tiny-text", "--revision", "v2"], "has no revision; drop revision="),
        (["run", "x", "a", "--max-new-tokens", "-1", "--out", "x"], "-1 must be 0 (one forward"),
        (["run", "x", "a", "--keep", "routing,", "--out", "x"], "has an empty name in it"),
        (["info", ""], "source='' is empty"),
        (["record", "c.jsonl", "tiny-text", "--out", "x"], "the model comes first, then the"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert problem in err
    assert "Traceback" not in err
    assert err.count("\n") == 1


def test_info_passes_over_fields_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small_model()
    folder = el.save_model(model, model.config, tmp_path / "m")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, "mood": "fine"}))
    assert main(["info", str(folder)]) == 2
    assert "--ignore mood" in capsys.readouterr().err
    assert main(["info", str(folder), "--ignore", "mood"]) == 0


def test_record_goes_on_and_refuses_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "And God said", "domain": "prose"}\n' * 5)
    record = ["record", "tiny-text", str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "r")]
    assert main([*record, "--unit-tokens", "6", "--rows", "ids"]) == 0
    assert "domains: prose" in capsys.readouterr().out
    assert main([*record, "--unit-tokens", "6", "--rows", "ids"]) == 0
    assert main([*record, "--unit-tokens", "9", "--rows", "ids"]) == 2
    assert "another plan (unit_tokens: 6, now 9)" in capsys.readouterr().err
    assert main(["record", "tiny-text", str(tmp_path / "no"), "--out", str(tmp_path / "q")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    assert el.RoutingStore(tmp_path / "r").plan["rows"] == "ids"


def test_record_with_a_runner(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.txt").write_text("And God said")
    record = ["record", "tiny-text", str(tmp_path / "c.txt"), "--out", str(tmp_path / "r")]
    monkeypatch.delenv("RANK", raising=False)
    assert main([*record, "--runner", "torchrun"]) == 2
    assert "start the script with torchrun" in capsys.readouterr().err
    assert main([*record, "--workers", "2"]) == 2
    assert "workers and gpus_per_worker are of runner='ray'" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*record, "--runner", "torchrun"]) == 0


def test_record_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSONL beside its pictures, with the built-in model that sees; against the model itself."""
    (tmp_path / "seen").mkdir()
    Image.new("RGB", (56, 84), "red").save(tmp_path / "seen/red.png")
    lines = [
        {"text": "what is this?", "images": ["seen/red.png"], "domain": "seen"},
        {"text": "nothing to see here", "domain": "read"},
    ]
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("\n".join(map(json.dumps, lines)))
    record = ["record", "tiny-vl", str(corpus), "--rows", "ids", "--out", str(tmp_path / "r")]
    assert main(record) == 0
    assert "vision bank" in capsys.readouterr().out
    store = el.RoutingStore(tmp_path / "r")
    lab = el.load("tiny-vl")
    trace = lab.run("what is this?", images=[tmp_path / "seen/red.png"], keep="routing").trace
    n_vision = int((trace.tokens["bank"] == "vision").sum())
    assert store.statistics("vision").n_tokens == n_vision > 0
    n_text = len(trace) - n_vision + len(lab.run(lines[1]["text"], keep="routing").trace)
    assert store.statistics("text").n_tokens == n_text
    assert set(store.sql("select distinct content from tokens")["content"]) >= {"text", "image"}
    lines[0]["images"] = ["seen/blue.png"]
    corpus.write_text("\n".join(map(json.dumps, lines)))
    assert main([*record[:-1], str(tmp_path / "q")]) == 2
    said = capsys.readouterr().err
    assert "c.jsonl, line 1 cannot be read" in said and "seen/blue.png: no such file" in said


def test_without_a_command_there_is_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "usage: ernie-lab" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"ernie-lab {el.__version__}\n"


@pytest.mark.parametrize(
    "command", [["run", "no-such-model", "a"], ["demo"], ["record", "no-such-model", "c.jsonl"]]
)
def test_a_file_is_no_out(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before a model is looked for."""
    (tmp_path / "c.txt").write_text("mine")
    main([*command, "--out", str(tmp_path / "c.txt")])
    assert "c.txt is a file; name a folder" in capsys.readouterr().err
    assert (tmp_path / "c.txt").read_text() == "mine"


def test_a_report_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "report.html").write_text("mine")
    assert main(["run", "no-such-model", "And", "--out", str(tmp_path)]) == 2
    assert "report.html exists already; choose another --out" in capsys.readouterr().err


def test_keep_with_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "tiny-text", "And", "--keep"]
    assert main([*run, "routing, blocks.[1,2].attn.pattern", "--out", str(tmp_path / "a")]) == 0
    trace = el.Trace.load(tmp_path / "a" / "trace")
    assert "blocks.2.attn.pattern" in trace.sites and "blocks.3.moe.expert_ids" in trace.sites
    assert (tmp_path / "a" / "report.html").exists()
    capsys.readouterr()
    assert main([*run, "attention", "--out", str(tmp_path / "b")]) == 0
    assert "this was kept: attention; add --keep routing" in capsys.readouterr().out


def test_a_closed_pipe_is_no_crash() -> None:
    command = [sys.executable, "-m", "ernie_lab", "info", "tiny-text", "--sites"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
