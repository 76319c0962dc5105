"""Which tokens an edit is about: positions, kind, phase, forwards, sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypedDict

import torch
from torch import Tensor

from ernie_lab.interventions.calling import called
from ernie_lab.interventions.here import EditError, Here, Past
from ernie_lab.interventions.protocol import Edit, Exchange, Explains, Reads
from ernie_lab.interventions.saying import shown
from ernie_lab.sites import Phase, Site
from ernie_lab.trace.integers import integers
from ernie_lab.trace.positions import Positions, PositionsLike, as_positions

CONTENTS = ("text", "image", "video", "delimiter")


@dataclass(frozen=True, slots=True, repr=False)
class Where:
    """Tokens by what is given; None leaves a criterion open. Padding is never chosen.

    `positions` count in each sequence without its padding, from the prompt's start and on
    through generation. `steps` are forwards, 0 the prefill.
    """

    positions: Positions | None = None
    content: tuple[str, ...] | None = None
    phase: Phase | None = None
    steps: tuple[int, ...] | None = None
    sequences: tuple[int, ...] | None = None

    @classmethod
    def of(
        cls,
        positions: PositionsLike | None = None,
        where: str | Iterable[str] | None = None,
        phase: Phase | None = None,
        steps: int | Iterable[int] | None = None,
        sequence: int | Iterable[int] | None = None,
    ) -> Where:
        content = (where,) if isinstance(where, str) else None if where is None else tuple(where)
        for one in content or ():
            if one not in CONTENTS:
                raise EditError(f"where={one!r} must be one of {', '.join(CONTENTS)}")
        if phase not in (None, "prefill", "decode"):
            raise EditError(f'phase={phase!r} must be "prefill" or "decode"; leave it out for both')
        for name, given in (("where", content), ("steps", steps), ("sequence", sequence)):
            if isinstance(given, list | tuple) and not given:
                raise EditError(f"an empty {name} selects nothing; leave it out for all")
        return cls(
            None if positions is None else as_positions(positions),
            content,
            phase,
            None if steps is None else integers(steps, "steps"),
            None if sequence is None else integers(sequence, "sequence"),
        )

    @property
    def is_open(self) -> bool:
        return self == Where()

    def among(self, past: Past) -> Tensor:
        """`[b t]` over all columns so far, True on those meant."""
        assert past.mask_BT is not None
        meant_BT = past.mask_BT.clone()
        if self.positions is not None:
            meant_BT &= self._at_positions(past)
        if self.content is not None:
            meant_BT &= _of_content(past, self.content)
        if self.phase is not None:
            meant_BT &= _columns([phase == self.phase for phase in past.phases], meant_BT)
        if self.steps is not None:
            meant_BT &= _columns([index in self.steps for index in past.indices], meant_BT)
        if self.sequences is not None:
            n = len(meant_BT)
            if beyond := [i for i in self.sequences if not -n <= i < n]:
                raise EditError(f"sequence={beyond[0]}: this batch has sequences 0..{n - 1}")
            mine = {i % n for i in self.sequences}
            of_B = torch.tensor([i in mine for i in range(n)], device=meant_BT.device)
            meant_BT &= of_B[:, None]
        return meant_BT

    def _at_positions(self, past: Past) -> Tensor:
        assert self.positions is not None
        assert past.mask_BT is not None
        if self.positions.needs_the_end and past.indices[-1] > 0:
            raise EditError(
                f"positions={self.positions} count from the end, which a generation does not know; "
                "count from the start, or narrow to phase='prefill'"
            )
        longest = int(past.mask_BT.sum(1).max())
        pos_BT = past.positions
        meant = []
        for pos_T in pos_BT:
            length = int(pos_T.max()) + 1 if self.positions.needs_the_end else longest
            wanted = torch.tensor(self.positions.among(length), dtype=torch.int64)
            meant.append(torch.isin(pos_T, wanted.to(pos_T.device)))
        return torch.stack(meant)

    def __repr__(self) -> str:
        return f"edits.tokens({self.said})"

    @property
    def said(self) -> str:
        """As `at` and `tokens` take it."""
        given = {
            "phase": self.phase,
            "steps": self.steps,
            "positions": self.positions,
            "where": self.content,
            "sequence": self.sequences,
        }
        return ", ".join(
            f"{name}={_typed(value) if isinstance(value, Positions) else shown(value)}"
            for name, value in given.items()
            if value is not None
        )


def _typed(positions: Positions) -> str:
    """As `positions=` takes them."""
    if positions.span is None:
        return shown(positions.indices)
    start, stop, step = positions.span
    return f"slice({start}, {stop})" if step == 1 else f"slice({start}, {stop}, {step})"


def _of_content(past: Past, content: Sequence[str]) -> Tensor:
    assert past.modality_BT is not None
    assert past.bank_BT is not None
    is_text_BT = past.modality_BT == 0
    kinds = {
        "text": is_text_BT & (past.bank_BT == 0),
        "delimiter": is_text_BT & (past.bank_BT == 1),
        "image": past.modality_BT == 1,
        "video": past.modality_BT == 2,
    }
    return torch.stack([kinds[one] for one in content]).any(0)


def _columns(flags: Sequence[bool], like_BT: Tensor) -> Tensor:
    return torch.tensor(flags, device=like_BT.device)[None]


@dataclass(frozen=True, slots=True, repr=False)
class At:
    """An edit for some tokens alone; the others keep their value."""

    kind: ClassVar[str] = "at"
    edit: Edit
    wheres: tuple[Where, ...]

    def __repr__(self) -> str:
        return _said(self.edit, self.wheres)

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        found = self.edit.select(sites)
        _require_tokens(found, self.wheres)
        return found

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return self.edit.reads(sites) if isinstance(self.edit, Reads) else ()

    def why_idle(self, nobody: str) -> str:
        narrowed = f"{nobody} that it is narrowed to"
        return self.edit.why_idle(narrowed) if isinstance(self.edit, Explains) else ""

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        inside = _narrowed(self.wheres, here)
        if inside is None:
            return x
        if inside.chosen_BS is None:
            return self.edit.apply(site, x, inside)
        chosen = inside.chosen(site, x)
        assert chosen is not None
        if not bool(chosen.any()):
            return x
        return torch.where(chosen, self.edit.apply(site, x, inside), x)


@dataclass(frozen=True, slots=True, repr=False)
class AtPart:
    """An exchange of parts for some tokens alone: the donor runs beside, on the same input.

    Inside of the part (`moe.shared.act`) a trace shows the receiver's own values.
    """

    kind: ClassVar[str] = "at part"
    exchange: Exchange
    wheres: tuple[Where, ...]

    def __repr__(self) -> str:
        return _said(self.exchange, self.wheres)

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        assert isinstance(self.exchange, Edit)
        return self.exchange.select(sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return self.exchange.reads(sites) if isinstance(self.exchange, Reads) else ()

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        inside = _narrowed(self.wheres, here)
        if inside is None:
            return x
        chosen = inside.chosen(site, x)
        if chosen is not None and not bool(chosen.any()):
            return x
        other = self.exchange.beside(site, inside)
        return other if chosen is None else torch.where(chosen, other, x)


@called("at")
def at(
    edit: Edit,
    *,
    phase: Phase | None = None,
    steps: int | Iterable[int] | None = None,
    positions: PositionsLike | None = None,
    where: str | Iterable[str] | None = None,
    sequence: int | Iterable[int] | None = None,
) -> Edit:
    """`edit` for some tokens alone: all that is given must hold.

    Args:
        phase: `"prefill"` or `"decode"`.
        steps: forwards: 0 is the prefill, 1 the first that reads a generated token.
        positions: an index, several, a range or a slice, counted in each sequence without its
            padding and on through generation; negative from the end, in a prefill alone.
        where: `"text"`, `"image"`, `"video"`, `"delimiter"`, or several of them.
        sequence: numbers in the batch.
    """
    if not isinstance(edit, Edit):
        raise EditError(f"el.at takes an edit, not {edit!r}")
    new = Where.of(positions, where, phase, steps, sequence)
    if new.is_open:
        raise EditError("el.at needs something to narrow to: phase, steps, positions, where, …")
    if isinstance(edit, At):
        return At(edit.edit, (*edit.wheres, new))
    if isinstance(edit, AtPart):
        return AtPart(edit.exchange, (*edit.wheres, new))
    return AtPart(edit, (new,)) if isinstance(edit, Exchange) else At(edit, (new,))


class Tokens(TypedDict, total=False):
    """What ready-made edits pass on to `at`."""

    phase: Phase | None
    steps: int | Iterable[int] | None
    positions: PositionsLike | None
    where: str | Iterable[str] | None
    sequence: int | Iterable[int] | None


def narrowed_to(edit: Edit, tokens: Tokens) -> Edit:
    """`at(edit, **tokens)` if any of them is given."""
    return at(edit, **tokens) if any(value is not None for value in tokens.values()) else edit


def _narrowed(wheres: Sequence[Where], here: Here) -> Here | None:
    """None where no token of this forward is meant."""
    step = here.forward
    for one in wheres:
        if one.phase not in (None, step.phase):
            return None
        if one.steps is not None and step.index not in one.steps:
            return None
    of_tokens = [w for w in wheres if not _of_forwards(w)]
    if not of_tokens:
        return here
    n_new = step.mask.shape[1]
    for one in of_tokens:
        here = here.narrowed(one.among(here.past)[:, -n_new:])
    return here


def _of_forwards(where: Where) -> bool:
    return where == Where(phase=where.phase, steps=where.steps)


def _require_tokens(sites: Sequence[Site], wheres: Sequence[Where]) -> None:
    patches = [site.path for site in sites if site.of_patches]
    if patches and not all(map(_of_forwards, wheres)):
        raise EditError(
            f"{patches[0]} has patches and no tokens, so positions, where and sequence cannot "
            "narrow an edit there"
        )


def _said(edit: object, wheres: Sequence[Where]) -> str:
    """Within each other: `at` takes a criterion once."""
    said = repr(edit)
    for where in wheres:
        said = f"at({said}, {where.said})"
    return said
