"""Decoding with a whole step in one CUDA graph, and every site still seen.

A compiled step still asks Python for a thousand kernels, which on a GPU takes longer than the
kernels. Captured once, a step is replayed by one call. What flows through the sites stays in
fixed places of the graph's memory; after each replay copies of it are shown to the tap.

**Not run on a GPU.** The capture itself (`captured`) has never been executed. The step in fixed
memory, and the showing of its sites, are tested on the CPU, where a replay is another call of the
step (tests/model/test_graphed.py). A capture that fails, or whose first replay gives other logits
than the step itself, is warned of and not used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TypeAlias, cast
from weakref import WeakKeyDictionary, ref

import torch
from einops import repeat
from torch import Tensor, nn
from torch.nn.functional import embedding

from ernie_lab.model.banks import BankRows
from ernie_lab.model.cache import StaticCache
from ernie_lab.model.compiled import MOST_SEQUENCES, Values
from ernie_lab.model.kinds import Model
from ernie_lab.model.rope import Rotation, rotation, rotation_3d
from ernie_lab.model.stack import block_list, run_blocks
from ernie_lab.model.vl import VLModel
from ernie_lab.sites import CandidTap, Site, Tap, all_sites, may_change

Run: TypeAlias = Callable[[], Values]

# Columns of the cache: a power of two, so that few lengths need a capture of their own.
SMALLEST = 256
# Columns of all sequences together: 3.5 GiB of keys and values in a 21B-A3B.
LARGEST = 2**16

# As long as the sequence, or one product more: a tap that wants one goes the compiled way.
_LEFT_OUT = (".attn.scores", ".attn.pattern", ".attn.result")


class CollectAll:
    """The tap inside a captured step. By path: what flowed there, but for what is left out."""

    def __init__(self) -> None:
        self.values: Values = {}

    def wants(self, site: Site, /) -> bool:
        return not site.path.endswith(_LEFT_OUT)

    def changes(self, paths: frozenset[str], /) -> bool:  # noqa: ARG002
        return False

    def reads(self, paths: frozenset[str], /) -> frozenset[str]:
        return paths

    def accept(self, values: Mapping[str, Tensor], /) -> None:
        self.values.update(values)

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        self.values[site.path] = x
        return x


class FixedStep:
    """What a decode step of a model reads, in fixed places, and the step itself."""

    def __init__(self, model: Model, n_sequences: int, capacity: int) -> None:
        config, like = model.config.decoder, model.embed_VD.detach()
        attention = config.attention
        groups = attention.n_kv_heads, attention.head_dim
        self.cache = StaticCache(config.n_layers, n_sequences, capacity, groups, like)
        self.ids_BS = like.new_zeros(n_sequences, 1, dtype=torch.int64)
        shape = n_sequences, 1, attention.head_dim // 2
        self.rotation = Rotation(
            like.new_ones(shape, dtype=torch.float32), like.new_zeros(shape, dtype=torch.float32)
        )
        self.cache.aim(0, 0)
        self.banks = None
        if isinstance(model, VLModel):
            # What `BankRows.of` makes of text alone, without asking a GPU how many there are.
            rows_N = torch.arange(n_sequences, device=like.device)
            self.banks = BankRows(torch.zeros_like(self.ids_BS), (rows_N, rows_N[:0]))

    def read(self, model: Model, ids_BS: Tensor, positions_BS: Tensor) -> None:
        """Put a step's input in its place. Not captured: angles may depend on lengths."""
        config = model.config.decoder
        by = config.rope, config.attention.head_dim
        if isinstance(model, VLModel):
            turned = rotation_3d(*by, repeat(positions_BS, "b s -> b s r", r=3))
        else:
            turned = rotation(*by, positions_BS)
        self.ids_BS.copy_(ids_BS)
        for fixed_BSC, new_BSC in zip(self.rotation, turned, strict=True):
            fixed_BSC.copy_(new_BSC)

    def run(self, model: Model) -> Values:
        """The model's forward over it: what flowed through each site, in the order it did."""
        tap, at = CollectAll(), model.sites
        tokens_BSD = tap(at.embed, embedding(self.ids_BS, model.embed_VD))
        resid_BSD = tap(at.embed_in, tokens_BSD)
        resid_BSD, _ = run_blocks(
            block_list(model.blocks),
            resid_BSD,
            self.rotation,
            self.cache.visible_BST,
            self.banks,
            self.cache,
            tap,
        )
        model.unembed(model.final_norm(resid_BSD, at.final_norm, tap), tap)
        return tap.values


def captured(run: Run) -> Run:
    """The same as a CUDA graph: each call replays it, into the same tensors. Never executed yet."""
    before = torch.cuda.Stream()
    before.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(before):
        for _ in range(2):  # kernels are compiled, and libraries take their memory
            run()
    torch.cuda.current_stream().wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        values = run()

    def replay() -> Values:
        graph.replay()
        return values

    return replay


class Room:
    """A step, and its replay, with the addresses of the weights that it reads."""

    def __init__(
        self, model: Model, n_sequences: int, capacity: int, capture: Callable[[Run], Run]
    ) -> None:
        self.step = FixedStep(model, n_sequences, capacity)
        with torch.cuda.device_of(self.step.ids_BS):  # of a CPU: nothing
            self.replay = capture(lambda: self.step.run(model))
        self.addresses = addresses(model)
        self.taken = Lock()
        self._require_equal(self.step.run(model)["logits"])

    def _require_equal(self, expected_BSV: Tensor) -> None:
        off = (self.replay()["logits"].float() - expected_BSV.float()).abs().max()
        if not off <= 0.01 * expected_BSV.float().abs().max():
            raise RuntimeError(f"a replay gives logits that are off by {float(off):.2g}")


class GraphedDecode:
    """The way of a decode step through a whole model; one `Room` for each size.

    It serves any batch of up to `MOST_SEQUENCES`, padded or not, whose cache fits into `LARGEST`
    columns, in steps at whose sites a tap changes nothing. A model with
    exchanged parts or weights is another one, for which nothing was captured: it goes the
    compiled way. Weights that change where they lie are read as they are.
    """

    def __init__(self, model: Model, capture: Callable[[Run], Run] = captured) -> None:
        self._model, self._capture = ref(model), capture
        self._rooms: dict[tuple[int, int], Room] = {}
        self._failed, self._making = False, Lock()
        self.sites = {site.path: site for site in all_sites(model)}
        self.paths = frozenset(self.sites)
        self.left_out = frozenset(path for path in self.paths if path.endswith(_LEFT_OUT))

    @contextmanager
    def generation(self, model: Model, mask_BS: Tensor, n_new: int) -> Iterator[Graphed | None]:
        """See the function of this name."""
        room = self._room(model, len(mask_BS), mask_BS.shape[1] + n_new)
        if room is None or not room.taken.acquire(blocking=False):
            yield None
            return
        try:
            yield Graphed(self, room, model, mask_BS)
        finally:
            room.taken.release()

    def _room(self, model: Model, n_sequences: int, n_columns: int) -> Room | None:
        capacity = max(SMALLEST, 1 << (n_columns - 1).bit_length())
        if (
            self._failed
            or model is not self._model()
            or n_sequences > MOST_SEQUENCES
            or n_sequences * capacity > LARGEST
        ):
            return None
        with self._making:
            room = self._rooms.get((n_sequences, capacity))
            if room is None:
                room = self._made(model, n_sequences, capacity)
        return room if room is not None and room.addresses == addresses(model) else None

    def _made(self, model: Model, n_sequences: int, capacity: int) -> Room | None:
        try:
            room = Room(model, n_sequences, capacity, self._capture)
        except Exception as error:
            self._failed = True
            told = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(
                f"a decode step was not captured as a CUDA graph: {told}. Decoding goes on "
                "compiled, with the same results",
                stacklevel=2,
            )
            return None
        self._rooms[n_sequences, capacity] = room
        return room


class Graphed:
    """The steps of one generation. `cache` is for its prefill, and for steps not served here."""

    def __init__(self, owner: GraphedDecode, room: Room, model: Model, mask_BS: Tensor) -> None:
        self._owner, self._room, self._model = owner, room, model
        self._n_prompt = mask_BS.shape[1]
        self.cache = room.step.cache.begin(mask_BS)

    def serves(self, tap: Tap) -> bool:
        owner = self._owner
        if self.cache.length >= self._room.step.cache.capacity or may_change(tap, owner.paths):
            return False
        asked = cast("CandidTap", tap).reads(owner.left_out)
        return not any(tap.wants(owner.sites[path]) for path in asked)

    def __call__(self, ids_BS: Tensor, positions_BS: Tensor, tap: Tap) -> Tensor:
        """The logits `[b 1 v]` of one step; the cache counts it."""
        step, owner, model = self._room.step, self._owner, self._model
        step.read(model, ids_BS, positions_BS)
        step.cache.aim(self.cache.length, self._n_prompt)
        values = self._room.replay()
        candid = cast("CandidTap", tap)  # `serves` asked it
        wanted = candid.reads(owner.paths)
        candid.accept(_copies({path: x for path, x in values.items() if path in wanted}))
        after_B = positions_BS[:, -1] + 1 if isinstance(model, VLModel) else None
        self.cache.commit(1, after_B)
        return values["logits"].clone()


def _copies(values: Values) -> Values:
    """Of what the next replay overwrites, by one copy for each dtype."""
    copies: Values = {}
    for dtype in {x.dtype for x in values.values()}:
        mine = {path: x for path, x in values.items() if x.dtype is dtype}
        joined = torch.cat([x.flatten() for x in mine.values()])
        parts = joined.split([x.numel() for x in mine.values()])
        for (path, x), part in zip(mine.items(), parts, strict=True):
            copies[path] = part.view(x.shape)
    return {path: copies[path] for path in values}


def addresses(model: Model) -> tuple[int, ...]:
    """Where each parameter lies."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


_WAYS: WeakKeyDictionary[nn.Module, GraphedDecode] = WeakKeyDictionary()


def graph_decode(model: Model, capture: Callable[[Run], Run] = captured) -> None:
    """Let a model, whose blocks decode compiled, decode by replaying whole steps.

    A step is captured at the first generation of each number of sequences and power of two of
    columns.
    """
    _WAYS[model] = GraphedDecode(model, capture)


@contextmanager
def generation(model: Model, mask_BS: Tensor, n_new: int) -> Iterator[Graphed | None]:
    """The steps of one generation; None where it is not served, as without `graph_decode`.

    `mask_BS` names the prompts' real tokens. The memory is one generation's at a time: another
    that begins meanwhile is not served.
    """
    way = _WAYS.get(model)
    if way is None:
        yield None
        return
    with way.generation(model, mask_BS, n_new) as steps:
        yield steps
