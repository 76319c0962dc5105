"""What passes through the shared experts: how large their output is beside the routed one.

The shared block of a layer reads every token, of text and of pictures alike; it is the one part of
a mixture layer that the banks have in common. How much of the layer's output it writes is a
question of size and of direction, and neither says what switching it off would do:
`el.shared.zero` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from ernie_lab.interventions.bootstrap import draws_of, estimate, interval

if TYPE_CHECKING:
    import xarray as xr

Floats: TypeAlias = NDArray[np.float64]

_DRAWS_AT_ONCE = 64


def shared_to_routed(
    shared: ArrayLike | xr.DataArray,
    routed: ArrayLike | xr.DataArray,
    content: Sequence[str],
    *,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """||shared_out|| / ||routed_out|| of each token, summarised by layer and by what tokens are.

    `shared` and `routed` are `t["moe.shared_out"]` and `t["moe.routed_out"]`, (layer, token,
    width), or plain `[n d]` of one layer, whose table has no layer. `content` has one label for
    each token: text, delimiter, image, video.

    Columns: `n_tokens`; `median` of the ratio with its interval `low`, `high`, and `p05`, `p95`
    of the tokens; `share`, the part of the layer's output that is the shared block's,

        share = mean over tokens of shared . out / ||out||^2,    out = shared + routed,

    with `share_low` and `share_high`; and `cosine` of the two. The two may point apart, so a
    ratio of 1 does not mean that each gives half of the output; the shares of the two sum to 1,
    and one is negative where it works against the sum. A token whose routed output is zero has no
    ratio and is counted in `undefined`.

    Intervals: 95 %, bootstrap over documents (coordinate `sequence`), NaN without it.
    """
    arrays: list[NDArray[Any]] = [np.asarray(x) for x in (shared, routed)]
    layered = arrays[0].ndim == 3
    shared_LND, routed_LND = arrays if layered else (x[None] for x in arrays)
    if shared_LND.shape != routed_LND.shape or shared_LND.shape[1] != len(content):
        raise ValueError(
            f"{len(content)} labels for {shared_LND.shape[:-1]} shared and "
            f"{routed_LND.shape[:-1]} routed outputs; give one row and one label for each token"
        )
    coords: Any = getattr(shared, "coords", {})
    layers = coords["layer"].values.tolist() if "layer" in coords else range(len(shared_LND))
    document_N = np.zeros(len(content), dtype=np.int64)
    if "sequence" in coords:
        document_N = np.unique(coords["sequence"].values, return_inverse=True)[1]
    drawn_PQ = draws_of(int(document_N.max(initial=0)) + 1, n_draws, seed)
    label_N = np.array([str(label) for label in content])
    rows: dict[tuple[int, str], dict[str, float]] = {}
    for layer, shared_ND, routed_ND in zip(layers, shared_LND, routed_LND, strict=True):
        # One layer at a time in double precision: the whole may be gigabytes.
        values = _per_token(shared_ND.astype(np.float64), routed_ND.astype(np.float64))
        for label in dict.fromkeys(label_N.tolist()):
            mine_N = label_N == label
            row = {name: column[mine_N] for name, column in values.items()}
            rows[int(layer), label] = _summary(row, document_N[mine_N], drawn_PQ)
    index = pd.MultiIndex.from_tuples(rows, names=["layer", "content"])
    table = pd.DataFrame(list(rows.values()), index=index)
    table = table.astype({"n_tokens": int, "undefined": int})
    return table if layered else table.droplevel("layer")


def _per_token(shared_ND: Floats, routed_ND: Floats) -> dict[str, Floats]:
    """ratio, share and cosine `[n]`; NaN where not defined."""
    shared_N, routed_N = (np.linalg.norm(x, axis=-1) for x in (shared_ND, routed_ND))
    dot_N = (shared_ND * routed_ND).sum(-1)
    out_N = ((shared_ND + routed_ND) ** 2).sum(-1)
    return {
        "ratio": _divided(shared_N, routed_N),
        "share": _divided(shared_N**2 + dot_N, out_N),
        "cosine": _divided(dot_N, shared_N * routed_N),
    }


def _summary(
    of: dict[str, Floats], document_N: NDArray[np.int64], drawn_PQ: NDArray[np.int64]
) -> dict[str, float]:
    there_N = np.isfinite(of["ratio"])
    ratio_N = of["ratio"][there_N]
    median, p05, p95 = np.quantile(ratio_N, [0.5, 0.05, 0.95]) if len(ratio_N) else [np.nan] * 3
    low, high = _median_interval(ratio_N, document_N[there_N], drawn_PQ)
    share = estimate(of["share"], document_N, drawn_PQ)
    return {
        "n_tokens": len(there_N),
        "median": median,
        "low": low,
        "high": high,
        "p05": p05,
        "p95": p95,
        "share": share.value,
        "share_low": share.low,
        "share_high": share.high,
        "cosine": estimate(of["cosine"], document_N, drawn_PQ).value,
        "undefined": int((~there_N).sum()),
    }


def _median_interval(
    values_N: Floats, document_N: NDArray[np.int64], drawn_PQ: NDArray[np.int64]
) -> tuple[float, float]:
    """Of the median of each draw of documents, which halves what was drawn."""
    if len(np.unique(document_N)) < 2:
        return np.nan, np.nan
    order_N = values_N.argsort()
    sorted_N, document_N = values_N[order_N], document_N[order_N]
    medians: list[float] = []
    for part_PQ in np.array_split(drawn_PQ, -(-len(drawn_PQ) // _DRAWS_AT_ONCE)):
        weights_PN = part_PQ[:, document_N].cumsum(axis=1)
        weights_PN = weights_PN[weights_PN[:, -1] > 0]
        # An even number has two middle values, and the median lies between them.
        first_P = (2 * weights_PN >= weights_PN[:, -1:]).argmax(axis=1)
        second_P = (2 * weights_PN > weights_PN[:, -1:]).argmax(axis=1)
        medians += ((sorted_N[first_P] + sorted_N[second_P]) / 2).tolist()
    return interval(medians, drawn_PQ.shape[1])


def _divided(a_N: Floats, b_N: Floats) -> Floats:
    return np.divide(a_N, b_N, where=b_N > 0, out=np.full_like(a_N, np.nan))
