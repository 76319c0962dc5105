"""What the other bank would have written: the same inputs through both banks of a layer.

The direction has to be said: `tokens="vision"` takes the tokens that went to the vision bank and
gives what entered their layer to the text bank (its router and its experts), `tokens="text"` the
reverse. Nothing upstream changes, so this is the local effect, layer by layer; what a crossing does
to the answer is `el.compare` with `el.routing.cross_bank`. Large differences of the output need not
matter to the answer, nor small ones be harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from ernie_lab.analysis.components import HasModel, model_of, require
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.bootstrap import draws_of, estimate
from ernie_lab.model.banks import Bank, BankedMoE
from ernie_lab.model.kinds import Model
from ernie_lab.model.router import renormalise
from ernie_lab.model.stack import block_list
from ernie_lab.trace.trace import Trace

BankName: TypeAlias = Literal["text", "vision"]
Floats: TypeAlias = NDArray[np.float64]

_ROWS = 2048  # whose outputs exist at one time: 40 MB at the 28B model's width


def cross_bank_sites(model: Model | HasModel) -> list[str]:
    """What to pass as `keep=` for `cross_bank_counterfactual`."""
    return [f"blocks.{layer}.moe.in" for layer in _mixtures(model_of(model))]


@torch.no_grad()
def cross_bank_counterfactual(
    trace: Trace,
    model: Model | HasModel,
    tokens: BankName,
    *,
    layers: Sequence[int] | None = None,
    n_draws: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per layer: the output of the other bank beside that of the tokens' own.

    With own(x) and other(x) the routed outputs of the two banks for the same input x, and shared(x)
    that of the shared experts:

    - `cosine`: mean of cos(own(x), other(x)), with `low` and `high`;
    - `size`: mean of log2(||other(x)|| / ||own(x)||), with `size_low` and `size_high`: 1 is twice;
    - `change`: mean of ||other(x) - own(x)|| / ||own(x) + shared(x)||, how far the layer's output
      moves, with `change_low` and `change_high`.

    Two references stand beside: `by_lot_cosine`, `by_lot_size`, `by_lot_change` of k experts of the
    tokens' *own* bank drawn at random and weighed by its router (below these the other bank is
    further away than a wrong choice at home), and `shuffled_cosine`, of other(x) for another
    token of the same kind (what the two banks share whatever the token). `same_numbers` is the
    share of the chosen expert numbers on which the two routers agree, `chance` what unrelated
    choices give, k/E. Numbers of different banks are different experts, unless one bank began as
    a copy of the other.

    A token counts the same in whatever sequence it is; intervals: 95 %, bootstrap over sequences.

    Raises:
        ValueError: a text model; no token of that bank; a trace in which tokens were moved.
        NotKept: see `cross_bank_sites`.
    """
    own_model = model_of(model)
    mixtures = _mixtures(own_model)
    if not mixtures:
        raise ValueError("a crossing needs two banks of experts; this model has one")
    if tokens not in BANKS:
        raise ValueError(f'tokens={tokens!r} must be "text" or "vision"')
    numbers = list(mixtures) if layers is None else [int(layer) for layer in layers]
    if absent := [layer for layer in numbers if layer not in mixtures]:
        raise ValueError(f"layers {absent} have no banks; those that do: {list(mixtures)}")
    if moved := [path for path in trace.edited if path.endswith("moe.bank")]:
        raise ValueError(f"an edit of {moved[0]} moved tokens in this trace: take one without")
    require(trace, [f"blocks.{layer}.moe.in" for layer in numbers], "cross_bank_sites(lab)")
    rows = []
    for layer in numbers:
        array = trace[f"blocks.{layer}.moe.in"]
        place = pd.MultiIndex.from_frame(trace.tokens[["sequence", "pos"]])
        kept = pd.MultiIndex.from_arrays([array["sequence"].values, array["pos"].values])
        bank_N = trace.tokens["bank"].to_numpy()[place.get_indexer(kept)]
        mine_N = torch.tensor(bank_N == tokens)
        if not mine_N.any():
            raise ValueError(f"no token of this trace went to the {tokens} bank in layer {layer}")
        document_N = np.unique(array["sequence"].values[mine_N.numpy()], return_inverse=True)[1]
        x_ND = trace.tensor(f"blocks.{layer}.moe.in")[mine_N]
        drawn_PQ = draws_of(int(document_N.max()) + 1, n_draws, seed)
        rows.append(_row(mixtures[layer], x_ND, tokens, document_N, drawn_PQ, seed + layer))
    return pd.DataFrame(rows, index=pd.Index(numbers, name="layer"))


def _row(
    moe: BankedMoE,
    x_ND: Tensor,
    tokens: BankName,
    document_N: NDArray[np.int64],
    drawn_PQ: NDArray[np.int64],
    seed: int,
) -> dict[str, float]:
    device = moe.text.router.weight_ED.device
    generator = torch.Generator().manual_seed(seed)
    pieces = [
        torch.stack(list(_compared(moe, x.to(device), tokens, generator))).double().cpu()
        for x in x_ND.split(_ROWS)
    ]
    columns = torch.cat(pieces, dim=1).numpy()
    found = dict(zip(_MEASURES, columns, strict=True))
    router = getattr(moe, tokens).router.config
    row: dict[str, float] = {"n_tokens": len(x_ND)}
    for name, prefix in (("cosine", ""), ("size", "size_"), ("change", "change_")):
        one = estimate(found[name], document_N, drawn_PQ)
        row |= {name: one.value, f"{prefix}low": one.low, f"{prefix}high": one.high}
    for name in _MEASURES[3:]:
        known = found[name][~np.isnan(found[name])]
        row[name] = float(known.mean()) if len(known) else np.nan
    return row | {"chance": router.n_chosen / router.n_experts}


_MEASURES = (
    "cosine", "size", "change", "by_lot_cosine", "by_lot_size", "by_lot_change", "shuffled_cosine",
    "same_numbers",
)  # fmt: skip


def _compared(
    moe: BankedMoE, x_ND: Tensor, tokens: BankName, generator: torch.Generator
) -> Iterator[Tensor]:
    """`[n]` of each of the measures, in their order."""
    banks: list[Bank] = [moe.text, moe.vision] if tokens == "text" else [moe.vision, moe.text]
    (own_ND, mine), (other_ND, theirs) = (bank(x_ND) for bank in banks)
    lot_ND = _by_lot(banks[0], x_ND, mine.probs_NE, generator)
    whole_ND = own_ND if moe.shared is None else own_ND + moe.shared(x_ND, moe.sites.shared)
    own_ND, other_ND, lot_ND, whole_ND = (
        one.float() for one in (own_ND, other_ND, lot_ND, whole_ND)
    )
    for one_ND in (other_ND, lot_ND):
        yield _cosine(own_ND, one_ND)
        yield (one_ND.norm(dim=-1) / own_ND.norm(dim=-1)).log2()
        yield (one_ND - own_ND).norm(dim=-1) / whole_ND.norm(dim=-1)
    # A ring through all tokens: a random order would leave some at their own place.
    order_N = torch.randperm(len(x_ND), generator=generator).to(x_ND.device)
    shuffled_N = _cosine(own_ND[order_N], other_ND[order_N.roll(1)])
    yield shuffled_N if len(x_ND) > 1 else shuffled_N.fill_(torch.nan)
    same_NKK = mine.expert_ids_NK.unsqueeze(-1) == theirs.expert_ids_NK.unsqueeze(-2)
    yield same_NKK.any(-1).float().mean(-1)


def _by_lot(bank: Bank, x_ND: Tensor, probs_NE: Tensor, generator: torch.Generator) -> Tensor:
    """k experts of the bank at random, weighed as if the router had chosen them."""
    config = bank.router.config
    drawn_NE = torch.rand(probs_NE.shape, generator=generator).to(x_ND.device)
    ids_NK = drawn_NE.topk(config.n_chosen, -1).indices
    weights_NK = renormalise(probs_NE.gather(-1, ids_NK), config.min_weight_sum).to(x_ND.dtype)
    out_ND: Tensor = bank.experts(x_ND, ids_NK, weights_NK, bank.sites.experts)
    return out_ND


def _cosine(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """NaN where one of them is 0."""
    cosine_N: Tensor = (a_ND * b_ND).sum(-1) / (a_ND.norm(dim=-1) * b_ND.norm(dim=-1))
    return cosine_N


def _mixtures(model: Model) -> dict[int, BankedMoE]:
    return {
        block.layer: block.moe
        for block in block_list(model.blocks)
        if isinstance(block.moe, BankedMoE)
    }
