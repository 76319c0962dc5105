"""Another model whose parts an edit uses: told by its weights, not by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from ernie_lab.interventions.here import EditError
from ernie_lab.interventions.parts import part_at
from ernie_lab.interventions.values import Values
from ernie_lab.model.quantised import named_weights


@dataclass(frozen=True, eq=False, repr=False)
class Donor:
    """The shared experts of a model. Equal donors have equal weights there."""

    model: nn.Module
    name: str

    @classmethod
    def of(cls, lab: Any) -> Donor:
        model = lab if isinstance(lab, nn.Module) else getattr(lab, "model", None)
        if not isinstance(model, nn.Module):
            raise EditError(f"a transplant takes another lab, not {type(lab).__name__}")
        return cls(model, str(getattr(lab, "model_id", "a model")))

    @cached_property
    def parts(self) -> Mapping[str, nn.Module]:
        return {
            path: module
            for path, module in self.model.named_modules()
            if path.startswith("blocks.") and path.endswith(".moe.shared")
        }

    def part(self, path: str) -> nn.Module:
        if path not in self.parts:
            raise EditError(f"the donor {self.name} has no {path}: no shared experts in that layer")
        return part_at(self.model, path)

    @cached_property
    def sha256(self) -> str:
        tensors = {
            f"{path}.{name}": parameter.detach()
            for path, part in self.parts.items()
            for name, parameter in named_weights(part)
        }
        return Values(tensors, self.name).sha256

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Donor) and (
            self.model is other.model or self.sha256 == other.sha256
        )

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __repr__(self) -> str:
        return f"<{self.name}>"
