"""The same token in different contexts: does routing read the token, or what stands around it?

The sets of experts of two tokens are compared by their Jaccard overlap |A and B| / |A or B|. Four
kinds of pairs answer four questions:

- `neither`: other tokens in other documents. The reference: how alike any two sets are.
- `document`: other tokens in the same document. Above the reference, the document speaks.
- `token`: the same token in other documents. Above the reference, the token speaks; 1 would be
  routing by the token alone.
- `token and previous`: the same token after the same token, in other documents. Above `token`, its
  neighbour speaks, or what the neighbour stands for.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.choices import Choices, choices, ids_of, place_of
from ernie_lab.analysis.token_groups import By, Floats, Integers, groups_of, token_coordinate
from ernie_lab.interventions.bootstrap import draws_of, interval

KINDS = ("token and previous", "token", "document", "neither")
REFERENCE = "neither"
_BLOCK = 512  # rows of pairs at one time


def context_overlap(
    routing: Any,
    by: By = "id",
    *,
    per_label: int = 20,
    max_tokens: int = 3000,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean Jaccard overlap of expert sets, one row per layer and kind of pair (`KINDS`).

    Tokens are the same if their labels `by` are: the name of a token coordinate, or one label for
    each token, None for those to be left out. Only labels found in two documents take part, each
    counts the same however common it is, with at most `per_label` occurrences and in all
    `max_tokens` tokens, drawn at random beyond. `low` and `high` are 95 % over documents; `above`
    is the difference to the reference `neither` in the same draws.
    """
    chosen = choices(routing, n_experts=_highest(routing) + 1)
    label_N, before_N, _ = _labels(routing, by, chosen)
    rng = np.random.default_rng(seed)
    keep_N = _taken(label_N, chosen.document_N, per_label, max_tokens, rng)
    chosen, label_N, before_N = chosen.part(keep_N), label_N[keep_N], before_N[keep_N]
    sums = _sums(chosen, label_N, before_N)
    draws_DX = draws_of(chosen.n_documents, n_draws, seed)
    rows = []
    for place, layer in enumerate(chosen.layers):
        reference_D = sums[REFERENCE].drawn(place, draws_DX)
        reference = sums[REFERENCE].mean(place)
        for kind in KINDS:
            mine = sums[kind]
            if mine.n_pairs == 0:
                continue
            value, drawn_D = mine.mean(place), mine.drawn(place, draws_DX)
            low, high = interval(drawn_D, chosen.n_documents)
            above_low, above_high = interval(drawn_D - reference_D, chosen.n_documents)
            rows.append(
                {
                    "layer": layer, "kind": kind, "jaccard": value, "low": low, "high": high,
                    "above": value - reference, "above_low": above_low, "above_high": above_high,
                    "n_pairs": mine.n_pairs, "n_labels": mine.n_labels,
                }
            )  # fmt: skip
    return pd.DataFrame(rows)


def label_overlap(
    routing: Any,
    layer: int,
    by: By = "text",
    *,
    n: int = 20,
    per_label: int = 200,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """For the `n` commonest labels: how alike are their expert sets in different documents?

    Sorted from those that the label decides to those that the context decides. `usual` is the
    commonest set, `usual_share` how many of the occurrences have just this one. Beside it belongs
    the reference `neither` of `context_overlap`.
    """
    chosen = choices(routing, n_experts=_highest(routing) + 1)
    place = place_of(layer, chosen.layers)
    label_N, _, names = _labels(routing, by, chosen)
    rng = np.random.default_rng(seed)
    keep_N = _taken(label_N, chosen.document_N, per_label, len(label_N), rng)
    rows = []
    for label, _ in Counter(label_N[keep_N].tolist()).most_common(n):
        part = chosen.part(keep_N & (label_N == label))
        same_N = np.zeros(part.ids_LNK.shape[1], np.int64)
        sums = _sums(part, same_N, same_N)["token"]
        drawn_D = sums.drawn(place, draws_of(part.n_documents, n_draws, seed))
        low, high = interval(drawn_D, part.n_documents)
        sets = Counter(tuple(sorted(one)) for one in part.ids_LNK[place].tolist())
        usual, often = sets.most_common(1)[0]
        rows.append(
            {
                "label": names[label], "n": len(same_N), "n_documents": part.n_documents,
                "jaccard": sums.mean(place), "low": low, "high": high,
                "usual": " ".join(map(str, usual)), "usual_share": often / len(same_N),
            }
        )  # fmt: skip
    return pd.DataFrame(rows).sort_values("jaccard", ascending=False, ignore_index=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Sums:
    """Of one kind: weighted overlaps and weights, by the documents of the two tokens.

    Weights are those that make every label count the same, so a mean is a ratio of sums; pairs
    of two documents come up as often as both are drawn.
    """

    overlap_LXX: Floats
    weight_XX: Floats
    n_pairs: int
    n_labels: int

    def mean(self, place: int) -> float:
        total = self.weight_XX.sum()
        return float(self.overlap_LXX[place].sum() / total) if total > 0 else np.nan

    def drawn(self, place: int, draws_DX: Integers) -> Floats:
        def times(sums_XX: Floats) -> Floats:
            apart_XX = sums_XX - np.diag(sums_XX.diagonal())
            pairs_D = ((draws_DX @ apart_XX) * draws_DX).sum(1)
            return np.asarray(pairs_D + draws_DX @ sums_XX.diagonal())

        with np.errstate(invalid="ignore"):
            return times(self.overlap_LXX[place]) / times(self.weight_XX)


def _sums(chosen: Choices, label_N: Integers, before_N: Integers) -> dict[str, _Sums]:
    order = np.argsort(chosen.document_N, kind="stable")
    document_N, label_N, before_N = chosen.document_N[order], label_N[order], before_N[order]
    n_labels, n_documents = int(label_N.max()) + 1, chosen.n_documents
    starts = np.searchsorted(document_N, np.arange(n_documents))
    chosen_LNE = np.stack([chosen.chosen(place)[order] for place in range(len(chosen.layers))])

    def kinds_of(block: slice) -> dict[str, NDArray[np.bool_]]:
        same = label_N[block, None] == label_N[None]
        apart = document_N[block, None] != document_N[None]
        after = (before_N[block, None] == before_N[None]) & (before_N[None] >= 0)
        return {
            "token and previous": same & apart & after, "token": same & apart,
            "document": ~same & ~apart, REFERENCE: ~same & apart,
        }  # fmt: skip

    blocks = [slice(at, at + _BLOCK) for at in range(0, len(label_N), _BLOCK)]
    pairs = {kind: np.zeros(n_labels) for kind in KINDS}
    for block in blocks:
        for kind, mask in kinds_of(block).items():
            np.add.at(pairs[kind], label_N[block], mask.sum(1))
    shape = (n_documents, n_documents)
    overlap = {kind: np.zeros((len(chosen.layers), *shape)) for kind in KINDS}
    weight = {kind: np.zeros(shape) for kind in KINDS}
    for block in blocks:
        jaccards = [_jaccards(chosen_NE[block], chosen_NE, chosen.k) for chosen_NE in chosen_LNE]
        for kind, mask in kinds_of(block).items():
            per_label = np.divide(1, pairs[kind], where=pairs[kind] > 0, out=np.zeros(n_labels))
            weights = mask * per_label[label_N[block], None].astype(np.float32)
            _add(weight[kind], weights, document_N[block], starts)
            for place, jaccard in enumerate(jaccards):
                _add(overlap[kind][place], weights * jaccard, document_N[block], starts)
    return {
        kind: _Sums(overlap[kind], weight[kind], int(pairs[kind].sum()) // 2,
                    int((pairs[kind] > 0).sum()))
        for kind in KINDS
    }  # fmt: skip


def _jaccards(rows_XE: NDArray[Any], all_NE: NDArray[Any], k: int) -> NDArray[Any]:
    both_XN = rows_XE @ all_NE.T
    return np.asarray(both_XN / (2 * k - both_XN))


def _add(
    sums_XX: Floats, values_RN: NDArray[Any], document_R: Integers, starts: NDArray[Any]
) -> None:
    np.add.at(sums_XX, document_R, np.add.reduceat(values_RN, starts, axis=1, dtype=float))


def _labels(routing: Any, by: By, chosen: Choices) -> tuple[Integers, Integers, tuple[Any, ...]]:
    """Numbers of the labels and of those of the tokens before, -1 for none; and the labels."""
    ids = ids_of(routing)
    if isinstance(by, str) and by in ("id", "text"):
        _refuse_pictures(ids)
    groups = groups_of(ids, by)
    label_N = groups.code_N[chosen.rows_N]
    before_N = np.full_like(label_N, -1)
    follows_N = chosen.document_N[1:] == chosen.document_N[:-1]
    if "pos" in ids.coords:
        # In a bank the row before need not be the token before.
        follows_N &= np.diff(token_coordinate(ids, "pos")[chosen.rows_N]) == 1
    before_N[1:] = np.where(follows_N, label_N[:-1], -1)
    return label_N, before_N, groups.names


def _refuse_pictures(ids: Any) -> None:
    kinds = ids.coords["modality"].values.tolist() if "modality" in ids.coords else []
    n = sum(kind in ("image", "video") for kind in kinds)
    if n:
        raise ValueError(
            f"{n} tokens are pieces of pictures, which all have the same id whatever they show: "
            "pass by= with a label for each token, None for those to be left out"
        )


def _taken(
    label_N: Integers, document_N: Integers, per_label: int, max_tokens: int,
    rng: np.random.Generator,
) -> NDArray[np.bool_]:  # fmt: skip
    """At most `per_label` tokens of each label that two documents have, `max_tokens` in all."""
    keep_N = np.zeros(len(label_N), bool)
    left = max_tokens
    for label in rng.permutation(np.unique(label_N[label_N >= 0])):
        rows = np.flatnonzero(label_N == label)
        rows = rng.permutation(rows)[:per_label]
        if len(np.unique(document_N[rows])) < 2 or len(rows) > left:
            continue
        keep_N[rows] = True
        left -= len(rows)
    if not keep_N.any():
        raise ValueError(
            "no label occurs in two documents: the same token needs two contexts. Run more texts, "
            "or pass labels that they share, by="
        )
    return keep_N


def _highest(routing: Any) -> int:
    """Unused experts change no overlap of sets, so their number need not be known."""
    return int(np.nanmax(np.asarray(ids_of(routing))))
