"""What the text and the vision-language model share: a stack of blocks over a residual stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_lab.model.attention import visible_keys
from ernie_lab.model.banks import BankRows
from ernie_lab.model.block import Block
from ernie_lab.model.cache import Cache, KVCache
from ernie_lab.model.losses import pooled_switch_loss, unbiased_choice
from ernie_lab.model.placed import device_of, in_turn, moved
from ernie_lab.model.rope import Rotation
from ernie_lab.model.router import Routing
from ernie_lab.sites import Tap


@dataclass(frozen=True, slots=True)
class ModelOutput:
    """What a model returns, by transformers' names where it has them.

    `aux_loss` counts the experts really chosen: one value in a text model, one for each bank
    in a vision-language model. `aux_loss_transformers` is what transformers reports, which
    ignores the correction bias and mixes the banks. Both are None unless asked for.
    """

    logits: Tensor
    loss: Tensor | None = None
    aux_loss: Tensor | dict[str, Tensor] | None = None
    aux_loss_transformers: Tensor | None = None
    past_key_values: KVCache | None = None


@dataclass(frozen=True, slots=True)
class Hidden:
    """The end of the trunk: normed states, every mixture layer's routing, the cache if any.

    `routings` holds, for each bank, one `Routing` per mixture layer; a text model's only bank
    is `"text"`. `mask_BS` is True on real tokens; None means all are. `next_position_B` is
    where each sequence goes on.
    """

    normed_BSD: Tensor
    routings: Mapping[str, tuple[Routing, ...]]
    mask_BS: Tensor | None
    cache: KVCache | None
    next_position_B: Tensor | None = None

    def commit(self) -> None:
        """Let the cache count this pass's rows; call it when nothing can fail any more."""
        if self.cache is not None:
            self.cache.commit(self.normed_BSD.shape[1], self.next_position_B)

    def aux_losses(self) -> dict[str, Tensor]:
        """By bank: the auxiliary loss of the experts really chosen, in transformers' scale.

        A bank that no real token went to is absent: a balance of nothing does not exist.
        """
        losses = {}
        for bank, routings in self.routings.items():
            parts = [self._real(routing) for routing in routings]
            if any(len(probs_NE) for probs_NE, _ in parts):
                losses[bank] = pooled_switch_loss(
                    [probs_NE for probs_NE, _ in parts], [ids_NK for _, ids_NK in parts]
                )
        return losses

    def aux_loss_transformers(self) -> Tensor:
        """What transformers reports: blind to the bias, and in a vision-language model with
        expert e of both banks in one column."""
        layers = zip(*self.routings.values(), strict=True)
        parts = [self._real(routing) for layer in layers for routing in layer]
        probs = [probs_NE for probs_NE, _ in parts]
        k = parts[0][1].shape[-1]
        return pooled_switch_loss(probs, [unbiased_choice(probs_NE, k) for probs_NE in probs])

    def _real(self, routing: Routing) -> tuple[Tensor, Tensor]:
        """Probabilities `[n e]` and choices `[n k]` of real tokens."""
        probs_NE = routing.probs_NE.reshape(-1, routing.probs_NE.shape[-1])
        ids_NK = routing.expert_ids_NK.reshape(-1, routing.expert_ids_NK.shape[-1])
        if self.mask_BS is None:
            return probs_NE, ids_NK
        real_N = self.mask_BS.flatten()
        if routing.rows_N is not None:
            real_N = real_N[routing.rows_N]
        return probs_NE[real_N], ids_NK[real_N]


def run_blocks(
    blocks: Sequence[Block],
    resid_BSD: Tensor,
    rope: Rotation,
    visible_BST: Tensor | None,
    banks: BankRows | None,
    cache: Cache | None,
    tap: Tap,
) -> tuple[Tensor, dict[str, tuple[Routing, ...]]]:
    """The residual stream after the last block, and the routing of each bank by layer.

    Values go to the device of each block's weights; what is returned lies where the stream began.
    """
    routings: dict[str, list[Routing]] = {}
    home, given = resid_BSD.device, (rope, visible_BST, banks)
    with in_turn(blocks) as turns:
        for block in turns:
            if (there := device_of(block)) != resid_BSD.device:
                resid_BSD, given = moved(resid_BSD, there), moved(given, there)
            resid_BSD, chosen = block(resid_BSD, *given, cache, tap)
            for bank, routing in chosen.items():
                routings.setdefault(bank, []).append(moved(routing, home))
    found = {bank: tuple(layers) for bank, layers in routings.items()}
    return moved(resid_BSD, home), found


def cache_for(past: KVCache | None, use_cache: bool, n_layers: int) -> KVCache | None:
    if past is None:
        return KVCache(n_layers) if use_cache else None
    if not isinstance(past, KVCache):
        raise TypeError(
            f"past_key_values is a {type(past).__name__}, expected the KVCache that a call with "
            "use_cache=True returns"
        )
    return past


def visible(attention_mask: Tensor | None, n_past: int, n_new: int) -> Tensor | None:
    """`[b s t]`, or None when every key is real and the plain causal rule does."""
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] != n_past + n_new:
        raise ValueError(
            f"attention_mask covers {attention_mask.shape[1]} positions, expected "
            f"{n_past} in the cache + {n_new} new = {n_past + n_new}"
        )
    return visible_keys(attention_mask, n_new)


def new_mask(attention_mask: Tensor | None, n_new: int) -> Tensor | None:
    """`[b s]` of the new positions, True on real tokens; None when no mask was given."""
    return None if attention_mask is None else attention_mask[:, -n_new:].bool()


def kept_positions(x_BSD: Tensor, keep: int | Tensor) -> Tensor:
    """The positions that `logits_to_keep` names: the last n, or a tensor of them; 0 is all."""
    if isinstance(keep, Tensor):
        return x_BSD[:, keep]
    return x_BSD[:, -keep:] if keep else x_BSD


def require_tokens(tokens_BSD: Tensor) -> None:
    if tokens_BSD.shape[1] == 0:
        raise ValueError("the input has no tokens; give at least one per sequence")


def counted_positions(n_past: int, n_new: int, like: Tensor) -> Tensor:
    """`[b s]`, counted on from the cache, padding included, as transformers does."""
    new_S = torch.arange(n_past, n_past + n_new, device=like.device)
    return new_S.expand(like.shape[0], -1)


def block_list(blocks: Iterable[object]) -> list[Block]:
    """The blocks of a ModuleList with the type that torch has forgotten."""
    return [block for block in blocks if isinstance(block, Block)]
