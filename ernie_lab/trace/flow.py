"""Gradients: the tensors that flowed through a site, held so that one can differentiate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ernie_lab.trace.keep import KeptSite
from ernie_lab.trace.pieces import Piece, cut
from ernie_lab.trace.recorded import Recorded, join
from ernie_lab.trace.rows import Rows, StepRows


@dataclass(frozen=True, slots=True, eq=False)
class Flow:
    """The very tensors of one site, one per forward in which it fired, padding included.

    What a trace shows are copies of their `rows`, and a copy is not upstream of the loss: only
    these are.
    """

    rule: KeptSite
    steps: tuple[StepRows, ...]
    rows: tuple[Rows | None, ...]
    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    def gradient(self, of: Tensor) -> Recorded:
        """d of / d site, in the same rows, heads and positions as the recording.

        Zero where `of` does not depend on the site. No gradient passes top-k: what a logit
        does by changing *who* is chosen is not in it.
        """
        path = self.rule.site.path
        if not all(x.requires_grad for x in self.tensors):
            raise ValueError(
                f"{path} has no graph: it is an integer, or nothing upstream requires a gradient"
            )
        grads = torch.autograd.grad(of, self.tensors, retain_graph=True, allow_unused=True)
        whole = [
            torch.zeros_like(x) if grad is None else grad
            for x, grad in zip(self.tensors, grads, strict=True)
        ]
        pieces = [
            Piece(rows, cut(self.rule, step, rows, grad))
            for step, rows, grad in zip(self.steps, self.rows, whole, strict=True)
        ]
        return join(self.rule, pieces, self.starts, self.lengths, fill=0.0)
