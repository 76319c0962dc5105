"""Who was chosen, as plain arrays: what the analyses of a routing start from.

A routing is anything with `expert_ids` of dims (layer, token, slot): a `Trace` of a text model,
`trace.routing("text")` and `trace.routing("vision")` of a vision-language one. Its token
coordinates say which tokens are of one document, here: of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.token_groups import (
    Integers,
    documents_of,
    layers_of,
    n_tokens_of,
    routing_of,
)


@dataclass(frozen=True, slots=True, eq=False)
class Choices:
    """`ids_LNK` of the tokens that were routed in every layer; `rows_N` says which these are.

    `document_N` numbers the document of each token from 0.
    """

    ids_LNK: Integers
    layers: tuple[int, ...]
    n_experts: int
    document_N: Integers
    rows_N: Integers

    @property
    def n_documents(self) -> int:
        return int(self.document_N.max()) + 1

    @property
    def k(self) -> int:
        return int(self.ids_LNK.shape[2])

    @property
    def first(self) -> Integers:
        """`[l n]`, the choice of highest selection score; where a correction bias spoke, it need
        not have the highest weight."""
        return self.ids_LNK[:, :, 0]

    def chosen(self, place: int) -> NDArray[np.float32]:
        """`[n e]`, 1 where a token chose an expert, in the layer that stands at `place`."""
        chosen_NE = np.zeros((self.ids_LNK.shape[1], self.n_experts), np.float32)
        np.put_along_axis(chosen_NE, self.ids_LNK[place], 1, axis=1)
        return chosen_NE

    def part(self, keep_N: NDArray[np.bool_]) -> Choices:
        """Some of the tokens; their documents are numbered anew."""
        return Choices(
            self.ids_LNK[:, keep_N],
            self.layers,
            self.n_experts,
            _numbered(self.document_N[keep_N]),
            self.rows_N[keep_N],
        )

    def halves(self, seed: int) -> tuple[Choices, Choices]:
        """One random half of the documents to pick on, the other to report on."""
        if self.n_documents < 2:
            raise ValueError(
                "what is picked as the largest of many must be picked on some documents and "
                "reported on others, and here is one sequence: run several texts"
            )
        order = np.random.default_rng(seed).permutation(self.n_documents)
        first_N = np.isin(self.document_N, order[: self.n_documents // 2])
        return self.part(first_N), self.part(~first_N)


def choices(routing: Any, *, n_experts: int | None = None) -> Choices:
    """Read a routing's `expert_ids`; `n_experts` where it cannot be known from what was kept."""
    ids = ids_of(routing)
    ids_LNK = np.asarray(ids.values)
    routed_N = np.isfinite(ids_LNK).all((0, 2)) & (ids_LNK >= 0).all((0, 2))
    if not routed_N.any():
        raise ValueError(f"no token of this routing is routed, of {ids_LNK.shape[1]}: take others")
    ids_LNK = ids_LNK[:, routed_N].astype(np.int64)
    n_experts = n_experts_of(routing) if n_experts is None else n_experts
    if ids_LNK.max() >= n_experts:
        raise ValueError(f"expert id {ids_LNK.max()} with n_experts={n_experts}: ids start at 0")
    rows_N = np.flatnonzero(routed_N)
    document_N = documents_of(ids, None)[0][rows_N]
    return Choices(ids_LNK, tuple(layers_of(ids)), n_experts, _numbered(document_N), rows_N)


def ids_of(routing: Any) -> Any:
    """The array of chosen experts, with true layer numbers."""
    ids = getattr(routing_of(routing), "expert_ids", routing)
    dims = getattr(ids, "dims", None)
    if dims != ("layer", "token", "slot") or "layer" not in ids.coords:
        found = f"dims {dims}" if dims else f"a {type(routing).__name__}"
        raise TypeError(
            f"a routing has expert_ids with dims (layer, token, slot); this is {found}. Pass a "
            "trace, or trace.routing('text') and trace.routing('vision') of a model with two banks"
        )
    n_tokens_of(ids)
    return ids


def place_of(layer: int, layers: Sequence[int]) -> int:
    """Where a true layer number stands among those of the routing."""
    if layer not in layers:
        raise ValueError(f"layer {layer} has no routing here; layers {', '.join(map(str, layers))}")
    return list(layers).index(layer)


def _numbered(labels_N: NDArray[Any]) -> Integers:
    """0, 1, … in the place of the labels, in their sorted order."""
    return np.asarray(np.unique(labels_N, return_inverse=True)[1], np.int64)
