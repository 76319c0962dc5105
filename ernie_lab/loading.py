"""`load`: from a name to a `Lab`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from ernie_lab.checkpoint import (
    ConfigError,
    Located,
    ModelUnavailable,
    Reader,
    TextConfig,
    VLConfig,
    detect,
    fill,
    locate,
    read_config_file,
    require_memory,
)
from ernie_lab.checkpoint.config_json import CONFIG_NAME
from ernie_lab.checkpoint.hub import locate_config
from ernie_lab.checkpoint.load import Devices
from ernie_lab.checkpoint.quantise import Quantisation, Scheme
from ernie_lab.inference.defaults import read_defaults
from ernie_lab.inputs import load_tokenizer, read_preprocessor
from ernie_lab.inputs.visual_layout import PositionRule
from ernie_lab.lab import Lab
from ernie_lab.model.compiled import CompilerMissing, compile_decode
from ernie_lab.model.graphed import graph_decode
from ernie_lab.model.kinds import build
from ernie_lab.model.quantised import quantise
from ernie_lab.organisms.builtin import BUILTIN, builtin_path, unknown_name
from ernie_lab.parallel.auto import local_rooms, plan_layers
from ernie_lab.parallel.over_ranks import open_over_ranks, serve_if_not_first
from ernie_lab.parallel.placement import read_placement, require_fitting
from ernie_lab.parallel.stream import open_streamed

DTYPES = ("float32", "bfloat16", "float16", "float64")


def load(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    quantize: Scheme | None = None,
    quantize_also: Sequence[str] = (),
    revision: str | None = None,
    ignore: Sequence[str] = (),
    positions: PositionRule = "reference",
    placement: str | None = None,
    compile: bool = False,
    progress: bool = True,
) -> Lab:
    """Open a model.

    Args:
        source: `"tiny-text"` or `"tiny-vl"` (ship in the package), a folder, or a hub id such as
            `"baidu/ERNIE-4.5-21B-A3B-PT"`.
        device: where the weights go; the first GPU if there is one, else the CPU.
        dtype: of weights and activations. If absent the checkpoint's own: what config.json
            names, else what most of its bytes are stored in; float32 for built-in models, whose
            figures are given in it. Routers stay float32 at any dtype.
        quantize: `"nf4"` (4.5 bits a weight; extra `quant`) or `"int8"`: hold the matrices of
            attention, MLPs and experts in few bits, packed one by one as they are read. They
            multiply as what the bits stand for, in `dtype`. Routers, norms, embeddings and the
            unembedding stay as they are. Such a model is for recording and editing: gradients and
            saving are refused. `lab.report.held` tells the bytes.
        quantize_also: `"vision_tower"`, `"resampler"`, which stay as they are unless named.
        revision: branch, tag or commit on the hub; the commit is recorded with every result.
        ignore: names of config fields unknown to this package that you have checked to change
            nothing in the maths. Known fields at unsupported values stay refused.
        positions: of text after pictures. `"transformers"` follows its rule, which differs from
            the reference's for clips that are longer than wide.
        placement: for models larger than one device. `"auto"`: whole layers over the GPUs of this
            machine and its memory, as much as fits on each in turn. The same sites, edits and
            results; the lab prints which layer is where. `"stream"`: the blocks stay on disk and
            two of them are in memory at a time, so every pass reads them all: for recording many
            tokens at once with a model that fits nowhere. A generated token costs a pass.
            Gradients, quantising, changing and saving such a model are refused. `"ep:N"`: experts
            over N ranks, which are started here: processes of this machine, or actors where Ray is
            connected, or what torchrun started (then the script goes on for rank 0 alone). Results
            are those of one process, bit for bit; gradients and quantising are refused.
            `"ep:N+tp"`: heads of attention too, where N divides the key/value heads.
        compile: decode through torch.compile: about twice as fast on a CPU, after some seconds
            of compilation at the first token of each number of sequences (up to 8). Recording
            sees the same sites; layers with an edit go the ordinary way. Sums
            are taken in another order, so values differ by rounding, and in bf16 near ties of
            routers may turn out otherwise. Without a compiler it warns and decodes as ever. On a
            GPU whole steps are replayed as a CUDA graph, whose first replay is checked; this has
            not been run on one yet.
        progress: show a bar while reading.

    Raises:
        ValueError: a source, device, dtype or rule of positions that cannot be; a damaged
            generation_config.json.
        BuiltinError: a built-in model whose files are not those that were shipped.
        ModelUnavailable: not found, gated, offline, no room on disk.
        ConfigError: a config that this package cannot honour exactly.
        CheckpointError: tensors missing, left over, damaged, or with NaN.
        NotEnoughMemory: with the estimate, before anything is read.
        ImportError: `quantize="nf4"` without bitsandbytes.
    """
    # What needs no model is settled before one is looked for, and perhaps downloaded.
    placed = read_placement(placement)
    if compile and (placement or quantize):
        other = f"placement={placement!r}" if placement else f"quantize={quantize!r}"
        raise ValueError(
            f"compile=True does not go with {other}: what is compiled reads plain weights on one "
            "device. Leave one of them out"
        )
    if placed is not None:
        require_fitting(placed, device, quantize)
        if placed.kind == "ep":
            serve_if_not_first(placed.n_ranks)
    where = _device(device)
    given = _dtype(dtype)
    if given is None and dtype is not None:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    how = Quantisation.of(quantize, quantize_also)
    if positions not in get_args(PositionRule):
        raise ValueError(f'positions={positions!r} must be "reference" or "transformers"')
    located = locate_source(source, revision)
    config = read_config_file(located.folder, ignore)
    if positions != "reference" and isinstance(config, TextConfig):
        raise ValueError(f"positions={positions!r} is about pictures; this model reads text alone")
    preprocessor = None
    if isinstance(config, VLConfig):
        preprocessor = read_preprocessor(located.folder, config.vision.patch_size)
    defaults = read_defaults(located.folder, config.decoder.ids.eos)
    is_builtin = source in BUILTIN
    reader = Reader.open(located.folder)
    kind = given or (torch.float32 if is_builtin else _own_dtype(located.folder, reader))
    layout, shown = detect(reader.tensors.keys()), progress and not is_builtin
    if placed is not None and placed.kind == "stream":
        model, report = open_streamed(
            config, reader, layout, device=where, dtype=kind, progress=shown
        )
    elif placed is not None and placed.kind == "ep":
        model, report = open_over_ranks(
            config, located.folder, placed, device=where, dtype=kind, ignore=ignore, progress=shown
        )
    else:
        devices: Devices = where
        if placed is None:
            require_memory(config, kind, where, quantize=how)
        else:
            devices = plan_layers(config, kind, local_rooms(), how).device_of
        with torch.device("meta"):
            model = build(config) if how is None else quantise(build(config), how)
        report = fill(model, reader, layout, device=devices, dtype=kind, progress=shown)
    if compile:
        try:
            compile_decode(model)
            if where.type == "cuda":
                graph_decode(model)
        except CompilerMissing as error:
            warnings.warn(f"compile=True: {error}. Decoding is not compiled", stacklevel=2)
    return Lab(
        model=model.eval(),
        tokenizer=load_tokenizer(located.folder),
        model_id=located.model_id,
        revision=located.revision,
        defaults=defaults,
        report=report,
        preprocessor=preprocessor,
        positions=positions,
    )


def locate_source(
    source: str | Path, revision: str | None = None, *, config_only: bool = False
) -> Located:
    """The folder of a built-in model, of a folder, or of a model on the hub.

    `config_only` downloads no weights.

    Raises:
        BuiltinError, ModelUnavailable: as `load`.
        ValueError: an empty source, or a revision of a built-in model.
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source={source!r} must be a name or a path, not {type(source).__name__}")
    if isinstance(source, Path):
        return _located(source, revision, config_only)
    if not source.strip():
        raise ValueError(
            f"source={source!r} is empty; give a built-in model ({', '.join(BUILTIN)}), a folder "
            "or a hub id such as 'baidu/ERNIE-4.5-21B-A3B-PT'"
        )
    if source in BUILTIN:
        if revision is not None:
            raise ValueError(f"{source} ships with the package and has no revision; drop revision=")
        return Located(builtin_path(source), source, None)
    try:
        return _located(source, revision, config_only)
    except ModelUnavailable as error:
        if source.startswith((".", "~")) or "/" in source or Path(source).exists():
            raise
        # A bare name was as likely meant for a built-in model as for the hub.
        raise ModelUnavailable(f"{unknown_name(source)}. As a folder or hub id: {error}") from error


def _located(source: str | Path, revision: str | None, config_only: bool) -> Located:
    if config_only:
        return Located(locate_config(source, revision=revision), str(source), revision)
    return locate(source, revision=revision)


def _device(given: str | torch.device | None) -> torch.device:
    """A device of this machine; the first GPU, or the CPU without one, when nothing is given."""
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    available = ["cpu"]
    if torch.accelerator.is_available():
        # `torch.accelerator` knows one kind a machine: cuda, mps, xpu …
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        available += [kind.type]
        available += [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]
    # By name: torch itself takes "cuda:300" for the number 44.
    if not isinstance(given, str | torch.device) or str(given) not in [*available, "cpu:0"]:
        found = ", ".join(f'"{name}"' for name in available)
        raise ValueError(
            f"device={str(given)!r} is not on this machine; available: {found}. Take one of these, "
            f"or leave device out{_why_no_gpu()}"
        )
    return torch.device(given)


def _why_no_gpu() -> str:
    if torch.accelerator.is_available():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f" (this build of torch, {torch.__version__}, has no GPU support)"
    return " (torch finds no GPU: see whether nvidia-smi lists one)"


def _dtype(given: object) -> torch.dtype | None:
    """The floating dtype of that name, or None where it is none of `DTYPES`."""
    name = str(given).removeprefix("torch.")
    return getattr(torch, name) if name in DTYPES else None


def _own_dtype(folder: Path, reader: Reader) -> torch.dtype:
    """What config.json names; where it names none, what most bytes are stored in."""
    path = folder / CONFIG_NAME
    raw = json.loads(path.read_text(encoding="utf-8"))
    for field in ("dtype", "torch_dtype"):
        if raw.get(field) is None:
            continue
        found = _dtype(raw[field])
        if found is None:
            raise ConfigError(
                f"{path}: {field}={raw[field]!r} must be one of {', '.join(DTYPES)}; correct the "
                'file, or choose with load(..., dtype="bfloat16")'
            )
        return found
    return reader.main_dtype
