"""The view of one bank's routing: arrays, derived quantities and the tidy table."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ernie_lab.display import ranges
from ernie_lab.trace import routing
from ernie_lab.trace.arrays import labelled, stacked, token_coords
from ernie_lab.trace.keys import NotKept
from ernie_lab.trace.recorded import Recorded
from ernie_lab.trace.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


_ARRAYS = ("router_logits", "router_probs", "selection_scores", "expert_ids", "expert_weights")


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """One quantity of several layers: `values` is `[l n …]`, `rows` are rows of the tokens."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]
    values: Tensor

    def same_tokens(self, other: Stack) -> bool:
        return self.layers == other.layers and self.rows == other.rows

    def holding(self, values: Tensor) -> Stack:
        return Stack(self.layers, self.rows, values)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class RoutingLedger:
    """Who was chosen, how much each counts, and why; axes (layer, token, expert or slot).

    `router_probs` and `selection_scores` are, layer by layer, the recorded values where they
    were kept, else derived: softmax(logits), and that plus the correction bias; `margin`,
    `without_bias` and `to_frame` come from these. Deriving is refused past a site that was
    `edited` and not kept, since the edit may have changed what flowed and not who was chosen,
    and where the recorded choice does not follow although no edit is known.

    With `bank`, the tokens are those that this bank really read. An edit of `moe.bank` can give
    it other tokens in each layer: then take a layer at a time, `t.sel(layer=3)`.
    """

    values: Mapping[str, Recorded]
    context: Tokens
    routers: routing.Routers
    bank: str | None = None
    edited: frozenset[str] = frozenset()
    model: str = ""

    def __repr__(self) -> str:
        mine = [kept for kept in self.values.values() if f".{self.prefix}." in kept.site.path]
        sizes = sorted({kept.n_rows for kept in mine}) or [0]  # more than one under an edited bank
        n_tokens = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        layers = [kept.site.layer for kept in mine if kept.site.layer is not None]
        names = [name for name in _ARRAYS if self._sites(name)]
        whose = [self.model, f"{self.bank} bank" if self.bank else ""]
        lines = [
            f"Routing of {', '.join(filter(None, whose)) or 'one bank'}: {n_tokens} tokens x "
            f"{self.routers.n_chosen} of {self.n_experts} experts, layers {ranges(layers)}",
            f"kept: {', '.join(names) or 'nothing'}",
            "derived where logits were kept: router_probs, selection_scores, margin, without_bias",
            "correction_bias is of the checkpoint; to_frame() has a row for each token and choice",
        ]
        return "\n  ".join(lines)

    @property
    def prefix(self) -> str:
        """Where the sites are: `moe`, or `moe.text` and `moe.vision` where there are two banks."""
        return "moe" if self.bank is None else f"moe.{self.bank}"

    @property
    def n_experts(self) -> int:
        """Of this bank; `expert_ids` alone do not tell it."""
        return self.routers.n_experts

    @property
    def router_logits(self) -> xr.DataArray:
        """Before softmax."""
        return self._array("router_logits", self._kept("router_logits"), "expert")

    @property
    def router_probs(self) -> xr.DataArray:
        """Softmax of the logits, without the correction bias."""
        return self._array("router_probs", self._probs(), "expert")

    @property
    def selection_scores(self) -> xr.DataArray:
        """Probabilities + correction bias; the k best are chosen."""
        return self._array("selection_scores", self._scores(), "expert")

    @property
    def expert_ids(self) -> xr.DataArray:
        """The chosen experts, by falling selection score."""
        return self._array("expert_ids", self._kept("expert_ids"), "slot")

    @property
    def expert_weights(self) -> xr.DataArray:
        """What multiplies the chosen experts' outputs."""
        return self._array("expert_weights", self._kept("expert_weights"), "slot")

    @property
    def margin(self) -> xr.DataArray:
        """(layer, token): selection score of the k-th minus the (k+1)-th expert."""
        scores = self._scores()
        margin_LN = routing.margin(scores.values, self.routers.n_chosen)
        return self._array("margin", scores.holding(margin_LN))

    @property
    def without_bias(self) -> xr.DataArray:
        """(layer, token, slot): would this expert be chosen without the correction bias?

        That is, is it among the k most probable ones.
        """
        probs, ids = self._together(self._probs(), self._kept("expert_ids"))
        chosen_LNK = routing.without_bias(probs.values, ids.values)
        return self._array("without_bias", ids.holding(chosen_LNK), "slot")

    @property
    def correction_bias(self) -> xr.DataArray:
        """(layer, expert), as in the checkpoint; only differences within a layer matter."""
        layers = sorted(self.routers.correction_bias)
        bias_LE = self.routers.biases(layers)
        return labelled(bias_LE, ("layer", "expert"), {"layer": layers}, "correction_bias")

    def to_frame(self) -> pd.DataFrame:
        """Tidy: one row per token x layer x slot, with the columns of its token.

        In one of two banks, `bank` is the one that really read the token, `expected_bank` the one
        that its kind goes to, and layers may differ in their tokens.
        """
        import pandas as pd

        if self.bank is None:
            return self._frame()
        layers = {kept.site.layer for kept in self._sites("expert_ids")} or {None}
        frames = [self._of_layer(layer)._frame() for layer in sorted(layers, key=_number)]
        joined = pd.concat(frames, ignore_index=True)
        joined = joined.rename(columns={"bank": "expected_bank"})
        banks = pd.Series(self.bank, index=joined.index, dtype=joined["expected_bank"].dtype)
        joined.insert(list(joined.columns).index("layer"), "bank", banks)
        return joined

    def _of_layer(self, layer: int | None) -> RoutingLedger:
        mine = {path: kept for path, kept in self.values.items() if kept.site.layer == layer}
        return replace(self, values=mine)

    def _frame(self) -> pd.DataFrame:
        import numpy as np
        import pandas as pd

        ids, weights, probs, scores = self._together(
            self._kept("expert_ids"), self._kept("expert_weights"), self._probs(), self._scores()
        )
        n_layers, n_tokens, k = ids.values.shape
        tokens = self.context.take(ids.rows).table()
        repeated = tokens.iloc[np.tile(np.repeat(np.arange(n_tokens), k), n_layers)]
        margin_LNK = routing.margin(scores.values, k).unsqueeze(-1).expand(-1, -1, k)
        columns = {
            "layer": np.repeat(ids.layers, n_tokens * k),
            "slot": np.tile(np.arange(k), n_layers * n_tokens),
            "expert": _column(ids.values),
            "weight": _column(weights.values.float()),
            "prob": _column(probs.values.gather(-1, ids.values)),
            "without_bias": _column(routing.without_bias(probs.values, ids.values)),
            "margin": _column(margin_LNK),
        }
        return pd.concat([repeated.reset_index(drop=True), pd.DataFrame(columns)], axis=1)

    def _probs(self) -> Stack:
        probs, unknown = self._known_probs()
        self._refuse("router_probs", unknown)
        return probs

    def _scores(self) -> Stack:
        if self._everywhere("selection_scores"):
            return self._kept("selection_scores")
        probs, unknown = self._known_probs()
        scores, unknown = self._recorded_or("selection_scores", self._biased(probs), unknown)
        self._refuse("selection_scores", unknown)
        self._require_choice(scores, "expert_ids")
        return scores

    def _known_probs(self) -> tuple[Stack, list[int]]:
        """The probabilities, and the layers in which they are not what flowed."""
        if self._everywhere("router_probs"):
            return self._kept("router_probs"), []
        logits = self._kept("router_logits")
        derived = logits.holding(routing.router_probs(logits.values))
        probs, unknown = self._recorded_or("router_probs", derived, [])
        self._require_choice(self._biased(probs), "router_probs", "selection_scores", "expert_ids")
        return probs, unknown

    def _recorded_or(
        self, name: str, derived: Stack, unknown: Collection[int]
    ) -> tuple[Stack, list[int]]:
        """`derived`, with what was recorded in its place in the layers that have it.

        Also the layers where neither will do: derived from an `unknown` value, or across an
        edit, which may have left the choice as it was, so that nothing else gives it away.
        """
        rows_N = torch.tensor(derived.rows, dtype=torch.int64)
        recorded = {kept.site.layer: kept.parts[None] for kept in self._sites(name)}
        values, lost = derived.values.clone(), []
        for i, layer in enumerate(derived.layers):
            part = recorded.get(layer)
            if part is not None and torch.equal(part.rows_N, rows_N):
                values[i] = part.values.detach().to(values)
            elif layer in unknown or self._is_edited(name, layer):
                lost.append(layer)
        return derived.holding(values), lost

    def _refuse(self, name: str, unknown: Sequence[int]) -> None:
        if unknown:
            raise ValueError(
                f"{self.prefix}.{name} of layers {ranges(unknown)} does not follow from logits and "
                "correction bias: an edit changed it, or what comes before it. Record what flowed: "
                f"keep=['routing', '{self.prefix}.router_probs', "
                f"'{self.prefix}.selection_scores']"
            )

    def _is_edited(self, name: str, layer: int) -> bool:
        return f"blocks.{layer}.{self.prefix}.{name}" in self.edited

    def _biased(self, probs: Stack) -> Stack:
        bias_LE = self.routers.biases(probs.layers)
        return probs.holding(routing.selection_scores(probs.values, bias_LE))

    def _require_choice(self, scores: Stack, *between: str) -> None:
        """Without an edit of the sites in `between`, the choice follows from these scores."""
        if not self._sites("expert_ids"):
            return
        ids = self._kept("expert_ids")
        if not ids.same_tokens(scores):
            return
        plain = [
            i
            for i, layer in enumerate(ids.layers)
            if not any(self._is_edited(name, layer) for name in between)
        ]
        layers = [ids.layers[i] for i in plain]
        routing.require_choice(scores.values[plain], ids.values[plain], layers, self.prefix)

    def _together(self, *stacks: Stack) -> tuple[Stack, ...]:
        if not all(stack.same_tokens(stacks[0]) for stack in stacks):
            raise ValueError(
                "the routing sites were kept at different layers or positions; give them the "
                "same filters, as el.keep('routing', ...) does"
            )
        return stacks

    def _sites(self, name: str) -> list[Recorded]:
        ending = f".{self.prefix}.{name}"
        return [kept for path, kept in self.values.items() if path.endswith(ending)]

    def _everywhere(self, name: str) -> bool:
        """Was it kept in every layer whose logits, or else choices, were?"""
        mine = {kept.site.layer for kept in self._sites(name)}
        others = self._sites("router_logits") or self._sites("expert_ids")
        return bool(mine) and mine >= {kept.site.layer for kept in others}

    def _kept(self, name: str) -> Stack:
        sites = self._sites(name)
        if not sites:
            raise NotKept(
                f"{self.prefix}.{name} was not kept; run again with keep='routing' in the list"
            )
        rows_N, values = stacked(sites)
        layers = tuple(kept.site.layer for kept in sites if kept.site.layer is not None)
        return Stack(layers, tuple(rows_N.tolist()), values.cpu())

    def _array(self, name: str, stack: Stack, *last: str) -> xr.DataArray:
        coords = {"layer": list(stack.layers)} | token_coords(self.context.take(stack.rows))
        return labelled(stack.values, ("layer", "token", *last), coords, name)


def _number(layer: int | None) -> int:
    return -1 if layer is None else layer


def _column(values: Tensor) -> object:
    return values.flatten().numpy()
