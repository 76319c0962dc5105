"""Switch shared and routed experts off, and see at once what the model expects next."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ernie_lab.display import ranges
from ernie_lab.plots.next_tokens import plot_next_tokens
from ernie_lab.plots.view import View
from ernie_lab.trace.integers import integers
from ernie_lab.widgets.change_html import (
    STYLE,
    code_html,
    drift_html,
    figures_html,
    next_tokens_html,
    warning_html,
)
from ernie_lab.widgets.live import with_still
from ernie_lab.widgets.switches import WAYS, Change, Runs, Switches, Text

_CONTEXT = 24  # characters before the predicted token
_SENSES = {
    "zero: nothing in its place": "zero",
    "renormalise: the others fill up": "renormalise",
    "next_best: the next candidate": "next_best",
}


class AblationExplorer:
    """What `explore_ablation` returns.

    `switches` is what is off now, `change` its result, `edits` and `code` the same for
    `lab.run`; `set` changes it from Python. Where no kernel runs, the next tokens stand as a
    still picture, as they were when the cell was run.
    """

    def __init__(self, text: Text, start: Switches) -> None:
        self.text = text
        self.switches = start
        self.change: Change = text.without(start)
        self.error: Exception | None = None
        self._quiet = self._ready = False
        self._build()
        self._write()
        self._ready = True

    def __setattr__(self, name: str, value: Any) -> None:
        mine = name.startswith("_") or name in ("switches", "change", "error")
        if not mine and getattr(self, "_ready", False):
            raise AttributeError(
                f"setting {name!r} would change nothing that is shown; "
                "explorer.set(shared=[3], experts={4: [0, 7]}, how=…) switches parts off"
            )
        super().__setattr__(name, value)

    # From Python.

    @property
    def edits(self) -> list[Any]:
        return self.switches.edits()

    @property
    def code(self) -> str:
        given = "".join(f", {name}={name}" for name in self.text.options)
        return self.switches.code(given)

    @property
    def position(self) -> int:
        """The token after which the next one is shown."""
        return int(self.after.value)

    def set(
        self,
        shared: int | Iterable[int] = (),
        experts: Mapping[int, int | Iterable[int]] | None = None,
        how: str = "zero",
        bank: str | None = None,
    ) -> None:
        """Switch off exactly this; arguments as in `explore_ablation`."""
        self._apply(started(self.text, shared, {} if experts is None else experts, how, bank))
        self._press()

    @property
    def view(self) -> View:
        """The still picture of what is shown."""
        base, edited = self.change.losses
        layers = "; ".join(
            (f"{bank} bank " if bank else "")
            + ", ".join(f"{layer}: {100 * x:.0f} %" for layer, x in by_layer.items())
            for bank, by_layer in self.change.flips().items()
        )
        tokenizer, actual = self.text.lab.tokenizer, self._actual()
        known = actual is not None and tokenizer is not None
        return plot_next_tokens(
            self.change.next_tokens(self.position),
            actual=tokenizer.token_strings([actual])[0] if known else None,
            title=f"Next token after “…{self._before()}”, {self._off_in_words()}",
            caption=f"{self.text.lab.model_id}. Loss {base:.3f} intact, {edited:.3f} edited. "
            f"Routing drift by layer: {layers}. {self.code}",
        )

    # The controls.

    def _build(self) -> None:
        import ipywidgets as w

        layers = self._layers()
        self.title = w.HTML(STYLE + self._heading())
        self.shared = {
            layer: self._toggle(str(layer), f"shared experts of layer {layer} off")
            for layer in layers
        }
        self.all_shared = w.Button(description="all", layout={"width": "44px"})
        self.layer = w.Dropdown(options=layers, description="layer", layout={"width": "140px"})
        banks = [bank for bank in self.text.banks if bank]
        self.bank = w.Dropdown(options=banks or [""], description="bank", layout={"width": "180px"})
        self.bank.layout.display = "" if banks else "none"
        self.how = w.Dropdown(
            options=_SENSES, value=self.switches.how, description="off means",
            layout={"width": "330px"},
        )  # fmt: skip
        self.experts = [
            self._toggle(str(e), "", width="62px") for e in range(self.text.trace.n_experts)
        ]
        last = len(self.text.trace) - 1
        self.after = w.IntSlider(
            value=last, min=0, max=last, description="after token", continuous_update=False,
            layout={"width": "420px"},
        )  # fmt: skip
        self.reset = w.Button(description="reset", tooltip="everything on again")
        # The line stays when it is empty, or everything below would jump at each press.
        self.status, self.result = w.HTML(layout={"min_height": "26px"}), w.HTML()
        wrap = w.Layout(flex_flow="row wrap")
        said = w.HTML("<span class='ea-hint'>expert · how many tokens of this text chose it</span>")
        self.box = w.VBox(
            [
                self.title,
                w.HBox(
                    [
                        w.Label("shared experts off in layer"),
                        *self.shared.values(),
                        self.all_shared,
                    ],
                    layout=wrap,
                ),
                w.HBox(
                    [w.Label("routed experts off:"), self.layer, self.bank, self.how], layout=wrap
                ),
                said,
                w.HBox(self.experts, layout=wrap),
                w.HBox([self.after, self.reset], layout=wrap),
                self.status,
                self.result,
            ]
        )
        self._name_and_listen()

    def _name_and_listen(self) -> None:
        names = {
            "ernie-ablation": self.box, "ernie-reset": self.reset, "ernie-after": self.after,
            "ernie-how": self.how, "ernie-layer": self.layer, "ernie-bank": self.bank,
            "ernie-status": self.status, "ernie-result": self.result,
            "ernie-all-shared": self.all_shared,
        }  # fmt: skip
        names |= {f"ernie-shared-{layer}": button for layer, button in self.shared.items()}
        names |= {f"ernie-expert-{e}": button for e, button in enumerate(self.experts)}
        for name, widget in names.items():
            widget.add_class(name)
        for control in (*self.shared.values(), *self.experts, self.how):
            control.observe(lambda _change: self._read(), names="value")
        for control in (self.layer, self.bank):
            control.observe(lambda _change: self._press(), names="value")
        self.after.observe(lambda _change: self._write(), names="value")
        self.reset.on_click(lambda _button: self.set(how=self.how.value))
        self.all_shared.on_click(lambda _button: self._all_shared())
        self._press()

    @staticmethod
    def _toggle(words: str, tip: str, width: str = "44px") -> Any:
        import ipywidgets as w

        return w.ToggleButton(description=words, tooltip=tip, layout={"width": width})

    def _layers(self) -> list[int]:
        bank = self.text.banks[0]
        return [int(n) for n in self.text.trace.routing(bank or None).expert_ids["layer"].values]

    def _place(self) -> tuple[int, str]:
        return int(self.layer.value), str(self.bank.value)

    # From the controls to a result.

    def _press(self) -> None:
        """The buttons as `switches` has it, for the layer and bank that are picked."""
        self._quiet = True
        try:
            layer, bank = place = self._place()
            off = self.switches.routed.get(place, frozenset())
            counts = self.text.counts(layer, bank)
            for expert, button in enumerate(self.experts):
                button.value = expert in off
                button.description = f"{expert} · {counts[expert]}"
                of_bank = f"{bank} " if bank else ""
                button.tooltip = f"{of_bank}expert {expert} of layer {layer} off"
            for layer_off, button in self.shared.items():
                button.value = layer_off in self.switches.shared
            self.how.value = self.switches.how
        finally:
            self._quiet = False

    def _read(self) -> None:
        """From the buttons to `switches`, and to what they do."""
        if self._quiet:
            return
        ids = frozenset(e for e, button in enumerate(self.experts) if button.value)
        shared = frozenset(layer for layer, button in self.shared.items() if button.value)
        wanted = replace(self.switches, shared=shared, how=str(self.how.value))
        self._apply(wanted.with_experts(self._place(), ids))

    def _all_shared(self) -> None:
        """All off; all on again, if all are off."""
        every = frozenset(self.shared)
        wanted = frozenset() if self.switches.shared == every else every
        self._apply(replace(self.switches, shared=wanted))
        self._press()

    def _apply(self, switches: Switches) -> None:
        self.switches, self.error = switches, None
        self.status.value = "<span class='ea-hint'>running with the edits …</span>"
        try:
            self.change = self.text.without(switches)
        except Exception as error:  # a callback's error would be seen by nobody
            self.error = error
        self._write()

    # From a result to what is seen.

    def _write(self) -> None:
        if self.error is not None:
            kind = type(self.error).__name__
            self.status.value = warning_html(f"{kind}: {self.error}")
            self.result.value = code_html(self.code)
            return
        change = self.change
        self.status.value = warning_html(*change.warnings)
        before, kl = self._before(), change.kl()
        base, edited = change.losses
        here = float(kl[self.position])
        figures = {
            "loss, text tokens": f"{base:.3f} → {edited:.3f} nats ({edited - base:+.3f})"
            if bool(change.counted.any())
            else "one token: nothing is predicted",
            "KL(intact || edited), here": f"{here:.3g} nats",
            "KL, mean over all tokens": f"{float(kl.mean()):.3g} nats",
        }
        tokens = next_tokens_html(change.next_tokens(self.position), before, self._actual())
        right = figures_html(figures, change.counts) + drift_html(change.flips())
        self.result.value = (
            f"<div class='ea-two'><div>{tokens}</div><div>{right}</div></div>{code_html(self.code)}"
        )

    def _heading(self) -> str:
        n = len(self.text.trace)
        return (
            f"<div class='ea-title'>What if these experts were off? "
            f"{html.escape(self.text.lab.model_id)}, {n} tokens</div>"
            "<div class='ea-hint'>Pressed means off. One text shows what can happen; for an effect "
            "with an interval and a noise floor take el.compare.</div>"
        )

    def _before(self) -> str:
        text = self.text.trace.tokens["text"].tolist()[: self.position + 1]
        return "".join(text)[-_CONTEXT:].replace("\n", "⏎")

    def _actual(self) -> int | None:
        ids = self.text.trace.tokens["id"].tolist()
        return int(ids[self.position + 1]) if self.position + 1 < len(ids) else None

    def _off_in_words(self) -> str:
        shared = sorted(self.switches.shared)
        parts = [f"shared experts of layer {ranges(shared)}"] if shared else []
        parts += [
            f"{bank} expert {ranges(sorted(ids))} of layer {layer}".lstrip()
            for (layer, bank), ids in self.switches.routed.items()
        ]
        return f"{' and '.join(parts)} off" if parts else "nothing switched off"

    def _repr_mimebundle_(self, **selection: Any) -> Any:
        return with_still(self.box._repr_mimebundle_(**selection), self.view, repr(self))

    def __repr__(self) -> str:
        base, edited = self.change.losses
        return f"{self._off_in_words()}: loss {base:.3f} -> {edited:.3f} nats\n{self.code}"


def started(
    text: Text,
    shared: int | Iterable[int],
    experts: Mapping[int, int | Iterable[int]],
    how: str,
    bank: str | None,
) -> Switches:
    """What is off at the start; refuses layers, experts and banks that are not there."""
    of = bank if bank is not None else text.banks[0]
    if of not in text.banks:
        raise ValueError(f"bank={bank!r}: this text is read by {' and '.join(text.banks) or 'one'}")
    layers = [int(n) for n in text.trace.routing(of or None).expert_ids["layer"].values]
    if not isinstance(experts, Mapping):
        raise TypeError(f"experts={experts!r}: expected a dict by layer, such as {{5: [8, 9]}}")
    switches = Switches(frozenset(integers(shared, "shared")), {}, how)
    for layer in (*switches.shared, *experts):
        if layer not in layers:
            raise ValueError(f"layer {layer} has no experts; those with experts: {layers}")
    for layer, ids in experts.items():
        wanted = frozenset(integers(ids, f"experts of layer {layer}"))
        if outside := [e for e in wanted if not 0 <= e < text.trace.n_experts]:
            raise ValueError(f"expert {outside[0]} is not in 0..{text.trace.n_experts - 1}")
        switches = switches.with_experts((layer, of), wanted)
    return switches


def explore_ablation(
    lab: Runs,
    prompt: Any,
    *,
    images: Any = None,
    videos: Any = None,
    chat: Mapping[str, Any] | None = None,
    shared: int | Iterable[int] = (),
    experts: Mapping[int, int | Iterable[int]] | None = None,
    how: str = "zero",
    bank: str | None = None,
) -> AblationExplorer:
    """Switch experts off by buttons; next tokens, loss, KL and routing drift follow at once.

    The intact model runs once; each press runs the edited one on the same tokens. What is shown
    is one text: a start for a hypothesis, not a measurement.

    Args:
        prompt, images, videos, chat: as in `lab.run`; one prompt.
        shared: layers whose shared experts are off at the start.
        experts: routed experts that are off at the start, by layer, of `bank`.
        how: what "off" means for routed experts: `"zero"`, `"renormalise"` or `"next_best"`,
            as in `el.experts.off`.
        bank: of the experts, in a model with two; the first that reads a token if absent.
    """
    if how not in WAYS:
        raise ValueError(f"how={how!r} must be one of {', '.join(WAYS)}")
    text = Text.read(lab, prompt, images=images, videos=videos, chat=chat)
    return AblationExplorer(
        text, started(text, shared, {} if experts is None else experts, how, bank)
    )
