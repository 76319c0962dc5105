"""Are the two routers of a layer different? Cosines between their rows, beside chance.

Row e of a router is what an input must contain for expert e to be wanted. Only differences between
the rows of one router choose: a vector added to all of them changes no probability. So rows can
be compared as they are stored, and with the mean row of their router taken away (`centred`), which
is what acts. Both are shown, since a common direction of stored rows is easily taken for likeness.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_lab.analysis.components import HasModel, model_of
from ernie_lab.analysis.isolation import router_cosines
from ernie_lab.model.vl import VLModel

Floats: TypeAlias = NDArray[np.float64]


def router_alignment(
    model: VLModel | HasModel, *, centred: bool = False, n_permuted: int = 200, seed: int = 0
) -> pd.DataFrame:
    """One row per layer: how alike the text and the vision router's rows are.

    - `size`: root mean square of all E x E cosines between a text and a vision row;
    - `largest`: the largest of them in absolute value;
    - `same_number`: mean cosine of text row e and vision row e, which is high if the one router
      began as a copy of the other;
    - `within_text`, `within_vision`: root mean square of the cosines between different rows of one
      router.

    Chance, beside each: `size_random` is that of two random rows of width d, 1/sqrt(d); `…_low` and
    `…_high` hold 95 % of the draws of a permutation: for `size` and `largest` the d coordinates of
    the vision router are shuffled, all of its rows alike, which keeps what its rows are to each
    other and forgets which coordinate of the stream is which; for `same_number` its experts are
    renumbered. Large coordinates that both routers share count as likeness.
    """
    own = model_of(model)
    if not isinstance(own, VLModel):
        raise ValueError("a text model has one router in a layer: nothing to compare")
    routers = own.routers()
    rng = np.random.default_rng(seed)
    rows = {}
    for layer, text in routers["text"].items():
        text_ED, vision_ED = (
            _rows(router.weight_ED, centred) for router in (text, routers["vision"][layer])
        )
        rows[layer] = _row(text_ED, vision_ED, n_permuted, rng)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("layer")


def _rows(weight_ED: Tensor, centred: bool) -> Tensor:
    weight_ED = weight_ED.detach().double().cpu()
    return weight_ED - weight_ED.mean(0) if centred else weight_ED


def _row(
    text_ED: Tensor, vision_ED: Tensor, n_permuted: int, rng: np.random.Generator
) -> dict[str, float]:
    cosines_EE = router_cosines(text_ED, vision_ED)
    width = text_ED.shape[1]
    moved = [
        router_cosines(text_ED, vision_ED[:, torch.from_numpy(rng.permutation(width))])
        for _ in range(n_permuted)
    ]
    renumbered = [
        cosines_EE[:, rng.permutation(len(vision_ED))].diagonal().mean() for _ in range(n_permuted)
    ]
    diagonal = float(cosines_EE.diagonal().mean())
    return {
        **_beside("size", _size(cosines_EE), [_size(one) for one in moved]),
        "size_random": width**-0.5,
        **_beside("largest", float(abs(cosines_EE).max()), [abs(one).max() for one in moved]),
        **_beside("same_number", diagonal, renumbered),
        "within_text": _within(text_ED),
        "within_vision": _within(vision_ED),
        "n_experts": len(text_ED),
    }


def _beside(name: str, value: float, null: list[float]) -> dict[str, float]:
    low, high = np.percentile(null, [2.5, 97.5])
    return {name: value, f"{name}_low": float(low), f"{name}_high": float(high)}


def _size(cosines_EE: Floats) -> float:
    return float(np.sqrt((cosines_EE**2).mean()))


def _within(rows_ED: Tensor) -> float:
    cosines_EE = router_cosines(rows_ED, rows_ED)
    return _size(cosines_EE[~np.eye(len(cosines_EE), dtype=bool)])
