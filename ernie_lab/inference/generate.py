"""Generation with a key/value cache: prefill once, then one token a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ernie_lab.inference.prefill import bound, decode_step, prefill, prefill_step
from ernie_lab.inference.sampling import Sampling, draw, forbid, penalise_repetition
from ernie_lab.inputs.batch import Batch
from ernie_lab.model.cache import KVCache
from ernie_lab.model.graphed import generation
from ernie_lab.model.kinds import Model
from ernie_lab.sites import Tap, idle

# (ids so far, one list per sequence that is still growing; its logits [b v]) -> logits
LogitsProcessor = Callable[[list[list[int]], Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """Everything that decides what is generated; shown in the result."""

    max_new_tokens: int
    min_new_tokens: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "min_new_tokens"):
            if not isinstance(value := getattr(self, name), int):
                raise TypeError(f"{name}={value!r} must be an integer")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} must be in 0..{self.max_new_tokens}"
            )
        if "" in self.stop_strings:
            raise ValueError("an empty stop string would stop at once; remove it")


@torch.no_grad()
def decode(
    model: Model,
    batch: Batch,
    settings: Settings,
    *,
    tap: Tap = idle,
    processors: Sequence[LogitsProcessor] = (),
    finished: set[int] | None = None,
    prompt_logits: bool = False,
) -> Iterator[dict[int, int]]:
    """Yield, step by step, the new token of every sequence that is still growing.

    A sequence ends with a stop id, at `max_new_tokens`, or when the caller puts its number in
    `finished` (stop strings are the caller's: they need the tokenizer). Of a prompt only the
    last position is unembedded, unless `prompt_logits`. What is fed back is
    what was yielded; the last token of a sequence is never fed, so it has no routing.
    Finished sequences stay in the batch as masked rows. All state is local: an interrupted
    generation leaves nothing behind.
    """
    ended = set() if finished is None else finished
    n = len(batch.input_ids)
    generators = [torch.Generator().manual_seed(seed) for seed in _seeds(settings, n)]
    ids = [batch.input_ids[i][batch.mask[i]].tolist() for i in range(n)]
    mask_BT, padded = batch.mask, not bool(batch.mask.all())
    next_BS, positions_BS = batch.input_ids, batch.positions
    banked = batch.visual is not None

    with generation(model, batch.mask, settings.max_new_tokens) as replayed:
        cache = KVCache(model.config.decoder.n_layers) if replayed is None else replayed.cache
        for index in range(settings.max_new_tokens):
            if index == 0:
                step = prefill_step(batch)
            else:
                step = decode_step(index, positions_BS, mask_BT[:, -1:], banked=banked)
            step_tap = bound(tap, step)
            if index > 0 and replayed is not None and replayed.serves(step_tap):
                logits_BSV = replayed(next_BS, positions_BS, step_tap)
            else:
                if index == 0:
                    hidden = prefill(model, batch, step_tap, cache)
                else:
                    keys_BT = _keys(mask_BT, batch) if padded else None
                    hidden = model.trunk(next_BS, keys_BT, positions_BS, cache, tap=step_tap)
                last_BSD = hidden.normed_BSD if prompt_logits else hidden.normed_BSD[:, -1:]
                logits_BSV = model.unembed(last_BSD, step_tap)
                hidden.commit()
            growing = [i for i in range(n) if i not in ended]
            logits_BV = logits_BSV[growing, -1].float()
            new = _next_tokens(logits_BV, growing, ids, index, settings, processors, generators)
            for sequence, token in new.items():
                ids[sequence].append(token)
                if token in settings.stop_ids or index + 1 == settings.max_new_tokens:
                    ended.add(sequence)
            yield new
            if len(ended) == n:
                return
            alive_B1 = torch.tensor([[i not in ended] for i in range(n)], device=mask_BT.device)
            mask_BT = torch.cat([mask_BT, alive_B1], dim=1)
            next_BS = torch.tensor([[row[-1]] for row in ids], device=next_BS.device)
            after_B = cache.next_position_B
            positions_BS = positions_BS[:, -1:] + 1 if after_B is None else after_B[:, None]


def _keys(mask_BT: Tensor, batch: Batch) -> Tensor:
    """Keys that count: real prompt tokens and everything generated. The rows of a finished
    sequence are read by that sequence alone, so they may count too."""
    keys_BT = torch.ones_like(mask_BT)
    keys_BT[:, : batch.mask.shape[1]] = batch.mask
    return keys_BT


def _next_tokens(
    logits_BV: Tensor,
    growing: list[int],
    ids: list[list[int]],
    index: int,
    settings: Settings,
    processors: Sequence[LogitsProcessor],
    generators: Sequence[torch.Generator],
) -> dict[int, int]:
    seen = [list(ids[i]) for i in growing]
    logits_BV = penalise_repetition(logits_BV, seen, settings.sampling.repetition_penalty)
    if index < settings.min_new_tokens:
        logits_BV = forbid(logits_BV, settings.stop_ids)
    for processor in processors:
        processed_BV = processor(seen, logits_BV)
        shape = tuple(processed_BV.shape) if isinstance(processed_BV, Tensor) else processed_BV
        if shape != tuple(logits_BV.shape):
            raise ValueError(
                f"a logits processor returned {shape}, expected a tensor of shape "
                f"{tuple(logits_BV.shape)}"
            )
        logits_BV = processed_BV
    tokens = draw(logits_BV, settings.sampling, [generators[i] for i in growing])
    return dict(zip(growing, tokens, strict=True))


def _seeds(settings: Settings, n_sequences: int) -> tuple[int, ...]:
    """One seed each: as given, or the single one counted up."""
    if len(settings.seeds) == n_sequences:
        return settings.seeds
    if len(settings.seeds) == 1:
        return tuple(range(settings.seeds[0], settings.seeds[0] + n_sequences))
    raise ValueError(f"{len(settings.seeds)} seeds for {n_sequences} sequences; give 1 or as many")
