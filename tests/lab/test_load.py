"""`load`: what is refused before anything is read, and the choice of dtype."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import small_model

import ernie_lab as el
from ernie_lab.loading import _device, locate_source
from ernie_lab.organisms.builtin import builtin_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A loadable checkpoint in bfloat16: the built-in model's tokenizer and another vocabulary."""
    model = small_model(vocab_size=2048).to(torch.bfloat16)
    saved = el.save_model(model, model.config, tmp_path / "m")
    for path in builtin_path("tiny-text").glob("tokenizer*"):
        (saved / path.name).write_bytes(path.read_bytes())
    return saved


def rewrite(folder: Path, **fields: Any) -> Path:
    """Change fields of its config.json; None takes a field out."""
    path = folder / "config.json"
    kept = {**json.loads(path.read_text()), **fields}
    path.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))
    return folder


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), "mps"])
def test_a_gpu_that_is_not_there(device: Any) -> None:
    with pytest.raises(ValueError, match=r"is not on this machine; available: \"cpu\"\. .*GPU"):
        el.load("tiny-text", device=device)


@pytest.mark.parametrize("device", ["gpu", "CPU", "meta", "", "cpu:3", "cuda:300", 0, "cuda:x"])
def test_a_device_that_cannot_be(device: Any) -> None:
    with pytest.raises(ValueError, match=rf"device='{device}' is not on this .*available: \"cpu\""):
        el.load("tiny-text", device=device)


def test_device_and_dtype_are_settled_before_the_model_is_looked_for() -> None:
    with pytest.raises(ValueError, match="device='gpu'"):
        el.load("baidu/ERNIE-4.5-21B-A3B-PT", device="gpu")
    with pytest.raises(ValueError, match="dtype='bf16' must be one of float32, bfloat16"):
        el.load("baidu/ERNIE-4.5-21B-A3B-PT", dtype="bf16")


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_by_its_names(device: Any) -> None:
    assert el.load("tiny-text", device=device).device.type == "cpu"


def test_gpus_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cuda", "cuda:1", torch.device("cuda", 0)):
        assert _device(device).type == "cuda"
    with pytest.raises(ValueError) as caught:
        _device("cuda:7")
    assert str(caught.value) == (
        'device=\'cuda:7\' is not on this machine; available: "cpu", "cuda", "cuda:0", '
        '"cuda:1". Take one of these, or leave device out'
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_by_its_names() -> None:
    for device in (None, "cuda", "cuda:0", torch.device("cuda", 0)):
        assert el.load("tiny-text", device=device).device.type == "cuda"
    with pytest.raises(ValueError, match=r'device=.cuda:99.*available: "cpu", "cuda", "cuda:0"'):
        el.load("tiny-text", device="cuda:99")


@pytest.mark.parametrize("name", ["tiny-txt", "tiny_text", "Tiny-Text", "tiny text", "tinytext"])
def test_a_misspelt_name_is_answered_with_the_nearest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(el.ModelUnavailable, match=rf"no built-in model '{name}'; nearest: 'tiny-t"):
        el.load(name)


def test_a_name_like_none_is_answered_with_all_and_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        el.ModelUnavailable,
        match=r"no built-in model 'qwerty'; there are: tiny-text, .*hub cannot be reached",
    ):
        el.load("qwerty")


def test_hub_ids_and_paths_are_not_taken_for_built_in_names() -> None:
    for source in ("baidu/ERNIE-4.5-21B-A3B-PT", "./tiny-txt", Path("tiny-txt")):
        with pytest.raises(el.ModelUnavailable) as caught:
            el.load(source)
        assert "built-in" not in str(caught.value)


def test_a_path_is_a_folder_even_under_a_built_in_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    own = folder.rename(folder.parent / "tiny-text")
    assert locate_source(Path("tiny-text")).folder == own
    assert locate_source("tiny-text").folder == builtin_path("tiny-text")


@pytest.mark.parametrize("source", ["", "  "])
def test_no_source(source: str) -> None:
    with pytest.raises(
        ValueError, match=r"is empty; give a built-in model \(tiny-text, .*\), a folder"
    ):
        el.load(source)


@pytest.mark.parametrize("source", [None, 3, ["tiny-text"]])
def test_a_source_that_is_no_name(source: Any) -> None:
    with pytest.raises(TypeError, match="must be a name or a path, not"):
        el.load(source)


def test_unknown_fields_can_be_passed_over(folder: Path) -> None:
    rewrite(folder, mood="fine")
    with pytest.raises(el.ConfigError, match=r'load\(\.\.\., ignore=\("mood",\)\)'):
        el.load(folder, device="cpu")
    assert el.load(folder, device="cpu", ignore=["mood"], progress=False).config.width == 32


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, torch.bfloat16),
        ({"torch_dtype": None}, torch.bfloat16),  # what the file holds
        ({"torch_dtype": "float32"}, torch.float32),
        ({"torch_dtype": None, "dtype": "float16"}, torch.float16),
    ],
)
def test_the_checkpoints_own_dtype(
    folder: Path, fields: dict[str, Any], expected: torch.dtype
) -> None:
    lab = el.load(rewrite(folder, **fields), device="cpu", progress=False)
    assert lab.model.get_parameter("embed_VD").dtype == expected


@pytest.mark.parametrize("field", ["dtype", "torch_dtype"])
def test_a_dtype_in_the_file_that_cannot_be(folder: Path, field: str) -> None:
    rewrite(folder, **{"torch_dtype": None, field: "auto"})
    with pytest.raises(el.ConfigError, match=rf"config.json: {field}='auto' must be one of .*load"):
        el.load(folder, device="cpu")
    assert el.load(folder, device="cpu", dtype="float32", progress=False)


def test_warnings_of_the_generation_config_point_at_the_caller(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"num_beams": 4}')
    with pytest.warns(UserWarning, match="num_beams=4") as caught:
        el.load(folder, device="cpu", progress=False)
    assert caught[0].filename == __file__
