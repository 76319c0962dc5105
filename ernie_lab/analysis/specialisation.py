"""Does the router tell labels apart, and more than a router that learned nothing?

Bits between expert and label, never alone: beside them stand the same figure for permuted labels,
for untrained twins and for redrawn routers, all on the same tokens. Routers that learned nothing
tell a great deal, since the states they read differ. What is above them is learned, and even that
is information and not function: a model may use the experts of its prettiest router for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from ernie_lab.analysis.beside_nulls import UNTRAINED, Question, layer_specialisation
from ernie_lab.analysis.nulls import Choice, Permuted
from ernie_lab.analysis.token_groups import By, documents_of, groups_of, require_same_tokens
from ernie_lab.display import ranges
from ernie_lab.interventions.bootstrap import few_drawn
from ernie_lab.interventions.redraw import states_of
from ernie_lab.model.redraw import VARIANTS, OtherRouter, choose
from ernie_lab.trace.trace import Trace

# By layer, the gate `[e d]` of the bank; or a lab, or its model, which has them.
Gates: TypeAlias = "Mapping[int, Tensor] | Any"
# Kernels may break a tie otherwise; another gate agrees on few tokens.
_AGREE = 0.99


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Specialisation:
    """Bits between experts and a label in every layer, and what three nulls give.

    `table` has one row per layer. `bits`, `low`, `high`: the learned router, with a 95 %
    interval over documents. `permuted`, `permuted_p95`: permuted labels, their mean and what
    one more exceeds in at most 5 % of cases (by rank: of 40 draws the second largest, of 20 the
    largest). `untrained`, `untrained_max`: the untrained twins' mean and largest, NaN without
    one. For each way to redraw the router, `norm_` and `variance_`: `median` and `p95` of the
    draws, likewise, and `percentile`, the share of draws that tell less than the learned router,
    in percent. `above`: are the bits above the p95 of both ways? `above_twins`: are they above
    every untrained twin's (False without one)? `excess`, `excess_low`, `excess_high`: learned
    minus the mean of all redrawn routers, paired over documents. Its interval is of other
    documents, not of other routers: that of a router which is itself random excludes 0 often,
    and only `above` says that one is not. `label_bits` and `expert_bits` bound the bits.
    `max_violation`: of the learned router, where biases were fitted; `redrawn_max_violation`:
    that of the draw furthest from it.

    `nulls` has every draw: layer, null, draw, bits. `by` says what was permuted. The least p
    that n redrawn routers can give is 1 / (n + 1), and layers are not corrected for.
    """

    label: str
    table: pd.DataFrame
    nulls: pd.DataFrame
    by: Permuted
    model: str
    bank: str | None
    given: str | None
    n_tokens: int
    n_documents: int
    n_fitted: int
    n_redrawn: int

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(int(layer) for layer in self.table.index)

    @property
    def above(self) -> tuple[int, ...]:
        """The layers whose router tells more than 95 % of the redrawn ones, both ways."""
        return tuple(int(layer) for layer in self.table.index[self.table["above"]])

    @property
    def above_twins(self) -> tuple[int, ...]:
        """The layers whose router tells more than every untrained twin's."""
        return tuple(int(layer) for layer in self.table.index[self.table["above_twins"]])

    @property
    def n_twins(self) -> int:
        return int(self.nulls.loc[self.nulls["null"] == UNTRAINED, "draw"].nunique())

    @property
    def above_in_words(self) -> str:
        """What is above which null: "above 95 % of … in layers 2..5; above … in layer 2"."""
        n = self.n_twins
        who = {1: "the untrained twin", 2: "both untrained twins"}.get(
            n, f"all {n} untrained twins"
        )
        mine = f"above {who} in {_in_words(self.above_twins)}"
        twins = mine if n else "untrained twins were not asked"
        redrawn = f"above 95 % of the redrawn routers of both kinds in {_in_words(self.above)}"
        return f"{redrawn}; {twins}"

    @property
    def subject(self) -> str:
        """What the bits are of: "expert and domain", "vision expert and shape given id"."""
        whose = f"{self.bank} expert" if self.bank else "expert"
        return f"{whose} and {self.label}" + (f" given {self.given}" if self.given else "")

    def __repr__(self) -> str:
        parts = ["bits", "permuted_p95", "untrained_max"]
        parts += [f"{variant}_{part}" for variant in VARIANTS for part in ("median", "p95")]
        shown = self.table[parts].round(3)
        spans = [f"[{row.low:.3f}, {row.high:.3f}]" for row in self.table.itertuples()]
        shown.insert(1, "interval", spans)
        shown["percentiles"] = [
            f"{row.norm_percentile:g}, {row.variance_percentile:g}"
            for row in self.table.itertuples()
        ]
        redrawn, twins = self.table["above"], self.table["above_twins"]
        shown["above"] = np.where(redrawn, "redrawn", "neither" if self.n_twins else "no")
        if self.n_twins:
            shown.loc[twins, "above"] = np.where(redrawn[twins], "redrawn, twins", "twins")
        else:
            shown = shown.drop(columns="untrained_max")
        shown.columns = [column.replace("_", " ") for column in shown.columns]
        return "\n".join(
            [
                f"{self.model}: bits between {self.subject}, {self.n_tokens:,} tokens of "
                f"{self.n_documents} documents",
                shown.to_string(),
                f"norm, variance: {self.n_redrawn} redrawn routers each, fitted to the learned "
                f"load on {self.n_fitted:,} other tokens; percentiles: the percent of them that "
                f"tell less, norm and variance. Permuted: {self.by}.{few_drawn(self.n_documents)}",
                f"{self.above_in_words[0].upper()}{self.above_in_words[1:]}.",
            ]
        )


def specialisation(
    trace: Trace,
    labels: By,
    gates: Gates,
    *,
    bank: str | None = None,
    label: str | None = None,
    layers: Sequence[int] | None = None,
    untrained: Trace | Iterable[Trace] = (),
    given: By | None = None,
    weighted: bool = False,
    documents: By | None = None,
    n_redrawn: int = 40,
    n_permuted: int = 100,
    n_draws: int = 300,
    seed: int = 0,
) -> Specialisation:
    """Information between expert and label beside its three nulls, layer by layer.

    Documents are halved. On one half the correction biases of redrawn routers and of untrained
    twins are fitted until their MaxVio is the learned router's there, within 0.05; on the other
    half everything is measured, the learned router too. Redrawn routers read the trained
    model's own states; a twin reads its own.

    Labels that are constant in every document are permuted over documents, others among the
    tokens of each document, and with `given` among tokens of equal given value.

    Cost: 2 x `n_redrawn` gates a layer, on all tokens. Narrow with `layers`. Every seed, layer and
    draw has a gate of its own: where `percentile` is near 95, another `seed` may decide otherwise;
    more redrawn routers are the answer, not another seed.

    Args:
        trace: kept with `keep=["routing", "moe.in"]`, of several texts.
        labels: one for each token of this bank's routing, or the name of a token coordinate;
            None and NaN leave a token out of the bits, not out of the fit.
        gates: the lab (or model) that the trace is of, or its gate weights `[e d]` by layer.
        label: what the labels are called; the coordinate's name, else "label".
        untrained: traces of untrained twins on the same tokens (`untrained_twin`), kept with
            `keep="routing"`.
        given: bits beyond this: `"id"` for beyond the token itself. See `mutual_information`.
        weighted: rows count by the weight of their expert instead of equally, nulls' too.
        documents: the document of each token; its sequence unless given.
        n_draws: of the bootstrap over documents.

    Raises:
        ValueError: one document; one label; gates that do not give the recorded choice; a
            twin of other tokens.
    """
    routing = trace.routing(bank)
    ids = routing.expert_ids
    document_N, n_documents = documents_of(ids, documents)
    if n_documents < 2:
        raise ValueError(
            "nulls are fitted on some documents and measured on others, and this is one: run "
            "several texts, or pass documents="
        )
    given_N = None if given is None else groups_of(ids, given).code_N
    question = Question.of(
        groups_of(ids, labels).code_N, document_N, given_N, n_redrawn=n_redrawn,
        n_permuted=n_permuted, n_draws=n_draws, weighted=weighted, seed=seed,
    )  # fmt: skip
    twins = [untrained] if isinstance(untrained, Trace) else list(untrained)
    probs = [_probs(twin, ids, bank) for twin in twins]
    weights = routing.expert_weights
    numbers = [int(layer) for layer in ids.coords["layer"].values]
    rows, nulls = [], []
    for layer in numbers if layers is None else layers:
        if layer not in numbers:
            raise ValueError(f"layer {layer} has no routing here; layers {ranges(numbers)} have")
        learned = Choice(ids.sel(layer=layer).values, weights.sel(layer=layer).values)
        (states_ND,) = states_of(trace, (layer,), bank).tensors.values()
        gate_ED = _gate(gates, layer, bank)
        bias_E = routing.correction_bias.sel(layer=layer).values
        _require_gate(learned, states_ND, gate_ED, torch.tensor(bias_E), layer)
        of_twins = [torch.tensor(p.sel(layer=layer).values) for p in probs]
        told, drawn = layer_specialisation(question, learned, states_ND, gate_ED, of_twins, layer)
        rows.append({"layer": layer, **told})
        nulls.append(drawn.assign(layer=layer))
    return Specialisation(
        label=label or (labels if isinstance(labels, str) else "label"),
        table=pd.DataFrame(rows).set_index("layer"),
        nulls=pd.concat(nulls, ignore_index=True)[["layer", "null", "draw", "bits"]],
        by=question.by,
        model=trace.provenance.model,
        bank=bank,
        given=given if given is None or isinstance(given, str) else "given",
        n_tokens=int(question.measured_N.sum()),
        n_documents=len(np.unique(document_N[question.measured_N])),
        n_fitted=int(question.fitted_N.sum()),
        n_redrawn=n_redrawn,
    )


def _in_words(layers: tuple[int, ...]) -> str:
    """ "layers 2..5", "layer 1", "no layer"."""
    return f"layer{'s' if len(layers) > 1 else ''} {ranges(layers)}" if layers else "no layer"


def _gate(gates: Gates, layer: int, bank: str | None) -> Tensor:
    """The gate's weights `[e d]`, fp32 on the CPU."""
    model = getattr(gates, "model", gates)
    if isinstance(model, nn.Module):
        routers: Any = model.routers()  # type: ignore[operator]
        weight_ED = (routers if bank is None else routers[bank])[layer].weight_ED
    elif layer in gates:
        weight_ED = gates[layer]
    else:
        raise ValueError(f"gates has nothing for layer {layer}; it has layers {sorted(gates)}")
    return torch.as_tensor(weight_ED).detach().float().cpu()


def _probs(twin: Trace, ids: Any, bank: str | None) -> Any:
    """The router probabilities of a twin that read the same tokens."""
    probs = twin.routing(bank).router_probs
    require_same_tokens(probs, ids)
    return probs


def _require_gate(
    learned: Choice, states_ND: Tensor, gate_ED: Tensor, bias_E: Tensor, layer: int
) -> None:
    """Is this the gate that made the recorded choice?"""
    k = learned.ids_NK.shape[1]
    again_NK = choose(states_ND, OtherRouter(gate_ED, bias_E), k).numpy()
    same = (np.sort(again_NK, 1) == np.sort(learned.ids_NK, 1)).all(1).mean()
    if same < _AGREE:
        raise ValueError(
            f"layer {layer}: the gate gives the recorded experts of {same:.0%} of the tokens only. "
            "Pass the lab that the trace is of; a trace of edited routing has no redrawn null"
        )
