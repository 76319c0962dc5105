"""The router: who is chosen, and how much each of the chosen counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from ernie_lab.checkpoint.config import RouterConfig
from ernie_lab.sites import Site, Tap, idle


@dataclass(frozen=True, slots=True)
class RouterSites:
    """`rows` are the dims of the rows: `b s` in a text model, `n` in a bank."""

    router_logits: Site
    router_probs: Site
    selection_scores: Site
    expert_ids: Site
    expert_weights: Site

    @classmethod
    def under(cls, path: str, rows: str = "b s") -> RouterSites:
        def site(name: str, last: str, meaning: str, dtype: str = "float32") -> Site:
            return Site(f"{path}.{name}", f"{rows} {last}", meaning, dtype)

        return cls(
            router_logits=site("router_logits", "e", "before softmax; editing it re-routes"),
            router_probs=site("router_probs", "e", "softmax, without the correction bias"),
            selection_scores=site("selection_scores", "e", "probs + correction bias; only chooses"),
            expert_ids=site("expert_ids", "k", "chosen experts, by falling score", "int64"),
            expert_weights=site(
                "expert_weights",
                "k",
                "unbiased probs of the chosen, renormalised; what multiplies the experts",
                "model",
            ),
        )


class Routing(NamedTuple):
    """What one router decided: everything a balance loss or a recorder may ask for.

    The rows N are `[b s]` in a text model. In a bank of a vision-language one they are its
    tokens alone, and `rows_N` says which of the flattened `(b s)` these are.
    """

    probs_NE: Tensor
    expert_ids_NK: Tensor
    expert_weights_NK: Tensor
    rows_N: Tensor | None = None


class Router(nn.Module):
    """logits = W x;  p = softmax(logits);  chosen = top-k(p + bias);  w = p[chosen] / sum.

    The correction bias balances load during training, so it moves *who* is chosen and never
    *how much* each counts. All in fp32, whatever the model's dtype: bf16 logits over 64
    experts tie often enough to flip the choice. The weights are cast to the dtype of `x`,
    because that is the tensor that multiplies. Source: ernie-facts 3.1; the reference applied
    the bias to the weights until transformers #39581. No gradient flows through the choice.
    """

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.config = config
        # fp32 here, in `load` and under `.to(dtype)`; see the docstring.
        self.weight_ED = nn.Parameter(
            torch.empty(config.n_experts, config.width, dtype=torch.float32)
        )
        self.correction_bias_E = nn.Parameter(
            torch.empty(config.n_experts, dtype=torch.float32), requires_grad=False
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """`model.to(torch.bfloat16)` moves a router and does not round it."""
        exact = {name: parameter.detach() for name, parameter in self.named_parameters()}
        super()._apply(fn, recurse)
        for name, parameter in self.named_parameters():
            if parameter.dtype != torch.float32:
                parameter.data = exact[name].float().to(parameter.device)
        return self

    def forward(self, x_ND: Tensor, at: RouterSites, tap: Tap = idle) -> Routing:
        """`x_ND` `[… d]`, whatever its rows are."""
        with torch.autocast(x_ND.device.type, enabled=False):
            logits_NE = tap(at.router_logits, linear(x_ND.float(), self.weight_ED.float()))
            probs_NE = tap(at.router_probs, logits_NE.softmax(-1))
            scores_NE = tap(at.selection_scores, probs_NE + self.correction_bias_E.float())
            ids_NK = scores_NE.topk(self.config.n_chosen, -1).indices
            edited_NK = tap(at.expert_ids, ids_NK)
            if edited_NK is not ids_NK:
                ids_NK = _possible(edited_NK, self.config.n_experts, at.expert_ids)
            chosen_NK = probs_NE.gather(-1, ids_NK)
            weights_NK = renormalise(chosen_NK, self.config.min_weight_sum).to(x_ND.dtype)
        return Routing(probs_NE, ids_NK, tap(at.expert_weights, weights_NK))


def renormalise(weights_NK: Float[Tensor, "*n k"], floor: float) -> Float[Tensor, "*n k"]:
    """Weights divided by their sum over the slots, the sum being at least `floor`."""
    return weights_NK / weights_NK.sum(-1, keepdim=True).clamp(min=floor)


def _possible(ids_NK: Tensor, n_experts: int, site: Site) -> Tensor:
    """Edited ids, if a router could have chosen them: in range, no expert twice for a token."""
    if ids_NK.numel() == 0:
        return ids_NK
    if bool(((ids_NK < 0) | (ids_NK >= n_experts)).any()):
        low, high = int(ids_NK.min()), int(ids_NK.max())
        raise ValueError(f"{site.path} was edited to {low}..{high}, expected 0..{n_experts - 1}")
    sorted_NK = ids_NK.sort(-1).values
    if bool((sorted_NK[..., 1:] == sorted_NK[..., :-1]).any()):
        raise ValueError(
            f"{site.path} was edited to name one expert twice for a token; give distinct experts, "
            "or change expert_weights to let one count more"
        )
    return ids_NK
