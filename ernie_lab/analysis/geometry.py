"""The geometry of routers: which rows point alike.

Angles between rows are facts about parameters. Two experts whose rows point alike compete for the
same tokens; what they do with these, `expert_similarity` asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from ernie_lab.analysis.components import HasModel, model_of
from ernie_lab.analysis.information import null_p95
from ernie_lab.analysis.isolation import router_cosines
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.experts import ExpertBank
from ernie_lab.model.kinds import Model
from ernie_lab.model.moe import MoE
from ernie_lab.model.router import Router
from ernie_lab.model.stack import block_list
from ernie_lab.model.vl import VLModel

if TYPE_CHECKING:
    import xarray as xr

Floats = NDArray[np.float64]


def mixture(
    model: Model | HasModel, layer: int, bank: str | None = None
) -> tuple[Router, ExpertBank]:
    """Router and routed experts of one mixture layer; of a bank where there are two."""
    own = model_of(model)
    moes = {block.layer: block.moe for block in block_list(own.blocks)}
    found = moes.get(layer)
    if found is None:
        there = [number for number, moe in moes.items() if moe is not None]
        raise ValueError(f"layer {layer} has no experts; the mixture layers are {there}")
    if isinstance(found, BankedMoE):
        if bank not in ("text", "vision"):
            raise ValueError(f"bank={bank!r}: this model has two, bank='text' or bank='vision'")
        part = found.text if bank == "text" else found.vision
        return part.router, part.experts
    assert isinstance(found, MoE)
    if bank is not None:
        raise ValueError(f"bank={bank!r}: a text model has one bank of experts; leave it out")
    return found.router, found.experts


def router_similarity(model: Model | HasModel, bank: str | None = None) -> xr.DataArray:
    """cos(w_i, w_j) between the rows of each router, (layer, expert, other).

    Random rows of width d have 0 +- 1/sqrt(d), the attribute `chance_spread`. `bank="text/vision"`
    compares the two routers of a vision-language model, (layer, text_expert, vision_expert), where
    equal numbers mean nothing.
    """
    by_bank = _routers(model)
    pair = ("text", "vision") if bank == "text/vision" else (bank, bank)
    for one in pair:
        if one not in by_bank:
            names = [name for name in by_bank if name]
            choices = ", ".join(map(repr, [*names, "text/vision"])) if names else "None"
            raise ValueError(f"bank={bank!r} of this model's routers; one of {choices}")
    ours, theirs = (by_bank[one] for one in pair)
    cosines = np.stack([router_cosines(ours[n].weight_ED, theirs[n].weight_ED) for n in ours])
    axes = ("text_expert", "vision_expert") if pair[0] != pair[1] else ("expert", "other")
    return labelled_similarity(
        cosines, "cos(w_i, w_j)", axes, layers=list(ours), chance=0.0,
        chance_spread=_width(ours) ** -0.5,
        chance_name="the deviation of the cosine of two random rows",
    )  # fmt: skip


def router_geometry(model: Model | HasModel, *, n_random: int = 200, seed: int = 0) -> pd.DataFrame:
    """One row per router: how alike its rows are, beside random rows. (For the text router against
    the vision router there is `router_alignment`.)

    `mean` and `mean_size` are of cos and |cos| over pairs of experts, `largest` the cosine of
    largest size, of `expert` and `other`. Of as many Gaussian rows: `random_sd` = 1/sqrt(d), the
    deviation of a cosine; `random_mean_size`, the mean of |cos|; `random_largest_p95`, what the
    largest |cos| exceeds in 5 % of draws. `norm_cv` is std / mean of the rows' lengths.
    """
    rows: list[dict[str, Any]] = []
    references: dict[tuple[int, int], dict[str, float]] = {}
    for bank, routers in _routers(model).items():
        for layer, router in routers.items():
            weight_ED = router.weight_ED.detach()
            cosines_EE = router_cosines(weight_ED, weight_ED)
            upper_EE = np.triu(cosines_EE, 1)
            i, j = divmod(int(np.abs(upper_EE).argmax()), len(upper_EE))
            pairs, lengths_E = _pairs(cosines_EE), weight_ED.double().norm(dim=-1)
            n_experts, width = weight_ED.shape
            if (n_experts, width) not in references:
                references[n_experts, width] = _random_rows(n_experts, width, n_random, seed)
            rows.append(
                {
                    "layer": layer, "bank": bank, "mean": pairs.mean(),
                    "mean_size": np.abs(pairs).mean(), "largest": cosines_EE[i, j],
                    "expert": i, "other": j, **references[n_experts, width],
                    "norm_cv": float(lengths_E.std(correction=0) / lengths_E.mean()),
                }
            )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.drop(columns="bank") if table["bank"].isna().all() else table


def _routers(model: Model | HasModel) -> dict[str | None, dict[int, Router]]:
    own = model_of(model)
    if isinstance(own, VLModel):
        return dict(own.routers().items())
    return {None: own.routers()}


def _width(routers: dict[int, Router]) -> int:
    return next(iter(routers.values())).weight_ED.shape[1]


def _pairs(cosines_EE: Floats) -> Floats:
    return cosines_EE[np.triu_indices(len(cosines_EE), 1)]


def _random_rows(n_experts: int, width: int, n_random: int, seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    sizes, largest = [], []
    for _ in range(n_random):
        rows_ED = torch.randn(n_experts, width, generator=generator)
        pairs = np.abs(_pairs(router_cosines(rows_ED, rows_ED)))
        sizes.append(pairs.mean())
        largest.append(pairs.max())
    return {
        "random_sd": width**-0.5,
        "random_mean_size": float(np.mean(sizes)),
        "random_largest_p95": null_p95(largest),
    }


def labelled_similarity(
    values: Floats, meaning: str, names: tuple[str, str] = ("expert", "other"), *,
    layers: Sequence[int] | None = None, layer: int | None = None,
    numbers: Sequence[int] | None = None, **told: object,
) -> xr.DataArray:  # fmt: skip
    """`values` `[e e]` of one layer, or of several `[l e e]`, with true numbers.

    `told` are attributes; `chance`, `chance_spread` and `chance_name` are what a figure of it
    shows as what chance gives.
    """
    import xarray as xr

    coords: dict[str, Any] = {
        name: list(range(size)) if numbers is None else list(numbers)
        for name, size in zip(names, values.shape[-2:], strict=True)
    }
    coords["layer"] = layer if layers is None else list(layers)
    dims = names if layers is None else ("layer", *names)
    attrs = {"meaning": meaning, **told}
    return xr.DataArray(values, dims=dims, coords=coords, name="similarity", attrs=attrs)
