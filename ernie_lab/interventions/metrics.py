"""What two runs of the same tokens differ in: pure functions of their logits and choices.

The position that predicts token s is s - 1. Everything about predictions stands at the token
that was predicted, as in `Run.token_loss`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

# Positions whose fp32 log-softmax exists at one time.
_CHUNK = 256


def kl_divergence(
    base_NV: Float[Tensor, "n v"], edited_NV: Float[Tensor, "n v"]
) -> Float[Tensor, " n"]:
    """KL(base || edited) = sum_v p_v (log p_v - log q_v) in nats, from fp32 log-softmax.

    A word that base forbids (p = 0) adds nothing, whatever the other says.
    """
    log_p_NV, log_q_NV = base_NV.float().log_softmax(-1), edited_NV.float().log_softmax(-1)
    p_NV = log_p_NV.exp()
    # Not `p > 0`, which would say 0 of a NaN.
    return torch.where(p_NV == 0, 0.0, p_NV * (log_p_NV - log_q_NV)).sum(-1)


def at_predictors(
    base_BSV: Tensor, edited_BSV: Tensor, counted_BS: Bool[Tensor, "b s"]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits `[n v]` of both runs where the counted tokens were predicted, piece by piece."""
    sequence_N, pos_N = counted_BS.nonzero(as_tuple=True)
    if bool((pos_N == 0).any()):
        raise ValueError("nothing stands before the first position to predict it")
    for start in range(0, len(pos_N), _CHUNK):
        rows, before = sequence_N[start : start + _CHUNK], pos_N[start : start + _CHUNK] - 1
        yield base_BSV[rows, before], edited_BSV[rows, before]


def set_flips(base_NK: Int[Tensor, "n k"], edited_NK: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """1 - |S and S'| / k: the share of a token's experts that others took the place of."""
    stayed_NK = (base_NK.unsqueeze(-1) == edited_NK.unsqueeze(-2)).any(-1)
    return 1 - stayed_NK.float().mean(-1)


def banked_flips(
    base_bank_N: Tensor, base_NK: Tensor, edited_bank_N: Tensor, edited_NK: Tensor
) -> Float[Tensor, " n"]:
    """`set_flips`, and 1 where a token changed its bank: expert 5 of the one is not that of the
    other."""
    return torch.where(base_bank_N == edited_bank_N, set_flips(base_NK, edited_NK), 1.0)


def logit_difference(
    logits_BV: Float[Tensor, "b v"], answers_B2: Int[Tensor, "b two"]
) -> Float[Tensor, " b"]:
    """logit(first answer) - logit(second answer), in fp32."""
    both_B2 = logits_BV.float().gather(-1, answers_B2)
    return both_B2[:, 0] - both_B2[:, 1]
