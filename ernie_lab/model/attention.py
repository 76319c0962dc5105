"""Grouped-query attention with rotary positions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ernie_lab.checkpoint.config import AttentionConfig
from ernie_lab.model.cache import Cache
from ernie_lab.model.linear import Linear
from ernie_lab.model.rope import Rotation, rotate
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class AttentionSites:
    q: Site
    k: Site
    v: Site
    q_rot: Site
    k_rot: Site
    scores: Site
    pattern: Site
    z: Site
    result: Site
    attn_out: Site

    @classmethod
    def under(cls, path: str) -> AttentionSites:
        def site(name: str, dims: str, meaning: str, on_demand: bool = False) -> Site:
            return Site(f"{path}.{name}", dims, meaning, on_demand=on_demand)

        return cls(
            q=site("q", "b s h a", "queries, before rotation"),
            k=site("k", "b s g a", "keys, before rotation"),
            v=site("v", "b s g a", "values"),
            q_rot=site("q_rot", "b s h a", "queries, rotated"),
            k_rot=site("k_rot", "b s g a", "keys, rotated: what the cache holds"),
            scores=Site(
                f"{path}.scores",
                "b h s t",
                "scaled and masked (-inf), before softmax",
                dtype="float32",
                on_demand=True,
            ),
            pattern=site("pattern", "b h s t", "attention weights; rows sum to 1", True),
            z=site("z", "b s h a", "head outputs, before the output projection"),
            result=site("result", "b s h d", "head outputs, after it; bias excluded", True),
            attn_out=site("attn_out", "b s d", "what attention writes to the residual stream"),
        )


class Attention(nn.Module):
    """softmax(q k^T / sqrt(a) + mask) v, for h query heads over g key/value heads.

    The output comes from the fused kernel. `scores`, `pattern` and `result` are computed beside
    it when someone wants them, and replace it when someone changed them or when gradients
    flow; both agree to 1e-5 in fp32 (tests/model). Head i reads key/value head i // (h / g).
    """

    def __init__(self, config: AttentionConfig, path: str) -> None:
        super().__init__()
        self.config = config
        heads, groups = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = Linear(config.width, heads, bias=config.use_bias)
        self.k = Linear(config.width, groups, bias=config.use_bias)
        self.v = Linear(config.width, groups, bias=config.use_bias)
        self.o = Linear(heads, config.width, bias=config.use_bias)
        self.sites = AttentionSites.under(path)

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        visible_BST: Tensor | None,
        layer: int,
        cache: Cache | None = None,
        tap: Tap = idle,
    ) -> Tensor:
        """`visible_BST` is True where query s may read key t; None means plain causal."""
        q_BSHA, k_BSGA, v_BSGA = self.read(x_BSD, rotation, tap)
        k_BTGA, v_BTGA = (k_BSGA, v_BSGA) if cache is None else cache.extend(layer, k_BSGA, v_BSGA)
        return self.write(self.mix(q_BSHA, k_BTGA, v_BTGA, visible_BST, tap), tap)

    def read(
        self, x_BSD: Tensor, rotation: Rotation, tap: Tap = idle
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries and keys, and values, of the new tokens."""
        at, a = self.sites, self.config.head_dim
        q_BSHA = tap(at.q, rearrange(self.q(x_BSD), "b s (h a) -> b s h a", a=a))
        k_BSGA = tap(at.k, rearrange(self.k(x_BSD), "b s (g a) -> b s g a", a=a))
        v_BSGA = tap(at.v, rearrange(self.v(x_BSD), "b s (g a) -> b s g a", a=a))
        q_BSHA = tap(at.q_rot, rotate(q_BSHA, rotation))
        return q_BSHA, tap(at.k_rot, rotate(k_BSGA, rotation)), v_BSGA

    def mix(
        self,
        q_BSHA: Tensor,
        k_BTGA: Tensor,
        v_BTGA: Tensor,
        visible_BST: Tensor | None,
        tap: Tap = idle,
    ) -> Tensor:
        """What each head gathers from the keys it may read, `[b s h a]`."""
        return tap(self.sites.z, self._mixed(q_BSHA, k_BTGA, v_BTGA, visible_BST, tap))

    def write(self, z_BSHA: Tensor, tap: Tap = idle) -> Tensor:
        """What the heads' outputs add to the residual stream."""
        return tap(self.sites.attn_out, self._project(z_BSHA, tap))

    def results(self, z_BSHA: Tensor) -> Tensor:
        """`[b s h d]`: what each head writes; their sum and the bias are `attn_out`."""
        o_DHA = rearrange(self.o.weight, "d (h a) -> d h a", a=self.config.head_dim)
        result_BSHD: Tensor = einsum(z_BSHA, o_DHA, "b s h a, d h a -> b s h d")
        return result_BSHD

    def _mixed(
        self,
        q_BSHA: Tensor,
        k_BTGA: Tensor,
        v_BTGA: Tensor,
        visible_BST: Tensor | None,
        tap: Tap,
    ) -> Tensor:
        at = self.sites
        if not (tap.wants(at.scores) or tap.wants(at.pattern)):
            return fused_attention(q_BSHA, k_BTGA, v_BTGA, visible_BST)
        per_group = self.config.n_heads // self.config.n_kv_heads
        k_BTHA = repeat(k_BTGA, "b t g a -> b t (g m) a", m=per_group)
        v_BTHA = repeat(v_BTGA, "b t g a -> b t (g m) a", m=per_group)
        scores_BHST = einsum(q_BSHA, k_BTHA, "b s h a, b t h a -> b h s t").float()
        scores_BHST = scores_BHST / math.sqrt(self.config.head_dim)
        if visible_BST is None:
            seen_BST = causal(q_BSHA.shape[1], k_BTGA.shape[1], q_BSHA.device)[None]
        else:
            seen_BST = visible_BST
        scores_BHST = scores_BHST.masked_fill(rearrange(~seen_BST, "b s t -> b 1 s t"), -math.inf)
        shown_BHST = tap(at.scores, scores_BHST) if tap.wants(at.scores) else scores_BHST
        pattern_BHST = shown_BHST.softmax(-1).to(v_BTHA.dtype)
        used_BHST = tap(at.pattern, pattern_BHST) if tap.wants(at.pattern) else pattern_BHST
        if _only_shown(shown_BHST, scores_BHST) and _only_shown(used_BHST, pattern_BHST):
            return fused_attention(q_BSHA, k_BTGA, v_BTGA, visible_BST)
        z_BSHA: Tensor = einsum(used_BHST, v_BTHA, "b h s t, b t h a -> b s h a")
        return z_BSHA

    def _project(self, z_BSHA: Tensor, tap: Tap) -> Tensor:
        if tap.wants(self.sites.result):
            result_BSHD = self.results(z_BSHA)
            used_BSHD = tap(self.sites.result, result_BSHD)
            if not _only_shown(used_BSHD, result_BSHD):
                summed_BSD: Tensor = used_BSHD.sum(-2)
                return summed_BSD if self.o.bias is None else summed_BSD + self.o.bias
        attn_out_BSD: Tensor = self.o(rearrange(z_BSHA, "b s h a -> b s (h a)"))
        return attn_out_BSD


def _only_shown(after: Tensor, before: Tensor) -> bool:
    """Did a tap leave the very tensor as it was, and will nobody differentiate through it?

    Then the fused path gives the output, so that recording changes no bit of a run. With
    gradients the explicit one must: what is recorded has to be upstream of the loss.
    """
    return after is before and not after.requires_grad


def fused_attention(
    q_BSHA: Float[Tensor, "b s h a"],
    k_BTGA: Float[Tensor, "b t g a"],
    v_BTGA: Float[Tensor, "b t g a"],
    visible_BST: Bool[Tensor, "#b s t"] | None,
) -> Float[Tensor, "b s h a"]:
    """The same function without an S x T map in memory; `[b s h a]` out."""
    n_queries, n_keys = q_BSHA.shape[1], k_BTGA.shape[1]
    # One query at the end sees everything, so it needs no mask at all.
    if visible_BST is None and 1 < n_queries < n_keys:
        visible_BST = causal(n_queries, n_keys, q_BSHA.device)[None]
    z_BHSA = scaled_dot_product_attention(
        rearrange(q_BSHA, "b s h a -> b h s a"),
        rearrange(k_BTGA, "b t g a -> b g t a"),
        rearrange(v_BTGA, "b t g a -> b g t a"),
        attn_mask=None if visible_BST is None else rearrange(visible_BST, "b s t -> b 1 s t"),
        is_causal=visible_BST is None and n_queries > 1,
        enable_gqa=q_BSHA.shape[2] != k_BTGA.shape[2],
    )
    return rearrange(z_BHSA, "b h s a -> b s h a")


def causal(n_queries: int, n_keys: int, device: torch.device) -> Bool[Tensor, "s t"]:
    """`[s t]`, True where key t is no later than query s; the queries are the last keys."""
    query_S = torch.arange(n_keys - n_queries, n_keys, device=device)
    return query_S[:, None] >= torch.arange(n_keys, device=device)


def visible_keys(attention_mask_BT: Shaped[Tensor, "b t"], n_queries: int) -> Bool[Tensor, "b s t"]:
    """`[b s t]`: causal, and only real keys; but a padding query sees itself.

    Without the last clause a row of padding would have no key at all, its softmax would be
    NaN, and 0 x NaN would reach the real tokens of the next layer.
    """
    n_keys, device = attention_mask_BT.shape[1], attention_mask_BT.device
    key_T = torch.arange(n_keys, device=device)
    self_ST = key_T[n_keys - n_queries :, None] == key_T
    return causal(n_queries, n_keys, device) & (attention_mask_BT.bool()[:, None, :] | self_ST)
