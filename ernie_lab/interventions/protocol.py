"""What an edit is: values with two methods, and what some of them say besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor, nn

from ernie_lab.interventions.here import EditError, Here
from ernie_lab.model.kinds import Model
from ernie_lab.sites import Site

__all__ = ["Edit", "EditError", "Exchange", "Explains", "Narrowed", "Reads"]


@runtime_checkable
class Edit(Protocol):
    """What `edits=` takes."""

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        """The sites it applies to; raises `SiteError` when there are none."""
        ...

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        """The value that goes on instead of `x`, of the same shape, dtype and device."""
        ...


@runtime_checkable
class Reads(Protocol):
    """An edit that needs values from earlier in the same forward: `here.value(path)`.

    These are the values that flowed, after all edits; but of `embed`, which tells the tokens, what
    it was before any.
    """

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]: ...


@runtime_checkable
class Explains(Protocol):
    """An edit of which it follows why, if it changed nothing."""

    def why_idle(self, nobody: str) -> str:
        """`nobody` are the tokens that it was about: "no token". Empty where nothing follows."""
        ...


@runtime_checkable
class Exchange(Protocol):
    """An edit that puts other weights in the place of some: a donor's shared experts, a redrawn
    router.

    The run gets a model of its own that shares all tensors but these (`with_parts`). The parts
    are exchanged before anything flows, in the order of the edits; then values are edited.
    """

    def parts(self, model: Model) -> Mapping[str, nn.Module]:
        """What stands at each path of the model (`blocks.3.moe.shared`) during the run."""
        ...

    def beside(self, site: Site, here: Here, /) -> Tensor:
        """What this edit's part makes at a site, computed beside a model that keeps its own."""
        ...


@runtime_checkable
class Narrowed(Protocol):
    """An exchange for some tokens alone: its parts are computed beside the model's own."""

    @property
    def exchange(self) -> Exchange: ...
