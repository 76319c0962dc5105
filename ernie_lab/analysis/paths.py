"""Where a token goes next: first choices of consecutive mixture layers, and whole paths.

A path is the sequence of a token's first choices through all mixture layers. Expert 3 of layer 5
has nothing to do with expert 3 of layer 6; what can be asked is whether the one choice tells
anything about the next one, beyond what the loads of both layers tell.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ernie_lab.analysis.choices import Choices, choices, ids_of
from ernie_lab.analysis.information import Rows, null_p95
from ernie_lab.analysis.nulls import Permuted, permuted
from ernie_lab.analysis.token_groups import By, Integers, groups_of, token_coordinate
from ernie_lab.display import visible
from ernie_lab.interventions.bootstrap import draws_of, interval

if TYPE_CHECKING:
    import xarray as xr

_EXAMPLES = 4
_WITHIN: Permuted = "tokens of equal given"


def path_steps(routing: Any, *, n_experts: int | None = None) -> xr.DataArray:
    """Tokens by first choice here and in the next mixture layer, (layer, expert, next_expert).

    The coordinate `next_layer` says which layer is next to each. First is the highest selection
    score.
    """
    import xarray as xr

    chosen = _of_two_layers(routing, n_experts)
    steps = zip(chosen.first[:-1], chosen.first[1:], strict=True)
    counts = [_joint(here_N, next_N, chosen.n_experts) for here_N, next_N in steps]
    numbers = np.arange(chosen.n_experts)
    return xr.DataArray(
        np.stack(counts),
        dims=("layer", "expert", "next_expert"),
        coords={
            "layer": list(chosen.layers[:-1]), "next_layer": ("layer", list(chosen.layers[1:])),
            "expert": numbers, "next_expert": numbers,
        },
        name="path_steps",
        attrs={"meaning": "tokens by first choice in two consecutive mixture layers"},
    )  # fmt: skip


def path_information(
    routing: Any,
    *,
    given: By | None = None,
    n_experts: int | None = None,
    n_permuted: int = 100,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Bits that a first choice tells about that in the next mixture layer; one row per step.

    `information` is I(here; next) of `mutual_information`, one row a token. `chance` is its mean
    when the next choices are exchanged between tokens, which keeps the loads of both layers,
    `chance_p95` what 5 % of exchanges exceed. `excess` = information - chance, with its 95 %
    interval over documents; `share` = excess over the bits of the next choice.

    `given` is the name of a token coordinate such as "id", or one label for each token: then
    information and bits are conditional on it, and choices are exchanged between tokens of one
    label only. What is left is what the path says beyond the label; a label of a single token
    says nothing.
    """
    chosen = _of_two_layers(routing, n_experts)
    code_N = groups_of(ids_of(routing), given).code_N[chosen.rows_N]
    chosen, code_N = chosen.part(code_N >= 0), code_N[code_N >= 0]
    rng = np.random.default_rng(seed)
    draws_DX = draws_of(chosen.n_documents, n_draws, seed)
    rows = []
    for place, layer in enumerate(chosen.layers[:-1]):
        here_N, next_N = chosen.first[place], chosen.first[place + 1]
        counted = _counted(here_N, next_N, chosen, code_N)
        bits, low, high = counted.interval(draws_DX)
        null = [
            _bits(_counted(here_N, permuted(next_N, code_N, _WITHIN, rng), chosen, code_N))
            for _ in range(n_permuted)
        ]
        chance = float(np.mean(null))
        entropy = _bits(_counted(next_N, next_N, chosen, code_N))
        rows.append(
            {
                "layer": layer, "next_layer": chosen.layers[place + 1], "information": bits,
                "chance": chance, "chance_p95": null_p95(null),
                "excess": bits - chance, "low": low - chance, "high": high - chance,
                "share": (bits - chance) / entropy if entropy > 0 else np.nan,
                "n_tokens": len(here_N),
            }
        )  # fmt: skip
    return pd.DataFrame(rows)


def _counted(here_N: Integers, next_N: Integers, chosen: Choices, code_N: Integers) -> Rows:
    return Rows.of(here_N, next_N[:, None], chosen.document_N, chosen.n_experts, code_N)


def _bits(rows: Rows) -> float:
    return float(rows.bits(np.ones((1, int(rows.document_M.max()) + 1), np.int64))[0])


def path_counts(routing: Any) -> pd.DataFrame:
    """One row per distinct path, most frequent first: the first choice in each layer (columns
    are true layer numbers), `n_tokens`, `share`."""
    chosen = _of_two_layers(routing, n_experts=None, known=False)
    paths, counts = np.unique(chosen.first.T, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    table = pd.DataFrame(paths[order], columns=list(chosen.layers))
    table["n_tokens"] = counts[order]
    table["share"] = counts[order] / counts.sum()
    return table


def frequent_paths(
    routing: Any, n: int = 10, *, n_draws: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The `n` commonest paths, picked on half of the documents; all numbers are of the other.

    `share` of tokens, `low` and `high` its 95 % interval over documents. Beside it,
    `by_loads`, the product of the shares of its experts, and `by_steps`, the share if each choice
    depended on the one before it alone (a Markov chain with the counts of `path_steps`): what is
    above the second, choices remember from further back. `tokens` are the commonest token texts.
    """
    chosen = _of_two_layers(routing, n_experts=None, known=False)
    picking, telling = chosen.halves(seed)
    picked = Counter(map(tuple, picking.first.T.tolist())).most_common(n)
    texts = _texts(routing, telling)
    draws_DX = draws_of(telling.n_documents, n_draws, seed)
    return pd.DataFrame([_path_row(path, telling, texts, draws_DX) for path, _ in picked])


def _path_row(
    path: tuple[int, ...], telling: Choices, texts: list[str] | None, draws_DX: Integers
) -> dict[str, Any]:
    matches_LN = telling.first == np.array(path)[:, None]
    on_N = matches_LN.all(0)
    taken_X = np.bincount(telling.document_N[on_N], minlength=telling.n_documents)
    tokens_X = np.bincount(telling.document_N, minlength=telling.n_documents)
    shares_D = (draws_DX @ taken_X) / (draws_DX @ tokens_X)
    low, high = interval(shares_D, telling.n_documents)
    shares_L = matches_LN.mean(1)
    steps_L = (matches_LN[:-1] & matches_LN[1:]).mean(1)
    with np.errstate(invalid="ignore"):
        follows_L = np.where(steps_L > 0, steps_L / shares_L[:-1], 0.0)
    row = {
        "path": " → ".join(map(str, path)),
        "n_tokens": int(on_N.sum()), "share": float(on_N.mean()), "low": low, "high": high,
        "by_loads": float(shares_L.prod()), "by_steps": float(shares_L[0] * follows_L.prod()),
    }  # fmt: skip
    if texts is not None:
        found = Counter(texts[i] for i in np.flatnonzero(on_N).tolist()).most_common(_EXAMPLES)
        row["tokens"] = ", ".join(f"{visible(text)} ×{count}" for text, count in found)
    return row


def _texts(routing: Any, chosen: Choices) -> list[str] | None:
    ids = ids_of(routing)
    if "text" not in ids.coords:
        return None
    return [str(text) for text in token_coordinate(ids, "text")[chosen.rows_N]]


def _of_two_layers(routing: Any, n_experts: int | None, known: bool = True) -> Choices:
    """`known` = False: the number of experts does not matter here."""
    if not known:
        n_experts = int(np.nanmax(np.asarray(ids_of(routing)))) + 1
    chosen = choices(routing, n_experts=n_experts)
    if len(chosen.layers) < 2:
        raise ValueError(f"layer {chosen.layers[0]} alone: a path needs two mixture layers or more")
    return chosen


def _joint(here_N: Integers, next_N: Integers, n_experts: int) -> Integers:
    cells = np.bincount(here_N * n_experts + next_N, minlength=n_experts**2)
    return np.asarray(cells.reshape(n_experts, n_experts))
