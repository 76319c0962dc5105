"""The gated MLP of dense layers and of shared experts."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.functional import silu

from ernie_lab.model.linear import Linear
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class MLPSites:
    gate_proj: Site
    up: Site
    act: Site
    out: Site

    @classmethod
    def under(cls, path: str, out: str, what: str) -> MLPSites:
        return cls(
            gate_proj=Site(f"{path}.gate_proj", "b s f", f"gate of {what}, before silu"),
            up=Site(f"{path}.up", "b s f", f"up projection of {what}"),
            act=Site(f"{path}.act", "b s f", f"neurons of {what}: silu(gate) * up"),
            out=Site(out, "b s d", f"output of {what}, added to the residual stream"),
        )


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x).

    The owner passes the sites, so that a donor's weights fire under the receiver's names.
    """

    def __init__(self, width: int, hidden: int, use_bias: bool) -> None:
        super().__init__()
        self.gate = Linear(width, hidden, bias=use_bias)
        self.up = Linear(width, hidden, bias=use_bias)
        self.down = Linear(hidden, width, bias=use_bias)

    def forward(self, x_BSD: Tensor, at: MLPSites, tap: Tap = idle) -> Tensor:
        gate_BSF = tap(at.gate_proj, self.gate(x_BSD))
        up_BSF = tap(at.up, self.up(x_BSD))
        act_BSF = tap(at.act, silu(gate_BSF) * up_BSF)
        return tap(at.out, self.down(act_BSF))
