"""Routing that another engine recorded, in the same store: vLLM's and SGLang's routed experts.

They tell which experts each token went to, faster than any recording here, and nothing else: no
logits, no probabilities, no weights, no margins. What needs these refuses. Their kernels may take
near ties otherwise, and some return nonsense with correct text (vLLM issue 44116: all zeros), so
every array passes gates first, and a few documents are run again here where a `Lab` is given.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.corpus.agreement import agreement
from ernie_lab.corpus.folder import CorpusError, Folder, write
from ernie_lab.corpus.record import Recorded, Wanted, columns_of, commit_unit
from ernie_lab.corpus.rows import TokenRows
from ernie_lab.corpus.statistics import Rows, Shape, Statistics, bucket_of
from ernie_lab.corpus.store import REFERENCE, RoutingStore
from ernie_lab.corpus.units import Unit, Window
from ernie_lab.lab import Lab

_COUNTED = ("counts", "coactivation")


@dataclass(frozen=True, slots=True, eq=False)
class RoutedDocument:
    """One sequence as an engine routed it.

    Args:
        expert_ids: `[token layer k]`, whole numbers. vLLM's `prompt_routed_experts` followed by
            its `routed_experts` (np.concatenate), or SGLang's after `decode_sglang`. The layers
            are the model's mixture layers, or all of its layers, dense ones as zeros.
        token_ids: of the sequence. One more than `expert_ids` has tokens is allowed: the engines
            do not route the last token that they write.
        start: the position of the first token, where the engine left out a cached beginning.
    """

    expert_ids: NDArray[Any]
    token_ids: Sequence[int]
    domain: str = ""
    start: int = 0


def decode_sglang(data: str | bytes, n_layers: int, k: int) -> NDArray[np.int32]:
    """SGLang's `routed_experts`, base64 of int32 `[token layer k]`, as an array."""
    flat = np.frombuffer(base64.b64decode(data), dtype="<i4")
    if len(flat) == 0 or len(flat) % (n_layers * k):
        raise CorpusError(
            f"{len(flat)} ids are no whole number of tokens with n_layers={n_layers} x k={k}"
        )
    return flat.reshape(-1, n_layers, k)


def ingest_routed_experts(
    documents: Iterable[RoutedDocument],
    folder: str | PathLike[str],
    *,
    model: Lab | TextConfig,
    backend: str,
    model_id: str = "",
    layers: Sequence[int] | None = None,
    unit_tokens: int = 100_000,
    rows: Literal["ids"] | None = "ids",
    reference: int = 4,
    least_agreement: float = 0.9,
) -> RoutingStore:
    """Write what an engine returned as a recording: counts, co-activation and, if wanted, rows.

    Begun again after an interrupt it writes the same units again, which costs little.

    Args:
        model: with a `Lab`, the first `reference` documents are run again and compared, see
            `RoutingStore.reference`; a config alone says what the numbers must be.
        backend: the engine, its version and its mixture kernel, kept in the plan:
            "vllm 0.21, triton".
        model_id: needed beside a config.
        layers: true numbers of the layers of the arrays, if these are neither the mixture layers
            nor all.
        least_agreement: of the tokens whose margin is above the layer's median, the share whose
            set of experts must be the same here, in every layer. Near ties may fall otherwise, so
            the rest is reported alone.

    Raises:
        CorpusError: an array that cannot be this model's routing, naming the document: its shape,
            ids out of range, an expert twice for one token, all zeros, not as long as its tokens,
            dense layers that are not zero; or too little agreement. Units that were committed
            before stay.
    """
    if not backend.strip():
        raise ValueError("backend='' must name the engine, its version and its mixture kernel")
    gates = _Gates.of(model, layers)
    known = model.model_id if isinstance(model, Lab) else model_id
    if not known:
        raise ValueError("model_id= must name the model where only its config is given")
    waiting = iter(documents)
    first = list(islice(waiting, reference)) if isinstance(model, Lab) else []
    there = Folder(Path(folder).expanduser())
    there.open(
        {
            "model": known,
            "revision": model.revision if isinstance(model, Lab) else None,
            "layers": list(gates.layers),
            "unit_tokens": unit_tokens,
            "rows": rows,
            "stats": list(_COUNTED),
            "edits": "[]",
            "ingested": backend,
        }
    )
    there.sweep()
    if isinstance(model, Lab) and first:
        told = agreement(model, [(d.token_ids, gates.passed(d, n)) for n, d in enumerate(first)])
        _require_agreement(told["large_margin"], least_agreement)
        write(there.path / REFERENCE, json.dumps(told, indent=1).encode())
    last = -1
    for unit, ids in _units(chain(first, waiting), gates, unit_tokens):
        start = time.perf_counter()
        recorded = _counted(unit, ids, gates, rows)
        commit_unit(there, unit, recorded, Wanted(_COUNTED, rows, 0), time.perf_counter() - start)
        last = unit.number
    if last < 0:
        raise CorpusError("no document was given: nothing was ingested")
    if more := [number for number in there.committed() if number > last]:
        raise CorpusError(f"{there.path} holds units {more[:5]} of more documents than these")
    return RoutingStore(there.path)


@dataclass(frozen=True, slots=True)
class _Gates:
    """What the arrays of a model must be."""

    layers: tuple[int, ...]
    n_layers: int
    n_experts: int
    k: int
    vocab_size: int
    given: tuple[int, ...] | None

    @classmethod
    def of(cls, model: Lab | TextConfig, layers: Sequence[int] | None) -> _Gates:
        config = model.config if isinstance(model, Lab) else model
        if not isinstance(config, TextConfig):
            raise CorpusError(
                "a vision-language model has two banks of experts, and the engines do not say of "
                "which one an id is; record it with RecordPlan"
            )
        if config.moe is None:
            raise ValueError("this model is dense: it has no experts, so there is no routing")
        router, moe = config.moe.router, config.moe
        given = None if layers is None else tuple(layers)
        if given is not None and set(given) != set(moe.layers):
            raise ValueError(f"layers={list(given)}: the mixture layers are {list(moe.layers)}")
        return cls(
            tuple(moe.layers), config.n_layers, router.n_experts, router.n_chosen,
            config.vocab_size, given,
        )  # fmt: skip

    def passed(self, document: RoutedDocument, number: int) -> NDArray[np.int64]:
        """`[token, mixture layer, k]` of a document; `CorpusError` says what is wrong with it."""

        def refuse(reason: str) -> CorpusError:
            return CorpusError(f"document {number}: {reason}")

        ids = np.asarray(document.expert_ids)
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or ids.shape[2] != self.k or not len(ids):
            raise refuse(
                f"expert_ids of shape {ids.shape} and type {ids.dtype}, expected whole numbers "
                f"[token layer {self.k}]"
            )
        if (n_ids := len(document.token_ids)) not in (len(ids), len(ids) + 1):
            raise refuse(
                f"{len(ids)} routed tokens for {n_ids} token ids; expected as many, or all but the "
                "last. A prefix cache or a routing buffer that overflowed loses tokens"
            )
        tokens = np.asarray(document.token_ids)
        if not ((tokens >= 0) & (tokens < self.vocab_size)).all():
            raise refuse(f"token ids must be in 0..{self.vocab_size - 1}")
        if not ids.any():
            raise refuse(
                "all ids are zero: kernels that route internally return nothing. Choose another "
                "mixture backend (triton) in the engine"
            )
        ids = self._mixture(ids.astype(np.int64), refuse)
        if ids.min() < 0 or ids.max() >= self.n_experts:
            raise refuse(f"ids from {ids.min()} to {ids.max()}, expected 0..{self.n_experts - 1}")
        ordered = np.sort(ids, axis=-1)
        twice = np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(-1))
        if len(twice):
            token, place = (int(i) for i in twice[0])
            raise refuse(
                f"token {token} has an expert twice in layer {self.layers[place]}: "
                f"{ids[token, place].tolist()} ({len(twice)} such places)"
            )
        return ids

    def _mixture(self, ids: NDArray[np.int64], refuse: Any) -> NDArray[np.int64]:
        n = ids.shape[1]
        if self.given is not None and n == len(self.given):
            return ids[:, [self.given.index(layer) for layer in self.layers]]
        if self.given is None and n == len(self.layers):
            return ids
        if self.given is None and n == self.n_layers:
            dense = [layer for layer in range(n) if layer not in self.layers]
            if ids[:, dense].any():
                raise refuse(f"the dense layers {dense} have ids: the layers are shifted")
            return ids[:, list(self.layers)]
        raise refuse(
            f"{n} layers, expected the {len(self.layers)} mixture layers or all {self.n_layers}; "
            "layers= says which they are"
        )


def _require_agreement(large_margin: dict[str, float], least: float) -> None:
    if poor := {layer: share for layer, share in large_margin.items() if share < least}:
        raise CorpusError(
            "the engine's experts are not those of this model: of the tokens with a margin above "
            f"the median, these shares agree by layer: {poor}; least_agreement={least}. Other "
            "weights, another precision or shifted layers? Nothing was ingested"
        )


def _units(
    documents: Iterable[RoutedDocument], gates: _Gates, unit_tokens: int
) -> Iterator[tuple[Unit, NDArray[np.int64]]]:
    """Units of whole documents, with their ids `[token layer k]`."""
    number, windows, held = 0, list[Window](), list[NDArray[np.int64]]()
    for doc, document in enumerate(documents):
        ids = gates.passed(document, doc)
        tokens = tuple(int(token) for token in document.token_ids[: len(ids)])
        windows.append(Window(doc, document.start, tokens, document.domain))
        held.append(ids)
        if sum(map(len, held)) >= unit_tokens:
            yield Unit(number, tuple(windows)), np.concatenate(held)
            number, windows, held = number + 1, [], []
    if held:
        yield Unit(number, tuple(windows)), np.concatenate(held)


def _counted(unit: Unit, ids: NDArray[np.int64], gates: _Gates, rows: str | None) -> Recorded:
    shape = Shape(gates.layers, gates.n_experts, gates.k, gates.vocab_size, unit.domains)
    columns = columns_of(unit, ["text"] * unit.n_tokens)
    numbers = {domain: n for n, domain in enumerate(unit.domains)}
    of_tokens = Rows(
        torch.tensor([numbers[domain] for domain in columns["domain"]]),
        bucket_of(torch.tensor(columns["pos"])),
        torch.zeros(unit.n_tokens, dtype=torch.int64),
        torch.tensor(columns["token"]),
    )
    statistics = Statistics.empty(shape, _COUNTED)
    by_layer = {layer: ids[:, place] for place, layer in enumerate(gates.layers)}
    for layer, ids_NK in by_layer.items():
        statistics.add_choices(layer, of_tokens, torch.from_numpy(np.ascontiguousarray(ids_NK)))
    kept = None if rows is None else TokenRows(columns, by_layer, {})
    return Recorded({"text": statistics}, kept, ())
