"""Tokens x experts of one layer, to click through: a token's experts, an expert's tokens."""

from __future__ import annotations

from typing import Any

import anywidget
import traitlets

from ernie_lab.plots.expert_map import plot_expert_map
from ernie_lab.plots.pictures import TraceLike, model_name
from ernie_lab.plots.style import MARK
from ernie_lab.plots.view import View
from ernie_lab.trace.keys import NotKept
from ernie_lab.widgets.live import below, one_of, require_state, script, shades, traced, with_still
from ernie_lab.widgets.reading import Reading

# Of the still picture: a page, and some 40 kB in a notebook.
STILL_TOKENS = 60
STILL_LAYERS = 8


class RoutingExplorer(anywidget.AnyWidget):
    """What `explore_routing` returns. Its state can be set from Python as well.

    `layer` is the layer's number, `token` a place among the tokens that the bank read of this
    sequence, `expert` a number, or -1 for none. Where no kernel runs, a still picture is shown.
    """

    _esm = script("parts.js", "routing.js")
    _css = script("explorer.css")

    about = traitlets.Dict().tag(sync=True)
    bank = traitlets.Unicode().tag(sync=True)
    sequence = traitlets.Int().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    token = traitlets.Int(0).tag(sync=True)
    expert = traitlets.Int(-1).tag(sync=True)
    tokens = traitlets.Dict().tag(sync=True)
    choices = traitlets.Dict().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)

    def __init__(self, trace: TraceLike, model: str | None = None) -> None:
        self._trace = trace
        self._readings: dict[str, Reading] = {}
        self._source = model_name(trace, model)
        banks = self._banks()
        first = self._reading(banks[0])
        super().__init__(
            bank=banks[0],
            sequence=first.sequences[0],
            layer=first.layers[0],
            about={
                "model": self._source,
                "banks": banks if len(trace.banks) > 1 else [],
                "n_experts": trace.n_experts,
                "n_chosen": int(first.ids.shape[-1]),
                "shades": shades(MARK),
                **self._pickers(banks[0]),
            },
        )
        self._show_tokens()

    def __setattr__(self, name: str, value: Any) -> None:
        require_state(self, name)
        super().__setattr__(name, value)

    def _banks(self) -> list[str]:
        """Those that read anything: without a picture the vision bank reads nothing."""
        every = [*self._trace.banks] or [""]
        read = []
        for bank in every:
            try:
                if len(self._reading(bank).sequences):
                    read.append(bank)
            except NotKept:
                if bank == every[-1] and not read:
                    raise
        return read

    def _reading(self, bank: str) -> Reading:
        if bank not in self._readings:
            self._readings[bank] = Reading(self._trace, bank)
        return self._readings[bank]

    def _pickers(self, bank: str) -> dict[str, Any]:
        reading = self._reading(bank)
        return {"layers": reading.layers, "sequences": reading.sequences}

    @traitlets.validate("bank")
    def _is_bank(self, proposal: Any) -> str:
        return one_of("bank", str(proposal["value"]), self._banks())

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return one_of("layer", int(proposal["value"]), self._reading(self.bank).layers)

    @traitlets.validate("sequence")
    def _is_sequence(self, proposal: Any) -> int:
        return one_of("sequence", int(proposal["value"]), self._reading(self.bank).sequences)

    @traitlets.validate("token")
    def _is_token(self, proposal: Any) -> int:
        said = self._reading(self.bank).tokens(self.sequence)
        return below("token", int(proposal["value"]), len(said.texts), "this sequence has tokens")

    @traitlets.validate("expert")
    def _is_expert(self, proposal: Any) -> int:
        n_experts = self._trace.n_experts
        return below("expert", int(proposal["value"]), n_experts, "the bank has", none=True)

    @traitlets.observe("bank")
    def _other_bank(self, _change: Any) -> None:
        if not self.tokens:
            return
        reading = self._reading(self.bank)
        with self.hold_sync():
            self.about = {**self.about, **self._pickers(self.bank)}
            # Expert 5 of the one bank is not expert 5 of the other.
            self.expert = -1
            if self.layer not in reading.layers:
                self.layer = reading.layers[0]
            if self.sequence not in reading.sequences:
                self.sequence = reading.sequences[0]
            self._show_tokens()

    @traitlets.observe("sequence")
    def _other_sequence(self, _change: Any) -> None:
        if self.tokens:
            self._show_tokens()

    @traitlets.observe("layer")
    def _other_layer(self, _change: Any) -> None:
        if self.tokens:
            self._show_layer()

    @traitlets.observe("token")
    def _other_token(self, _change: Any) -> None:
        if self.tokens:
            self._show_token()

    def _show_tokens(self) -> None:
        said = self._reading(self.bank).tokens(self.sequence)
        with self.hold_sync():
            self.tokens = {"texts": said.texts, "positions": said.positions, "border": said.border}
            if self.token >= len(said.texts):
                self.token = 0
            self._show_layer()

    def _show_layer(self) -> None:
        with self.hold_sync():
            choices = self._reading(self.bank).choices(self.sequence, self.layer)
            self.choices = {"bank": self.bank, **choices}
            self._show_token()

    def _show_token(self) -> None:
        known = 0 <= self.token < len(self.tokens["texts"])
        reading = self._reading(self.bank)
        found = reading.token(self.sequence, self.layer, self.token) if known else {}
        self.detail = {**found, "token": self.token, "layer": self.layer}

    def still(self) -> View:
        """The picture that stays where no kernel runs; its title says what it leaves out."""
        reading = self._reading(self.bank)
        rows = reading.rows(self.sequence)
        start = max(0, min(self.token - STILL_TOKENS // 4, len(rows) - STILL_TOKENS))
        shown = rows[start : start + STILL_TOKENS]
        layers = _spread(reading.layers, STILL_LAYERS, self.layer)
        bank = self.bank if self.about["banks"] else ""
        return plot_expert_map(
            reading.ids.isel(token=shown),
            reading.weights.isel(token=shown),
            n_experts=self._trace.n_experts,
            bank=bank,
            tokens=self._trace.tokens,
            only_layers=layers,
            model=self._source,
            title=f"Which {bank + ' ' if bank else ''}experts each token went to"
            + _left_out(len(shown), len(rows), len(layers), len(reading.layers)),
        )

    def _repr_mimebundle_(self, **selection: Any) -> Any:
        return with_still(super()._repr_mimebundle_(**selection), self.still(), repr(self))

    def __repr__(self) -> str:
        reading = self._reading(self.bank)
        bank = f", {self.bank} bank" if self.about["banks"] else ""
        return (
            f"explore_routing: layer {self.layer} of {reading.layers[0]}..{reading.layers[-1]}"
            f"{bank}, {len(self.tokens['texts'])} tokens, {self.about['n_chosen']} of "
            f"{self.about['n_experts']} experts each"
        )


def explore_routing(trace: TraceLike, *, model: str | None = None) -> RoutingExplorer:
    """A layer's tokens x experts, to click through.

    Click a token for its experts, weights, probabilities, the runners-up and what the correction
    bias changed; an expert's number for its tokens. A vision-language model's two banks are looked
    at one after the other. Needs `keep="routing"`; the still picture is `plot_expert_map`.
    """
    return RoutingExplorer(traced(trace, "explore_routing"), model)


def _spread(layers: list[int], most: int, always: int) -> list[int]:
    """At most `most` layers at even distances, one of them replaced by `always` if it is none."""
    if len(layers) <= most:
        return layers
    step = (len(layers) - 1) / (most - 1)
    places = [round(i * step) for i in range(most)]
    wanted = layers.index(always)
    nearest = min(range(most), key=lambda i: abs(places[i] - wanted))
    places[nearest] = wanted
    return [layers[place] for place in sorted(set(places))]


def _left_out(tokens: int, all_tokens: int, layers: int, all_layers: int) -> str:
    parts = []
    if tokens < all_tokens:
        parts.append(f"{tokens} of {all_tokens:,} tokens")
    if layers < all_layers:
        parts.append(f"{layers} of {all_layers} layers")
    return f" ({', '.join(parts)}; with a kernel, all)" if parts else ""
