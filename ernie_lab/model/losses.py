"""Training-time terms of the router, as pure functions. Source: ernie-facts 5, design.md 5.

The bias update at the end is not a loss: it is the rule by which ERNIE's correction bias came
to be, so a trained bias is a record of the load it had to fight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

IGNORED = -100


def next_token_loss(
    logits_BSV: Float[Tensor, "b s v"], labels_BS: Int[Tensor, "b s"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of predicting `labels[s + 1]` at s; -100 is not counted.

    NaN when no label counts, as in transformers: there is nothing to take a mean of.
    """
    return cross_entropy(
        rearrange(logits_BSV[:, :-1].float(), "b s v -> (b s) v"),
        rearrange(labels_BS[:, 1:], "b s -> (b s)").to(logits_BSV.device),
        ignore_index=IGNORED,
    )


def expert_load(expert_ids_NK: Int[Tensor, "n k"], n_experts: int) -> Float[Tensor, " e"]:
    """f_e: share of all slots that went to expert e, `[e]`, sums to 1."""
    counts_E = torch.bincount(expert_ids_NK.flatten(), minlength=n_experts)
    return counts_E / counts_E.sum()


def switch_loss(
    probs_NE: Float[Tensor, "n e"], expert_ids_NK: Int[Tensor, "n k"]
) -> Float[Tensor, ""]:
    """E * sum_e f_e * mean_n p_ne for one layer and bank; 1 when balanced (Fedus et al. 2021).

    f_e counts the experts really chosen, the correction bias included.
    """
    n_experts = probs_NE.shape[-1]
    load_E = expert_load(expert_ids_NK, n_experts).to(probs_NE)
    return n_experts * (load_E * probs_NE.mean(0)).sum()


def pooled_switch_loss(
    probs_by_layer: Sequence[Tensor], ids_by_layer: Sequence[Tensor], mask_N: Tensor | None = None
) -> Tensor:
    """`switch_loss` on transformers' scale: k when balanced, load and probability pooled over
    the layers before they are multiplied. Each `[n e]` and `[n k]`; `mask_N` leaves out padding.
    """

    def real(x: Tensor) -> Tensor:
        return x if mask_N is None else x[mask_N]

    probs_NE = torch.cat([real(p) for p in probs_by_layer])
    ids = [real(i) for i in ids_by_layer]
    if len({ids_NK.shape[-1] for ids_NK in ids}) > 1:  # an edit gave some layers another k
        ids_J = torch.cat([ids_NK.flatten() for ids_NK in ids])
        load_E = expert_load(ids_J.unsqueeze(-1), probs_NE.shape[-1]).to(probs_NE)
        return len(ids_J) / len(probs_NE) * probs_NE.shape[-1] * (load_E * probs_NE.mean(0)).sum()
    ids_NK = torch.cat(ids)
    return ids_NK.shape[-1] * switch_loss(probs_NE, ids_NK)


def unbiased_choice(probs_NE: Float[Tensor, "n e"], n_chosen: int) -> Int[Tensor, "n k"]:
    """The experts that would be chosen without the correction bias, `[n k]`.

    transformers' `aux_loss` counts these, so it describes experts that the model did not use.
    """
    return probs_NE.topk(n_chosen, dim=-1).indices


def orthogonal_loss(weight_ED: Float[Tensor, "e d"]) -> Float[Tensor, ""]:
    """||W W^T - I||_F^2 / E^2 with rows of length 1; rows (1,0), (1,1) give 0.25."""
    unit_ED = normalize(weight_ED, dim=-1, eps=1e-12)
    gram_EE = einsum(unit_ED, unit_ED, "e d, f d -> e f")
    return (gram_EE - torch.eye(len(gram_EE), device=gram_EE.device)).square().mean()


def z_loss(router_logits_NE: Float[Tensor, "n e"]) -> Float[Tensor, ""]:
    """mean_n logsumexp_e(logits)^2 (ST-MoE, Zoph et al. 2022)."""
    return router_logits_NE.logsumexp(-1).square().mean()


def updated_correction_bias(
    bias_E: Float[Tensor, " e"], counts_E: Int[Tensor, " e"], step: float = 1e-3
) -> Float[Tensor, " e"]:
    """bias + step * sign(mean count - count): the aux-loss-free balancing rule.

    One update per optimiser step and layer, from the counts of that step. The released models
    were trained with step 1e-3.
    """
    counts_E = counts_E.to(bias_E)
    return bias_E + step * torch.sign(counts_E.mean() - counts_E)
