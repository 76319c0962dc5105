"""What is switched off in an ablation, as edits and as code; and what that changes in one text."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ernie_lab.interventions import Edit, experts, shared
from ernie_lab.interventions.metrics import kl_divergence, set_flips
from ernie_lab.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd

# Of one bank of one layer; the bank of a text model is "".
Place = tuple[int, str]

WAYS = ("zero", "renormalise", "next_best")
SHOWN_TOKENS = 10
_AT_ONCE = 256  # positions whose log-softmax exists at one time
_CHOICES = "blocks.*.moe.*expert_ids"


class Runs(Protocol):
    """A `Lab`, as far as it is needed here."""

    @property
    def model_id(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    def run(self, prompt: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Switches:
    """Shared experts off by layer, routed experts off by layer and bank, in one sense of "off"."""

    shared: frozenset[int] = frozenset()
    routed: Mapping[Place, frozenset[int]] = field(default_factory=dict)
    how: str = "zero"

    def __post_init__(self) -> None:
        if self.how not in WAYS:
            raise ValueError(f"how={self.how!r} must be one of {', '.join(WAYS)}")

    def with_experts(self, place: Place, ids: frozenset[int]) -> Switches:
        """The same, with exactly these experts of this place off."""
        routed = {**self.routed, place: ids}
        return replace(self, routed={key: routed[key] for key in sorted(routed) if routed[key]})

    def edits(self) -> list[Edit]:
        found = [shared.zero(sorted(self.shared))] if self.shared else []
        for (layer, bank), ids in self.routed.items():
            how: Any = self.how
            found.append(experts.off(layer, sorted(ids), how, bank=bank or None))
        return found

    def code(self, more: str = "") -> str:
        """The call that does the same; `more` are its other arguments."""
        said = [f"el.shared.zero({sorted(self.shared)})"] if self.shared else []
        for (layer, bank), ids in self.routed.items():
            of = f', bank="{bank}"' if bank else ""
            said.append(f'el.experts.off({layer}, {sorted(ids)}, "{self.how}"{of})')
        edits = f", edits=[{', '.join(said)}]" if said else ""
        return f'lab.run(prompt{more}{edits}, keep="routing")'


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """One prompt, run once without edits: what every edited run is held against."""

    lab: Runs
    prompt: Any
    options: Mapping[str, Any]
    base: Any

    @classmethod
    def read(cls, lab: Runs, prompt: Any, **options: Any) -> Text:
        if not hasattr(lab, "run"):
            raise TypeError(
                f"{lab!r} is a {type(lab).__name__}, expected a lab: "
                + (f"el.load({lab!r})" if isinstance(lab, str) else "what el.load returns")
            )
        given = {name: value for name, value in options.items() if value is not None}
        base = lab.run(prompt, keep="routing", **given)
        if len(base.batch.lengths) != 1:
            raise ValueError(
                f"one prompt at a time: {len(base.batch.lengths)} were given. For many texts, "
                "with intervals, take el.compare"
            )
        if not base.trace.banks:
            raise ValueError(f"{lab.model_id} is dense: it has no experts to switch off")
        return cls(lab, prompt, given, base)

    @property
    def trace(self) -> Trace:
        found: Trace = self.base.trace
        return found

    @property
    def banks(self) -> tuple[str, ...]:
        """Those that read a token of this text; "" is the one of a text model."""
        if len(self.trace.banks) < 2:
            return ("",)
        read = set(self.trace.tokens["bank"])
        return tuple(bank for bank in self.trace.banks if bank in read)

    def counts(self, layer: int, bank: str) -> list[int]:
        """How many tokens of the text chose each expert in the run without edits."""
        ids = self.trace.routing(bank or None).expert_ids.sel(layer=layer).to_numpy()
        chosen: list[int] = torch.bincount(
            torch.from_numpy(ids.ravel().astype("int64")), minlength=self.trace.n_experts
        ).tolist()
        return chosen

    def without(self, switches: Switches) -> Change:
        """The same tokens with these parts off; warnings become words of the result."""
        edits = switches.edits()
        if not edits:
            return Change(self, self.base, ())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = self.lab.run(self.prompt, keep=_CHOICES, edits=edits, **self.options)
        return Change(self, run, tuple(str(warning.message) for warning in caught))


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """An edited run beside the base run of the same tokens."""

    text: Text
    run: Any
    warnings: tuple[str, ...]

    @property
    def counts(self) -> list[tuple[str, int, int]]:
        """Of each edit: its words, how often it was applied, how often it changed a number."""
        edits = () if self.run is self.text.base else self.run.edits
        return [(repr(count.edit), count.n_fired, count.n_changed) for count in edits]

    @property
    def counted(self) -> torch.Tensor:
        """The tokens of text that are predicted, `[s]`."""
        words_S = torch.tensor((self.text.trace.tokens["content"] == "text").to_numpy(copy=True))
        counted_S: torch.Tensor = self.text.base.counted[0].cpu()
        return words_S & counted_S

    @property
    def losses(self) -> tuple[float, float]:
        """Mean loss in nats over the tokens of text, intact and edited; NaN of a single token.

        Places of pictures do not count: no model learns to predict them.
        """
        both = [run.token_loss[0].float().cpu() for run in (self.text.base, self.run)]
        base, edited = (float(loss_S[self.counted].mean()) for loss_S in both)
        return base, edited

    def kl(self) -> torch.Tensor:
        """KL(base || edited) in nats of what is predicted after each token."""
        if self.run is self.text.base:
            return torch.zeros(len(self.text.trace))
        base_SV, edited_SV = self.text.base.logits[0], self.run.logits[0]
        pieces = zip(base_SV.split(_AT_ONCE), edited_SV.split(_AT_ONCE), strict=True)
        return torch.cat([kl_divergence(one, other) for one, other in pieces]).cpu()

    def next_tokens(self, position: int, n: int = SHOWN_TOKENS) -> pd.DataFrame:
        """The likeliest of either run after `position`: id, token, base, edited; base first."""
        import pandas as pd

        probs_RV = torch.stack(
            [run.logits[0, position].float().softmax(-1) for run in (self.text.base, self.run)]
        ).cpu()
        ids = probs_RV.amax(0).topk(min(n, probs_RV.shape[1])).indices
        ids = ids[probs_RV[0, ids].argsort(descending=True, stable=True)]
        base, edited = probs_RV[:, ids].tolist()
        tokenizer = self.text.lab.tokenizer
        words = tokenizer.token_strings(ids.tolist()) if tokenizer else [f"id {i}" for i in ids]
        return pd.DataFrame({"id": ids.tolist(), "token": words, "base": base, "edited": edited})

    def flips(self) -> dict[str, dict[int, float]]:
        """Mean set flips by bank and layer: the share of a token's experts that others replaced."""
        found: dict[str, dict[int, float]] = {}
        for bank in self.text.banks:
            runs = (self.text.base, self.run)
            was, now = (run.trace.routing(bank or None).expert_ids for run in runs)
            layers = [int(layer) for layer in was["layer"].values]
            pairs = zip(was.to_numpy(), now.to_numpy(), strict=True)
            shares = [set_flips(*map(torch.tensor, pair)).mean() for pair in pairs]
            found[bank] = {layer: float(x) for layer, x in zip(layers, shares, strict=True)}
        return found
