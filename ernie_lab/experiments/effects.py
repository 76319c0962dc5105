"""How much of an edit's effect goes through routing: total, fixed-routing and replay effects."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ernie_lab.arguments import as_edits
from ernie_lab.display import ranges
from ernie_lab.experiments.comparing import Settings, compared, warn_if_idle, warn_of_losses
from ernie_lab.experiments.conditions import BatchRun, Named, check_sites
from ernie_lab.experiments.measuring import Array, routed_layers
from ernie_lab.experiments.passages import Continuations, Passages, Rows, require_lab
from ernie_lab.inputs import Prompt
from ernie_lab.interventions import Edit, routing
from ernie_lab.interventions.bootstrap import draws_of, estimate
from ernie_lab.interventions.comparison import Comparison
from ernie_lab.interventions.summary import floor_of
from ernie_lab.lab import Lab
from ernie_lab.preparing import Images, Videos
from ernie_lab.sites import all_sites

if TYPE_CHECKING:
    import pandas as pd

TOTAL, FIXED, REPLAYED = "TE", "FE", "RE"
# The variants that hold who is chosen and let the weights follow.
FIXED_IDS, REPLAYED_IDS = "FE (ids only)", "RE (ids only)"
_ROUTING = ("router_logits", "router_probs", "selection_scores", "expert_ids", "expert_weights")
_WEIGHTS = "blocks.*.moe.*expert_weights"


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Effects:
    """The four runs of one edit. `table` has a row for each measure and effect, with interval and
    noise floor; `comparison` holds the three edited runs as conditions `TE`, `FE`, `RE`, with
    their KLs and set flips, which are shown and never subtracted.

    `frozen_layers` are those whose routing was held; `exempt_layers` those whose routing the edit
    itself changes.
    """

    table: pd.DataFrame
    comparison: Comparison

    @property
    def frozen_layers(self) -> tuple[int, ...]:
        return tuple(self.comparison.settings["frozen_layers"])

    @property
    def exempt_layers(self) -> tuple[int, ...]:
        return tuple(self.comparison.settings["exempt_layers"])

    @classmethod
    def of(cls, comparison: Comparison) -> Effects:
        return cls(_table(comparison), comparison)

    def save(self, folder: str | PathLike[str]) -> Path:
        return self.comparison.save(folder)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Effects:
        """Reopen what `save` wrote; needs no model."""
        return cls.of(Comparison.load(folder))

    def __repr__(self) -> str:
        return f"{self._head()}\n{self.table.to_string(index=False, float_format='{:.4g}'.format)}"

    def _repr_html_(self) -> str:
        return f"<div>{self._head()}{self.table.to_html(index=False)}</div>"

    def _head(self) -> str:
        held = ranges(self.frozen_layers)
        exempt = ranges(self.exempt_layers)
        return (
            f"Effects on {self.comparison.provenance.line()}; routing held in layers {held}"
            + (f", not in {exempt}, which the edit itself routes" if self.exempt_layers else "")
            + ". interaction = TE - FE - RE"
        )


def effects(
    lab: Lab,
    prompts: Prompt,
    edits: Edit | Iterable[Edit],
    *,
    ids_only: bool = False,
    labels: Rows | None = None,
    loss_mask: Rows | None = None,
    continuations: Continuations | None = None,
    answers: Sequence[Any] | None = None,
    documents: Sequence[Hashable] | None = None,
    images: Images | None = None,
    videos: Videos | None = None,
    chat: Mapping[str, Any] | None = None,
    noise: int = 8,
    noise_tokens: int = 2048,
    n_draws: int = 1000,
    seed: int = 0,
    batch_tokens: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Effects:
    """Total, fixed-routing and routing-replay effect of edits, from four teacher-forced runs.

    - TE: edited, routing free, minus base.
    - FE: edited, ids and weights of experts held to those of the base run, minus base: what the
      edit does when it may not re-route.
    - RE: unedited, with the routing of the edited run, minus base: what the re-routing does alone.
    - interaction = TE - FE - RE, on loss and on the logit difference of `answers` alone, which
      add; KLs do not and are only shown.

    Routing is held in every layer, but where the edit itself changes the routing of a layer, that
    layer is exempt: holding it would undo the edit. (Layers before the edit route as in the base
    run anyway.) With `ids_only`, two more runs hold the ids and let the weights follow; they have
    names of their own.

    The other arguments are those of `compare`.
    """
    require_lab(lab)
    given = as_edits(edits)
    if not given:
        raise ValueError("edits= is empty: there is no effect of nothing; give el.shared.zero(3)")
    exempt = own_routing(lab, given)
    held = tuple(layer for layer in routed_layers(lab) if layer not in exempt)
    named = {
        TOTAL: Named.always(given),
        FIXED: _fixed(given, held, ids_only=False),
        REPLAYED: _replayed(given, held, ids_only=False),
    }
    if ids_only:
        named[FIXED_IDS] = _fixed(given, held, ids_only=True)
        named[REPLAYED_IDS] = _replayed(given, held, ids_only=True)
    check_sites(lab, named)
    passages = Passages.read(
        lab,
        prompts,
        images=images,
        videos=videos,
        chat=chat,
        labels=labels,
        loss_mask=loss_mask,
        continuations=continuations,
        answers=answers,
        documents=documents,
    )
    how = Settings(noise, noise_tokens, n_draws, seed, batch_tokens, folder, progress)
    found = compared(lab, named, passages, how, {}, (_WEIGHTS,) if routed_layers(lab) else ())
    warn_of_losses(found)
    warn_if_idle(found, only=TOTAL)
    layers = {"frozen_layers": list(held), "exempt_layers": list(exempt)}
    return Effects.of(dataclasses.replace(found, settings={**found.settings, **layers}))


def own_routing(lab: Lab, edits: Sequence[Edit]) -> tuple[int, ...]:
    """The layers whose routing these edits change by their own hand."""
    sites = all_sites(lab.model)
    touched = [site for edit in edits for site in edit.select(sites)]
    return tuple(
        sorted(
            {
                site.layer
                for site in touched
                if site.layer is not None and site.path.rpartition(".")[2] in (*_ROUTING, "bank")
            }
        )
    )


def _fixed(edits: tuple[Edit, ...], held: tuple[int, ...], *, ids_only: bool) -> Named:
    def of(batch: BatchRun) -> tuple[Edit, ...]:
        if not held:
            return edits
        trace = batch.base.run.trace
        return (*edits, _replay(trace, held, ids_only))

    return Named(of, None, ("fixed", edits, held, ids_only))


def _replayed(edits: tuple[Edit, ...], held: tuple[int, ...], *, ids_only: bool) -> Named:
    def of(batch: BatchRun) -> tuple[Edit, ...]:
        return (_replay(batch.run(edits).run.trace, held, ids_only),) if held else ()

    return Named(of, None, ("replayed", edits, held, ids_only))


def _replay(trace: Any, held: tuple[int, ...], ids_only: bool) -> Edit:
    # The batch is the same, also where an edit changed its embeddings.
    return routing.replay(trace, layers=held, ids_only=ids_only, same_tokens=False)


def _table(found: Comparison) -> pd.DataFrame:
    import pandas as pd

    measures = {"loss": ("tokens", "loss_change")}
    if "logit_diff" in found.sequences:
        measures["logit difference"] = ("sequences", "logit_diff_change")
    rows = []
    for measure, (table, column) in measures.items():
        frame = getattr(found, table)
        known = found.conditions[column].notna()
        columns = {
            # What has no average there has none here.
            str(name): np.where(known[name], part[column].to_numpy(dtype=float), np.nan)
            for name, part in frame.groupby("condition", sort=False)
        }
        one = frame[frame["condition"] == TOTAL]
        document = pd.factorize(one["document"])[0]
        n = int(document.max()) + 1
        draws = draws_of(n, found.settings["n_draws"], found.settings["seed"])
        noise = found.noise[column].to_numpy() if len(found.noise) else np.array([])
        for name, values in (columns | _interactions(columns)).items():
            got = estimate(values, document, draws)
            floor = floor_of(column, noise)
            if name not in columns:
                floor = floor_of(column, _noise_of_three(noise))
            row = {"measure": measure, "effect": name, "value": got.value, "low": got.low}
            row |= {"high": got.high, "floor": floor}
            if name in columns:
                shown = found.conditions.loc[name]
                row |= {key: shown[key] for key in ("kl", "flips") if key in shown}
            rows.append(row)
    return pd.DataFrame(rows)


def _interactions(columns: Mapping[str, Array]) -> dict[str, Array]:
    found = {"interaction": columns[TOTAL] - columns[FIXED] - columns[REPLAYED]}
    if FIXED_IDS in columns:
        by_ids = columns[TOTAL] - columns[FIXED_IDS] - columns[REPLAYED_IDS]
        found["interaction (ids only)"] = by_ids
    return found


def _noise_of_three(noise: Array) -> Array:
    """What TE - FE - RE would be of three runs that have no effect."""
    triples = itertools.permutations(range(len(noise)), 3)
    return np.array([noise[i] - noise[j] - noise[k] for i, j, k in triples])
