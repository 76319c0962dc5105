"""Writing a model as a checkpoint folder that this package and others open alike."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from safetensors.torch import save_file
from torch import Tensor, nn

from ernie_lab.checkpoint.config import ModelConfig, TextConfig
from ernie_lab.checkpoint.config_json import CONFIG_NAME, Style, write_config
from ernie_lab.checkpoint.errors import CheckpointError
from ernie_lab.checkpoint.layout import Layout
from ernie_lab.checkpoint.names import LAYOUTS, VL_LAYOUTS, stays_float32
from ernie_lab.checkpoint.on_disk import is_streamed
from ernie_lab.checkpoint.packing import held_bytes
from ernie_lab.checkpoint.reader import INDEX_NAME, WEIGHTS_NAME
from ernie_lab.checkpoint.slices import sliced_parameters

# transformers opens only files that say which framework wrote them.
_METADATA = {"format": "pt"}

LayoutName: TypeAlias = Literal["released", "transformers-released", "transformers"]


def save_model(
    model: nn.Module,
    config: ModelConfig,
    folder: str | Path,
    *,
    layout: LayoutName = "released",
    max_shard_bytes: int = 5_000_000_000,
) -> Path:
    """Write `config.json` and the weights, in their present dtype, to a new folder.

    Everything is written to a folder beside it first and moved at the end, so an interrupted
    save leaves nothing. A tensor larger than `max_shard_bytes` gets a shard of its own.

    Args:
        layout: of a text model `"released"` or `"transformers"` (experts stacked), both with
            the same config.json, and transformers opens both. Of a vision-language model:
            `"released"`, tensors and config.json as Baidu's, which transformers 5 does not
            open, because it does not know that config; `"transformers-released"`, what its own
            `save_pretrained` writes by default, the released tensors but for the tower's
            prefix, with its own config.json; `"transformers"`, tensors as it holds them.

    Raises:
        ValueError: no such layout for this kind of model.
        FileExistsError: the folder exists and is not empty.
        ConfigError: the config cannot be said in the fields of that layout.
        CheckpointError: a model without weights, quantised, streamed, over several ranks, or of
            several dtypes.
    """
    table = LAYOUTS if isinstance(config, TextConfig) else VL_LAYOUTS
    if layout not in table:
        raise ValueError(f"layout={layout!r} must be one of {', '.join(table)} for this model")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} exists and is not empty; name a new folder or remove it")
    if (scheme := held_bytes(model).scheme) is not None:
        raise CheckpointError(
            f"the model is quantised ({scheme}) and is not saved: a checkpoint would hold the "
            "dequantised weights as if they were the original ones. Keep the checkpoint it was "
            "loaded from, and load that with the same quantize="
        )
    if is_streamed(model):
        raise CheckpointError(
            "the model is streamed from disk and is not saved: its checkpoint is there already. To "
            "write it in another layout or dtype, load it without placement='stream'"
        )
    if sliced_parameters(model):
        raise CheckpointError(
            "the model is over several ranks and is not saved: this one holds a part of it. Its "
            "checkpoint is there already; to write it in another layout or dtype, load it without "
            "placement="
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CheckpointError("the model is on the meta device: there are no weights to save")
    style: Style = "released" if layout == "released" else "transformers"
    fields = write_config(config, _dtype_name(model), style)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        (draft / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        _write_weights(_stored(model, table[layout]), draft, max_shard_bytes)
        draft.replace(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return target


def _dtype_name(model: nn.Module) -> str:
    """The dtype of the weights, fp32 gates aside."""
    dtypes = {p.dtype for name, p in model.named_parameters() if not stays_float32(name)}
    if len(dtypes) != 1:
        raise CheckpointError(
            f"the model mixes the dtypes {sorted(map(str, dtypes))}; cast it to one before saving"
        )
    return str(dtypes.pop()).removeprefix("torch.")


def _stored(model: nn.Module, layout: Layout) -> list[tuple[str, Tensor]]:
    """Each tensor under its key: views of the parameters, copies only of what is assembled."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return [(key, stored.assembled()) for key, stored in layout.stored(parameters).items()]


def _write_weights(
    stored: Sequence[tuple[str, Tensor]], folder: Path, max_shard_bytes: int
) -> None:
    shards = list(_shards(stored, max_shard_bytes))
    if len(shards) == 1:
        _write_shard(shards[0], folder / WEIGHTS_NAME)
        return
    stem = WEIGHTS_NAME.removesuffix(".safetensors")
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(shard, folder / name)
        weight_map |= dict.fromkeys((key for key, _ in shard), name)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for _, tensor in stored)},
        "weight_map": weight_map,
    }
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(
    stored: Sequence[tuple[str, Tensor]], max_bytes: int
) -> Iterator[list[tuple[str, Tensor]]]:
    """Cut the tensors, in their order, into runs of at most `max_bytes`."""
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for key, tensor in stored:
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size = [], 0
        shard.append((key, tensor))
        size += tensor.nbytes
    yield shard


def _write_shard(shard: list[tuple[str, Tensor]], path: Path) -> None:
    # A contiguous view on the CPU is passed as it is; safetensors takes nothing else.
    tensors = {key: tensor.cpu().contiguous() for key, tensor in shard}
    save_file(tensors, path, metadata=_METADATA)
