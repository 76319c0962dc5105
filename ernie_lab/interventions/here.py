"""What an edit may know where it is applied: tokens, other values of the forward, its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.model.kinds import Model
from ernie_lab.sites import Phase, Site, Step


class EditError(ValueError):
    """An edit that cannot be applied: wrong shape, dtype or device, or an impossible target."""


@dataclass(slots=True)
class Past:
    """Every column that a run has read so far, padding included, as its cache has them."""

    mask_BT: Tensor | None = None
    modality_BT: Tensor | None = None
    bank_BT: Tensor | None = None
    phases: list[Phase] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)

    def extend(self, step: Step) -> None:
        mask_BS = step.mask.bool()
        none_BS = torch.zeros_like(mask_BS, dtype=torch.int64)
        modality_BS = none_BS if step.modality is None else step.modality
        bank_BS = none_BS if step.bank is None else step.bank
        if step.index == 0 or self.mask_BT is None:
            self.mask_BT, self.modality_BT, self.bank_BT = mask_BS, modality_BS, bank_BS
            self.phases, self.indices = [], []
        else:
            assert self.modality_BT is not None
            assert self.bank_BT is not None
            self.mask_BT = torch.cat([self.mask_BT, mask_BS], 1)
            self.modality_BT = torch.cat([self.modality_BT, modality_BS], 1)
            self.bank_BT = torch.cat([self.bank_BT, bank_BS], 1)
        self.phases += [step.phase] * mask_BS.shape[1]
        self.indices += [step.index] * mask_BS.shape[1]

    @property
    def positions(self) -> Tensor:
        """Positions counted in each sequence, without padding, from the prompt's start; -1 on
        padding."""
        if self.mask_BT is None:
            raise _unbound()
        return (self.mask_BT.cumsum(1) - 1).masked_fill(~self.mask_BT, -1)


@dataclass(frozen=True, slots=True, eq=False)
class Here:
    """One application of an edit. `step` is None where a tap was bound to no forward.

    `model` is the model that runs, `parts` are this edit's own (see `Exchange`), by path;
    `before` are those that stood there. `chosen_BS` are the tokens that the edit is narrowed to,
    None for all. `kept` belongs to this edit and this forward: what it noted at one site for
    another. `told` belongs to the edit's count: figures for the result. All tensors are on the
    device of the value at the site: layers may be on several.
    """

    step: Step | None
    past: Past
    values: Mapping[str, Tensor]
    model: Model | None = None
    parts: Mapping[str, nn.Module] = field(default_factory=dict)
    before: Mapping[str, nn.Module] = field(default_factory=dict)
    chosen_BS: Tensor | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)
    told: dict[str, list[float]] = field(default_factory=dict)
    device: torch.device | None = None

    def on(self, device: torch.device) -> Here:
        """The same, for a value that is there."""
        if self.step is None or self.step.mask.device == device:
            return replace(self, device=device)
        return replace(
            self, device=device, step=_moved(self.step, device), past=_moved(self.past, device)
        )

    def value(self, path: str) -> Tensor:
        """The value that flowed at a site which the edit `reads`, earlier in this forward."""
        if path not in self.values:
            raise EditError(f"{path} has not flowed yet in this forward, or the edit reads it not")
        found = self.values[path]
        return found if self.device is None else found.to(self.device)

    def narrowed(self, chosen_BS: Tensor) -> Here:
        both_BS = chosen_BS if self.chosen_BS is None else self.chosen_BS & chosen_BS
        return replace(self, chosen_BS=both_BS)

    @property
    def forward(self) -> Step:
        if self.step is None:
            raise _unbound()
        return self.step

    def rows(self, site: Site, x: Tensor) -> Tensor:
        """For each row of a site's value, in their order, its index in the flattened `(b s)`."""
        mask_BS = self.forward.mask
        flat_BS = torch.arange(mask_BS.numel(), device=x.device).view(mask_BS.shape)
        if site.row == "b":
            n_queries = x.shape[site.dims.split().index("s")]
            return flat_BS[:, mask_BS.shape[1] - n_queries :].flatten()
        if site.bank is not None and site.bank_path is not None:
            mine_N = self.value(site.bank_path).flatten() == BANKS.index(site.bank)
            return mine_N.nonzero().squeeze(1)
        if site.row == "m" and self.forward.modality is not None:
            pictured_BS = (self.forward.modality != 0) & mask_BS.bool()
            return pictured_BS.flatten().nonzero().squeeze(1).to(x.device)
        raise EditError(f"{site.path} has patches and no tokens; it cannot be narrowed to some")

    def chosen(self, site: Site, x: Tensor) -> Tensor | None:
        """True on the rows of chosen tokens, in a shape that broadcasts with `x`; None for all."""
        if self.chosen_BS is None:
            return None
        return self.spread(site, x, self.chosen_BS)

    def spread(self, site: Site, x: Tensor, token_BS: Tensor) -> Tensor:
        """One value per token, in a shape that broadcasts with a site's value."""
        rows = token_BS.to(x.device).flatten()[self.rows(site, x)]
        letters = site.dims.split()
        if site.row != "b":
            return rows.view(-1, *[1] * (x.ndim - 1))
        sizes = zip(letters, x.shape, strict=True)
        return rows.view([size if letter in "bs" else 1 for letter, size in sizes])

    def coordinates(self, site: Site, x: Tensor) -> tuple[Tensor, Tensor]:
        """(sequence, position) of each row; the position is -1 on padding."""
        n_sequences, n_new = self.forward.mask.shape
        pos_BS = self.past.positions[:, -n_new:].to(x.device)
        sequence_BS = torch.arange(n_sequences, device=x.device)[:, None].expand(-1, n_new)
        rows_N = self.rows(site, x)
        return sequence_BS.flatten()[rows_N], pos_BS.flatten()[rows_N]

    def of_rows(self, site: Site, x: Tensor, token_BSX: Tensor) -> Tensor:
        """The rows of a `[b s …]` value that belong to a site's rows, in the shape of these."""
        if site.row == "b":
            return token_BSX
        return token_BSX.flatten(0, 1)[self.rows(site, x)]

    def real(self, site: Site, x: Tensor) -> Tensor:
        """`[rows]`, True on real tokens that the edit is about."""
        about_BS = self.forward.mask.bool()
        if self.chosen_BS is not None:
            about_BS = about_BS & self.chosen_BS
        return about_BS.to(x.device).flatten()[self.rows(site, x)]

    def tell(self, name: str, site: Site, per_row: Tensor) -> None:
        """Add the mean over real tokens of one number per row to the edit's figures."""
        about_N = per_row.detach().flatten()
        if self.step is not None:
            about_N = about_N[self.real(site, per_row)]
        total = self.told.setdefault(f"{name} at {site.path}", [0.0, 0])
        total[0] += float(about_N.double().sum())
        total[1] += len(about_N)


Tokens = TypeVar("Tokens", Step, Past)


def _moved(of: Tokens, device: torch.device) -> Tokens:
    """All tensors of it at a device."""
    values = {one.name: getattr(of, one.name) for one in fields(of)}
    there: dict[str, Any] = {
        name: x.to(device) for name, x in values.items() if isinstance(x, Tensor)
    }
    return replace(of, **there)


def _unbound() -> EditError:
    return EditError(
        "this edit selects tokens, and the tap is bound to no forward: use lab.run, lab.generate, "
        "or pass tap=edit_tap.bind(step)"
    )
