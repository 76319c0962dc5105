"""The residual stream as the sum of what was written to it."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from ernie_lab.analysis.attribution import component_table
from ernie_lab.analysis.components import (
    HasModel,
    Written,
    at_kept,
    model_of,
    needed_sites,
    relative_error,
    require,
    token_rows,
    written,
)
from ernie_lab.model.kinds import Model
from ernie_lab.trace.trace import Trace


def decomposition_sites(model: Model | HasModel, layer: int | None = None) -> list[str]:
    """What to pass as `keep=` for `decompose` and `direct_logit_attribution`.

    Heads and slots have a vector each for every token, so keep it for some positions only where
    texts are long: `el.keep(*el.analysis.decomposition_sites(lab), positions=[-1])`.
    """
    own = model_of(model)
    if layer is not None:
        return [*needed_sites(own, layer), f"blocks.{layer}.resid_mid"]
    last = own.config.decoder.n_layers - 1
    return [*needed_sites(own), f"blocks.{last}.resid_post", "final_norm.scale"]


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Decomposition:
    """`parts` in the order in which they write, each `[n d]`; `exact_ND` is the stream itself.

    `residual_error` is max over tokens of ||sum - x|| / ||x||.
    """

    parts: tuple[Written, ...]
    exact_ND: Tensor
    tokens: pd.DataFrame

    @property
    def residual_error(self) -> float:
        return relative_error(self.sum(), self.exact_ND)

    @property
    def components(self) -> pd.DataFrame:
        """component, kind, layer, index; one row for each of `parts`."""
        return component_table([part.component for part in self.parts])

    @property
    def values(self) -> Tensor:
        """`[c n d]`, a copy."""
        return torch.stack([part.values_ND for part in self.parts])

    def sum(self) -> Tensor:
        """`[n d]`, added up in fp64."""
        total_ND = torch.zeros_like(self.exact_ND, dtype=torch.float64)
        for part in self.parts:
            total_ND += part.values_ND
        return total_ND

    def along(self, direction: Tensor) -> Tensor:
        """`[n c]`: every component's product with a direction, `[d]` or one per token `[n d]`."""
        wide = direction.double()
        return torch.stack([(part.values_ND.double() * wide).sum(-1) for part in self.parts], 1)

    def norms(self) -> pd.DataFrame:
        """Per component: mean length, and mean share of the stream it points along,
        component . x / ||x||^2, which sums to 1."""
        shares_NC = self.along(self.exact_ND) / self.exact_ND.double().square().sum(-1, True)
        table = self.components
        table["norm"] = [float(part.values_ND.norm(dim=-1).mean()) for part in self.parts]
        table["share"] = shares_NC.mean(0).numpy()
        return table

    def __repr__(self) -> str:
        table = self.norms().groupby("kind", sort=False)[["share"]].sum().round(4)
        return (
            f"Decomposition of the residual stream at {len(self.exact_ND)} tokens into "
            f"{len(self.parts)} components; sum and stream differ by {self.residual_error:.1e} of "
            f"its length\n{table.to_string()}"
        )


def decompose(trace: Trace, model: Model | HasModel, layer: int | None = None) -> Decomposition:
    """embed_in + heads + biases + dense MLPs + slots + shared blocks = the residual stream.

    The stream is that after the last block, or `resid_mid` of `layer`, which its router reads.
    In a vision-language model `embed_in` holds the pictures' features at their tokens. Closes to
    rounding: below 1e-4 in fp32, about 1e-2 in bf16.
    """
    own = model_of(model)
    require(trace, needed_sites(own, layer), _how(layer))
    last = own.config.decoder.n_layers - 1
    exact = f"blocks.{last}.resid_post" if layer is None else f"blocks.{layer}.resid_mid"
    require(trace, [exact], _how(layer))
    trace = at_kept(trace, "embed_in")
    return Decomposition(tuple(written(trace, own, layer)), token_rows(trace, exact), trace.tokens)


def _how(layer: int | None) -> str:
    return f"el.analysis.decomposition_sites(lab{'' if layer is None else f', {layer}'})"
