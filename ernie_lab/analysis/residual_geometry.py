"""Where text and pictures lie in the residual stream, layer by layer.

Three numbers, each beside what it would be if the labels meant nothing:

- the norm of a state, by kind of token;
- the cosine between the centroids of two kinds, cos(mean of A, mean of B);
- the share of the states' variance that lies between the centroids of all kinds,

      eta^2 = sum_g n_g ||c_g - c||^2 / sum_i ||x_i - c||^2,

  0 if all kinds have the same centroid, 1 if every state is its kind's centroid (the R^2 of a
  permutational analysis of variance, Anderson 2001).

Pictures enter the stream by another way than words, so kinds are apart in an untrained model, too:
what training did to their geometry is seen beside the same numbers of an untrained twin only.
The stream's norm and centroid are ruled by few large coordinates where a model has them, and by the
first token, on which attention rests; leave it out, t.sel(position=range(1, n)), and say so.
Two kinds that lie apart may still be alike inside: see `cka`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from ernie_lab.analysis.information import null_p95
from ernie_lab.analysis.nulls import Permuted, constant_within, permuted
from ernie_lab.interventions.bootstrap import draws_of, estimate, interval

if TYPE_CHECKING:
    import xarray as xr

Floats: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ResidualGeometry:
    """Norms and centroids of the states by kind of token.

    `norms`, by (layer, kind): `n_tokens`, `mean` with `low` and `high`, `median`.
    `cosines`, by (layer, first, second): `cosine` of the centroids with `low` and `high`, and
    `null_p05`, below which 5 % of the draws with shuffled labels lie.
    `between`, by layer: `share` of variance with `low` and `high`, `null_p95`.

    Intervals: 95 %, bootstrap over documents. Labels are shuffled within documents; those that are
    constant in every document (its domain) are dealt out to other documents, all tokens together.
    """

    norms: pd.DataFrame
    cosines: pd.DataFrame
    between: pd.DataFrame
    n_documents: int

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self.norms.index.unique("kind"))

    def __repr__(self) -> str:
        share = self.between["share"]
        return (
            f"Residual stream of {', '.join(self.kinds)} in {len(share)} layers, "
            f"{self.n_documents} documents: {share.min():.0%} to {share.max():.0%} of the variance "
            "lies between kinds; see .norms, .cosines, .between"
        )


def residual_geometry(
    states: xr.DataArray,
    labels: str | Sequence[str] = "modality",
    *,
    n_draws: int = 1000,
    n_permuted: int = 100,
    seed: int = 0,
) -> ResidualGeometry:
    """Norms, centroid cosines and the share of variance between kinds, in every layer.

    `states` is (layer, token, width), such as `t["resid_post"]`. `labels` is a coordinate of its
    tokens, or one label for each: `t.tokens["content"]` (in "modality", delimiters are text).

    Every token counts the same. An interval is NaN where a single document has such tokens, and
    an upward bias of eta^2, (kinds - 1) / (n - 1) for unlike labels, is in value and null alike.
    """
    layers, label_N, document_N = _read(states, labels)
    kinds = list(dict.fromkeys(label_N.tolist()))
    if len(kinds) < 2:
        raise ValueError(f"all {len(label_N)} tokens are {kinds[0]!r}: nothing to compare")
    kind_N = np.array([kinds.index(label) for label in label_N])
    n_documents = int(document_N.max()) + 1
    drawn_PQ = draws_of(n_documents, n_draws, seed)
    deals = _deals(kind_N, document_N, n_permuted, seed)
    norms, cosines, between = {}, {}, {}
    for layer, values in zip(layers, states.values, strict=True):
        x_ND = np.asarray(values, dtype=np.float64)
        norm_N = np.linalg.norm(x_ND, axis=1)
        for number, kind in enumerate(kinds):
            mine_N = kind_N == number
            mean = estimate(norm_N[mine_N], document_N[mine_N], drawn_PQ)
            norms[layer, kind] = {
                "n_tokens": mean.n, "mean": mean.value, "low": mean.low, "high": mean.high,
                "median": float(np.median(norm_N[mine_N])),
            }  # fmt: skip
        sums = _Sums.of(x_ND, kind_N, document_N, len(kinds))
        drawn, shuffled = sums.drawn(drawn_PQ), _shuffled(x_ND, deals, len(kinds))
        whole = sums.drawn(np.ones((1, n_documents)))
        for a, b in combinations(range(len(kinds)), 2):
            low, high = interval(_cosine(drawn, a, b), n_documents)
            cosines[layer, kinds[a], kinds[b]] = {
                "cosine": float(_cosine(whole, a, b)[0]), "low": low, "high": high,
                "null_p05": -null_p95(-_cosine(shuffled, a, b)),
            }  # fmt: skip
        low, high = interval(_share(drawn), n_documents)
        between[layer] = {
            "share": float(_share(whole)[0]), "low": low, "high": high,
            "null_p95": null_p95(_share(shuffled)),
        }  # fmt: skip
    return ResidualGeometry(
        _framed(norms, ["layer", "kind"]).astype({"n_tokens": int}),
        _framed(cosines, ["layer", "first", "second"]),
        pd.DataFrame.from_dict(between, orient="index").rename_axis("layer"),
        n_documents,
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Centroids:
    """Of each draw: sums of the states by kind `[p g d]`, tokens `[p g]`, sum of squares `[p]`."""

    sums_PGD: Floats
    counts_PG: Floats
    squares_P: Floats


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """The same by document: all that a draw of whole documents needs."""

    sums_QGD: Floats
    counts_QG: Floats
    squares_Q: Floats

    @classmethod
    def of(
        cls,
        x_ND: Floats,
        kind_N: NDArray[np.int64],
        document_N: NDArray[np.int64],
        n_kinds: int,
    ) -> _Sums:
        n_documents = int(document_N.max()) + 1
        cell_N, ones_N = document_N * n_kinds + kind_N, np.ones(len(kind_N))
        shape = (n_documents * n_kinds, len(kind_N))
        member = sparse.csr_matrix((ones_N, (cell_N, np.arange(len(kind_N)))), shape=shape)
        return cls(
            np.asarray(member @ x_ND).reshape(n_documents, n_kinds, -1),
            np.asarray(member @ ones_N).reshape(n_documents, n_kinds),
            np.asarray(member @ (x_ND**2).sum(1)).reshape(n_documents, n_kinds).sum(1),
        )

    def drawn(self, drawn_PQ: NDArray[Any]) -> _Centroids:
        weights = drawn_PQ.astype(float)
        return _Centroids(
            np.tensordot(weights, self.sums_QGD, axes=1),
            weights @ self.counts_QG,
            weights @ self.squares_Q,
        )


def _shuffled(x_ND: Floats, deals_PN: NDArray[np.int64], n_kinds: int) -> _Centroids:
    """The kinds dealt out anew in every row `[p n]`."""
    numbers_G1 = np.arange(n_kinds)[:, None]
    sums = np.stack([(deal_N == numbers_G1).astype(float) @ x_ND for deal_N in deals_PN])
    counts = np.stack([(deal_N == numbers_G1).sum(1) for deal_N in deals_PN])
    return _Centroids(sums, counts.astype(float), np.full(len(sums), (x_ND**2).sum()))


def _cosine(of: _Centroids, a: int, b: int) -> Floats:
    """cos(c_a, c_b) `[p]`; NaN in a draw without one of the kinds."""
    one, two = of.sums_PGD[:, a], of.sums_PGD[:, b]
    norm = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    return _divided((one * two).sum(1), norm)


def _share(of: _Centroids) -> Floats:
    """eta^2 `[p]`, from sums: between = sum_g ||S_g||^2 / n_g - ||S||^2 / n."""
    counts = np.maximum(of.counts_PG, 1)
    whole = (of.sums_PGD.sum(1) ** 2).sum(-1) / of.counts_PG.sum(1)
    between = ((of.sums_PGD**2).sum(-1) / counts).sum(1) - whole
    spread = of.squares_P - whole
    return _divided(between, spread)


def _divided(a_P: Floats, b_P: Floats) -> Floats:
    return np.divide(a_P, b_P, where=b_P > 0, out=np.full_like(a_P, np.nan))


def _deals(
    kind_N: NDArray[np.int64], document_N: NDArray[np.int64], n: int, seed: int
) -> NDArray[np.int64]:
    """The kinds of the tokens, dealt out anew `[p n]`.

    Within documents; where every document has one kind, that would move nothing, and documents
    get each other's.
    """
    rng = np.random.default_rng(seed)
    over = constant_within(kind_N, document_N)
    how: Permuted = "documents" if over else "tokens of a document"
    return np.stack([permuted(kind_N, document_N, how, rng) for _ in range(n)])


def _read(
    states: xr.DataArray, labels: str | Sequence[str]
) -> tuple[list[int], NDArray[Any], NDArray[np.int64]]:
    if tuple(states.dims)[:2] != ("layer", "token") or states.ndim != 3:
        raise ValueError(
            f"states have dims {tuple(states.dims)}, expected (layer, token, width), such as "
            't["resid_post"]'
        )
    if isinstance(labels, str):
        if labels not in states.coords:
            raise ValueError(
                f"labels={labels!r} is no coordinate of the tokens; there are "
                f"{[str(name) for name in states.coords]}. Or give one label for each token"
            )
        labels = states[labels].values.tolist()
    label_N = np.array([str(label) for label in labels])
    if len(label_N) != states.sizes["token"]:
        raise ValueError(f"{len(label_N)} labels for {states.sizes['token']} tokens")
    document_N = np.zeros(len(label_N), dtype=np.int64)
    if "sequence" in states.coords:
        document_N = np.unique(states["sequence"].values, return_inverse=True)[1]
    return [int(layer) for layer in states["layer"].values], label_N, document_N


def _framed(rows: dict[Any, dict[str, float]], names: list[str]) -> pd.DataFrame:
    index = pd.MultiIndex.from_tuples(rows, names=names)
    return pd.DataFrame(list(rows.values()), index=index)
