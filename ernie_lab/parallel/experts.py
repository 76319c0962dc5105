"""Experts over several ranks: rank 0 routes, each rank multiplies with the experts it holds.

A rank is sent the tokens that chose any of its experts, each once, and sends back what each chosen
expert put out, slot by slot. These are weighted and summed on rank 0, in the order of one process.
Every expert sees the rows it would see there, in the same order and by the same code, so every bit
is the same (on a CPU: with as many threads for each rank; a BLAS may add up otherwise with more).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor, nn

from ernie_lab.checkpoint.slices import Slice
from ernie_lab.model.experts import ExpertBank, ExpertSites, weighted
from ernie_lab.model.kinds import Model
from ernie_lab.parallel.messages import Kind, Message
from ernie_lab.parallel.ranks import Ranks, Talk
from ernie_lab.sites import Site, Tap, idle

NO_GRADIENTS = (
    "parts of this model are held by several ranks, and gradients through them are refused: they "
    "would have to travel back the same way. Load it without placement= for gradients"
)


def held_by(rank: int, n_experts: int, n_ranks: int) -> range:
    """The experts of one rank: neighbours, as many for each rank as for any other, or one more."""
    return range(rank * n_experts // n_ranks, (rank + 1) * n_experts // n_ranks)


class SplitExpertBank(nn.Module):
    """`ExpertBank` over several ranks. `own` are the experts of this one.

    On ranks other than 0 it is only filled: they compute with `own` alone (`computed`).
    """

    def __init__(self, twin: ExpertBank, rank: int, n_ranks: int) -> None:
        super().__init__()
        n_experts, width, hidden = twin.down_EDF.shape
        held = held_by(rank, n_experts, n_ranks)
        self.own = ExpertBank(len(held), width, hidden)
        self.slices = {
            f"own.{name}": Slice(name, tuple(parameter.shape), 0, held)
            for name, parameter in twin.named_parameters()
        }
        self.held = [held_by(rank, n_experts, n_ranks) for rank in range(n_ranks)]
        self.number = 0
        self.ranks: Ranks | None = None

    @property
    def gate_up_E2FD(self) -> Tensor:  # noqa: N802
        raise ValueError(self._not_here("gate_up_E2FD"))

    @property
    def down_EDF(self) -> Tensor:  # noqa: N802
        raise ValueError(self._not_here("down_EDF"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SplitExpertBank:
        if self.ranks is not None:
            require_unchanged(fn, self.own.down_EDF)
        super()._apply(fn, recurse)
        return self

    def weights_elsewhere(self) -> list[str]:
        return [] if self.ranks is None else self.ranks.sums(self.number)

    def _not_here(self, name: str) -> str:
        return (
            f"{name} is in pieces: its experts are held by {len(self.held)} ranks, and rank 0 has "
            f"{len(self.held[0])} of {self.held[-1].stop}. What reads weights of experts needs a "
            "model without placement="
        )

    def forward(
        self,
        x_ND: Tensor,
        expert_ids_NK: Tensor,
        expert_weights_NK: Tensor,
        at: ExpertSites,
        tap: Tap = idle,
    ) -> Tensor:
        if x_ND.requires_grad and torch.is_grad_enabled():
            raise ValueError(NO_GRADIENTS)
        assert self.ranks is not None
        x_MD, shares = rearrange(x_ND, "... d -> (...) d"), self._shares(expert_ids_NK)
        wanted = [wants for wants in (at.gate, at.up, at.act) if tap.wants(wants)]
        with self.ranks.talk() as talk:
            shown = _Shown(tap, talk, shares, expert_ids_NK.shape, wanted)
            shown.replies = talk.ask(
                {
                    rank: share.question(self.number, x_MD, _flags(wanted, at))
                    for rank, share in enumerate(shares)
                    if rank > 0 and len(share.rows_J)
                }
            )
            # Meanwhile. Of its own part it shows what all have, so without rows it runs too.
            token_J, expert_J = shares[0].token_J, shares[0].expert_J
            out_JD = computed(self.own, x_MD.index_select(0, token_J), expert_J, at, shown)
            out_NKD = shown.together(out_JD)
        return weighted(out_NKD, expert_weights_NK, at, tap)

    def _shares(self, expert_ids_NK: Tensor) -> list[_Share]:
        """The rows (token * k + slot) of each rank."""
        expert_J, k = expert_ids_NK.flatten(), expert_ids_NK.shape[-1]
        ends = torch.tensor([held.stop for held in self.held], device=expert_J.device)
        rank_J = torch.bucketize(expert_J, ends, right=True)
        order_J = rank_J.argsort(stable=True)
        counts = torch.bincount(rank_J, minlength=len(self.held)).tolist()
        return [
            _Share(rows_J, rows_J // k, expert_J[rows_J] - held.start)
            for rows_J, held in zip(order_J.split(counts), self.held, strict=True)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class _Share:
    """The slots whose expert is on one rank: row, token, and number among the rank's experts."""

    rows_J: Tensor
    token_J: Tensor
    expert_J: Tensor

    def question(self, number: int, x_MD: Tensor, flags: int) -> Message:
        """Each token once, and for each slot which of these it is."""
        token_T, which_J = self.token_J.unique_consecutive(return_inverse=True)
        tokens = x_MD.index_select(0, token_T), which_J, self.expert_J
        return Message(Kind.EXPERTS, number, flags, tokens)


@dataclass(slots=True)
class _Shown:
    """The tap of rank 0's own experts: what it is shown is put together from all ranks."""

    tap: Tap
    talk: Talk
    shares: Sequence[_Share]
    shape: torch.Size
    wanted: Sequence[Site]
    replies: Future[dict[int, Message]] = field(default_factory=Future)

    def wants(self, site: Site, /) -> bool:
        return site in self.wanted

    def __call__(self, site: Site, x_J1F: Tensor, /) -> Tensor:
        parts = self.replies.result()
        shown_NKF = self._joined(x_J1F.squeeze(1), parts)
        used_NKF = self.tap(site, shown_NKF)
        if used_NKF is shown_NKF:
            self.replies = self.talk.answer(dict.fromkeys(parts))
            return x_J1F
        used_JF = used_NKF.flatten(0, -2)
        self.replies = self.talk.answer(
            {rank: used_JF.index_select(0, self.shares[rank].rows_J) for rank in parts}
        )
        return used_JF.index_select(0, self.shares[0].rows_J).unsqueeze(1)

    def together(self, out_JD: Tensor) -> Tensor:
        """`[… k d]`: what each slot's expert put out, once all ranks are done."""
        return self._joined(out_JD, self.replies.result())

    def _joined(self, own_JX: Tensor, parts: Mapping[int, Message]) -> Tensor:
        width = own_JX.shape[-1]  # named, because nothing can be inferred of no rows
        joined_JX = own_JX.new_empty(self.shape.numel(), width)
        joined_JX[self.shares[0].rows_J] = own_JX
        for rank, part in parts.items():
            (x_JX,) = part.tensors
            joined_JX[self.shares[rank].rows_J] = x_JX.to(own_JX.device).flatten(1)
        return joined_JX.view(*self.shape, width)


def computed(
    bank: ExpertBank, x_JD: Tensor, expert_J: Tensor, at: ExpertSites, tap: Tap = idle
) -> Tensor:
    """What each row's expert puts out, `[j d]`: a bank of tokens with one slot of weight 1 each."""
    weight_J1 = x_JD.new_ones(len(x_JD), 1)
    out_JD: Tensor = bank(x_JD, expert_J.unsqueeze(1), weight_J1, at, tap)
    return out_JD


def answered(bank: ExpertBank, question: Message, show: Callable[[Tensor], Tensor]) -> Tensor:
    """What a rank replies to `Kind.EXPERTS`. `show` gives what is to flow on in a value's place."""
    device = bank.down_EDF.device
    x_TD, which_J, expert_J = (x.to(device) for x in question.tensors)
    x_JD = x_TD.index_select(0, which_J)
    return computed(bank, x_JD, expert_J, _SERVED, _Showing(question.flags, show))


_SERVED = ExpertSites.under("served")


def _flags(wanted: Sequence[Site], at: ExpertSites) -> int:
    return sum(1 << i for i, site in enumerate((at.gate, at.up, at.act)) if site in wanted)


@dataclass(frozen=True, slots=True)
class _Showing:
    """The tap of another rank's experts."""

    flags: int
    show: Callable[[Tensor], Tensor]

    def wants(self, site: Site, /) -> bool:
        shown = (_SERVED.gate, _SERVED.up, _SERVED.act)
        return any(site is one and self.flags >> i & 1 for i, one in enumerate(shown))

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        return self.show(x) if self.wants(site) else x


def require_unchanged(fn: Callable[[Tensor], Tensor], weights: Tensor) -> None:
    """Refuse `.to(...)` of a part of a model whose other parts are out of its reach."""
    kept, moved = weights.detach()[:0], fn(weights.detach()[:0])
    if (moved.dtype, moved.device) != (kept.dtype, kept.device):
        raise ValueError(
            f"this model is over several ranks, {kept.dtype} on {kept.device} here: choose dtype "
            "and device with load(..., dtype=, device=). It is not usable any more; load it again"
        )


def split_experts(model: Model, rank: int, n_ranks: int) -> list[SplitExpertBank]:
    """Put split banks in the place of the model's own, unfilled; numbered as they stand in it.

    Use it under `torch.device("meta")`, before `fill`.
    """
    banks: list[SplitExpertBank] = []
    for path, bank in list(model.named_modules()):
        if isinstance(bank, ExpertBank):
            split = SplitExpertBank(bank, rank, n_ranks)
            split.number = len(banks)
            owner, _, name = path.rpartition(".")
            setattr(model.get_submodule(owner), name, split)
            banks.append(split)
    return banks
