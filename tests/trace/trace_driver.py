"""Hand-made forwards through a recorder: no model, values that name their own origin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ernie_lab.sites import Phase, Site, Step
from ernie_lab.trace.keep import Keep
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorder import Recorder
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.trace import Trace

N_LAYERS, N_EXPERTS, N_CHOSEN, N_HEADS = 3, 5, 2, 3
BIAS = {layer: torch.linspace(0, 0.3, N_EXPERTS).roll(layer) for layer in (1, 2)}

# Two sequences of 2 and 4 tokens, left-padded; the first then decodes 3 tokens, the second 1.
PREFILL = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
DECODE = [torch.tensor([[1], [1]]), torch.tensor([[1], [0]]), torch.tensor([[1], [0]])]
LENGTHS = (5, 5)
IDS = [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]
TEXTS = [["a", " b", "\n", "é", "", "?"], ["<x>", "\udce4", "‮x", "\x00", "y", "z"]]


def sites() -> tuple[Site, ...]:
    """Layer 0 is dense, 1 and 2 have experts."""
    found = [Site("embed", "b s d", "token embeddings")]
    for layer in range(N_LAYERS):
        path = f"blocks.{layer}"
        found += [
            Site(f"{path}.resid_pre", "b s d", "before attention"),
            Site(f"{path}.norm1.scale", "b s", "1 / rms", "float32"),
            Site(f"{path}.norm1.normalized", "b s d", "normed"),
            Site(f"{path}.attn.k", "b s g a", "keys"),
            Site(f"{path}.attn.scores", "b h s t", "masked", "float32", on_demand=True),
            Site(f"{path}.attn.pattern", "b h s t", "weights", on_demand=True),
            Site(f"{path}.attn.z", "b s h a", "head outputs"),
            Site(f"{path}.resid_mid", "b s d", "between"),
            Site(f"{path}.norm2.normalized", "b s d", "normed"),
        ]
        if layer:
            found += [
                Site(f"{path}.moe.router_logits", "b s e", "logits", "float32"),
                Site(f"{path}.moe.router_probs", "b s e", "softmax", "float32"),
                Site(f"{path}.moe.selection_scores", "b s e", "probs + bias", "float32"),
                Site(f"{path}.moe.expert_ids", "b s k", "chosen", "int64"),
                Site(f"{path}.moe.expert_weights", "b s k", "weights"),
                Site(f"{path}.moe.shared.gate_proj", "b s f", "shared gate"),
                Site(f"{path}.moe.moe_out", "b s d", "sum"),
            ]
        else:
            found += [
                Site(f"{path}.mlp.gate_proj", "b s f", "gate"),
                Site(f"{path}.mlp.mlp_out", "b s d", "written"),
            ]
        found.append(Site(f"{path}.resid_post", "b s d", "after the MLP"))
    return (*found, Site("logits", "b s v", "next-token logits"))


SITES = sites()
SIZES = {"d": 4, "g": 1, "a": 2, "h": N_HEADS, "e": N_EXPERTS, "k": N_CHOSEN, "f": 3, "v": 6}


def steps() -> list[Step]:
    def step(phase: Phase, index: int, mask: Tensor) -> Step:
        return Step(phase, index, torch.zeros(mask.shape, dtype=torch.int64), mask.bool())

    return [step("prefill", 0, PREFILL), *(step("decode", i + 1, m) for i, m in enumerate(DECODE))]


def one_step(lengths: tuple[int, ...]) -> Step:
    """A prefill of right-padded sequences."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Step("prefill", 0, torch.zeros(mask.shape, dtype=torch.int64), mask)


def values(site: Site, shape_BS: tuple[int, int], n_keys: int, seed: int) -> Tensor:
    """Random values of the site's shape; routing that follows from its logits."""
    layer = site.layer or 0
    random = torch.Generator().manual_seed(1000 * layer + seed)
    if ".moe." in site.path and site.dims[-1] in "ek":
        logits_BSE = torch.randn((*shape_BS, N_EXPERTS), generator=random)
        probs_BSE = logits_BSE.softmax(-1)
        scores_BSE = probs_BSE + BIAS[layer]
        ids_BSK = scores_BSE.topk(N_CHOSEN, -1).indices
        chosen_BSK = probs_BSE.gather(-1, ids_BSK)
        return {
            "router_logits": logits_BSE,
            "router_probs": probs_BSE,
            "selection_scores": scores_BSE,
            "expert_ids": ids_BSK,
            "expert_weights": chosen_BSK / chosen_BSK.sum(-1, keepdim=True),
        }[site.path.rpartition(".")[2]]
    sizes = SIZES | {"b": shape_BS[0], "s": shape_BS[1], "t": n_keys}
    x = torch.randn([sizes[letter] for letter in site.dims.split()], generator=random)
    return x + len(site.path)


def drive(recorder: Recorder, over: list[Step]) -> dict[str, list[Tensor]]:
    """Fire every site in every step; returns what was fired."""
    fired: dict[str, list[Tensor]] = {site.path: [] for site in SITES}
    n_keys = 0
    for step in over:
        tap = recorder.bind(step)
        n_keys += step.mask.shape[1]
        for site in SITES:
            x = values(site, (step.mask.shape[0], step.mask.shape[1]), n_keys, step.index)
            before = x.clone()
            assert tap(site, x) is x
            assert torch.equal(x, before)
            fired[site.path].append(x)
    return fired


def routers() -> Routers:
    return Routers(N_EXPERTS, N_CHOSEN, BIAS)


def provenance() -> Provenance:
    return Provenance.now("fake/model", revision="abc", config_hash="123", seed=7, note="driver")


def generation(
    keep: object = "routing", *, edited: Collection[str] = (), **filters: object
) -> tuple[Trace, dict[str, list[Tensor]]]:
    """The batch of two above, recorded to its end."""
    recorder = Recorder(Keep.of(keep, SITES, **filters))  # type: ignore[arg-type]
    fired = drive(recorder, steps())
    trace = recorder.trace(
        IDS,
        sites=SITES,
        provenance=provenance(),
        texts=TEXTS,
        routers=routers(),
        edited=edited,
    )
    return trace, fired


def forward(lengths: tuple[int, ...], keep: object = "routing", **filters: object) -> Trace:
    recorder = Recorder(Keep.of(keep, SITES, **filters))  # type: ignore[arg-type]
    drive(recorder, [one_step(lengths)])
    ids = [[100 * i + pos for pos in range(length)] for i, length in enumerate(lengths)]
    return recorder.trace(ids, sites=SITES, provenance=provenance(), routers=routers())


def as_schema_2(folder: Path) -> None:
    """Rewrite a saved trace of a text model as the version before the pictures wrote it."""
    header = json.loads((folder / "trace.json").read_text())
    header["schema"] = 2
    header["routers"] = header["routers"].get("text")
    del header["media"], header["tokens"]["bank"]
    tensors = load_file(folder / "values.safetensors")
    renamed = {
        name.replace("correction_bias.text.", "correction_bias."): x for name, x in tensors.items()
    }
    save_file(renamed, folder / "values.safetensors")
    header["sha256"] = hashlib.sha256((folder / "values.safetensors").read_bytes()).hexdigest()
    (folder / "trace.json").write_text(json.dumps(header))
