"""The routing of a trace: logits, choices, and everything that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Softmax on another device or in another kernel may differ in the last bits.
_SAME_SCORE = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Routers:
    """What the recorded values of one bank do not say: sizes, and the correction bias `[e]` by
    layer."""

    n_experts: int
    n_chosen: int
    correction_bias: Mapping[int, Tensor]

    def copied(self) -> Routers:
        """Without a tie to the model, whose parameters may change or lie on another device."""
        biases = {
            layer: bias_E.detach().to("cpu", torch.float32, copy=True)
            for layer, bias_E in self.correction_bias.items()
        }
        return Routers(self.n_experts, self.n_chosen, biases)

    def biases(self, layers: Sequence[int]) -> Tensor:
        """`[l e]`, fp32."""
        missing = [layer for layer in layers if layer not in self.correction_bias]
        if missing:
            raise ValueError(f"no correction bias is known for layers {missing}")
        return torch.stack([self.correction_bias[layer] for layer in layers])


def router_probs(logits_LNE: Tensor) -> Tensor:
    """softmax(logits), in fp32, without the correction bias."""
    return logits_LNE.float().softmax(-1)


def selection_scores(probs_LNE: Tensor, bias_LE: Tensor) -> Tensor:
    """probs + bias: the k largest are chosen."""
    return probs_LNE + bias_LE.to(probs_LNE.device).unsqueeze(1)


def margin(scores_LNE: Tensor, k: int) -> Tensor:
    """`[l n]`: selection score of the k-th minus the (k+1)-th; NaN when every expert is chosen."""
    if k == scores_LNE.shape[-1]:
        return scores_LNE.new_full(scores_LNE.shape[:-1], torch.nan)
    best = scores_LNE.topk(k + 1, -1).values
    return best[..., k - 1] - best[..., k]


def without_bias(probs_LNE: Tensor, ids_LNK: Tensor) -> Tensor:
    """`[l n k]`: would the expert in this slot be chosen by the probabilities alone?"""
    unbiased_LNK = probs_LNE.topk(ids_LNK.shape[-1], -1).indices
    return (ids_LNK.unsqueeze(-1) == unbiased_LNK.unsqueeze(-2)).any(-1)


def require_choice(
    scores_LNE: Tensor, ids_LNK: Tensor, layers: Sequence[int], prefix: str = "moe"
) -> None:
    """Raise where the recorded experts are not the k best of these derived scores.

    Then something between the logits and the choice was edited, and what is derived from the
    logits is not what flowed.
    """
    k = ids_LNK.shape[-1]
    kth_LN = scores_LNE.topk(k, -1).values[..., -1]
    lowest_LN = scores_LNE.gather(-1, ids_LNK).min(-1).values
    wrong_LN = lowest_LN < kth_LN - _SAME_SCORE
    if wrong_LN.any():
        per_layer = {
            layer: int(wrong_N.sum())
            for layer, wrong_N in zip(layers, wrong_LN, strict=True)
            if wrong_N.any()
        }
        raise ValueError(
            f"the recorded experts do not follow from logits and correction bias (tokens per "
            f"layer: {per_layer}): an edit changed something in between. Record what flowed: "
            f"keep=['routing', '{prefix}.router_probs', '{prefix}.selection_scores']"
        )
