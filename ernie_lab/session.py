"""One call of a `Lab`: its recorder, its trace, and generation piece by piece.

Everything here is local to the call, which is why a `Lab` has nothing to reset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from ernie_lab.checkpoint.config import DynamicScaling, ModelConfig
from ernie_lab.checkpoint.packing import quantised_details
from ernie_lab.inference.defaults import GenerationDefaults
from ernie_lab.inference.forward import Forward, LossNotFiniteWarning, not_finite
from ernie_lab.inference.generate import LogitsProcessor, Settings, decode
from ernie_lab.inference.writer import Piece, Writer
from ernie_lab.inputs import Batch, Tokenizer
from ernie_lab.inputs.thinking import Thought, read_thinking, thinking_is_open
from ernie_lab.inputs.visual_layout import PositionRule
from ernie_lab.interventions.edits import Edit, EditChangedNothingWarning, EditTap
from ernie_lab.interventions.functions import BackwardHook, Hook
from ernie_lab.model.kinds import Model
from ernie_lab.model.placed import placement_details
from ernie_lab.model.router import Router
from ernie_lab.model.stack import block_list
from ernie_lab.model.text import TextModel
from ernie_lab.results import Generation
from ernie_lab.sites import Site, Tap, all_sites, filtered, idle, select
from ernie_lab.trace.budget import estimate_bytes, require_budget
from ernie_lab.trace.keep import Keep, Names
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.trace import Trace

# (site, fn(x, hook=site)), as TransformerLens has them.
Hooks: TypeAlias = Sequence[tuple[str | Callable[[str], bool], Callable[..., Tensor | None]]]


class Opened(Protocol):
    """What a call needs to know of the `Lab` it is made on."""

    @property
    def model(self) -> Model: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...
    @property
    def model_id(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def defaults(self) -> GenerationDefaults: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def positions(self) -> PositionRule: ...


@dataclass(frozen=True, slots=True)
class Call:
    """One call of `generate`, with nothing left open. `single`: one prompt, not a batch of one."""

    settings: Settings
    edits: tuple[Edit, ...]
    processors: tuple[LogitsProcessor, ...]
    single: bool


def real_ids(batch: Batch) -> list[list[int]]:
    """The ids of each sequence, without padding."""
    return [ids[mask].tolist() for ids, mask in zip(batch.input_ids, batch.mask, strict=True)]


def cached_sites(
    names: str | Sequence[str] | Callable[[str], bool] | None, sites: Sequence[Site]
) -> tuple[Site, ...]:
    """TransformerLens' `names_filter` on our sites; None leaves out what is large and rare."""
    if callable(names):
        return filtered(names, sites)
    if names is not None:
        return select(names, sites)
    return tuple(site for site in sites if not site.on_demand or site.ragged)


def recorder_for(
    lab: Opened,
    keep: Names | None,
    batch: Batch,
    tap: EditTap,
    *,
    max_new_tokens: int = 0,
    grad: bool = False,
    max_bytes: int | None = None,
) -> Recorder | None:
    """A recorder of what is asked for, if anything is, once its size has been agreed to.

    It records what the edits of `tap` leave, so it also stands behind them.
    """
    if keep is None or (isinstance(keep, list | tuple) and not keep):
        return None
    edited = bool(tap.counts)
    what = Keep.of(keep, all_sites(lab.model), edited=edited)
    chosen = chosen_counts(tap.model) if edited else {}
    sizes = sizes_of(lab, what, batch, max_new_tokens, grad=grad, edited=edited, n_chosen=chosen)
    # With gradients the tensors themselves are held, where the model is.
    require_budget(sizes, max_bytes, device=str(lab.device) if grad else what.devices)
    tap.then = recorder = Recorder(what, grad=grad)
    return recorder


def chosen_counts(model: Model) -> dict[str, int]:
    """How many experts each router chooses, by the path of its mixture."""
    return {
        name.rpartition(".")[0]: part.config.n_chosen
        for name, part in model.named_modules()
        if isinstance(part, Router)
    }


def sizes_of(
    lab: Opened,
    what: Keep,
    batch: Batch,
    max_new_tokens: int = 0,
    *,
    grad: bool = False,
    edited: bool = False,
    n_chosen: Mapping[str, int] | None = None,
) -> dict[str, int]:
    """Bytes of every kept site, an upper bound. An edit may move tokens from bank to bank."""
    visual = batch.visual
    on_vision = None
    if visual is not None and not edited:
        on_vision = visual.layout.bank_BS.sum(1).tolist()
    return estimate_bytes(
        what,
        lab.config,
        batch.lengths,
        max_new_tokens,
        lab.dtype,
        grad,
        grids=[media.grid for media in visual.media] if visual else (),
        n_vision=on_vision,
        n_chosen=n_chosen,
    )


def trace_of(
    lab: Opened,
    recorder: Recorder,
    batch: Batch,
    ids: Sequence[Sequence[int]],
    tap: EditTap,
    seed: int | None = None,
    **details: object,
) -> Trace:
    if batch.visual is not None:
        details["positions"] = lab.positions
    texts = lab.tokenizer and [lab.tokenizer.token_strings(sequence) for sequence in ids]
    return recorder.trace(
        ids,
        sites=all_sites(lab.model),
        texts=texts,
        routers=_routers(lab.config, tap.model),
        edited=tap.by_path.keys(),
        media=batch.visual.media if batch.visual else (),
        provenance=Provenance.now(
            lab.model_id,
            revision=lab.revision,
            config_hash=config_hash(lab),
            dtype=str(lab.dtype).removeprefix("torch."),
            device=str(lab.device),
            seed=seed,
            keep=recorder.keep.description,
            edits=[repr(count.edit) for count in tap.counts],
            **quantised_details(lab.model),
            **placement_details(block_list(lab.model.blocks)),
            **details,
        ),
    )


def config_hash(lab: Opened) -> str:
    """SHA-256 of the config's fields: equal hashes, equal architectures."""
    fields = json.dumps(dataclasses.asdict(lab.config), sort_keys=True)
    return hashlib.sha256(fields.encode()).hexdigest()


def _routers(config: ModelConfig, model: Model) -> Routers | dict[str, Routers] | None:
    """What the trace needs of the routers of the model that ran; by bank in a vision-language
    model."""
    if config.decoder.moe is None:
        return None
    if isinstance(model, TextModel):
        return _of_bank(model.routers())
    return {bank: _of_bank(layers) for bank, layers in model.routers().items()}


def _of_bank(routers: Mapping[int, Router]) -> Routers:
    """An edit may have given some layers another k; the largest is told."""
    configs = [router.config for router in routers.values()]
    n_chosen = max(config.n_chosen for config in configs)
    return Routers(configs[0].n_experts, n_chosen, _biases(routers))


def _biases(routers: Mapping[int, Router]) -> dict[int, Tensor]:
    return {layer: router.correction_bias_E for layer, router in routers.items()}


class Stream(Iterator[Piece]):
    """A generation under way. Iterate over its pieces; `result` runs it to its end."""

    def __init__(self, running: Generator[Piece, None, Generation]) -> None:
        self._running = running
        self._result: Generation | None = None

    def __next__(self) -> Piece:
        try:
            return next(self._running)
        except StopIteration as end:
            # A generator tells its return value once; asked again it has none.
            self._result = self._result or end.value
            raise

    @property
    def result(self) -> Generation:
        for _ in self:
            pass
        if self._result is None:
            raise RuntimeError("this generation was interrupted, so it has no result; start anew")
        return self._result


def pieces(
    lab: Opened,
    batch: Batch,
    call: Call,
    keep: Names | None,
    max_bytes: int | None,
) -> Generator[Piece, None, Generation]:
    """Every new token as it comes; what it returns is the whole."""
    settings, edits = call.settings, call.edits
    if settings.stop_strings and lab.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and this checkpoint has none")
    warn_if_long(lab, int(batch.next_positions_B.max()) + settings.max_new_tokens - 1)
    tap = EditTap.of(edits, all_sites(lab.model), idle, lab.model)
    recorder = recorder_for(
        lab, keep, batch, tap, max_new_tokens=settings.max_new_tokens, max_bytes=max_bytes
    )
    writers = [
        Writer(lab.tokenizer, settings.stop_strings, settings.min_new_tokens) for _ in batch.lengths
    ]
    ended: set[int] = set()
    for new in decode(
        tap.model,
        batch,
        settings,
        tap=tap if edits else recorder or idle,
        processors=call.processors,
        finished=ended,
        prompt_logits=tap.touches("logits"),
    ):
        for sequence, token in new.items():
            text = writers[sequence].push(token)
            if writers[sequence].hit is not None:
                ended.add(sequence)
            if sequence in ended:
                text += writers[sequence].finish()
            yield Piece(sequence, token, text)
    tap.warn_if_idle()
    prompts = real_ids(batch)
    ids = [prompt + writer.tokens for prompt, writer in zip(prompts, writers, strict=True)]
    return Generation(
        prompts=tuple(map(tuple, prompts)),
        tokens=[writer.tokens for writer in writers],
        texts=[writer.text for writer in writers],
        finish=tuple(_reason(writer, settings) for writer in writers),
        settings=settings,
        defaults=lab.defaults.source,
        edits=tap.counts,
        single=call.single,
        thoughts=tuple(
            read_thinking(writer.tokens, lab.tokenizer, opened, text=writer.text)
            for writer, opened in zip(writers, _opened(lab.tokenizer, prompts), strict=True)
        )
        if lab.tokenizer
        else tuple(Thought(None, writer.text) for writer in writers),
        _trace=trace_of(lab, recorder, batch, ids, tap, settings.seeds[0], settings=repr(settings))
        if recorder
        else None,
    )


def _opened(tokenizer: Tokenizer, prompts: Sequence[Sequence[int]]) -> list[bool]:
    """Which prompts end inside of a thought, so that the new text begins as thinking."""
    return [thinking_is_open(prompt, tokenizer) for prompt in prompts]


def _reason(writer: Writer, settings: Settings) -> str:
    if writer.hit is not None:
        return "stop string"
    return "stop" if writer.tokens[-1] in settings.stop_ids else "length"


def warn_if_silent(tap: EditTap) -> None:
    """Say so when a hook was never called. One that changed nothing may have come to look."""
    for count in tap.counts:
        if count.n_fired == 0:
            warnings.warn(f"{count.edit!r} was never called", EditChangedNothingWarning, 3)


def with_its_warning(out: Forward, batch: Batch, tap: Tap) -> Forward:
    """Say if NaN or infinity reached a prediction that counts, and what was edited."""
    if out.counted is None or out.token_loss is None or out.loss is None:
        return out
    bad_BS = out.counted & ~out.token_loss.isfinite()
    if not bool(bad_BS.any()):
        return out
    sequence, column = bad_BS.nonzero()[0].tolist()
    pos = column - (bad_BS.shape[1] - batch.lengths[sequence])
    told = not_finite(int(bad_BS.sum()), int(out.counted.sum()), sequence, pos)
    edits = [repr(count.edit) for count in tap.counts] if isinstance(tap, EditTap) else []
    why = f"edits: {'; '.join(edits)}" if edits else "nothing was edited"
    warnings.warn(
        f'{told}, so loss={out.loss.item():g}; {why}. keep="residual" shows where it begins',
        LossNotFiniteWarning,
        stacklevel=4,
    )
    return out


def as_hooks(forward: Hooks, backward: Hooks) -> tuple[list[Edit], list[BackwardHook]]:
    """All hooks as edits, and those among them that wait for a gradient."""
    backwards = [BackwardHook(where, fn) for where, fn in backward]
    return [*(Hook(where, fn) for where, fn in forward), *backwards], backwards


def run_backwards(out: Forward, hooks: Sequence[BackwardHook], *, keep_graph: bool) -> Forward:
    """Call the hooks in a backward pass of the loss, which ends at their sites.

    Without `keep_graph` the result has no graph any more.
    """
    through = [x for hook in hooks for x in hook.through]
    if through:
        assert out.loss is not None
        torch.autograd.grad(out.loss, through, retain_graph=keep_graph, allow_unused=True)
    if keep_graph or not hooks:
        return out
    parts = {name: getattr(out, name) for name in ("logits", "loss")}
    free = {name: None if x is None else x.detach() for name, x in parts.items()}
    return dataclasses.replace(out, **free)


def warn_if_long(lab: Opened, n_positions: int) -> None:
    """Say so when a text leaves the positions that the model was trained for."""
    rope = lab.config.decoder.rope
    limit, stretches = rope.max_positions, isinstance(rope.scaling, DynamicScaling)
    if n_positions > limit and not stretches:
        warnings.warn(
            f"the text reaches {n_positions} positions; the model was made for {limit}",
            stacklevel=3,
        )
