"""One layer of the decoder, with a dense MLP, a mixture, or a mixture of two banks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from ernie_lab.checkpoint.config import TextConfig, VLConfig
from ernie_lab.model.attention import Attention, AttentionSites
from ernie_lab.model.banks import BankedMoE, BankedMoESites, BankRows
from ernie_lab.model.cache import Cache
from ernie_lab.model.mlp import GatedMLP, MLPSites
from ernie_lab.model.moe import MoE, MoESites
from ernie_lab.model.norm import NormSites, RMSNorm
from ernie_lab.model.rope import Rotation
from ernie_lab.model.router import Routing
from ernie_lab.sites import Site, Tap, flatten


@dataclass(frozen=True, slots=True)
class BlockSites:
    """One layer, in the order of its forward. Exactly one of `mlp` and `moe` is there."""

    resid_pre: Site
    norm1: NormSites
    attn: AttentionSites
    resid_mid: Site
    norm2: NormSites
    mlp: MLPSites | None
    moe: MoESites | BankedMoESites | None
    resid_post: Site


class AnotherWay(Protocol):
    """Another way through a block, for what it serves. See `ernie_lab.model.compiled`."""

    def serves(self, block: Block, resid_BSD: Tensor, cache: Cache | None, tap: Tap) -> bool: ...

    def __call__(
        self,
        block: Block,
        resid_BSD: Tensor,
        rotation: Rotation,
        visible_BST: Tensor | None,
        banks: BankRows | None,
        cache: Cache | None,
        tap: Tap,
    ) -> tuple[Tensor, Mapping[str, Routing]]: ...


class Block(nn.Module):
    """resid_mid = resid_pre + attn(norm1(resid_pre)); resid_post = resid_mid + mlp(norm2(...))."""

    def __init__(self, config: TextConfig | VLConfig, layer: int) -> None:
        super().__init__()
        path, text = f"blocks.{layer}", config.decoder
        self.layer = layer
        self.compiled: AnotherWay | None = None
        self.norm1 = RMSNorm(text.width, text.norm_eps)
        self.attn = Attention(text.attention, f"{path}.attn")
        self.norm2 = RMSNorm(text.width, text.norm_eps)
        self.moe = _mixture(config, f"{path}.moe") if text.is_moe(layer) else None
        self.mlp = (
            None if text.is_moe(layer) else GatedMLP(text.width, text.dense_hidden, text.use_bias)
        )
        mlp_sites = MLPSites.under(f"{path}.mlp", f"{path}.mlp.mlp_out", "the dense MLP")
        self.sites = BlockSites(
            resid_pre=Site(f"{path}.resid_pre", "b s d", "residual stream, before attention"),
            norm1=NormSites.under(f"{path}.norm1"),
            attn=self.attn.sites,
            resid_mid=Site(f"{path}.resid_mid", "b s d", "residual stream, after attention"),
            norm2=NormSites.under(f"{path}.norm2"),
            mlp=None if self.moe else mlp_sites,
            moe=self.moe.sites if self.moe else None,
            resid_post=Site(f"{path}.resid_post", "b s d", "residual stream, after the MLP"),
        )
        self.paths = frozenset(site.path for site in flatten(self.sites))
        self.prefix = f"{path}."

    def forward(
        self,
        resid_pre_BSD: Tensor,
        rotation: Rotation,
        visible_BST: Tensor | None,
        banks: BankRows | None,
        cache: Cache | None,
        tap: Tap,
    ) -> tuple[Tensor, Mapping[str, Routing]]:
        """The routing is by bank; a text model's only bank is `"text"`, a dense layer has none."""
        if self.compiled is not None and self.compiled.serves(self, resid_pre_BSD, cache, tap):
            return self.compiled(self, resid_pre_BSD, rotation, visible_BST, banks, cache, tap)
        at = self.sites
        resid_pre_BSD = tap(at.resid_pre, resid_pre_BSD)
        normed_BSD = self.norm1(resid_pre_BSD, at.norm1, tap)
        attn_out_BSD = self.attn(normed_BSD, rotation, visible_BST, self.layer, cache, tap)
        return self.after(resid_pre_BSD, attn_out_BSD, banks, tap)

    def after(
        self, resid_pre_BSD: Tensor, attn_out_BSD: Tensor, banks: BankRows | None, tap: Tap
    ) -> tuple[Tensor, Mapping[str, Routing]]:
        """The layer from the end of its attention on."""
        at = self.sites
        resid_mid_BSD = tap(at.resid_mid, resid_pre_BSD + attn_out_BSD)
        normed_BSD = self.norm2(resid_mid_BSD, at.norm2, tap)
        mlp_out_BSD, routings = self._mlp(normed_BSD, banks, tap)
        return tap(at.resid_post, resid_mid_BSD + mlp_out_BSD), routings

    def _mlp(
        self, normed_BSD: Tensor, banks: BankRows | None, tap: Tap
    ) -> tuple[Tensor, Mapping[str, Routing]]:
        if isinstance(self.moe, BankedMoE):
            assert banks is not None
            banked: tuple[Tensor, dict[str, Routing]] = self.moe(normed_BSD, banks, tap)
            return banked
        if self.moe is not None:
            out_BSD, routing = self.moe(normed_BSD, tap)
            return out_BSD, {"text": routing}
        assert self.mlp is not None
        assert self.sites.mlp is not None
        return self.mlp(normed_BSD, self.sites.mlp, tap), {}


def _mixture(config: TextConfig | VLConfig, path: str) -> MoE | BankedMoE:
    return BankedMoE(config, path) if isinstance(config, VLConfig) else MoE(config, path)
