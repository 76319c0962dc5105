"""The routing of one run, in another run: ids and weights, or ids alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from ernie_lab.inputs.visual_layout import BANKS
from ernie_lab.interventions.calling import called
from ernie_lab.interventions.here import EditError, Here
from ernie_lab.interventions.lookup import looked_up
from ernie_lab.interventions.protocol import Edit
from ernie_lab.interventions.saying import as_call, shown
from ernie_lab.interventions.targets import Layers, as_layers, true_layer
from ernie_lab.interventions.values import AT, Values, recorded_rows
from ernie_lab.interventions.where import Tokens, narrowed_to
from ernie_lab.sites import Site, select
from ernie_lab.trace.trace import Trace

_IDS, _WEIGHTS = ".expert_ids", ".expert_weights"
_TOKENS = "tokens"


@dataclass(frozen=True, slots=True, repr=False)
class Replay:
    """Routing held to a recorded one. See `replay`."""

    kind: ClassVar[str] = "routing.replay"
    values: Values
    missing: str = "error"
    same_tokens: bool = True

    def __repr__(self) -> str:
        """With what it holds of the trace, which the values tell."""
        held = self.values.paths
        layers = tuple(sorted({int(path.split(".")[1]) for path in held}))
        banks = {path.split(".moe.")[1].partition(".")[0] for path in held} & set(BANKS)
        said = [f"layers={shown(layers)}"]
        said += [f"bank={bank!r}" for bank in banks if len(banks) == 1]
        said += [] if any(path.endswith(_WEIGHTS) for path in held) else ["ids_only=True"]
        return f"{as_call(self)[:-1]}, {', '.join(said)})"

    def select(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return select(list(self.values.paths), sites)

    def reads(self, sites: Sequence[Site]) -> tuple[Site, ...]:
        return select("embed", sites)

    def apply(self, site: Site, x: Tensor, here: Here, /) -> Tensor:
        if self.same_tokens:
            self._require_tokens(here)
        return looked_up(self.values, site, x, here, self.missing)

    def _require_tokens(self, here: Here) -> None:
        """The prompt is told by its embeddings, which are rows of the model's own table."""
        if "checked" in here.kept or here.model is None:
            return
        embed_BSD = here.value("embed")
        n_sequences, n_new = embed_BSD.shape[:2]
        pos_BS = here.past.positions[:, -n_new:].to(embed_BSD.device)
        sequence_BS = torch.arange(n_sequences, device=embed_BSD.device)[:, None].expand_as(pos_BS)
        found_N = self.values.find(_TOKENS, sequence_BS.flatten(), pos_BS.flatten())
        known_N = found_N >= 0
        ids_N = self.values[_TOKENS].to(embed_BSD.device)[found_N[known_N]]
        table_VD = here.model.embed_VD
        expected_ND = table_VD[ids_N.to(table_VD.device)].to(embed_BSD.device)
        differ_N = (embed_BSD.flatten(0, 1)[known_N] != expected_ND).any(-1)
        if bool(differ_N.any()):
            first = known_N.nonzero().squeeze(1)[differ_N][0]
            raise EditError(
                f"{self.values!r} is of another prompt: sequence {int(first) // n_new} differs at "
                f"position {int(pos_BS.flatten()[first])}; pass same_tokens=False if that is meant"
            )
        here.kept["checked"] = known_N


def _replay(
    trace: Trace,
    *,
    ids_only: bool = False,
    layers: Layers = None,
    bank: str | None = None,
    missing: str = "error",
    same_tokens: bool = True,
    **tokens: Unpack[Tokens],
) -> Edit:
    """The routing of `trace` (kept with `keep="routing"`), token by token.

    Replaying a run's own routing changes no bit of it, in a run or a generation.

    Args:
        ids_only: hold who is chosen; the weights follow from the probabilities of this run.
        layers: those to hold; None means all that the trace kept.
        bank: in a vision-language model, one bank alone; None means both.
        missing: `"error"` where the run has a token that the trace has not (the last token of a
            generation has no routing), or `"keep"` to leave these to the router.
        same_tokens: refuse a run of other tokens. False replays the routing of another prompt
            of the same layout.
    """
    if not isinstance(trace, Trace):
        raise EditError(_no_trace(trace))
    if missing not in ("error", "keep"):
        raise EditError(f'missing={missing!r} must be "error" or "keep"')
    endings = (_IDS,) if ids_only else (_IDS, _WEIGHTS)
    wanted = _wanted(trace, as_layers(layers), bank)
    paths = [path for path in wanted if path.endswith(endings)]
    held = recorded_rows(trace, paths, f"routing of {len(trace)} tokens")
    context = trace.context
    at_N2 = torch.tensor([context.sequence, context.pos]).T
    extra = {_TOKENS: torch.tensor(context.id), _TOKENS + AT: at_N2} if same_tokens else {}
    values = Values({**held.tensors, **extra}, held.source)
    return narrowed_to(Replay(values, missing, same_tokens), tokens)


def _no_trace(given: object) -> str:
    of_run = isinstance(getattr(given, "trace", None), Trace)
    shown = f"a {type(given).__name__}: pass its .trace" if of_run else f"{given!r}: pass run.trace"
    return f"routing.freeze (or routing.replay) takes a trace, not {shown}"


replay = called("routing.replay")(_replay)
freeze = called("routing.freeze")(_replay)


def _wanted(trace: Trace, layers: tuple[int, ...] | None, bank: str | None) -> list[str]:
    sites = trace.known_sites
    has_banks = any(site.bank for site in sites)
    if bank is not None and (bank not in trace.banks or not has_banks):
        raise EditError(f"bank={bank!r}: this trace has banks {' and '.join(trace.banks)}")
    numbers = None if layers is None else {true_layer(layer, sites) for layer in layers}
    found = [
        site
        for site in sites
        if site.path.endswith((_IDS, _WEIGHTS))
        and (bank is None or site.bank == bank)
        and (numbers is None or site.layer in numbers)
    ]
    kept = [site.path for site in found if site.path in trace.values]
    there = {trace.values[path].site.layer for path in kept}
    if not kept or (numbers is not None and numbers - there):
        raise EditError('the trace has no routing of these layers; record it with keep="routing"')
    unpaired = [
        path for path in kept if path.endswith(_IDS) and path[: -len(_IDS)] + _WEIGHTS not in kept
    ]
    if unpaired:
        raise EditError(f"the trace has {unpaired[0]} without its weights; keep both")
    return kept
