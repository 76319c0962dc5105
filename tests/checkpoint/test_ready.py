"""Whether a model can be opened here, told without a network."""

from pathlib import Path

import pytest
import torch

from ernie_lab.checkpoint.ready import readiness
from ernie_lab.organisms.builtin import builtin_path

MODEL = "baidu/ERNIE-4.5-21B-A3B-PT"


def test_a_folder_that_fits_is_ready():
    found = readiness(builtin_path("tiny-text"), device="cpu")
    assert found.ok and found.folder is not None
    assert found.needed is not None and 5e6 < found.needed < 2e7
    assert repr(found).endswith("ready") and "not ready" not in found._repr_html_()


def test_a_quantised_model_needs_less() -> None:
    folder = builtin_path("tiny-text")
    plain = readiness(folder, device="cpu", dtype=torch.bfloat16)
    nf4 = readiness(folder, device="cpu", dtype=torch.bfloat16, quantize="nf4")
    assert nf4.needed is not None and plain.needed is not None
    assert nf4.needed < 0.5 * plain.needed
    assert "cpu, bfloat16, nf4 weights" in repr(nf4)


def test_what_does_not_fit_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ernie_lab.checkpoint.ready.free_bytes", lambda _device: 1000)
    found = readiness(builtin_path("tiny-text"), device="cpu", dtype=torch.float32)
    assert not found.ok and "MB are needed on cpu, 1.0 kB are free" in repr(found)


def test_what_is_not_in_the_cache_is_not_downloaded(tmp_path: Path):
    found = readiness(MODEL, device="cpu", cache_dir=tmp_path)
    assert found.folder is None and found.needed is None and not found.ok
    assert f"{MODEL} is not in the hub's cache" in found.obstacles[0]
    assert "not ready: " in found._repr_html_() and not list(tmp_path.iterdir())


def cached(folder: Path, *names: str) -> Path:
    """A cache that holds these files of one commit."""
    commit = "0" * 40
    here = folder / f"models--{MODEL.replace('/', '--')}"
    (here / "refs").mkdir(parents=True)
    (here / "refs" / "main").write_text(commit)
    for name in names:
        target = here / "snapshots" / commit / name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = builtin_path("tiny-text") / name
        target.write_bytes(source.read_bytes() if source.exists() else b"")
    return folder


def test_a_config_alone_is_not_a_model(tmp_path: Path):
    found = readiness(MODEL, device="cpu", cache_dir=cached(tmp_path, "config.json"))
    assert not found.ok
    assert any(words in repr(found) for words in ("incomplete", "no weights yet"))


def test_a_missing_part_of_the_weights_is_told(tmp_path: Path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((builtin_path("tiny-text") / "config.json").read_bytes())
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'
    )
    found = readiness(folder, device="cpu")
    assert not found.ok and "model-00001-of-00002.safetensors" in repr(found)


@pytest.mark.parametrize("source", ["no such/model at all", Path("nowhere")])
def test_what_is_no_model_says_so(source: str | Path, tmp_path: Path):
    found = readiness(source, device="cpu", cache_dir=tmp_path)
    assert not found.ok and found.obstacles[0]
