"""Decode, prefill, recording and long attention of the released shapes on one GPU.

    python -m benchmarks.gpu            # needs a GPU; some 10 minutes, benchmarks/results/gpu.json
    python -m benchmarks.gpu --toy      # the same code, toy models, any machine: does it run?

Weights are random, bf16, made on the device; transformers runs over the very same tensors.
Fractions are of limits measured in the same run: of a copy (bytes read and written) for decode,
which reads the active weights once a token, and of a square bf16 product for prefill. What is
measured comes in order of importance, and the JSON is written after each. Where two ways of ours
are compared, `ours` is the recorded one and `theirs` the other.

**No figure of this script has been measured on a GPU yet.** Toy figures say that it runs, and
nothing else; they are never stored.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

import ernie_lab as el
from benchmarks import gpu_shapes as shapes
from benchmarks.forward import decoding, prefill_theirs
from benchmarks.shapes import Pair
from benchmarks.timing import conditions, paired, store, table, timed
from ernie_lab.inference.generate import Settings, decode
from ernie_lab.inference.prefill import bound, prefill, prefill_step
from ernie_lab.inference.sampling import Sampling
from ernie_lab.inputs.batch import Batch, pad_batch
from ernie_lab.inputs.media import Grid, Media
from ernie_lab.model.cache import KVCache
from ernie_lab.model.compiled import compile_decode
from ernie_lab.model.graphed import graph_decode
from ernie_lab.sites import all_sites, idle
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.recorder import Recorder

NO_GPU = "NO GPU FIGURES: toy models; these times say that the script runs, and nothing else"
LAYER = 1


@dataclass(frozen=True)
class Sizes:
    text: shapes.Shape
    vl: shapes.Shape
    prompt: int  # tokens before a decode
    new: int  # tokens decoded
    prefill: int
    attention: int
    image: tuple[int, int]  # rows and columns of patches
    product: int  # side of the matrices of the measured rate
    copied: int  # bytes of the measured copy
    pairs: int


FULL = Sizes(shapes.TEXT_21B, shapes.VL_28B, 64, 64, 4096, 8192, (64, 64), 8192, 2**32, 9)
TOY = Sizes(shapes.TEXT_TOY, shapes.VL_TOY, 8, 4, 48, 64, (8, 8), 64, 2**16, 1)


@dataclass
class Report:
    """What was found so far; stored after each measurement if a GPU made it."""

    device: torch.device
    toy: bool
    minutes: float
    start: float = field(default_factory=time.monotonic)
    found: dict[str, Any] = field(default_factory=dict)

    def measure(self, name: str, how: Callable[[], dict[str, Any]]) -> None:
        if time.monotonic() - self.start > 60 * self.minutes:
            self.found[name] = {"not_measured": f"{self.minutes} minutes were over"}
        else:
            self.found[name] = self._measured(how)
        print(table([{"what": name, **self.found[name]}]), flush=True)
        if self.device.type == "cuda" and not self.toy:
            store("gpu", self.found)

    def _measured(self, how: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            row = how()
        except Exception as error:  # what comes after it is still worth its device time
            if self.toy:
                raise
            return {"failed": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
        peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None
        return row | {"peak_gib": None if peak is None else round(peak, 2)}


def median_of(call: Callable[[], object], times: int) -> float:
    """Seconds, after one uncounted call."""
    timed(call)
    return float(np.median([timed(call) for _ in range(times)]))


def limits(sizes: Sizes, device: torch.device) -> dict[str, Any]:
    side = torch.randn(sizes.product, sizes.product, device=device).bfloat16()
    product = median_of(lambda: side @ side, 9)
    source = torch.zeros(sizes.copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = median_of(lambda: target.copy_(source), 9)
    return {
        "product_tflops": 2 * sizes.product**3 / product / 1e12,
        "copy_gb_per_s": 2 * sizes.copied / copy / 1e9,
    }


def lab_of(report: Report, shape: shapes.Shape, kind: str) -> tuple[el.Lab, shapes.Shape]:
    """A model, as deep as the free memory allows, and decoding as `load(compile=True)` has it."""
    gc.collect()  # the model before it, whose compiled blocks refer to each other
    n_layers = shape["num_hidden_layers"]
    if report.device.type == "cuda":
        free = 0.75 * torch.cuda.mem_get_info()[0]
        while n_layers > 2 and shapes.model_bytes(shape, n_layers) > free:
            n_layers -= 1
    if n_layers < shape["num_hidden_layers"]:
        print(f"free memory holds {n_layers} of {shape['num_hidden_layers']} layers")
    shape = {**shape, "num_hidden_layers": n_layers}
    lab = shapes.random_lab(shape, kind, report.device)
    if report.device.type == "cuda":
        compile_decode(lab.model)
        graph_decode(lab.model)
    else:
        graph_decode(lab.model, lambda run: run)  # the step is called again, not replayed
    return lab, shape


def random_ids(lab: el.Lab, n: int) -> list[int]:
    return torch.randint(3, min(400, lab.config.decoder.vocab_size), (n,)).tolist()


def text_batch(lab: el.Lab, n: int) -> Batch:
    return pad_batch([random_ids(lab, n)], pad_id=0, device=lab.device)


def image_batch(lab: el.Lab, n: int, grid_hw: tuple[int, int]) -> Batch:
    """A picture and `n` tokens of text."""
    grid, ids, vision = Grid(1, *grid_hw), lab.config.ids, lab.config.vision
    patches_PQ = torch.randn(grid.n_patches, 3 * vision.patch_size**2)
    pixels = np.zeros((1, *(vision.patch_size * side for side in grid_hw), 3), np.uint8)
    media = Media("image", patches_PQ, grid, pixels, pixels.shape[1:3])
    picture = [ids.image_start, *[ids.image] * grid.n_tokens, ids.image_end]
    tokens = [*picture, *random_ids(lab, n)]
    return pad_batch([tokens], pad_id=0, device=lab.device, media=[[media]], ids=ids)


def routing(lab: el.Lab, device: str = "cpu") -> Keep:
    return Keep.of(el.keep("routing", device=device), all_sites(lab.model))


def started(lab: el.Lab, batch: Batch, n_new: int, keep: Keep | None) -> Callable[[], None]:
    """Prefilled, and what decodes the rest and sorts out what was recorded."""
    settings = Settings(max_new_tokens=n_new + 1, sampling=Sampling(temperature=0))
    recorder = None if keep is None else Recorder(keep)
    steps = decode(lab.model, batch, settings, tap=recorder or idle)
    next(steps)

    def run() -> None:
        deque(steps, maxlen=0)
        if recorder is not None:
            recorder.settle()

    return run


@torch.no_grad()
def prefilled(lab: el.Lab, batch: Batch, keep: Keep | None = None) -> None:
    tap = bound(idle if keep is None else Recorder(keep), prefill_step(batch))
    hidden = prefill(lab.model, batch, tap, KVCache(lab.config.decoder.n_layers))
    lab.model.unembed(hidden.normed_BSD[:, -1:], tap)
    hidden.commit()


def decode_recorded(report: Report, lab: el.Lab, batch: Batch, sizes: Sizes) -> dict[str, Any]:
    """Batch 1, a token: routing recorded (values kept on the device) beside not recorded."""
    new = lab, batch, sizes.new
    keep = routing(lab, str(report.device))
    found = decoding(
        partial(started, *new, keep), partial(started, *new, None), sizes.new, sizes.pairs
    )
    seconds = float(np.median(found.ours))
    limit = shapes.active(lab).n_bytes / (1e9 * report.found["limits"]["copy_gb_per_s"])
    return {
        "tokens_per_s": round(1 / seconds, 1),
        "of_bandwidth_limit": round(limit / seconds, 3),
        "active_gb": round(shapes.active(lab).n_bytes / 1e9, 3),
        **found.row(),
    }


def decode_to_host(lab: el.Lab, batch: Batch, sizes: Sizes) -> dict[str, Any]:
    """The same with what is recorded copied to the CPU, 64 steps at a time: the default."""
    new = lab, batch, sizes.new
    ways = partial(started, *new, routing(lab)), partial(started, *new, None)
    return decoding(*ways, sizes.new, sizes.pairs).row()


def generate_beside(both: Pair, batch: Batch, sizes: Sizes) -> dict[str, Any]:
    """Prompt and new tokens, routing recorded; transformers' `generate`, eager."""
    keep = routing(both.ours, str(both.ours.device))
    n_new = sizes.new

    def theirs() -> None:
        both.theirs.generate(
            batch.input_ids,
            attention_mask=batch.mask.long(),
            min_new_tokens=n_new,
            max_new_tokens=n_new,
            do_sample=False,
        )

    def ours() -> None:
        started(both.ours, batch, n_new - 1, keep)()

    return paired(ours, theirs, max(1, sizes.pairs // 3), warm=1).row()


def prefill_beside(report: Report, both: Pair, sizes: Sizes) -> dict[str, Any]:
    lab, n = both.ours, sizes.prefill
    batch = text_batch(lab, n)
    theirs = partial(prefill_theirs, both, batch.input_ids)
    found = paired(partial(prefilled, lab, batch), theirs, sizes.pairs)
    config, active = lab.config.decoder, shapes.active(lab)
    heads = config.attention.n_heads * config.attention.head_dim
    # Two operations a weight and token, without the unembedding; and q k^T and p v, causal.
    flops = 2.0 * (active.parameters - active.table) * n + 2.0 * n**2 * heads * config.n_layers
    rate = 1e12 * report.found["limits"]["product_tflops"]
    return {
        "tokens_per_s": round(n / float(np.median(found.ours))),
        "of_product_rate": round(flops / rate / float(np.median(found.ours)), 3),
        **found.row(),
    }


def prefill_recorded(lab: el.Lab, batch: Batch, sizes: Sizes) -> dict[str, Any]:
    keep = routing(lab, str(lab.device))
    return paired(
        partial(prefilled, lab, batch, keep), partial(prefilled, lab, batch), sizes.pairs
    ).row()


def attention_sums(lab: el.Lab, sizes: Sizes) -> dict[str, Any]:
    ids = random_ids(lab, sizes.attention)
    keep = el.keep("attn.q_rot", "attn.k_rot", layers=[LAYER], device=str(lab.device))
    trace = lab.run(ids, keep=keep, logits="last").trace
    seconds = median_of(lambda: el.analysis.attention_summary(trace, LAYER), min(3, sizes.pairs))
    return {"tokens": sizes.attention, "reductions_ms": round(1000 * seconds, 2)}


def attention_map(lab: el.Lab, sizes: Sizes) -> dict[str, Any]:
    """A forward that records one layer's map of all heads, beside one that does not."""
    ids = random_ids(lab, sizes.attention)
    keep = el.keep("attn.pattern", layers=[LAYER], device=str(lab.device))
    full, plain = (
        median_of(partial(lab.run, ids, keep=what, logits="last"), min(3, sizes.pairs))
        for what in (keep, ())
    )
    return {
        "tokens": sizes.attention,
        "forward_with_map_ms": round(1000 * full, 2),
        "forward_ms": round(1000 * plain, 2),
    }


def measure_text(report: Report, sizes: Sizes) -> None:
    lab, shape = lab_of(report, sizes.text, "ernie4_5_moe")
    report.found["text_layers"] = shape["num_hidden_layers"]
    both = Pair(lab, shapes.in_transformers(lab, shape))
    prompt = text_batch(lab, sizes.prompt)
    measure = report.measure
    measure("text_decode_recorded", lambda: decode_recorded(report, lab, prompt, sizes))
    measure("text_generate", lambda: generate_beside(both, prompt, sizes))
    measure("text_prefill", lambda: prefill_beside(report, both, sizes))
    long = text_batch(lab, sizes.prefill)
    measure("text_prefill_recorded", lambda: prefill_recorded(lab, long, sizes))
    measure("attention_sums", lambda: attention_sums(lab, sizes))
    measure("attention_map", lambda: attention_map(lab, sizes))
    measure("text_decode_recorded_to_cpu", lambda: decode_to_host(lab, prompt, sizes))


def measure_vl(report: Report, sizes: Sizes) -> None:
    """Without transformers beside it."""
    lab, shape = lab_of(report, sizes.vl, "ernie4_5_moe_vl")
    report.found["vl_layers"] = shape["num_hidden_layers"]
    seen = image_batch(lab, sizes.prompt, sizes.image)
    measure = report.measure
    measure("vl_decode_recorded", lambda: decode_recorded(report, lab, seen, sizes))
    measure("vl_prefill_recorded", lambda: prefill_recorded(lab, seen, sizes))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="toy sizes, on any machine")
    parser.add_argument("--minutes", type=float, default=11, help="begin nothing after these")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.toy:
        raise SystemExit("this machine has no GPU that torch finds; --toy shows that it runs")
    report = Report(device, options.toy, options.minutes)
    sizes = TOY if options.toy else FULL
    torch.manual_seed(0)
    if options.toy:
        print(NO_GPU)
    report.found |= {"figures_of": NO_GPU if options.toy else "GPU", "conditions": conditions()}
    report.measure("limits", lambda: limits(sizes, device))
    measure_text(report, sizes)
    measure_vl(report, sizes)
    if options.toy:
        print(NO_GPU)
    return report.found


if __name__ == "__main__":
    main()
