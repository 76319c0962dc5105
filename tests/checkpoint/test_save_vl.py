"""Vision-language round trips in all three layouts, value for value."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint.vl_cases import (
    VARIANTS,
    config_of,
    load,
    logits,
    reference,
    same_values,
    save_reference,
    under_our_names,
)
from transformers import AutoModelForImageTextToText
from transformers.utils import logging as transformers_logging

from ernie_lab.checkpoint.config_json import write_config
from ernie_lab.checkpoint.names import VL_LAYOUTS, stays_float32
from ernie_lab.checkpoint.reader import Reader
from ernie_lab.checkpoint.save import save_model
from ernie_lab.checkpoint.shapes import parameter_shapes

transformers_logging.disable_progress_bar()


def open_with_transformers(folder: Path) -> Any:
    theirs, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return theirs


@pytest.mark.parametrize("layout", VL_LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_transformers_writes_goes_round(tmp_path: Path, layout: Any, variant: str) -> None:
    """Read by us, written by us, read again by us and by transformers."""
    theirs = reference(variant)
    ours, report = load(save_reference(theirs, tmp_path / "theirs", layout, variant))
    assert report.layout == layout
    assert ours.config == config_of(variant)
    expected = under_our_names(theirs)
    assert same_values(ours, expected)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    assert parameter_shapes(ours.config) == shapes
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-5, rtol=1e-5)

    folder = save_model(ours, ours.config, tmp_path / "ours", layout=layout)
    stored, given = (Reader.open(path).tensors for path in (folder, tmp_path / "theirs"))
    assert {k: t.shape for k, t in stored.items()} == {k: t.shape for k, t in given.items()}
    again, report = load(folder)
    assert (report.layout, again.config) == (layout, ours.config)
    assert same_values(again, expected)
    if layout == "released":
        # Baidu's config needs Baidu's code. With a native one transformers opens the same tensors.
        native = write_config(ours.config, style="transformers")
        (folder / "config.json").write_text(json.dumps(native))
    opened = open_with_transformers(folder)
    assert same_values(ours, under_our_names(opened))
    # Not `equal`: tensors mapped from a file are aligned otherwise, and products round otherwise.
    torch.testing.assert_close(logits(opened), logits(theirs), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("layout", VL_LAYOUTS)
def test_in_shards(tmp_path: Path, layout: Any) -> None:
    theirs = reference()
    theirs.save_pretrained(
        tmp_path / "theirs",
        save_original_format=layout != "transformers",
        max_shard_size="30KB",
    )
    ours, _ = load(tmp_path / "theirs")
    folder = save_model(ours, ours.config, tmp_path / "m", layout=layout, max_shard_bytes=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert same_values(load(folder)[0], under_our_names(theirs))


@pytest.mark.parametrize("layout", VL_LAYOUTS)
def test_bfloat16_keeps_float32_gates(tmp_path: Path, layout: Any) -> None:
    save_reference(reference(), tmp_path / "theirs", layout, "shared, tied")
    ours, _ = load(tmp_path / "theirs", torch.bfloat16)
    folder = save_model(ours, ours.config, tmp_path / "m", layout=layout)
    kinds = {key: info.dtype for key, info in Reader.open(folder).tensors.items()}
    gates = {key for key in kinds if "moe_statics" in key or ".gate.weight" in key}
    assert len(gates) == (8 if layout == "transformers" else 6)
    assert all(kinds[key] == ("F32" if key in gates else "BF16") for key in kinds)
    raw = json.loads((folder / "config.json").read_text())
    assert raw.get("dtype", raw.get("torch_dtype")) == "bfloat16"
    again, _ = load(folder, torch.bfloat16)
    assert same_values(again, dict(ours.named_parameters()))
    for name, parameter in again.named_parameters():
        assert parameter.dtype == (torch.float32 if stays_float32(name) else torch.bfloat16)
    if layout != "released":
        assert open_with_transformers(folder).dtype == torch.bfloat16


def test_a_layout_of_another_kind(tmp_path: Path) -> None:
    theirs = save_reference(reference(), tmp_path / "theirs", "released", "shared, tied")
    ours, _ = load(theirs)
    unknown: Any = "paddle"
    with pytest.raises(ValueError, match=r"'paddle' must be one of released, transformers-rel"):
        save_model(ours, ours.config, tmp_path / "m", layout=unknown)
    with pytest.raises(ValueError, match=r"'transformers-released' must be one of released, tran"):
        save_model(ours, ours.config.text, tmp_path / "m", layout="transformers-released")
