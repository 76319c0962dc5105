"""Stage 2, one step: answers, throw-away heads, orthogonal gates, balanced biases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ernie_lab.model.losses import orthogonal_loss, updated_correction_bias
from ernie_lab.model.router import Routing
from ernie_lab.model.vl import VLModel
from ernie_lab.organisms.boards.clips import Clip
from ernie_lab.organisms.boards.draw import N_CELLS, NONE, Board
from ernie_lab.organisms.boards.planted import GLYPH_FACTS
from ernie_lab.organisms.boards.questions import KINDS
from ernie_lab.organisms.boards.recipe import (
    CLIP_MIX,
    FIRST_MIX,
    FIRST_SPARSE,
    ID,
    N_EXPERTS,
    SECOND_MIX,
    WIDTH,
    Recipe,
)
from ernie_lab.organisms.boards.rows import (
    Batch,
    Encoder,
    Marks,
    Row,
    draw_row,
    embeddings,
    mix_of,
)
from ernie_lab.organisms.boards.seeing import Seen
from ernie_lab.organisms.boards.tokens import VOCAB_SIZE
from ernie_lab.sites import Site

BLIND_MIX = {"fact": 1.0}
# After the first, second and third mixture layer.
SITES = tuple(f"blocks.{FIRST_SPARSE + i}.resid_post" for i in range(3))
# What a clip's token sees in its cell: within its pair of frames, or since the pair before.
CHANGES = ("none", "leaves", "arrives", "left since", "new since")
ONE_LOOK = ("find", "value", "fact", "name")


@dataclass(slots=True)
class TrainingTap:
    """Keeps what the throw-away heads read, and silences experts for whole rows.

    `silent_N` marks the vision tokens (in the bank's order) of rows without vision experts.
    """

    shared_dropout: float
    silent_N: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site.path in SITES:
            self.kept[site.path] = x
        if self.shared_dropout and site.path.endswith(".moe.shared_out"):
            return x * (torch.rand(len(x), 1, 1) >= self.shared_dropout)
        if self.silent_N is not None and site.path.endswith(".moe.vision.routed_out"):
            return x.masked_fill(self.silent_N.unsqueeze(-1), 0.0)
        return x


def silent_tokens(batch: Batch, share: float) -> Tensor | None:
    """The vision tokens of a random `share` of the rows; None for a share of 0."""
    if not share:
        return None
    silent_B = torch.rand(len(batch.bank_BS)) < share
    return silent_B[(batch.bank_BS == 1).nonzero()[:, 0]]


class Scaffold(nn.Module):
    """Throw-away heads that read, early, what a token should know by then.

    After the first mixture layer: a glyph its value, a clip's token what changed in its cell.
    After the second: a picture's token its own cell; a colour word the cell of its glyph; a word
    that names a fact its value; the word that completes a question, and every part of a caption,
    the cell to be read; that word the answer, where one look is enough. After the third: that
    word any other answer.
    They say *what* the stream must hold, not which expert is to hold it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.glyphs, self.changes = nn.Linear(WIDTH, 10), nn.Linear(WIDTH, len(CHANGES))
        self.places = nn.Linear(WIDTH, 2 * N_CELLS)
        self.cells, self.goals = nn.Linear(WIDTH, N_CELLS), nn.Linear(WIDTH, N_CELLS + 1)
        self.values = nn.Linear(WIDTH, 10)
        self.early, self.late = nn.Linear(WIDTH, VOCAB_SIZE), nn.Linear(WIDTH, VOCAB_SIZE)

    def forward(
        self, kept: dict[str, Tensor], batch: Batch, seen: dict[str, Seen]
    ) -> dict[str, Tensor]:
        first, second, third = (kept[site] for site in SITES)
        marks = batch.marks
        is_early_Q = np.isin(batch.kind_Q, [KINDS.index(kind) for kind in ONE_LOOK])
        return {
            "glyphs": self.at_pictures(self.glyphs, first, batch, seen["image"], "image"),
            "changes": self.at_pictures(self.changes, first, batch, seen["video"], "video"),
            "places": place_loss(self.places, second, batch),
            "cells": loss_at(self.cells, second, marks["cells"]),
            "values": loss_at(self.values, second, marks["values"]),
            "goals": loss_at(self.goals, second, marks["goals"]),
            "early": loss_at(self.early, second, marks["answers"], is_early_Q),
            "late": loss_at(self.late, third, marks["answers"], ~is_early_Q),
        }

    def at_pictures(
        self, head: nn.Linear, resid_BSD: Tensor, batch: Batch, seen: Seen, medium: str
    ) -> Tensor:
        """At the tokens of all pictures of a kind; 0 where the batch has none."""
        rows = [b for b, found in enumerate(batch.medium_B) if found == medium]
        if not rows:
            return resid_BSD.new_zeros(())
        is_picture_BS = batch.ids_BS[rows] == ID["<|IMAGE_PLACEHOLDER|>"]
        wanted = [token_labels(seen.scenes[batch.scene_B[b]]) for b in rows]
        wanted_M = torch.from_numpy(np.concatenate(wanted))
        return cross_entropy(head(resid_BSD[rows][is_picture_BS]), wanted_M, ignore_index=NONE)


def place_loss(head: nn.Linear, resid_BSD: Tensor, batch: Batch) -> Tensor:
    """At every token of a picture: which of the 16 cells it is, and of which pair of frames."""
    n_cells = {"none": 0, "image": N_CELLS, "video": 2 * N_CELLS}
    wanted = [torch.arange(n_cells[medium]) for medium in batch.medium_B]
    is_picture_BS = batch.ids_BS == ID["<|IMAGE_PLACEHOLDER|>"]
    return cross_entropy(head(resid_BSD[is_picture_BS]), torch.cat(wanted))


def loss_at(
    head: nn.Linear, resid_BSD: Tensor, marks: Marks, these: np.ndarray | None = None
) -> Tensor:
    """Cross-entropy at the marks, or at `these` of them; 0 where there are none."""
    chosen = np.arange(len(marks.rows)) if these is None else np.flatnonzero(these)
    if not len(chosen):
        return resid_BSD.new_zeros(())
    rows, places, wanted = (
        torch.from_numpy(np.array(column)[chosen])
        for column in (marks.rows, marks.places, marks.wanted)
    )
    return cross_entropy(head(resid_BSD[rows, places]), wanted)


def token_labels(scene: Board | Clip) -> np.ndarray:
    """Of an image the values of its cells, of a clip the changes in its cells, `[m]`."""
    return cell_changes(scene) if isinstance(scene, Clip) else cell_values(scene)


def cell_changes(clip: Clip) -> np.ndarray:
    """`[pair cell]`, flattened: an index of CHANGES."""
    changes = np.zeros((2, N_CELLS), np.int64)
    for move in clip.moves:
        between = move.after == 1
        pair = 0 if move.after == 0 else 1
        changes[pair, move.start] = CHANGES.index("left since" if between else "leaves")
        changes[pair, move.stop] = CHANGES.index("new since" if between else "arrives")
    return changes.ravel()


def cell_values(board: Board) -> np.ndarray:
    """`[cell]`, NONE where a cell is empty."""
    values_C: np.ndarray = GLYPH_FACTS[board.shape_C, board.colour_C]
    return np.where(board.shape_C == NONE, NONE, values_C)


def optimiser(model: VLModel, scaffold: Scaffold, recipe: Recipe) -> torch.optim.AdamW:
    """Weight decay on matrices; none on gains, the embedding and the heads. The eye is frozen."""
    decayed: list[nn.Parameter] = []
    free = list(scaffold.parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim > 1 and "embed" not in name else free).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=recipe.betas, fused=True)


def progress(recipe: Recipe, step: int) -> float:
    return step / recipe.n_steps


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to a share of the peak."""
    warm = min(1.0, (step + 1) / recipe.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * progress(recipe, step)))
    return recipe.peak_lr * warm * (recipe.final_lr_share + (1 - recipe.final_lr_share) * cosine)


def board_mix(recipe: Recipe, step: int) -> dict[str, float]:
    moved = min(1.0, progress(recipe, step) / recipe.mix_share)
    return {
        kind: (1 - moved) * first + moved * SECOND_MIX[kind] for kind, first in FIRST_MIX.items()
    }


def training_rows(recipe: Recipe, step: int, encoder: Encoder, seen: dict[str, Seen]) -> list[Row]:
    """The rows of a step depend on the seed and the step alone."""
    rng = np.random.default_rng((recipe.seed, step))
    mixes = {
        "image": mix_of(board_mix(recipe, step)),
        "video": mix_of(dict(CLIP_MIX)),
        "none": mix_of(BLIND_MIX),
    }
    shares = [1 - recipe.clip_share - recipe.blind_share, recipe.clip_share, recipe.blind_share]
    rows = []
    for medium in rng.choice(list(mixes), recipe.rows_per_step, p=shares).tolist():
        index = -1 if medium == "none" else int(rng.integers(len(seen[medium].scenes)))
        row = draw_row(
            rng,
            encoder,
            None if medium == "none" else seen[medium].scenes[index],
            index,
            mixes[medium],
            test=False,
            length=recipe.row_length,
            think_share=recipe.think_share,
        )
        rows.append(row)
    return rows


def train_step(
    model: VLModel,
    scaffold: Scaffold,
    adam: torch.optim.AdamW,
    batch: Batch,
    seen: dict[str, Seen],
    recipe: Recipe,
    step: int,
) -> dict[str, float]:
    for group in adam.param_groups:
        group["lr"] = learning_rate(recipe, step)
    tap = TrainingTap(recipe.shared_dropout, silent_tokens(batch, recipe.vision_dropout))
    features = {medium: looks.features_NMD for medium, looks in seen.items()}
    inputs_BSD = embeddings(model.embed_VD, batch, features, recipe.feature_noise)
    hidden = model.trunk(
        inputs_embeds=inputs_BSD,
        position_ids=batch.positions_BSR,
        bank=batch.bank_BS,
        tap=tap,
    )
    logits_TV = model.unembed(hidden.normed_BSD[batch.token_row, batch.token_place])
    nats_T = cross_entropy(logits_TV, batch.token_id, reduction="none")
    loss = (nats_T * batch.token_weight).sum() / batch.token_weight.sum()
    gates = [router.weight_ED for bank in model.routers().values() for router in bank.values()]
    orthogonal = torch.stack([orthogonal_loss(w) for w in gates]).mean() * N_EXPERTS**2
    total = loss + 2 * recipe.orthogonal_coef * orthogonal
    early: dict[str, Tensor] = {}
    weight = recipe.scaffold_coef * max(0.0, 1 - progress(recipe, step) / recipe.scaffold_share)
    if weight:
        early = scaffold(tap.kept, batch, seen)
        total = total + weight * torch.stack(list(early.values())).sum()
    adam.zero_grad()
    total.backward()
    norm = nn.utils.clip_grad_norm_(
        [p for p in model.parameters() if p.grad is not None], recipe.max_grad_norm
    )
    adam.step()
    violation = balance(model, hidden.routings, batch, recipe, step)
    record = {"loss": loss.item(), "grad_norm": norm.item()}
    record |= {f"scaffold/{name}": found.item() for name, found in early.items()}
    return record | violation | by_kind(nats_T.detach(), batch)


@torch.no_grad()
def balance(
    model: VLModel,
    routings: object,
    batch: Batch,
    recipe: Recipe,
    step: int,
) -> dict[str, float]:
    """Move every correction bias by the batch's loads of real tokens; the batch's MaxVio."""
    left, violations = 1 - progress(recipe, step), {}
    steps = {"text": recipe.text_bias_step, "vision": recipe.vision_bias_step}
    real_N = batch.real_BS.flatten()
    for bank, routers in model.routers().items():
        of_bank: tuple[Routing, ...] = routings[bank]  # type: ignore[index]
        found = []
        for router, routing in zip(routers.values(), of_bank, strict=True):
            real_ids = routing.expert_ids_NK[real_N[routing.rows_N]]
            counts_E = torch.bincount(real_ids.flatten(), minlength=N_EXPERTS)
            bias_E = router.correction_bias_E
            bias_E.copy_(updated_correction_bias(bias_E, counts_E, steps[bank] * left))
            found.append((counts_E.max() / counts_E.float().mean() - 1).item())
        violations[f"batch_max_vio/{bank}"] = sum(found) / len(found)
    return violations


def by_kind(nats_T: Tensor, batch: Batch) -> dict[str, float]:
    """Mean nats of the answer tokens of each kind of question, ends included."""
    kind_T = batch.kind_Q[batch.token_question.numpy()]
    nats = nats_T.numpy()
    return {
        f"nats/{kind}": float(nats[kind_T == k].mean())
        for k, kind in enumerate(KINDS)
        if (kind_T == k).any()
    }
