"""Decoding through torch.compile: the equations of a block, with Python taken out.

A decode step reads each weight once and does little with it, so it is bound by memory and, in
eager mode, by Python. Compiled, products of one row become reductions over the weights where
they lie, those of experts read only the chosen ones, and the rest fuses.

What is compiled is the reference itself, in two pieces (before and after the heads look at
the cache), run with a tap that collects what flows through each site. These values leave the
compiled function as outputs and are handed to the real tap afterwards, so what is recorded is
what was computed, and recording changes no bit. All blocks of one kind share a compilation:
its parameters are arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from inspect import signature
from operator import attrgetter
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ernie_lab.model.banks import BankRows
from ernie_lab.model.block import Block
from ernie_lab.model.cache import Cache
from ernie_lab.model.experts import FEW_TOKENS
from ernie_lab.model.rope import Rotation
from ernie_lab.model.router import Routing
from ernie_lab.model.stack import block_list
from ernie_lab.sites import CandidTap, Site, Tap, may_change

Values: TypeAlias = dict[str, Tensor]

# More are multiplied expert by expert, which reads no matrix twice.
MOST_SEQUENCES = FEW_TOKENS


# What goes in, or on to another layer, the heads or the cache: a tap gets copies of these. All else
# that leaves a compiled piece goes to the tap, and to losses, which only read.
GO_ON = frozenset(("resid_pre", "attn.v", "attn.q_rot", "attn.k_rot", "moe.bank", "resid_post"))


class Collect:
    """The tap inside a compiled function. By path without its layer: what flowed there."""

    def __init__(self, prefix: str) -> None:
        self.start = len(prefix)
        self.values: Values = {}

    def wants(self, site: Site, /) -> bool:
        # All are small in a decode step; `attn.result` would be one more product.
        return not site.path.endswith(".attn.result")

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        self.values[site.path[self.start :]] = x
        return x


class Before(nn.Module):
    """Norm, projections and rotation: what the heads will look for, and what they add."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, resid_BSD: Tensor, rotation: Rotation
    ) -> tuple[tuple[Tensor, Tensor, Tensor], Values]:
        block, tap = self.block, Collect(self.block.prefix)
        resid_BSD = tap(block.sites.resid_pre, resid_BSD)
        normed_BSD = block.norm1(resid_BSD, block.sites.norm1, tap)
        return block.attn.read(normed_BSD, rotation, tap), tap.values


class After(nn.Module):
    """From the heads' outputs on."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, resid_BSD: Tensor, z_BSHA: Tensor, banks: BankRows | None
    ) -> tuple[tuple[Tensor, Mapping[str, Routing]], Values]:
        block, tap = self.block, Collect(self.block.prefix)
        attn_out_BSD = block.attn.write(z_BSHA, tap)
        return block.after(resid_BSD, attn_out_BSD, banks, tap), tap.values


class Piece:
    """A piece of a block, compiled once and run with the parameters of any block like it."""

    def __init__(self, piece: Before | After) -> None:
        names = [name for name, _ in piece.block.named_parameters()]
        self.of = attrgetter(*names)
        self.names = [f"block.{name}" for name in names]

        def call(parameters: dict[str, Tensor], *args: Any) -> Any:
            return functional_call(piece, parameters, args)

        # Its overloads do not know `isolate_recompiles`.
        self.compiled: Callable[..., Any] = cast("Any", torch.compile)(
            call,
            fullgraph=True,
            dynamic=False,
            # Or what other models compiled would count towards the limit of recompilations.
            isolate_recompiles=True,
            # Shapes, dtypes and devices are looked at in each call. The rest cannot change: the
            # piece belongs to this object, and `serves` looks at gradients and autocast.
            options={"guard_filter_fn": torch.compiler.keep_tensor_guards_unsafe},
        )

    def __call__(self, block: Block, *args: Any) -> Any:
        # Detached: of a parameter, the compiler may take the values for constants.
        values = [parameter.detach() for parameter in self.of(block)]
        return self.compiled(dict(zip(self.names, values, strict=True)), *args)


class CompiledDecode:
    """The way of one token a sequence through blocks of one kind.

    It serves decode steps without gradients at whose sites nothing may be changed. A block with
    an edit, a prefill and a training step go the reference's way.
    """

    def __init__(self, template: Block) -> None:
        self.before, self.after = Piece(Before(template)), Piece(After(template))

    def serves(self, block: Block, resid_BSD: Tensor, cache: Cache | None, tap: Tap) -> bool:
        n_sequences, n_new, _ = resid_BSD.shape
        return (
            cache is not None
            and n_new == 1
            and n_sequences <= MOST_SEQUENCES
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(resid_BSD.device.type)
            and not may_change(tap, block.paths)
        )

    def __call__(
        self,
        block: Block,
        resid_BSD: Tensor,
        rotation: Rotation,
        visible_BST: Tensor | None,
        banks: BankRows | None,
        cache: Cache | None,
        tap: Tap,
    ) -> tuple[Tensor, Mapping[str, Routing]]:
        assert cache is not None
        wanted = cast("CandidTap", tap).reads(block.paths)  # `serves` asked it
        (q_BSHA, k_BSGA, v_BSGA), values = self.before(block, resid_BSD, rotation)
        hand_over(values, block, wanted, tap)
        k_BTGA, v_BTGA = cache.extend(block.layer, k_BSGA, v_BSGA)
        z_BSHA = block.attn.mix(q_BSHA, k_BTGA, v_BTGA, visible_BST, tap)
        if tap.wants(block.sites.attn.result):
            tap(block.sites.attn.result, block.attn.results(z_BSHA))
        (out_BSD, routings), values = self.after(block, resid_BSD, z_BSHA, banks)
        hand_over(values, block, wanted, tap)
        return out_BSD, routings


def hand_over(values: Values, block: Block, wanted: frozenset[str], tap: Tap) -> None:
    """To the tap what it reads there; it has said that it changes nothing."""
    if not wanted:
        return
    found: Values = {}
    for name, x in values.items():
        if (path := block.prefix + name) in wanted:
            found[path] = x.clone() if name in GO_ON else x
    if found:
        cast("CandidTap", tap).accept(found)


class CompilerMissing(RuntimeError):
    """Nothing can be compiled on this machine."""


def compile_decode(model: nn.Module) -> None:
    """Let the blocks of a model decode compiled.

    Each kind of block is compiled at the first decode step of each number of sequences, in some
    seconds. Now one addition is, as a trial.

    Raises:
        CompilerMissing: with what the trial ended in.
    """
    blocks = block_list(cast("Any", model).blocks)
    require_compiler(next(blocks[0].parameters()).device)
    ways: dict[object, CompiledDecode] = {}
    for block in blocks:
        kind = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if kind not in ways:
            ways[kind] = CompiledDecode(block)
        block.compiled = ways[kind]


def require_compiler(device: torch.device) -> None:
    try:
        if "isolate_recompiles" not in signature(torch.compile).parameters:
            raise RuntimeError(f"torch {torch.__version__} is too old for it; 2.13 is not")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch imports only now warns of torch
            torch.compile(_next, fullgraph=True)(torch.zeros(8, device=device))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CompilerMissing(
            f"torch.compile does not work on this machine for {device}: {' '.join(lines[:2])}. On "
            "a CPU it needs a C++ compiler (g++ or clang), on a GPU triton"
        ) from error


def _next(x: Tensor) -> Tensor:
    return x + 1
