"""Attention over several ranks, by heads: each rank runs `Attention` with the heads that it holds.

Every rank has as many key/value heads, with the query heads that read them, their slices of the
projections and of the cache. What the heads write is added up on rank 0. A matrix product over all
heads at once adds up in another order, so the last bits differ from one process (in fp64 by 1e-12
of the values); what is inside of a head does not leave its rank unless a tap wants it.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ernie_lab.checkpoint.config import AttentionConfig
from ernie_lab.checkpoint.slices import Slice
from ernie_lab.model.attention import Attention, AttentionSites
from ernie_lab.model.cache import KVCache
from ernie_lab.model.kinds import Model
from ernie_lab.model.rope import Rotation
from ernie_lab.model.stack import block_list
from ernie_lab.parallel.experts import NO_GRADIENTS, require_unchanged
from ernie_lab.parallel.layouts import head_axis
from ernie_lab.parallel.messages import Kind, Message
from ernie_lab.parallel.ranks import Ranks, Talk
from ernie_lab.sites import Site, Tap, idle

NO_CACHE = 0


def require_heads(config: AttentionConfig, n_ranks: int) -> None:
    """
    Raises:
        ValueError: the heads cannot be given to so many ranks.
    """
    if config.n_kv_heads % n_ranks:
        fitting = [n for n in range(2, config.n_kv_heads + 1) if config.n_kv_heads % n == 0]
        raise ValueError(
            f'placement="ep:{n_ranks}+tp": {config.n_kv_heads} key/value heads cannot be shared '
            f"equally by {n_ranks} ranks (by {' or '.join(map(str, fitting)) or 'none'}); "
            f'placement="ep:{n_ranks}" leaves attention whole'
        )


class SplitAttention(nn.Module):
    """`Attention` over several ranks. `own` are the heads of this one."""

    def __init__(self, twin: Attention, rank: int, n_ranks: int) -> None:
        super().__init__()
        config = twin.config
        n_heads, n_groups = config.n_heads // n_ranks, config.n_kv_heads // n_ranks
        self.config, self.sites, self.rank, self.n_ranks = config, twin.sites, rank, n_ranks
        own = dataclasses.replace(config, n_heads=n_heads, n_kv_heads=n_groups)
        self.own = Attention(own, "")
        self.own.sites = twin.sites
        if config.use_bias and rank > 0:  # added once
            self.own.o.bias = nn.Parameter(torch.empty(0))
        self.slices = {
            f"own.{name}": _slice(name, whole, part, rank)
            for (name, whole), part in zip(
                twin.named_parameters(), self.own.parameters(), strict=True
            )
        }
        self.number = 0
        self.ranks: Ranks | None = None

    @property
    def q(self) -> nn.Linear:
        raise ValueError(self._not_here("q"))

    @property
    def k(self) -> nn.Linear:
        raise ValueError(self._not_here("k"))

    @property
    def v(self) -> nn.Linear:
        raise ValueError(self._not_here("v"))

    @property
    def o(self) -> nn.Linear:
        raise ValueError(self._not_here("o"))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SplitAttention:
        if self.ranks is not None:
            require_unchanged(fn, self.own.o.weight)
        super()._apply(fn, recurse)
        return self

    def weights_elsewhere(self) -> list[str]:
        return [] if self.ranks is None else self.ranks.sums(self.number, heads=True)

    def _not_here(self, name: str) -> str:
        return (
            f"the projection {name} is in pieces: {self.n_ranks} ranks hold its heads. What reads "
            "weights of attention needs a model whose placement= has no +tp"
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotation: Rotation,
        visible_BST: Tensor | None,
        layer: int,
        cache: KVCache | None = None,
        tap: Tap = idle,
    ) -> Tensor:
        """As `Attention.forward`. `q`, `k`, `v`, `q_rot`, `k_rot` and `z` are shown, like those on
        demand, to a tap that says it wants them."""
        if x_BSD.requires_grad and torch.is_grad_enabled():
            raise ValueError(NO_GRADIENTS)
        assert self.ranks is not None
        shown = split_sites(self.sites)
        flags = sum(1 << i for i, site in enumerate(shown) if tap.wants(site))
        masks = () if visible_BST is None else (visible_BST,)
        past = torch.tensor(_past(cache, self.ranks))
        question = Message(Kind.ATTEND, self.number, flags, (past, x_BSD, *rotation, *masks))
        with self.ranks.talk() as talk:
            whole = _Whole(tap, talk, {site for i, site in enumerate(shown) if flags >> i & 1})
            whole.replies = talk.ask(dict.fromkeys(self.ranks.others, question))
            total_BSD = self.own(x_BSD, rotation, visible_BST, layer, cache, whole)
            for _, part in sorted(whole.replies.result().items()):
                total_BSD = total_BSD + part.tensors[0].to(total_BSD.device)
        attn_out_BSD: Tensor = tap(self.sites.attn_out, total_BSD)
        return attn_out_BSD


def split_sites(at: AttentionSites) -> tuple[Site, ...]:
    """Those that have heads, in the order in which they fire."""
    return (at.q, at.k, at.v, at.q_rot, at.k_rot, at.scores, at.pattern, at.z, at.result)


def _slice(name: str, whole: Tensor, part: Tensor, rank: int) -> Slice:
    """The rank's part of a projection: rows of q, k and v, columns of o."""
    axis = int(name == "o.weight")
    if name == "o.bias":
        return Slice(name, tuple(whole.shape), 0, range(len(part)))
    size = part.shape[axis]
    return Slice(name, tuple(whole.shape), axis, range(rank * size, (rank + 1) * size))


@dataclass(slots=True)
class _Whole:
    """The tap of rank 0's own heads: what a tap wants is put together from all ranks."""

    tap: Tap
    talk: Talk
    wanted: set[Site]
    replies: Future[dict[int, Message]] = field(default_factory=Future)

    def wants(self, site: Site, /) -> bool:
        return site in self.wanted

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        if site not in self.wanted:
            return x
        parts, axis = self.replies.result(), head_axis(site)
        others = [parts[rank].tensors[0].to(x.device) for rank in sorted(parts)]
        whole = torch.cat([x, *others], dim=axis)
        used = self.tap(site, whole)
        if used is whole:
            self.replies = self.talk.answer(dict.fromkeys(parts))
            return x
        own, *rest = used.chunk(len(parts) + 1, dim=axis)
        self.replies = self.talk.answer(dict(zip(sorted(parts), rest, strict=True)))
        return own.contiguous()


# On rank 0: a number for each cache, by which the other ranks call their parts of it.
_numbers = itertools.count(NO_CACHE + 1)
_of_cache: weakref.WeakKeyDictionary[KVCache, int] = weakref.WeakKeyDictionary()


def _past(cache: KVCache | None, ranks: Ranks) -> tuple[int, int]:
    """The cache's number, and how long it is."""
    if cache is None:
        return NO_CACHE, 0
    if cache not in _of_cache:
        _of_cache[cache] = number = next(_numbers)
        ended = Message(Kind.FORGET, number, flags=1)
        weakref.finalize(cache, _tell, weakref.ref(ranks), ended).atexit = False
    return _of_cache[cache], cache.length


def _tell(ranks: Callable[[], Ranks | None], message: Message) -> None:
    if (those := ranks()) is not None:
        those.tell(message)


@dataclass(slots=True)
class Caches:
    """On ranks other than 0: their parts of the caches of generations under way, by number."""

    n_layers: int
    held: dict[int, KVCache] = field(default_factory=dict)

    def at(self, number: int, length: int) -> KVCache | None:
        """As long as rank 0's: what a pass that did not finish has left behind is overwritten."""
        if number == NO_CACHE:
            return None
        if number not in self.held:
            self.held[number] = KVCache(self.n_layers)
        cache = self.held[number]
        cache.length = length
        return cache


def attended(
    attention: Attention,
    layer: int,
    question: Message,
    caches: Caches,
    show: Callable[[Tensor], Tensor],
) -> Tensor:
    """What a rank replies to `Kind.ATTEND`: the part of the output that its heads write."""
    device = attention.q.weight.device
    past, x_BSD, cos_BSC, sin_BSC, *masks = question.tensors
    cache = caches.at(*past.tolist())
    rotation = Rotation(cos_BSC.to(device), sin_BSC.to(device))
    visible_BST = masks[0].to(device) if masks else None
    shown = split_sites(attention.sites)
    wanted = frozenset(site for i, site in enumerate(shown) if question.flags >> i & 1)
    out_BSD: Tensor = attention(
        x_BSD.to(device), rotation, visible_BST, layer, cache, _Showing(wanted, show)
    )
    return out_BSD


@dataclass(frozen=True, slots=True)
class _Showing:
    """The tap of another rank's heads."""

    wanted: frozenset[Site]
    show: Callable[[Tensor], Tensor]

    def wants(self, site: Site, /) -> bool:
        return site in self.wanted

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        return self.show(x) if site in self.wanted else x


def split_attention(model: Model, rank: int, n_ranks: int) -> list[SplitAttention]:
    """Put split attention in the place of the decoder's own, unfilled; the tower's stays whole.

    Use it under `torch.device("meta")`, before `fill`.
    """
    layers: list[SplitAttention] = []
    for block in block_list(model.blocks):
        split = SplitAttention(block.attn, rank, n_ranks)
        split.number = len(layers)
        block.attn = split  # type: ignore[assignment]  # it does what Attention does
        layers.append(split)
    return layers


def complete(layers: Sequence[SplitAttention]) -> None:
    """Once they are filled: a bias that another rank adds is none."""
    for layer in layers:
        if layer.own.o.bias is not None and not len(layer.own.o.bias):
            layer.own.o.register_parameter("bias", None)
