"""The mixture layer of the text models: router, routed experts, shared experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ernie_lab.checkpoint.config import TextConfig
from ernie_lab.model.experts import ExpertBank, ExpertSites
from ernie_lab.model.mlp import GatedMLP, MLPSites
from ernie_lab.model.router import Router, RouterSites, Routing
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class MoESites:
    """In the order in which they fire. `shared` is None where there are no shared experts."""

    input: Site
    router: RouterSites
    experts: ExpertSites
    routed_out: Site
    shared: MLPSites | None
    moe_out: Site

    @classmethod
    def under(cls, path: str, has_shared: bool) -> MoESites:
        shared = MLPSites.under(f"{path}.shared", f"{path}.shared_out", "the shared experts")
        return cls(
            input=Site(f"{path}.in", "b s d", "what router and experts read"),
            router=RouterSites.under(path),
            experts=ExpertSites.under(path),
            routed_out=Site(f"{path}.routed_out", "b s d", "weighted sum over the slots"),
            shared=shared if has_shared else None,
            moe_out=Site(f"{path}.moe_out", "b s d", "routed_out + shared_out"),
        )


class MoE(nn.Module):
    """moe_out = sum over chosen experts of weight * expert(x), + shared(x)."""

    def __init__(self, config: TextConfig, path: str) -> None:
        super().__init__()
        moe = config.moe
        assert moe is not None
        self.router = Router(moe.router)
        self.experts = ExpertBank(moe.router.n_experts, config.width, moe.expert_hidden)
        self.shared = (
            GatedMLP(config.width, moe.shared_hidden, config.use_bias) if moe.n_shared else None
        )
        self.sites = MoESites.under(path, has_shared=moe.n_shared > 0)

    def forward(self, x_BSD: Tensor, tap: Tap = idle) -> tuple[Tensor, Routing]:
        at = self.sites
        x_BSD = tap(at.input, x_BSD)
        routing = self.router(x_BSD, at.router, tap)
        routed_BSD = tap(
            at.routed_out,
            self.experts(x_BSD, routing.expert_ids_NK, routing.expert_weights_NK, at.experts, tap),
        )
        if self.shared is None or at.shared is None:
            return tap(at.moe_out, routed_BSD), routing
        shared_BSD = self.shared(x_BSD, at.shared, tap)
        return tap(at.moe_out, routed_BSD + shared_BSD), routing
