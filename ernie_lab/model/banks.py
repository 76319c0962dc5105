"""The mixture layer of the vision-language models: one bank of experts for each modality.

A token goes to the text bank or to the vision bank, whole; the shared experts see all. Every
routing quantity exists twice, under `.text` and `.vision`, one row for each token of that
bank: expert 5 of the one has nothing to do with expert 5 of the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from ernie_lab.checkpoint.config import MoEConfig, VLConfig
from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.model.experts import ExpertBank, ExpertSites
from ernie_lab.model.mlp import GatedMLP, MLPSites
from ernie_lab.model.router import Router, RouterSites, Routing
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class BankSites:
    """In the order in which they fire; all have one row for each token of the bank."""

    router: RouterSites
    experts: ExpertSites
    routed_out: Site

    @classmethod
    def under(cls, path: str) -> BankSites:
        return cls(
            router=RouterSites.under(path, rows="n"),
            experts=ExpertSites.under(path, rows="n"),
            routed_out=Site(f"{path}.routed_out", "n d", "weighted sum over this bank's slots"),
        )


@dataclass(frozen=True, slots=True)
class BankedMoESites:
    input: Site
    bank: Site
    text: BankSites
    vision: BankSites
    routed_out: Site
    shared: MLPSites | None
    moe_out: Site

    @classmethod
    def under(cls, path: str, has_shared: bool) -> BankedMoESites:
        shared = MLPSites.under(f"{path}.shared", f"{path}.shared_out", "the shared experts")
        return cls(
            input=Site(f"{path}.in", "b s d", "what routers and experts read"),
            bank=Site(
                f"{path}.bank",
                "b s",
                "which bank each token goes to: 0 text, 1 vision; editing it moves tokens",
                "int64",
            ),
            text=BankSites.under(f"{path}.text"),
            vision=BankSites.under(f"{path}.vision"),
            routed_out=Site(f"{path}.routed_out", "b s d", "both banks' routed_out, in place"),
            shared=shared if has_shared else None,
            moe_out=Site(f"{path}.moe_out", "b s d", "routed_out + shared_out"),
        )


@dataclass(frozen=True, slots=True, eq=False)
class BankRows:
    """Which tokens belong to each bank: `rows[i]` indexes the flattened `(b s)`.

    A bank's rows stand in reading order, sequence by sequence.
    """

    bank_BS: Tensor
    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, bank_BS: Tensor) -> BankRows:
        flat_N = bank_BS.flatten()
        return cls(bank_BS, tuple((flat_N == i).nonzero().squeeze(1) for i in range(len(BANKS))))

    def edited(self, bank_BS: Tensor, site: Site) -> BankRows:
        """These rows, or those of an edited assignment."""
        if bank_BS is self.bank_BS:
            return self
        if bool(((bank_BS != 0) & (bank_BS != 1)).any()):
            found = sorted(set(bank_BS.flatten().tolist()))
            raise ValueError(
                f"{site.path} was edited to {found[:5]}, expected 0 (text) and 1 (vision) alone"
            )
        return BankRows.of(bank_BS)


class Bank(nn.Module):
    """One modality's router and experts, on its own tokens `[n d]`."""

    def __init__(self, moe: MoEConfig, width: int, hidden: int, path: str) -> None:
        super().__init__()
        self.router = Router(moe.router)
        self.experts = ExpertBank(moe.router.n_experts, width, hidden)
        self.sites = BankSites.under(path)

    def forward(self, x_ND: Tensor, tap: Tap = idle) -> tuple[Tensor, Routing]:
        at = self.sites
        routing = self.router(x_ND, at.router, tap)
        routed_ND = self.experts(
            x_ND, routing.expert_ids_NK, routing.expert_weights_NK, at.experts, tap
        )
        return tap(at.routed_out, routed_ND), routing


class BankedMoE(nn.Module):
    """moe_out = text bank on text tokens, vision bank on vision tokens, + shared on all.

    The banks differ in the width of their experts. Source: ernie-facts 2.3 and 3.4.
    """

    def __init__(self, config: VLConfig, path: str) -> None:
        super().__init__()
        text, moe = config.text, config.text.moe
        assert moe is not None
        self.text = Bank(moe, text.width, moe.expert_hidden, f"{path}.text")
        self.vision = Bank(moe, text.width, config.vision_expert_hidden, f"{path}.vision")
        self.shared = (
            GatedMLP(text.width, moe.shared_hidden, text.use_bias) if moe.n_shared else None
        )
        self.sites = BankedMoESites.under(path, has_shared=moe.n_shared > 0)

    def forward(
        self, x_BSD: Tensor, banks: BankRows, tap: Tap = idle
    ) -> tuple[Tensor, dict[str, Routing]]:
        at = self.sites
        x_BSD = tap(at.input, x_BSD)
        banks = banks.edited(tap(at.bank, banks.bank_BS), at.bank)
        x_ND = rearrange(x_BSD, "b s d -> (b s) d")
        routed_ND, routings = torch.zeros_like(x_ND), {}
        for name, bank, rows_N in zip(BANKS, (self.text, self.vision), banks.rows, strict=True):
            own_ND, routing = bank(x_ND.index_select(0, rows_N), tap)
            routed_ND = routed_ND.index_copy(0, rows_N, own_ND)
            routings[name] = routing._replace(rows_N=rows_N)
        routed_BSD = tap(at.routed_out, routed_ND.view_as(x_BSD))
        if self.shared is None or at.shared is None:
            return tap(at.moe_out, routed_BSD), routings
        shared_BSD = self.shared(x_BSD, at.shared, tap)
        return tap(at.moe_out, routed_BSD + shared_BSD), routings
