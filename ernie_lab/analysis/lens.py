"""The logit lens: what a partial stream would predict if the model ended there.

It normalises every partial state anew, so it is another function than direct logit attribution,
which holds the final norm's scale: lens logits of parts do not add up to anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ernie_lab.analysis.components import (
    HasModel,
    Place,
    at_kept,
    following,
    model_of,
    require,
    slots,
    token_rows,
)
from ernie_lab.display import visible
from ernie_lab.interventions.metrics import kl_divergence
from ernie_lab.model.banks import BankedMoE
from ernie_lab.model.kinds import Model
from ernie_lab.model.moe import MoE
from ernie_lab.model.stack import block_list
from ernie_lab.sites import all_sites, idle
from ernie_lab.trace.trace import Trace

# Rows whose `[n v]` logits exist at one time.
_CHUNK = 512


def lens_logits(model: Model | HasModel, x_ND: Tensor) -> Tensor:
    """unembed(gain * x / rms(x)) `[n v]`: the model's own final norm and head, on any vectors."""
    own = model_of(model)
    weight = own.embed_VD
    with torch.no_grad():
        x_1ND = x_ND.to(device=weight.device, dtype=weight.dtype)[None]
        normed_1ND = own.final_norm(x_1ND, own.sites.final_norm, idle)
        return own.unembed(normed_1ND)[0].float().cpu()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Lens:
    """`table`: one row for each place and token: `n_top` most likely words (`top`, `top_id`,
    `top_prob` of the first), `entropy` in nats, the rank and probability of the token that
    follows (rank 1 is the most likely), and `kl`, KL(final || lens) in nats.

    `logits` holds `[n v]` by layer where they were asked for.
    """

    table: pd.DataFrame
    n_top: int
    logits: dict[int, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self._wide().to_string()

    def _repr_html_(self) -> str:
        html: str = self._wide().to_html()
        return html

    def _wide(self) -> pd.DataFrame:
        """Tokens down, layers across, the most likely word in each cell."""
        rows = ["sequence", "pos", "text"] + [c for c in ("slot",) if c in self.table]
        return self.table.pivot(index=rows, columns="layer", values="top")


def logit_lens(
    trace: Trace,
    model: Model | HasModel,
    place: Place = "resid_post",
    *,
    n_top: int = 1,
    keep_logits: bool = False,
) -> Lens:
    """The stream at `place` of every layer that was kept there, through final norm and head.

    The last layer's `resid_post` gives the model's own prediction, so its `kl` is 0. Needs
    `keep="residual"`, or these sites; `kl` needs the last layer's `resid_post` too and is NaN
    without it.
    """
    own = model_of(model)
    paths = {
        block.layer: f"blocks.{block.layer}.{place}"
        for block in block_list(own.blocks)
        if f"blocks.{block.layer}.{place}" in trace.values
    }
    if not paths:
        require(trace, [f"blocks.0.{place}"], f"[{place!r}], of every layer")
    trace = at_kept(trace, next(iter(paths.values())))
    final_ND = _final(trace, own)
    frames, logits = [], {}
    for layer, path in paths.items():
        x_ND = token_rows(trace, path)
        found = _read(trace, model, x_ND, torch.arange(len(trace)), final_ND, n_top, keep_logits)
        frames.append(found[0].assign(layer=layer))
        if found[1] is not None:
            logits[layer] = found[1]
    return Lens(_ordered(pd.concat(frames, ignore_index=True), "layer"), n_top, logits)


def expert_lens(
    trace: Trace,
    model: Model | HasModel,
    layer: int,
    *,
    n_top: int = 1,
) -> Lens:
    """The output of every chosen expert of a layer, and of its shared block, read by itself.

    One row for each token and slot; `expert` and `bank` say whose output it is, `slot` -1 is the
    shared block. Before the expert's weight, which the norm takes out anyway. Needs
    `keep=el.analysis.expert_lens_sites(lab, layer)`.
    """
    own = model_of(model)
    moe = _mixture(own, layer)
    require(trace, _of_experts(own, layer), f"el.analysis.expert_lens_sites(lab, {layer})")
    shared = f"blocks.{layer}.moe.shared_out"
    if shared in trace.values:
        trace = at_kept(trace, shared)
    out_NKD, ids_NK, bank_N = slots(trace, moe, layer, "expert_out")
    rows_N, final_ND = torch.arange(len(trace)), _final(trace, own)
    parts: list[tuple[int, Tensor, Any, Any]] = [
        (slot, out_NKD[:, slot], ids_NK[:, slot].numpy(), bank_N.numpy())
        for slot in range(out_NKD.shape[1])
    ]
    if shared in trace.values:
        parts.append((-1, token_rows(trace, shared), -1, -1))
    names = np.array(["text", "vision", "shared"], dtype=object)
    frames = [
        _read(trace, model, x_ND, rows_N, final_ND, n_top, False)[0].assign(
            layer=layer, slot=slot, expert=experts, bank=names[bank]
        )
        for slot, x_ND, experts, bank in parts
    ]
    return Lens(_ordered(pd.concat(frames, ignore_index=True), "layer", "slot"), n_top)


def expert_lens_sites(model: Model | HasModel, layer: int) -> list[str]:
    """What to pass as `keep=` for `expert_lens` of this layer."""
    own = model_of(model)
    shared = [] if _mixture(own, layer).shared is None else [f"blocks.{layer}.moe.shared_out"]
    last = f"blocks.{own.config.decoder.n_layers - 1}.resid_post"
    return [*_of_experts(own, layer), *shared, last]


def _of_experts(model: Model, layer: int) -> list[str]:
    endings = (".expert_out", ".expert_ids")
    sites = [site for site in all_sites(model) if site.layer == layer]
    return [site.path for site in sites if site.path.endswith(endings)]


def _mixture(model: Model, layer: int) -> MoE | BankedMoE:
    moe = block_list(model.blocks)[layer].moe
    if moe is None:
        raise ValueError(f"layer {layer} is dense: it has no experts")
    mixture: MoE | BankedMoE = moe
    return mixture


def _read(
    trace: Trace,
    model: Model | HasModel,
    x_ND: Tensor,
    rows_N: Tensor,
    final_ND: Tensor | None,
    n_top: int,
    keep_logits: bool,
) -> tuple[pd.DataFrame, Tensor | None]:
    """One place at all tokens."""
    pieces, kept = [], []
    next_ids = [-1 if after is None else after for after in following(trace)]
    for start in range(0, len(x_ND), _CHUNK):
        here = slice(start, start + _CHUNK)
        logits_NV = lens_logits(model, x_ND[here])
        final_NV = None if final_ND is None else lens_logits(model, final_ND[here])
        pieces.append(_columns(model, logits_NV, final_NV, next_ids[here], n_top))
        if keep_logits:
            kept.append(logits_NV)
    tokens = trace.tokens.iloc[rows_N.tolist()][["sequence", "pos", "id", "text"]]
    columns = pd.concat(pieces, ignore_index=True)
    table = pd.concat([tokens.reset_index(drop=True), columns], axis=1)
    return table, torch.cat(kept) if kept else None


def _columns(
    model: Model | HasModel,
    logits_NV: Tensor,
    final_NV: Tensor | None,
    next_ids: Sequence[int],
    n_top: int,
) -> pd.DataFrame:
    log_p_NV = logits_NV.log_softmax(-1)
    p_NV = log_p_NV.exp()
    best = p_NV.topk(n_top, -1)
    next_N = torch.tensor(next_ids)
    has_next_N = next_N >= 0
    next_logit_N = logits_NV.gather(1, next_N.clamp(min=0)[:, None])
    rank_N = 1 + (logits_NV > next_logit_N).sum(-1)
    nan = torch.full((len(next_N),), torch.nan)
    kl_N = nan if final_NV is None else kl_divergence(final_NV, logits_NV)
    words = [", ".join(_word(model, i) for i in ids) for ids in best.indices.tolist()]
    return pd.DataFrame(
        {
            "top": pd.Series(words, dtype=object),
            "top_id": best.indices[:, 0].numpy(),
            "top_prob": best.values[:, 0].numpy(),
            "entropy": -torch.where(p_NV > 0, p_NV * log_p_NV, 0.0).sum(-1).numpy(),
            "next_rank": torch.where(has_next_N, rank_N, nan).numpy(),
            "next_prob": torch.where(
                has_next_N, p_NV.gather(1, next_N.clamp(min=0)[:, None])[:, 0], nan
            ).numpy(),
            "kl": kl_N.numpy(),
        }
    )


def _word(model: Model | HasModel, token: int) -> str:
    tokenizer = getattr(model, "tokenizer", None)
    return str(token) if tokenizer is None else visible(tokenizer.token_strings([token])[0])


def _final(trace: Trace, model: Model) -> Tensor | None:
    path = f"blocks.{model.config.decoder.n_layers - 1}.resid_post"
    return token_rows(trace, path) if path in trace.values else None


def _ordered(table: pd.DataFrame, *first: str) -> pd.DataFrame:
    named = [*first, *(c for c in ("expert", "bank") if c in table)]
    return table[[*named, *(c for c in table if c not in named)]]
