"""The text decoder: embedding, blocks, final norm, unembedding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.model.block import Block, BlockSites
from ernie_lab.model.cache import KVCache
from ernie_lab.model.linear import linear
from ernie_lab.model.losses import next_token_loss
from ernie_lab.model.moe import MoE
from ernie_lab.model.norm import NormSites, RMSNorm
from ernie_lab.model.rope import rotation
from ernie_lab.model.router import Router
from ernie_lab.model.stack import (
    Hidden,
    ModelOutput,
    block_list,
    cache_for,
    counted_positions,
    kept_positions,
    new_mask,
    require_tokens,
    run_blocks,
    visible,
)
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class TextSites:
    embed: Site
    embed_in: Site
    blocks: tuple[BlockSites, ...]
    final_norm: NormSites
    logits: Site


class TextModel(nn.Module):
    """ERNIE 4.5 for text, dense or with mixture layers.

    Building it allocates and does not initialise: `load` fills every parameter exactly once,
    `initialise` draws random ones.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_VD = nn.Parameter(torch.empty(config.vocab_size, config.width))
        blocks = [Block(config, layer) for layer in range(config.n_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = RMSNorm(config.width, config.norm_eps)
        self.unembed_VD = (
            None if config.tied else nn.Parameter(torch.empty(config.vocab_size, config.width))
        )
        self.unembed_bias_V = (
            nn.Parameter(torch.empty(config.vocab_size)) if config.head_bias else None
        )
        self.sites = TextSites(
            embed=Site("embed", "b s d", "token embeddings"),
            embed_in=Site("embed_in", "b s d", "what enters the first block"),
            blocks=tuple(block.sites for block in blocks),
            final_norm=NormSites.under("final_norm"),
            logits=Site("logits", "b s v", "next-token logits"),
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_router_logits: bool = False,
        logits_to_keep: int | Tensor = 0,
        *,
        tap: Tap = idle,
    ) -> ModelOutput:
        """Arguments and conventions of transformers' `Ernie4_5_MoeForCausalLM`.

        Args:
            input_ids: `[b s]`; or give `inputs_embeds` `[b s d]` instead.
            attention_mask: `[b t]` with t = past + s, 1 on real tokens; padding on either side.
            position_ids: `[b s]`; counted from the cache's length when absent, padding included.
            labels: `[b s]`; -100 is not counted. Shifted here, so pass the input ids.
            output_router_logits: compute both auxiliary losses and, with labels, add
                coefficient x `aux_loss_transformers` to `loss`, as transformers does.
            logits_to_keep: the last n positions, or a tensor of positions; 0 keeps all.
            tap: sees, and may replace, the value at every site.
        """
        hidden = self.trunk(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, tap
        )
        logits_BSV = self.unembed(kept_positions(hidden.normed_BSD, logits_to_keep), tap)
        loss = None if labels is None else next_token_loss(logits_BSV, labels)
        aux = aux_transformers = None
        if output_router_logits and self.config.moe:
            aux = hidden.aux_losses()["text"]
            aux_transformers = hidden.aux_loss_transformers()
            if loss is not None:
                loss = loss + self.config.moe.aux_loss_coef * aux_transformers
        hidden.commit()
        return ModelOutput(logits_BSV, loss, aux, aux_transformers, hidden.cache)

    def trunk(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        tap: Tap = idle,
    ) -> Hidden:
        """Everything but the unembedding, whose `[b s v]` is often the largest tensor of all.

        What it wrote to the cache counts only after `commit()` on the result.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        tokens_BSD = inputs_embeds if input_ids is None else embedding(input_ids, self.embed_VD)
        assert tokens_BSD is not None
        require_tokens(tokens_BSD)
        cache = cache_for(past_key_values, use_cache, self.config.n_layers)
        n_past, n_new = 0 if cache is None else cache.length, tokens_BSD.shape[1]
        if position_ids is None:
            position_ids = counted_positions(n_past, n_new, like=tokens_BSD)
        visible_BST = visible(attention_mask, n_past, n_new)

        resid_BSD = tap(self.sites.embed_in, tap(self.sites.embed, tokens_BSD))
        rope = rotation(self.config.rope, self.config.attention.head_dim, position_ids)
        blocks = block_list(self.blocks)
        resid_BSD, routings = run_blocks(blocks, resid_BSD, rope, visible_BST, None, cache, tap)
        normed_BSD = self.final_norm(resid_BSD, self.sites.final_norm, tap)
        return Hidden(normed_BSD, routings, new_mask(attention_mask, n_new), cache)

    def routers(self) -> dict[int, Router]:
        """The router of every mixture layer, by layer number."""
        return {
            block.layer: block.moe.router
            for block in block_list(self.blocks)
            if isinstance(block.moe, MoE)
        }

    def unembed(self, normed_BSD: Tensor, tap: Tap = idle) -> Tensor:
        weight_VD = self.embed_VD if self.unembed_VD is None else self.unembed_VD
        return tap(self.sites.logits, linear(normed_BSD, weight_VD, self.unembed_bias_V))
