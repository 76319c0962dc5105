"""Do two engines send the same tokens to the same experts?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ernie_lab.lab import Lab


def agreement(
    lab: Lab, documents: Sequence[tuple[Sequence[int], NDArray[np.int64]]]
) -> dict[str, Any]:
    """Token ids and another engine's experts `[token layer k]`, run again here.

    By layer: `slots`, the share of slots whose expert was chosen here too; `sets`, the share of
    tokens with the same set of experts; `large_margin`, the same of the tokens whose margin here
    is above the layer's median, where rounding decides nothing. And `n_tokens`.
    """
    same, whole, large, n_tokens = [], [], [], 0
    margins = []
    for token_ids, ids in documents:
        n = len(ids)
        trace = lab.run([int(token) for token in token_ids[:n]], keep="routing").trace
        ours = trace.expert_ids.transpose("token", "layer", "slot").values
        scores = np.sort(trace.selection_scores.transpose("token", "layer", "expert").values)
        k = ids.shape[-1]
        margins.append(scores[..., -k] - scores[..., -k - 1] if k < scores.shape[-1] else 0 * ours)
        shared = (ids[..., None] == ours[..., None, :]).any(-1)
        same.append(shared.mean(-1))
        whole.append(shared.all(-1))
        n_tokens += n
    margin_NL, same_NL, whole_NL = (np.concatenate(parts) for parts in (margins, same, whole))
    for place in range(margin_NL.shape[1]):
        far = margin_NL[:, place] >= np.median(margin_NL[:, place])
        large.append(whole_NL[far, place].mean())
    names = [str(layer) for layer in trace.layers]

    def by_layer(values: Any) -> dict[str, float]:
        return {name: round(float(x), 4) for name, x in zip(names, values, strict=True)}

    return {
        "n_documents": len(documents),
        "n_tokens": n_tokens,
        "slots": by_layer(same_NL.mean(0)),
        "sets": by_layer(whole_NL.mean(0)),
        "large_margin": by_layer(large),
    }
