"""How alike two sets of states are, whatever their axes: linear CKA, debiased.

Rows are paired: row i of the one set belongs to row i of the other (one token in two layers, a
glyph and the word that names it). The measure compares which rows are alike in the one with which
are alike in the other, so the two need not have the same width, and a rotation or one scale for
all changes nothing:

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))        Kornblith et al. 2019

The plain estimator of HSIC grows with width over rows: unrelated sets of 20 rows in 128 dimensions
have a CKA of 0.87. So the unbiased one is used (Song et al. 2012, equation 5; for CKA Nguyen et
al. 2021), in the form of U-centred Gram matrices (Szekely and Rizzo 2014, definition 2):

    HSIC_1(X, Y) = sum over i != j of A_ij B_ij / (n (n - 3)),
    A_ij = k_ij - k_i. / (n - 2) - k_.j / (n - 2) + k_.. / ((n - 1) (n - 2)),

with k the Gram matrix of X with its diagonal set to 0 and dots for its sums. It is 0 on average
for unrelated sets, so it can be below 0, and above 1 in small samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit  # quantiles of t; scipy.stats takes seconds to import

from ernie_lab.analysis.information import null_p95, null_p95s
from ernie_lab.interventions.bootstrap import CONFIDENCE

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

Floats: TypeAlias = NDArray[np.float64]

LEAST_ROWS = 4  # n (n - 3) must be above 0
MAX_ROWS = 1024  # 28 Gram matrices of as many rows take 0.23 GB
_FOLDS = 20


@dataclass(frozen=True, slots=True, eq=False)
class LayerCKA:
    """Debiased CKA of the same tokens in every two layers.

    `value`, `low` and `high` are (layer, other) with true layer numbers. `null_p95` is what 5 % of
    draws with the rows of the one layer shuffled exceed (by rank), the largest of all pairs.
    `n_rows` tokens of `n_documents` documents were compared.
    """

    value: xr.DataArray
    low: xr.DataArray
    high: xr.DataArray
    null_p95: float
    n_rows: int
    n_documents: int


def linear_cka(x: ArrayLike, y: ArrayLike, *, debiased: bool = True) -> float:
    """CKA of `[n d]` and `[n m]`, rows paired. `debiased=False` is Kornblith's, biased upwards.

    NaN where all rows of one set are alike.
    """
    x_ND, y_NM = (np.asarray(one, dtype=np.float64) for one in (x, y))
    if x_ND.ndim != 2 or y_NM.ndim != 2 or len(x_ND) != len(y_NM):
        raise ValueError(f"sets of shape {x_ND.shape} and {y_NM.shape}: rows must be paired")
    if not debiased:
        grams = [(one @ one.T)[None] for one in (x_ND - x_ND.mean(0), y_NM - y_NM.mean(0))]
        return float(_ratio(*grams)[0, 0])
    return float(_ratio(centred(_gram(x_ND)[None]), centred(_gram(y_NM)[None]))[0, 0])


def layer_cka(
    states: xr.DataArray, *, max_rows: int = 256, n_permuted: int = 50, seed: int = 0
) -> LayerCKA:
    """Linear CKA between every two layers of `states` (layer, token, width), `t["resid_post"]`.

    Give one kind of token at a time, `t.sel(content="image")["resid_post"]`: over mixed kinds it
    mostly says that pictures are no text in either layer. Beyond `max_rows` tokens a random part
    of them is taken.

    The intervals are of a jackknife that leaves out whole documents (at most 20 groups of them),
    value +- t s: in a bootstrap a row meets its own copy, which the unbiased estimator takes for
    likeness. NaN for fewer than 3 documents.
    """
    import xarray as xr

    layers = _layers(states)
    rng = np.random.default_rng(seed)
    n = states.sizes["token"]
    if not LEAST_ROWS <= max_rows <= MAX_ROWS:
        raise ValueError(f"max_rows={max_rows}: {LEAST_ROWS} to {MAX_ROWS} rows can be compared")
    rows_N = np.sort(rng.choice(n, max_rows, replace=False)) if n > max_rows else np.arange(n)
    values_LND = np.asarray(states.isel(token=rows_N).values, dtype=np.float64)
    grams_LNN = np.stack([_gram(values_ND) for values_ND in values_LND])
    fold_N = _folds(states, rows_N)
    u_LNN = centred(grams_LNN)
    value_LL = _ratio(u_LNN, u_LNN)
    low_LL, high_LL = _jackknife(value_LL, grams_LNN, grams_LNN, fold_N)
    orders = [rng.permutation(len(rows_N)) for _ in range(n_permuted)]
    shuffled = [_ratio(u_LNN, _reordered(u_LNN, order_N)) for order_N in orders]

    def labelled(values_LL: Floats) -> xr.DataArray:
        coords = {"layer": layers, "other": layers}
        return xr.DataArray(values_LL, dims=("layer", "other"), coords=coords)

    return LayerCKA(
        labelled(value_LL),
        labelled(low_LL),
        labelled(high_LL),
        float(null_p95s(np.stack(shuffled)).max()),
        len(rows_N),
        _n_documents(states, rows_N),
    )


def paired_cka(
    first: xr.DataArray, second: xr.DataArray, *, n_permuted: int = 200, seed: int = 0
) -> pd.DataFrame:
    """Linear CKA, layer by layer, of two sets of tokens of which the i-th belong together.

    `first` and `second` are (layer, token, width): for example the tokens of things in a picture
    and of the words that name them, `states.isel(token=thing_rows)` and
    `states.isel(token=word_rows)`. Where no token belongs to another there is no CKA between
    modalities; take `residual_geometry`.

    Columns: `cka`, `low`, `high` (jackknife over documents, as in `layer_cka`), `null_mean`,
    `null_p95` (the second set shuffled: what unpaired tokens of the same kinds give), `n`.
    """
    import pandas as pd

    layers = _layers(first)
    if layers != _layers(second) or first.sizes["token"] != second.sizes["token"]:
        raise ValueError(
            f"{first.sizes['token']} tokens in layers {layers} and {second.sizes['token']} in "
            f"{_layers(second)}: the two must be paired, in the same layers"
        )
    n = first.sizes["token"]
    if n > MAX_ROWS:
        raise ValueError(f"{n} pairs, at most {MAX_ROWS}: take some, first.isel(token=…)")
    fold_N = _folds(first, np.arange(n))
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(n) for _ in range(n_permuted)]
    rows = []
    for a_ND, b_ND in zip(first.values, second.values, strict=True):
        grams = [_gram(np.asarray(x, dtype=np.float64))[None] for x in (a_ND, b_ND)]
        u_a, u_b = (centred(gram) for gram in grams)
        value = _ratio(u_a, u_b)
        low, high = _jackknife(value, grams[0], grams[1], fold_N)
        null = [float(_ratio(u_a, _reordered(u_b, order_N))[0, 0]) for order_N in orders]
        rows.append(
            {
                "cka": value[0, 0],
                "low": low[0, 0],
                "high": high[0, 0],
                "null_mean": np.mean(null),
                "null_p95": null_p95(null),
                "n": n,
            }
        )
    return pd.DataFrame(rows, index=pd.Index(layers, name="layer"))


def centred(grams: Floats) -> Floats:
    """U-centred Gram matrices `[… n n]`; rows and columns sum to 0, as does the diagonal."""
    n = grams.shape[-1]
    if n < LEAST_ROWS:
        raise ValueError(f"{n} rows; the unbiased estimator needs at least {LEAST_ROWS}")
    out: Floats = grams.copy()
    diagonal = np.arange(n)
    out[..., diagonal, diagonal] = 0
    sums = out.sum(-1, keepdims=True) / (n - 2)
    everything = sums.sum(-2, keepdims=True) / (n - 1)
    out -= sums
    out -= sums.swapaxes(-1, -2) - everything
    out[..., diagonal, diagonal] = 0
    return out


def _gram(x_ND: Floats) -> Floats:
    """Of rows from which their mean is taken: it changes nothing, and rounding is smaller."""
    x_ND = x_ND - x_ND.mean(0)
    return np.asarray(x_ND @ x_ND.T)


def _reordered(grams_LNN: Floats, rows_N: NDArray[np.int64]) -> Floats:
    """These rows and columns, in this order."""
    n = grams_LNN.shape[-1]
    cells = (rows_N[:, None] * n + rows_N).ravel()
    return grams_LNN.reshape(len(grams_LNN), -1)[:, cells].reshape(-1, len(rows_N), len(rows_N))


def _ratio(a_LNN: Floats, b_MNN: Floats) -> Floats:
    """CKA `[l m]` of centred Gram matrices."""
    flat = [x.reshape(len(x), -1) for x in (a_LNN, b_MNN)]
    own = [np.einsum("ln,ln->l", x, x) for x in flat]
    norm_LM = np.sqrt(np.outer(*own))
    out: Floats = np.full(norm_LM.shape, np.nan)
    np.divide(flat[0] @ flat[1].T, norm_LM, out=out, where=norm_LM > 0)
    return out


def _jackknife(
    value: Floats, a_LNN: Floats, b_MNN: Floats, fold_N: NDArray[np.int64]
) -> tuple[Floats, Floats]:
    """value +- t s, s^2 = (g - 1) / g sum (value_-i - mean)^2 over g groups left out (Efron and
    Tibshirani 1993, section 11.5)."""
    n_folds = int(fold_N.max()) + 1
    same = b_MNN is a_LNN
    left = []
    for fold in range(n_folds):
        kept = np.flatnonzero(fold_N != fold)
        if n_folds < 3 or len(kept) < LEAST_ROWS:
            return np.full_like(value, np.nan), np.full_like(value, np.nan)
        part = centred(_reordered(a_LNN, kept))
        left.append(_ratio(part, part if same else centred(_reordered(b_MNN, kept))))
    deviation = np.stack(left) - np.mean(left, axis=0)
    spread = np.sqrt((n_folds - 1) / n_folds * (deviation**2).sum(0))
    wide = stdtrit(n_folds - 1, (1 + CONFIDENCE) / 2) * spread
    return value - wide, value + wide


def _folds(states: xr.DataArray, rows_N: NDArray[Any]) -> NDArray[np.int64]:
    """Which of at most 20 groups of documents each row is in; a row is one where none are known."""
    document_N = np.arange(len(rows_N))
    if "sequence" in states.coords:
        document_N = np.unique(states["sequence"].values[rows_N], return_inverse=True)[1]
    return np.asarray(document_N % _FOLDS, dtype=np.int64)


def _n_documents(states: xr.DataArray, rows_N: NDArray[Any]) -> int:
    if "sequence" not in states.coords:
        return len(rows_N)
    return len(np.unique(states["sequence"].values[rows_N]))


def _layers(states: xr.DataArray) -> Sequence[int]:
    if tuple(states.dims)[:2] != ("layer", "token") or states.ndim != 3:
        raise ValueError(
            f"states have dims {tuple(states.dims)}, expected (layer, token, width), such as "
            't["resid_post"]'
        )
    return [int(layer) for layer in states["layer"].values]
