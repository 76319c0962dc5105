"""Which experts are alike: in their weights, up to the order of their neurons, and in what they do.

The cosine of two flattened expert matrices means nothing: any order of the neurons is the same
expert. So neurons are paired first, or the outputs are compared instead. Neither is an ablation:
experts may be alike and both be needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, normalize, silu

from ernie_lab.analysis.components import HasModel
from ernie_lab.analysis.geometry import labelled_similarity, mixture
from ernie_lab.model.experts import ExpertBank
from ernie_lab.model.kinds import Model

if TYPE_CHECKING:
    import xarray as xr

# Cells of neuron against neuron to be assigned, over all pairs: about a minute's work.
_MOST_CELLS = 300_000_000
_RANDOM_PAIRS = 4
_ROWS = 1024  # of inputs at one time


def matched_neurons(
    model: Model | HasModel,
    layer: int,
    bank: str | None = None,
    *,
    experts: Sequence[int] | None = None,
    seed: int = 0,
) -> xr.DataArray:
    """How alike two experts' weights are once their neurons are paired, (expert, other).

    The order of an expert's neurons means nothing, and neither does turning the signs of both
    `up` and `down` of one. So neurons f and g are compared by

        s = (cos(gate_f, gate_g) + cos(up_f, up_g) cos(down_f, down_g)) / 2

    which is 1 for equal neurons up to such turns and positive scale of `up` and `down`, and paired
    one to one so that the mean of s is largest (Hungarian assignment, scipy); that mean is the
    value. Pairing finds something in any two experts: the attribute `chance` is the mean over
    pairs of Gaussian experts of this size, `chance_most` the largest of them.
    """
    _, bank_of = mixture(model, layer, bank)
    # Read once: a quantised bank dequantises its weights anew each time.
    gate_up_E2FD, down_EDF = bank_of.gate_up_E2FD, bank_of.down_EDF
    numbers = _experts(experts, len(down_EDF))
    hidden, width = gate_up_E2FD.shape[2:]
    n_pairs = len(numbers) * (len(numbers) - 1) // 2
    if n_pairs * hidden**2 > _MOST_CELLS:
        raise ValueError(
            f"{n_pairs} pairs of experts with {hidden} neurons each take too long to match: "
            "narrow with experts=[…]"
        )
    parts = {e: _neurons(gate_up_E2FD[e], down_EDF[e]) for e in numbers}
    values = np.eye(len(numbers))
    for a, b in combinations(range(len(numbers)), 2):
        values[a, b] = values[b, a] = _matched(parts[numbers[a]], parts[numbers[b]])
    generator = torch.Generator().manual_seed(seed)

    def drawn() -> tuple[Tensor, Tensor, Tensor]:
        gate_up = torch.randn(2, hidden, width, generator=generator)
        return _neurons(gate_up, torch.randn(width, hidden, generator=generator))

    random = [_matched(drawn(), drawn()) for _ in range(_RANDOM_PAIRS)]
    return labelled_similarity(
        values, "mean similarity of matched neurons", layer=layer, numbers=numbers,
        chance=float(np.mean(random)), chance_most=max(random),
        chance_name="two Gaussian experts of this size, matched likewise",
    )  # fmt: skip


def expert_output_similarity(
    model: Model | HasModel, states: Any, layer: int, bank: str | None = None
) -> xr.DataArray:
    """Mean cosine of two experts' outputs on the same inputs, (expert, other).

    `states` are what the experts of this layer read, `[n d]`: `trace["blocks.3.moe.in"]`, in a
    vision-language model the rows of the bank's own tokens. Every expert reads every input, also
    those that the router never sends it: of what an expert does there, training said nothing.
    Other than weights, outputs cannot be misled by the order of neurons. No reference at chance
    exists but 0: experts that share a mean output are alike for that alone.
    """
    _, bank_of = mixture(model, layer, bank)
    down_EDF = bank_of.down_EDF
    x_ND = torch.as_tensor(np.array(states)).to(down_EDF)
    if x_ND.ndim != 2 or x_ND.shape[1] != down_EDF.shape[1] or not len(x_ND):
        raise ValueError(
            f"states of shape {tuple(x_ND.shape)}; expected [n, {down_EDF.shape[1]}], what "
            f"experts of layer {layer} read: keep 'blocks.{layer}.moe.in'"
        )
    total_EE = torch.zeros(2 * (len(down_EDF),), dtype=torch.float64)
    for rows_ND in x_ND.split(_ROWS):
        total_EE += _output_cosines(bank_of, rows_ND)
    cosines = (total_EE / len(x_ND)).numpy()
    return labelled_similarity(
        cosines, "mean cosine of outputs on the same inputs", layer=layer, n_tokens=len(x_ND)
    )


@torch.no_grad()
def _output_cosines(bank_of: ExpertBank, x_ND: Tensor) -> Tensor:
    """Summed over the inputs, `[e e]`."""
    outs = []
    for gate_up_2FD, down_DF in zip(bank_of.gate_up_E2FD, bank_of.down_EDF, strict=True):
        hidden_NF = silu(linear(x_ND, gate_up_2FD[0])) * linear(x_ND, gate_up_2FD[1])
        outs.append(normalize(linear(hidden_NF, down_DF).float(), dim=-1))
    unit_END = torch.stack(outs)
    return torch.einsum("e n d, o n d -> e o", unit_END, unit_END).double().cpu()


def _neurons(gate_up_2FD: Tensor, down_DF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gate, up and down of every neuron, `[f d]`, of length 1."""
    gate_FD, up_FD = gate_up_2FD.detach().float().cpu()
    down_FD = down_DF.detach().float().cpu().T
    return normalize(gate_FD, dim=-1), normalize(up_FD, dim=-1), normalize(down_FD, dim=-1)


def _matched(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> float:
    from scipy.optimize import linear_sum_assignment

    gate_FF, up_FF, down_FF = (a @ b.T for a, b in zip(one, other, strict=True))
    alike_FF = ((gate_FF + up_FF * down_FF) / 2).numpy()
    rows, cols = linear_sum_assignment(alike_FF, maximize=True)
    return float(alike_FF[rows, cols].mean())


def _experts(experts: Sequence[int] | None, n_experts: int) -> list[int]:
    numbers = list(range(n_experts)) if experts is None else [int(e) for e in experts]
    wrong = [e for e in numbers if not 0 <= e < n_experts]
    if wrong or len(set(numbers)) < 2 or len(set(numbers)) < len(numbers):
        raise ValueError(f"experts={numbers}: two or more different ones of 0 to {n_experts - 1}")
    return numbers
