"""Direct logit attribution: what each component adds to a logit, past all later layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ernie_lab.analysis.attribution import Attribution, component_table, slot_columns
from ernie_lab.analysis.components import (
    Component,
    HasModel,
    Written,
    at_kept,
    following,
    model_of,
    needed_sites,
    require,
    token_rows,
    written,
)
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.block import Block
from ernie_lab.model.kinds import Model
from ernie_lab.model.mlp import GatedMLP
from ernie_lab.model.moe import MoE
from ernie_lab.model.stack import block_list
from ernie_lab.model.text import TextModel
from ernie_lab.trace.trace import Trace

# A token id, the text of one token, or one of them for each row.
Word: TypeAlias = "int | str | Sequence[int | str]"
_HOW = "el.analysis.decomposition_sites(lab)"


def direct_logit_attribution(
    trace: Trace,
    model: Model | HasModel,
    token: Word = "next",
    against: Word | None = None,
    *,
    base: Trace | None = None,
) -> Attribution:
    """logit(token) - logit(against) after every token of the trace, over components.

    Without `against` the logit is centred: minus its mean over the vocabulary, since a softmax
    does not see what is added to all logits alike.

    contribution = scale * c . (gain * (w_token - w_against)), and the head's bias as a component
    of its own. scale = 1 / rms of the final stream is that of the recorded run, or of `base`
    where the trace is of an edited run, so that the two can be compared; it is a constant here,
    so the sum is exact. Slots are conditional on the recorded choice and weights of experts.
    Direct means past later layers: what a component does through them is not in it. This is
    another function than the logit lens, which normalises every partial stream anew.

    Args:
        token, against: ids, or texts of one token (with a `Lab`), for all rows or one for each;
            `"next"` is the token that follows, for the rows that have one.
    """
    own = model_of(model)
    last = own.config.decoder.n_layers - 1
    final = f"blocks.{last}.resid_post"
    require(trace, [*needed_sites(own), final, "final_norm.scale"], _HOW)
    trace = at_kept(trace, "embed_in")
    readout = _Readout.of(trace, model, token, against, base)
    parts = list(written(trace, own))
    values = [readout.along(part.values_ND) for part in parts]
    components = [part.component for part in parts]
    if readout.bias_R is not None:
        components.append(Component("head_bias"))
        values.append(readout.bias_R)
    exact_R = readout.recorded(trace) if base is None and "logits" in trace.values else None
    if exact_R is None:
        exact_R = readout.along(token_rows(trace, final))
        exact_R = exact_R if readout.bias_R is None else exact_R + readout.bias_R
    return _attribution("Direct logit attribution", readout, components, values, parts, exact_R)


def neuron_attribution(
    trace: Trace,
    model: Model | HasModel,
    layer: int,
    token: Word = "next",
    against: Word | None = None,
    *,
    base: Trace | None = None,
) -> Attribution:
    """The direct effect of a layer's shared block (or dense MLP) on a logit, over its neurons.

    contribution = act_f * scale * down[:, f] . (gain * (w_token - w_against)); the bias of
    `down`, where there is one, is the component `mlp_bias`. The sum is what
    `direct_logit_attribution` gives the whole block.
    """
    own = model_of(model)
    mlp, act, out = _gated(block_list(own.blocks)[layer], layer)
    require(trace, [act, out, "final_norm.scale"], f"[{act!r}, {out!r}, 'final_norm.scale']")
    trace = at_kept(trace, act)
    readout = _Readout.of(trace, model, token, against, base)
    act_RF = token_rows(trace, act)[readout.rows_R].double()
    down_RF = readout.direction_RD @ mlp.down.weight.detach().double().cpu()
    values = list((act_RF * down_RF).unbind(1))
    components = [Component("neuron", layer, f) for f in range(act_RF.shape[1])]
    if mlp.down.bias is not None:
        components.append(Component("mlp_bias", layer))
        values.append(readout.direction_RD @ mlp.down.bias.detach().double().cpu())
    exact_R = readout.along(token_rows(trace, out))
    return _attribution(f"Neurons of {out}", readout, components, values, [], exact_R)


def _gated(block: Block, layer: int) -> tuple[GatedMLP, str, str]:
    if isinstance(block.moe, MoE | BankedMoE):
        if block.moe.shared is None:
            raise ValueError(f"layer {layer} has no shared experts")
        at = f"blocks.{layer}.moe"
        return block.moe.shared, f"{at}.shared.act", f"{at}.shared_out"
    assert block.mlp is not None
    return block.mlp, f"blocks.{layer}.mlp.act", f"blocks.{layer}.mlp.mlp_out"


@dataclass(frozen=True, slots=True, eq=False)
class _Readout:
    """For each number R: its token's row, and the direction `[r d]` in the stream that it reads,
    the scale included; on the CPU, in fp64. `ids_R` and `against_R` say which it is."""

    rows_R: Tensor
    direction_RD: Tensor
    bias_R: Tensor | None
    ids_R: Tensor
    against_R: Tensor | None
    targets: pd.DataFrame

    @classmethod
    def of(
        cls,
        trace: Trace,
        model: Model | HasModel,
        token: Word,
        against: Word | None,
        base: Trace | None,
    ) -> _Readout:
        own, n, after_N = model_of(model), len(trace), following(trace)
        rows = torch.arange(n)
        if token == "next":
            rows = torch.tensor([i for i, after in enumerate(after_N) if after is not None])
            if not len(rows):
                raise ValueError('token="next": no token of this trace has one after it')
            ids_R = torch.tensor([after for after in after_N if after is not None])
        else:
            ids_R = _ids(model, token, n, "token")
        against_R = None if against is None else _ids(model, against, n, "against")[rows]
        scale_N = token_rows(trace, "final_norm.scale")
        if base is not None:
            scale_N = _same_tokens(base, trace)
        weight_VD = own.embed_VD if own.unembed_VD is None else own.unembed_VD
        gain_D = own.final_norm.gain_D.detach().double().cpu()
        bias_V = own.unembed_bias_V if isinstance(own, TextModel) else None
        words_RD = _contrast(weight_VD.detach(), ids_R, against_R)
        bias_R = None if bias_V is None else _contrast(bias_V.detach(), ids_R, against_R)
        direction_RD = words_RD * gain_D * scale_N[rows].double().cpu()[:, None]
        targets = trace.tokens.iloc[rows.tolist()][["sequence", "pos", "id", "text"]]
        targets = targets.reset_index(drop=True).assign(token=ids_R.numpy())
        if against_R is not None:
            targets["against"] = against_R.numpy()
        return cls(rows, direction_RD, bias_R, ids_R, against_R, targets)

    def along(self, values_ND: Tensor) -> Tensor:
        return (values_ND[self.rows_R].double().cpu() * self.direction_RD).sum(-1)

    def recorded(self, trace: Trace) -> Tensor:
        """The same contrasts of the logits that flowed."""
        logits_RV = token_rows(trace, "logits")[self.rows_R].double().cpu()
        first_R = logits_RV.gather(1, self.ids_R[:, None])[:, 0]
        if self.against_R is None:
            return first_R - logits_RV.mean(1)
        return first_R - logits_RV.gather(1, self.against_R[:, None])[:, 0]


def _contrast(weight: Tensor, ids_R: Tensor, against_R: Tensor | None) -> Tensor:
    """Rows of `[v …]` for the tokens, minus those of the others or the mean over the vocabulary."""
    mine = weight[ids_R.to(weight.device)].double().cpu()
    if against_R is None:
        return mine - weight.float().mean(0).double().cpu()
    return mine - weight[against_R.to(weight.device)].double().cpu()


def _ids(model: Model | HasModel, word: Word, n: int, name: str) -> Tensor:
    words: list[Any] = [word] * n if isinstance(word, int | str) else list(word)
    if len(words) != n:
        raise ValueError(
            f"{name}: {len(words)} given for {n} tokens of the trace; one, or one each"
        )
    known: dict[Any, int] = {}
    for one in words:
        if one not in known:
            known[one] = _id(model, one, name)
    return torch.tensor([known[one] for one in words])


def _id(model: Model | HasModel, word: int | str, name: str) -> int:
    vocab = model_of(model).config.decoder.vocab_size
    if isinstance(word, str):
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"{name}={word!r}: pass the lab, whose tokenizer knows it, or an id")
        ids = tokenizer.encode(word)
        if len(ids) != 1:
            raise ValueError(
                f"{name}={word!r} is {len(ids)} tokens {tokenizer.token_strings(ids)}, expected "
                "one; does it need a space before it?"
            )
        return int(ids[0])
    if not 0 <= word < vocab:
        raise ValueError(f"{name}={word} must be in 0..{vocab - 1}")
    return int(word)


def _same_tokens(base: Trace, trace: Trace) -> Tensor:
    """The final norm's scale of another run on the same tokens."""
    require(base, ["final_norm.scale"], "'final_norm.scale'")
    base = at_kept(base, "final_norm.scale")
    mine = [
        (trace.context.sequence[i], trace.context.pos[i], trace.context.id[i])
        for i in trace.rows_N.tolist()
    ]
    theirs = [
        (base.context.sequence[i], base.context.pos[i], base.context.id[i])
        for i in base.rows_N.tolist()
    ]
    if mine != theirs:
        raise ValueError("base is a trace of other tokens; run it on the same prompt")
    return token_rows(base, "final_norm.scale")


def _attribution(
    title: str,
    readout: _Readout,
    components: list[Component],
    values: list[Tensor],
    parts: list[Written],
    exact_R: Tensor,
) -> Attribution:
    rows = readout.rows_R.numpy()
    experts = np.full((len(rows), len(components)), -1)
    banks = experts.copy()
    if parts:
        experts[:, : len(parts)], banks[:, : len(parts)] = slot_columns(parts, rows)
    return Attribution(
        title=title,
        targets=readout.targets.assign(value=exact_R.numpy()),
        components=component_table(components),
        values=torch.stack(values, 1).numpy(),
        experts=experts,
        banks=banks,
    )
