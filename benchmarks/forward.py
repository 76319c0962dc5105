"""Prefill and decode beside transformers, and what recording costs; CPU, random weights.

    python -m benchmarks.forward

The model of `benchmarks/shapes.py` with the same weights in both. Ratios are medians over pairs
run in turn in one process; below 1 ours is faster. Both are given token ids, a cache, and no mask.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch

from benchmarks.shapes import CPU_SHAPE, Pair, pair
from benchmarks.timing import THREADS, Paired, conditions, paired, store, table, timed
from ernie_lab.checkpoint.memory import count_parameters
from ernie_lab.inference.prefill import bound, decode_step
from ernie_lab.model.cache import KVCache
from ernie_lab.model.compiled import compile_decode
from ernie_lab.sites import Step, Tap, all_sites, idle
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.recorder import Recorder

WIDTH = CPU_SHAPE["hidden_size"]
# Prefills, and returns what decodes.
Started: TypeAlias = Callable[[], Callable[[], None]]


def tokens(n_sequences: int, n_tokens: int, vocab_size: int) -> torch.Tensor:
    return torch.randint(3, vocab_size, (n_sequences, n_tokens))


@torch.no_grad()
def prefill_ours(both: Pair, ids_BS: torch.Tensor, keep: Keep | None = None) -> None:
    tap: Tap = idle
    if keep is not None:
        positions_BS = torch.arange(ids_BS.shape[1]).expand_as(ids_BS)
        step = Step("prefill", 0, positions_BS, torch.ones_like(ids_BS, dtype=torch.bool))
        tap = bound(Recorder(keep), step)
    hidden = both.ours.model.trunk(ids_BS, past_key_values=KVCache(n_layers(both)), tap=tap)
    both.ours.model.unembed(hidden.normed_BSD[:, -1:], tap)
    hidden.commit()


@torch.no_grad()
def prefill_theirs(both: Pair, ids_BS: torch.Tensor, router_logits: bool = False) -> None:
    both.theirs(
        input_ids=ids_BS, use_cache=True, logits_to_keep=1, output_router_logits=router_logits
    )


@torch.no_grad()
def decode_ours(
    both: Pair, ids_BS: torch.Tensor, n_new: int, keep: Keep | None = None
) -> Callable[[], None]:
    """A call that decodes `n_new` tokens after a prefill that is not timed."""
    cache, model = KVCache(n_layers(both)), both.ours.model
    n_sequences, n_past = ids_BS.shape
    recorder = None if keep is None else Recorder(keep)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    first = Step("prefill", 0, torch.arange(n_past).expand_as(ids_BS), mask_BS)
    hidden = model.trunk(
        ids_BS, past_key_values=cache, tap=idle if recorder is None else bound(recorder, first)
    )
    hidden.commit()

    @torch.no_grad()
    def run() -> None:
        next_BS = ids_BS[:, -1:]
        for index in range(1, n_new + 1):
            positions_BS = torch.full((n_sequences, 1), n_past + index - 1)
            tap: Tap = idle
            if recorder is not None:
                step = decode_step(index, positions_BS, mask_BS[:, -1:], banked=False)
                tap = bound(recorder, step)
            hidden = model.trunk(next_BS, None, positions_BS, cache, tap=tap)
            logits_BSV = model.unembed(hidden.normed_BSD, tap)
            hidden.commit()
            next_BS = logits_BSV[:, -1].argmax(-1, keepdim=True)
        if recorder is not None:
            recorder.settle()  # what was put aside is sorted out on the clock

    return run


@torch.no_grad()
def decode_theirs(both: Pair, ids_BS: torch.Tensor, n_new: int) -> Callable[[], None]:
    out = both.theirs(input_ids=ids_BS, use_cache=True, logits_to_keep=1)
    cache, n_past = out.past_key_values, ids_BS.shape[1]

    @torch.no_grad()
    def run() -> None:
        next_BS, past = ids_BS[:, -1:], cache
        for index in range(n_new):
            out = both.theirs(
                input_ids=next_BS,
                past_key_values=past,
                use_cache=True,
                position_ids=torch.full((len(next_BS), 1), n_past + index),
            )
            past = out.past_key_values
            next_BS = out.logits[:, -1].argmax(-1, keepdim=True)

    return run


def n_layers(both: Pair) -> int:
    return int(both.ours.config.decoder.n_layers)


def decoding(ours: Started, theirs: Started, n_new: int, pairs: int) -> Paired:
    """Seconds a token. Each pair prefills anew, off the clock: caches grow as they are used."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, pairs):
        for into, start in zip(times, (ours, theirs), strict=True):
            seconds = timed(start()) / n_new
            if number >= 0:
                into.append(seconds)
    return Paired(tuple(times[0]), tuple(times[1]))


def measured(dtype: str, pairs: int, quick: bool) -> list[dict[str, Any]]:
    both = pair(dtype, **({"num_hidden_layers": 2, "moe_num_experts": 8} if quick else {}))
    vocab, keep = both.ours.config.vocab_size, Keep.of("routing", all_sites(both.ours.model))
    n, n_new, n_recorded, many = (16, 2, 2, 2) if quick else (512, 16, 64, max(25, pairs))
    rows = []

    def add(name: str, found: Paired) -> None:
        rows.append({"what": f"{dtype}: {name}"} | found.row())

    def decodes(batch: int) -> Paired:
        new = both, tokens(batch, n // 4, vocab), n_new
        return decoding(partial(decode_ours, *new), partial(decode_theirs, *new), n_new, pairs)

    def decodes_recorded() -> Paired:
        new = both, tokens(1, n // 4, vocab), n_recorded
        recorded, plain = partial(decode_ours, *new, keep), partial(decode_ours, *new)
        return decoding(recorded, plain, n_recorded, many)

    def generates_recorded() -> Paired:
        """As a user calls it, with the trace made."""
        ids = tokens(1, n // 4, vocab)[0].tolist()
        plain = partial(both.ours.generate, ids, max_new_tokens=n_recorded, temperature=0, stop=[])
        return paired(partial(plain, keep="routing"), plain, many)

    for shape in ((1, n), (4, n // 4)):
        ids_BS = tokens(*shape, vocab)
        ours, theirs = partial(prefill_ours, both, ids_BS), partial(prefill_theirs, both, ids_BS)
        add(f"prefill {shape[0]} x {shape[1]}", paired(ours, theirs, pairs))
    ids_BS = tokens(1, n, vocab)
    recorded, plain = partial(prefill_ours, both, ids_BS, keep), partial(prefill_ours, both, ids_BS)
    add("prefill, routing recorded / not", paired(recorded, plain, many))
    logits, none = (
        partial(prefill_theirs, both, ids_BS, True),
        partial(prefill_theirs, both, ids_BS),
    )
    add("prefill of transformers, router logits / not", paired(logits, none, pairs))
    add("decode, batch 1, a token", decodes(1))
    add("decode, batch 8, a token", decodes(8))
    add("decode, routing recorded / not", decodes_recorded())
    add("generate, routing recorded / not", generates_recorded())
    compile_decode(both.ours.model)
    decode_ours(both, tokens(1, 4, vocab), 1)()
    decode_ours(both, tokens(8, 4, vocab), 1)()
    add("compiled decode, batch 1, a token", decodes(1))
    add("compiled decode, batch 8, a token", decodes(8))
    add("compiled decode, routing recorded / not", decodes_recorded())
    add("compiled generate, routing recorded / not", generates_recorded())
    weights_ND = torch.randn(count_parameters(both.ours.config).active // WIDTH, WIDTH)
    streaming = partial(stream, weights_ND.to(both.ours.dtype))
    alone = decode_ours(both, tokens(1, 4, vocab), 1)
    add("reading a token's weights / compiled decode", paired(streaming, alone, pairs))
    return rows


@torch.compile
def stream(weights_ND: torch.Tensor) -> torch.Tensor:
    """The limit of decoding: what a token's weights take to be read, in one product."""
    return (weights_ND * weights_ND[0]).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--pairs", type=int, default=11, help="recording takes 25 in any case")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    under = conditions()
    pairs = 2 if options.quick else options.pairs
    rows = [row for dtype in options.dtype for row in measured(dtype, pairs, options.quick)]
    print(table(rows))
    if not options.quick:
        print(store("forward", {"rows": rows, "conditions": under}))


if __name__ == "__main__":
    main()
