"""`Lab`: the verbs users call. It composes the other modules and holds no state of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ernie_lab.arguments import as_edits, as_processors, as_settings
from ernie_lab.checkpoint import LoadReport, TextConfig
from ernie_lab.checkpoint.config import ModelConfig
from ernie_lab.describe import as_lines, as_table, lab_facts, site_table
from ernie_lab.inference.defaults import GenerationDefaults
from ernie_lab.inference.forward import Forward, LogitsWanted, aligned_labels, forward
from ernie_lab.inference.generate import LogitsProcessor
from ernie_lab.inference.writer import Piece
from ernie_lab.inputs import (
    Batch,
    ImageLike,
    Media,
    Preprocessor,
    Prompt,
    SamplingRule,
    Tokenizer,
    VideoLike,
    is_single,
    prepare_image,
    prepare_video,
)
from ernie_lab.inputs.visual_layout import PositionRule
from ernie_lab.interventions.edits import Edit, EditTap
from ernie_lab.model.kinds import Model
from ernie_lab.parallel import over_ranks
from ernie_lab.preparing import Images, Videos, prepare, preprocessor_of
from ernie_lab.results import Generation, Run
from ernie_lab.session import (
    Call,
    Hooks,
    Stream,
    as_hooks,
    cached_sites,
    pieces,
    real_ids,
    recorder_for,
    run_backwards,
    sizes_of,
    trace_of,
    warn_if_long,
    warn_if_silent,
    with_its_warning,
)
from ernie_lab.sites import Tap, all_sites, idle
from ernie_lab.trace.activation_cache import ActivationCache, CacheTap
from ernie_lab.trace.budget import require_budget
from ernie_lab.trace.keep import Keep, Names

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, slots=True, repr=False)
class Lab:
    """A model with everything around it. Build one with `ernie_lab.load`.

    `model` is the plain `nn.Module`; `tokenizer` is None when the checkpoint has none, and
    prompts are then token ids. A prompt is a string, a list of strings, token ids, or chat
    messages. Calls leave nothing behind on the model, not even when interrupted, so they may
    also run in several threads.
    """

    model: Model
    tokenizer: Tokenizer | None = None
    model_id: str = "in memory"
    revision: str | None = None
    defaults: GenerationDefaults = dataclasses.field(default_factory=GenerationDefaults)
    report: LoadReport | None = None
    preprocessor: Preprocessor | None = None
    positions: PositionRule = "reference"

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def device(self) -> torch.device:
        return self.model.embed_VD.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_VD.dtype

    def sites(self, keep: Names | None = None) -> pd.DataFrame:
        """Every site, or those that `keep=` would take (`"attn.*"`, `"routing"`): path, dims
        (letters of `ernie_lab.dims`), dtype, on demand, meaning."""
        return site_table(all_sites(self.model), keep)

    def prepare(
        self,
        prompt: Prompt,
        chat: Mapping[str, Any] | None = None,
        *,
        images: Images | None = None,
        videos: Videos | None = None,
    ) -> Batch:
        """The batch that `run` would read: ids, mask, positions, pictures; padded on the left."""
        return prepare(self, prompt, chat, images, videos)

    def read_image(
        self, image: ImageLike, *, allow_url: bool = False, source: str | None = None
    ) -> Media:
        """An image as this model reads it; URLs only when they are allowed."""
        return prepare_image(image, self._preprocessor(), allow_url=allow_url, source=source)

    def read_video(
        self,
        video: VideoLike,
        *,
        rule: SamplingRule | None = None,
        fps: float | None = None,
        timestamps: bool | None = None,
        allow_url: bool = False,
        source: str | None = None,
    ) -> Media:
        """A clip as this model reads it.

        `rule` ("baidu" or "transformers") and `fps` choose the frames of a file; for a list of
        frames `fps` says how fast they pass. `timestamps`: draw the time on each frame, as the
        model was trained to see it. See `ernie_lab.inputs.prepare_video`.
        """
        return prepare_video(
            video,
            self._preprocessor(),
            rule=rule,
            fps=fps,
            timestamps=timestamps,
            allow_url=allow_url,
            source=source,
        )

    def _preprocessor(self) -> Preprocessor:
        if isinstance(self.config, TextConfig):
            raise ValueError(f"{self.model_id} reads text alone; it has no use for pictures")
        return preprocessor_of(self.preprocessor, self.config)

    def run(
        self,
        prompt: Prompt,
        *,
        images: Images | None = None,
        videos: Videos | None = None,
        keep: Names | None = (),
        edits: Edit | Iterable[Edit] = (),
        labels: Tensor | Sequence[Sequence[int]] | Sequence[int] | None = None,
        logits: LogitsWanted = "all",
        grad: bool = False,
        max_bytes: int | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Run:
        """One forward pass.

        Args:
            images, videos: paths, bytes, PIL images or arrays (clips also as lists of frames),
                or what `read_image` and `read_video` return. A string with pictures becomes a
                user's message, the pictures before the text; messages may hold theirs as parts.
                Several prompts need one list for each.
            keep: what to record: a group (`"routing"`, `"attention"`, `"residual"`, `"all"`),
                paths, globs, Sites, or `el.keep(...)` with filters. Refused, with the figure,
                when it would exceed `max_bytes` (half of the free memory unless given).
            edits: applied in this order; what is recorded is what really flowed.
            labels: one per token, -100 for those that should not count; the prompt itself if
                absent. Shifted inside.
            logits: `"all"`, `"last"` (of each sequence, no loss) or `"loss"` (losses alone, the
                `[b s v]` never in memory).
            grad: keep the graph, for gradients with respect to sites or weights.
            chat: for messages, and strings with pictures: variables of the chat template
                (`enable_thinking`, `tools`), `template`, `add_generation_prompt`.
        """
        if labels is not None and logits == "last":
            raise ValueError('labels would not be used: logits="last" computes no loss')
        edits = as_edits(edits)
        batch = self.prepare(prompt, chat, images=images, videos=videos)
        warn_if_long(self, int(batch.next_positions_B.max()))
        tap = EditTap.of(edits, all_sites(self.model), idle, self.model)
        recorder = recorder_for(self, keep, batch, tap, grad=grad, max_bytes=max_bytes)
        if logits != "all" and tap.touches("logits"):
            raise ValueError(
                f"logits={logits!r} does not compute all logits, but they are kept or edited; "
                'use logits="all"'
            )
        out = self._forward(batch, tap if edits else tap.then, labels, logits, grad, tap.model)
        tap.warn_if_idle()
        moe = self.config.decoder.moe
        return Run(
            batch=batch,
            logits=out.logits,
            token_loss=out.token_loss,
            counted=out.counted,
            loss=out.loss,
            aux_loss=out.aux_loss,
            aux_loss_transformers=out.aux_loss_transformers,
            aux_loss_coef=moe.aux_loss_coef if moe else 0.0,
            edits=tap.counts,
            _trace=trace_of(self, recorder, batch, real_ids(batch), tap) if recorder else None,
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | Sequence[int] = 0,
        stop: int | str | Sequence[int | str] | None = None,
        images: Images | None = None,
        videos: Videos | None = None,
        keep: Names | None = (),
        edits: Edit | Iterable[Edit] = (),
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
        stream: Callable[[Piece], object] | None = None,
        max_bytes: int | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Continue the prompt, recording prefill and every decode step.

        Args:
            temperature: 0 is greedy. This and the other rules default to the checkpoint's
                `generation_config.json`; the result shows what was in force.
            seed: one for all (counted up along the batch) or one for each sequence. What a
                sequence draws depends on its seed alone, not on the rest of the batch.
            stop: token ids and strings that end a text. None: the checkpoint's; `[]`: nothing,
                not even EOS.
            logits_processors: called in order as `fn(ids, logits) -> logits`, after the
                repetition penalty and before the temperature.
            stream: called with every `Piece` as it comes. For an iterator see `stream`.
            images, videos, keep, edits, max_bytes, chat: as in `run`.
        """
        running = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            images=images,
            videos=videos,
            keep=keep,
            edits=edits,
            logits_processors=logits_processors,
            max_bytes=max_bytes,
            chat=chat,
        )
        if stream is not None and not callable(stream):
            raise TypeError(f"stream={stream!r} must be a function of a Piece; see lab.stream")
        for piece in running:
            if stream is not None:
                stream(piece)
        return running.result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        stop: int | str | Sequence[int | str] | None = None,
        seed: int | Sequence[int] = 0,
        images: Images | None = None,
        videos: Videos | None = None,
        keep: Names | None = (),
        edits: Edit | Iterable[Edit] = (),
        logits_processors: LogitsProcessor | Sequence[LogitsProcessor] = (),
        max_bytes: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> Stream:
        """`generate` as an iterator over pieces; `.result` is the `Generation` at its end."""
        settings = as_settings(
            self.defaults,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
            seed=seed,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        batch = self.prepare(prompt, chat, images=images, videos=videos)
        call = Call(settings, as_edits(edits), as_processors(logits_processors), is_single(prompt))
        return Stream(pieces(self, batch, call, keep, max_bytes))

    def run_with_cache(
        self,
        prompt: Prompt,
        names_filter: str | Sequence[str] | Callable[[str], bool] | None = None,
        *,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        device: str | torch.device | None = None,
        images: Images | None = None,
        videos: Videos | None = None,
        max_bytes: int | None = None,
        chat: Mapping[str, Any] | None = None,
    ) -> tuple[Tensor, ActivationCache]:
        """(logits, cache), as in TransformerLens.

        `names_filter`: a name, names, or a function of the path. None caches every site but
        those per head output (`result`) and per expert neuron and output, which are large:
        name them to have them. `incl_bwd` runs the loss of the prompt backwards and adds the
        gradient of the mean loss by each cached value as `name + "_grad"`; no gradient passes
        top-k.
        """
        batch = self.prepare(prompt, chat, images=images, videos=videos)
        sites = all_sites(self.model)
        chosen = cached_sites(names_filter, sites)
        sizes = sizes_of(self, Keep.of(chosen, sites), batch, grad=incl_bwd)
        require_budget(sizes, max_bytes, device=str(self.device))
        tap = CacheTap(chosen, grad=incl_bwd)
        out = self._forward(batch, tap, None, "all", incl_bwd)
        assert out.logits is not None
        cache = tap.cache(sites, out.loss if incl_bwd else None)
        cache = cache if device is None else cache.to(device)
        return out.logits.detach(), cache.remove_batch_dim() if remove_batch_dim else cache

    def run_with_hooks(
        self,
        prompt: Prompt,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        *,
        return_type: Literal["logits", "loss", "both"] = "logits",
        images: Images | None = None,
        videos: Videos | None = None,
        grad: bool = False,
        chat: Mapping[str, Any] | None = None,
    ) -> Any:
        """Logits, with `fn(x, hook=site)` called at each named site, as in TransformerLens.

        A hook may return a tensor of the same shape, dtype and device, change `x` in place, or
        return None. A name without a site raises, a hook that never fired (of pictures) warns.
        `bwd_hooks` get the gradient of the loss by the site, in a backward pass that leaves none
        on the model; what one returns flows on in its place.
        """
        if return_type not in ("logits", "loss", "both"):
            raise ValueError(f'return_type={return_type!r} must be "logits", "loss" or "both"')
        edits, backward = as_hooks(fwd_hooks, bwd_hooks)
        tap = EditTap.of(edits, all_sites(self.model))
        batch = self.prepare(prompt, chat, images=images, videos=videos)
        out = self._forward(batch, tap, None, "all", grad or bool(backward))
        warn_if_silent(tap)
        out = run_backwards(out, backward, keep_graph=grad)
        return {"logits": out.logits, "loss": out.loss, "both": (out.logits, out.loss)}[return_type]

    def _forward(
        self,
        batch: Batch,
        tap: Tap,
        labels: Tensor | Sequence[Sequence[int]] | Sequence[int] | None,
        logits: LogitsWanted,
        grad: bool,
        model: Model | None = None,
    ) -> Forward:
        vocab = self.config.decoder.vocab_size
        labels_BS = None if labels is None else aligned_labels(labels, batch, vocab)
        out = forward(model or self.model, batch, tap, labels=labels_BS, logits=logits, grad=grad)
        return with_its_warning(out, batch, tap)

    def close(self) -> None:
        """End the processes that hold parts of this model (`placement="ep:N"`), if there are any.

        So do the last reference to the model and the end of Python.
        """
        over_ranks.close(self.model)

    def __repr__(self) -> str:
        return as_lines(lab_facts(self))

    def _repr_html_(self) -> str:
        return as_table(lab_facts(self))
