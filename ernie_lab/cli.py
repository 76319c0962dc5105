"""The command line: `ernie-lab demo | info | run | record`."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from ernie_lab import __version__
from ernie_lab.checkpoint import (
    CheckpointError,
    ConfigError,
    ModelUnavailable,
    NotEnoughMemory,
    VLConfig,
    read_config_file,
)
from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.checkpoint.config_json import CONFIG_NAME
from ernie_lab.checkpoint.quantise import Scheme
from ernie_lab.corpus.folder import CorpusError
from ernie_lab.lab import Lab
from ernie_lab.loading import DTYPES
from ernie_lab.organisms.builtin import BUILTIN, BuiltinError
from ernie_lab.sites import SiteError
from ernie_lab.trace.budget import TraceTooLarge
from ernie_lab.trace.folders import require_folder

if TYPE_CHECKING:
    import torch

# Tokens of a sequence in a memory plan, unless said.
_CONTEXT = 4096
_COMMA = r",(?![^\[\]]*\])"
# Errors that say what to do; anything else is a bug and shows its traceback.
EXPECTED = (
    BuiltinError,
    CheckpointError,
    ConfigError,
    CorpusError,
    ModelUnavailable,
    NotEnoughMemory,
    SiteError,
    TraceTooLarge,
    FileExistsError,
    ImportError,
    PermissionError,
    ValueError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except BrokenPipeError:
        return _without_reader()
    except EXPECTED as error:
        print(f"ernie-lab: {error}", file=sys.stderr)
        return 2
    return 0


def _without_reader() -> int:
    """The status of a command whose pipe was closed, as by `head`: what SIGPIPE would give it."""
    try:
        print(flush=True)
    except BrokenPipeError:
        # What is still unwritten goes nowhere, or Python complains about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    raise  # some other pipe, such as a worker's


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ernie-lab", description=__doc__)
    parser.add_argument("--version", action="version", version=f"ernie-lab {__version__}")
    parser.set_defaults(command=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="command")

    demo = commands.add_parser("demo", help="look at the built-in model's routing")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for the report")
    demo.set_defaults(command=_demo)

    info = commands.add_parser("info", help="size, memory and sites of a model; loads no weights")
    info.add_argument("source", help="built-in name, folder or hub id")
    info.add_argument("--revision", help="branch, tag or commit on the hub")
    _add_ignore(info)
    info.add_argument("--sites", action="store_true", help="list every site")
    plan = info.add_argument_group("memory plan: which placement fits which devices")
    plan.add_argument("--devices", help="80GB, 8x80GB, 2x24GiB, or groups: 4x80GB,2x24GB")
    plan.add_argument("--context", type=int, help=f"tokens of a sequence (default: {_CONTEXT})")
    plan.add_argument("--batch", type=int, help="sequences at once (default: 1)")
    plan.add_argument(
        "--dtype",
        help=f"of weights and activations: {', '.join(DTYPES)} (default: the checkpoint's)",
    )
    plan.add_argument(
        "--quantize",
        choices=get_args(Scheme),
        action="append",
        help="also in so few bits; may be repeated",
    )
    info.set_defaults(command=_info)

    run = commands.add_parser("run", help="run or continue a prompt and save what was recorded")
    run.add_argument("source", help="built-in name, folder or hub id")
    run.add_argument("prompt")
    run.add_argument("--image", action="append", help="a picture; may be repeated")
    run.add_argument("--video", action="append", help="a clip; may be repeated")
    run.add_argument(
        "--keep",
        action="append",
        help="groups, paths or globs, with commas, or repeated (default: routing)",
    )
    run.add_argument("--out", type=Path, required=True, help="folder for trace and report")
    run.add_argument("--max-new-tokens", type=int, default=0, help="0: one forward pass")
    run.add_argument("--temperature", type=float, help="0 is greedy")
    run.add_argument("--seed", type=int, default=0)
    _add_loading(run)
    run.set_defaults(command=_run)

    record = commands.add_parser(
        "record", help="record the routing of a corpus; run again, it goes on where it stopped"
    )
    record.add_argument("source", help="built-in name, folder or hub id")
    record.add_argument(
        "corpus",
        type=Path,
        help=".txt (one document), .jsonl (one a line), .parquet (one a row), or a folder of these",
    )
    record.add_argument("--out", type=Path, required=True, help="folder of the recording")
    record.add_argument("--rows", choices=["ids", "ids+weights"], help="also a row per token")
    record.add_argument("--unit-tokens", type=int, default=100_000, help="committed as one")
    record.add_argument("--max-length", type=int, default=4096, help="longer texts are cut")
    record.add_argument("--batch-tokens", type=int, default=16_384, help="of one forward")
    record.add_argument(
        "--runner",
        choices=["local", "ray", "torchrun"],
        default="local",
        help="ray: several workers, each with the model; torchrun: started by torchrun",
    )
    record.add_argument("--workers", type=int, default=1, help="of ray")
    record.add_argument("--gpus-per-worker", type=float, default=0, help="of ray")
    _add_loading(record)
    record.set_defaults(command=_record)
    return parser


def _add_loading(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1 …")
    command.add_argument("--dtype", help=", ".join(DTYPES))
    command.add_argument("--quantize", choices=get_args(Scheme), help="weights in few bits")
    command.add_argument("--placement", help="auto: over all devices; stream: from disk; ep:N")
    command.add_argument("--revision", help="branch, tag or commit on the hub")
    _add_ignore(command)


def _add_ignore(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="FIELD",
        help="unknown field of config.json that you have checked to change nothing; may be "
        "repeated",
    )


def _demo(options: argparse.Namespace) -> None:
    from ernie_lab.demo import demo

    demo(options.out)


def _info(options: argparse.Namespace) -> None:
    from ernie_lab.describe import as_lines, config_facts
    from ernie_lab.loading import locate_source

    devices = _devices(options)
    located = locate_source(options.source, options.revision, config_only=True)
    config = read_config_file(located.folder, options.ignore)
    # First, so that a slip gets its message and nothing else.
    plan = list(_memory_plan(options, located.folder, config, devices)) if devices else []
    kind = "vision-language" if isinstance(config, VLConfig) else "text"
    facts = {"model": f"{options.source}, {kind}"} | config_facts(config)
    print(as_lines(facts, width=14))
    _print_sites(config, every=options.sites)
    if plan:
        print("", *plan, sep="\n")


def _devices(options: argparse.Namespace) -> tuple[int, ...]:
    """None given, none; refuses what is about them without them."""
    from ernie_lab.parallel.devices import read_devices

    if options.devices is not None:
        return read_devices(options.devices)
    for name in ("context", "batch", "dtype", "quantize"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} is about a memory plan: say --devices too, such as 8x80GB")
    return ()


def _memory_plan(
    options: argparse.Namespace, folder: Path, config: ModelConfig, devices: tuple[int, ...]
) -> Iterator[str]:
    from ernie_lab.parallel.memory import Asked
    from ernie_lab.parallel.memory_table import plan_lines

    longest = config.decoder.rope.max_positions
    asked = Asked(
        _planned_dtype(options, folder),
        min(_CONTEXT, longest) if options.context is None else options.context,
        1 if options.batch is None else options.batch,
    )
    schemes = dict.fromkeys(options.quantize or ())
    return plan_lines(config, options.source, devices, asked, tuple(schemes))


def _planned_dtype(options: argparse.Namespace, folder: Path) -> torch.dtype:
    """As `load` would choose it, without weights to look at: then bfloat16."""
    import torch

    fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    own = fields.get("dtype") or fields.get("torch_dtype") or "bfloat16"
    name = options.dtype or ("float32" if options.source in BUILTIN else own)
    if name.removeprefix("torch.") not in DTYPES:
        raise ValueError(f"dtype={name!r} must be one of {', '.join(DTYPES)}")
    found: torch.dtype = getattr(torch, name.removeprefix("torch."))
    return found


def _print_sites(config: ModelConfig, every: bool) -> None:
    import torch

    from ernie_lab.model.kinds import build
    from ernie_lab.sites import all_sites

    with torch.device("meta"):
        sites = all_sites(build(config))
    if not every:
        print(f"{'sites':14}{len(sites)}; list them with --sites")
        return
    print()
    for site in sites:
        print(f"{site.path:40}{site.dims:10}{site.dtype:9}{site.meaning}")


def _load(options: argparse.Namespace) -> Lab:
    from ernie_lab.loading import load

    return load(options.source, **_load_options(options))


def _load_options(options: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "dtype", "quantize", "placement", "revision", "ignore")
    return {name: getattr(options, name) for name in names}


def _record(options: argparse.Namespace) -> None:
    from ernie_lab.corpus import RecordPlan
    from ernie_lab.corpus.documents import SUFFIXES

    if Path(options.source).suffix in SUFFIXES:
        raise ValueError(f"{options.source} is a corpus; the model comes first, then the corpus")
    plan = RecordPlan(
        model=options.source,
        corpus=options.corpus,
        folder=options.out,
        unit_tokens=options.unit_tokens,
        max_length=options.max_length,
        batch_tokens=options.batch_tokens,
        rows=options.rows,
        load_options=_load_options(options),
    )
    how = {"workers": options.workers, "gpus_per_worker": options.gpus_per_worker}
    print(plan.run(runner=options.runner, **how))


def _run(options: argparse.Namespace) -> None:
    from ernie_lab.plots.trace_report import Reported, reportable, routing_report

    require_folder(options.out)
    for place in (options.out / "trace", options.out / "report.html"):
        if place.exists():
            raise FileExistsError(f"{place} exists already; choose another --out")
    if options.max_new_tokens < 0:
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens} must be 0 (one forward pass) or more"
        )
    keep, generated = _keep(options), None
    lab = _load(options)
    if options.max_new_tokens:
        gen = lab.generate(
            options.prompt,
            images=options.image,
            videos=options.video,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
            keep=keep,
        )
        trace, generated = gen.trace, gen.texts[0]
        print(generated)
    else:
        run = lab.run(options.prompt, images=options.image, videos=options.video, keep=keep)
        trace = run.trace
        print(run)
    print(f"trace:  {trace.save(options.out / 'trace')}")
    if reportable(trace):
        report = routing_report(
            options.out / "report.html",
            f"Expert routing in {lab.model_id}",
            {"Prompt": Reported(lab.model_id, trace, generated)},
        )
        print(f"report: {report}")
    elif trace.banks:
        print(
            "report: none, for it shows the whole routing, and this was kept: "
            f"{', '.join(keep)}; add --keep routing"
        )
    else:
        print("report: none, for it shows routing, and this model has no experts")


def _keep(options: argparse.Namespace) -> list[str]:
    """Names as they were given, one by one; a comma in the brackets of a glob cuts nothing."""
    given = [n.strip() for one in options.keep or ["routing"] for n in re.split(_COMMA, one)]
    if not all(given):
        raise ValueError(f"--keep {','.join(options.keep)!r} has an empty name in it")
    return given
