"""One attention head at a time, to point at: who looks at whom, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import anywidget
import numpy as np
import traitlets
from numpy.typing import NDArray

from ernie_lab.plots.attention import MAX_CELLS, map_in_words, plot_attention
from ernie_lab.plots.pictures import model_name
from ernie_lab.plots.style import AMOUNT
from ernie_lab.plots.token_names import names
from ernie_lab.plots.tokens import shortened, shown_text
from ernie_lab.plots.view import View
from ernie_lab.widgets.live import below, require_state, script, shades, with_still

Floats: TypeAlias = NDArray[Any]

MOST_PIXELS = 512  # of the overview's sides; a larger map is pooled by its maximum
WINDOW = 64  # tokens a side of the part shown in full beside a pooled overview
_LONGEST = 40  # characters of one token


@runtime_checkable
class HasPatterns(Protocol):
    """The part of `Trace` that this view reads."""

    @property
    def tokens(self) -> Any: ...
    @property
    def layers(self) -> Sequence[int]: ...
    def pattern(self, layer: int, sequence: int | None = None) -> Any: ...
    def __contains__(self, key: Any) -> bool: ...


class AttentionExplorer(anywidget.AnyWidget):
    """What `explore_attention` returns. Its state can be set from Python as well.

    `layer` and `head` are true numbers. `token` is a place among the keys of this sequence that
    was picked, `probe` the one that is pointed at, -1 for none; `facing` says whether the text
    is shaded by what that token looks at or by who looks at it. `spot` is the (query, key) around
    which a pooled map is shown in full. Where no kernel runs, a still picture is shown.
    """

    _esm = script("parts.js", "attention.js")
    _css = script("explorer.css", "attention.css")

    about = traitlets.Dict().tag(sync=True)
    sequence = traitlets.Int().tag(sync=True)
    layer = traitlets.Int().tag(sync=True)
    head = traitlets.Int().tag(sync=True)
    token = traitlets.Int(-1).tag(sync=True)
    probe = traitlets.Int(-1).tag(sync=True)
    facing = traitlets.Enum(["looks at", "is looked at by"], "looks at").tag(sync=True)
    spot = traitlets.List(traitlets.Int(), [0, 0]).tag(sync=True)
    heads = traitlets.List(traitlets.Int()).tag(sync=True)
    tokens = traitlets.Dict().tag(sync=True)
    overview = traitlets.Dict().tag(sync=True)
    detail = traitlets.Dict().tag(sync=True)
    tile = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        trace: HasPatterns,
        layer: int | None = None,
        head: int | None = None,
        sequence: int | None = None,
        model: str | None = None,
    ) -> None:
        self._trace, self._source = trace, model_name(trace, model)
        layers = [number for number in trace.layers if ("pattern", number, "attn") in trace]
        if not layers:
            raise ValueError('this trace has no attention pattern: run with keep="attention"')
        self._layers = layers
        self._sequences = list(dict.fromkeys(int(one) for one in trace.tokens["sequence"]))
        first = _one_of("sequence", sequence, self._sequences)
        start = _one_of("layer", layer, layers)
        self._held: tuple[tuple[int, int], Any] | None = None
        pattern = self._pattern(start, first)
        heads = [int(number) for number in pattern.coords["head"].values]
        super().__init__(
            sequence=first,
            layer=start,
            heads=heads,
            head=_one_of("head", head, heads),
            about={
                "model": self._source,
                "layers": layers,
                "sequences": self._sequences,
                "shades": shades(AMOUNT),
                "window": WINDOW,
            },
        )
        self._show_tokens()

    def __setattr__(self, name: str, value: Any) -> None:
        require_state(self, name)
        super().__setattr__(name, value)

    def _pattern(self, layer: int, sequence: int) -> Any:
        """The maps of one layer; the last one stays in memory."""
        if self._held is None or self._held[0] != (layer, sequence):
            pattern = self._trace.pattern(layer, sequence)
            if pattern[0].size > MAX_CELLS:
                raise ValueError(
                    f"{pattern[0].size / 1e6:.0f} million cells a head, at most "
                    f"{MAX_CELLS // 10**6}: explore_attention(trace.sel(position=…)) has fewer "
                    "queries"
                )
            self._held = (layer, sequence), pattern
        return self._held[1]

    def _shown(self) -> Floats:
        """The map `[query, key]` of the head that is looked at."""
        pattern = self._pattern(self.layer, self.sequence)
        return np.asarray(pattern.values[self.heads.index(self.head)])

    @property
    def _rows(self) -> NDArray[np.int64]:
        """The key that each query is."""
        return np.asarray(self.tokens["queries"], dtype=np.int64)

    @traitlets.validate("layer")
    def _is_layer(self, proposal: Any) -> int:
        return _one_of("layer", proposal["value"], self._layers)

    @traitlets.validate("sequence")
    def _is_sequence(self, proposal: Any) -> int:
        return _one_of("sequence", proposal["value"], self._sequences)

    @traitlets.validate("head")
    def _is_head(self, proposal: Any) -> int:
        return _one_of("head", proposal["value"], self.heads)

    @traitlets.validate("token", "probe")
    def _is_token(self, proposal: Any) -> int:
        n_keys = self._pattern(self.layer, self.sequence).sizes["key"]
        name = proposal["trait"].name
        return below(name, int(proposal["value"]), n_keys, "this sequence has keys", none=True)

    @traitlets.observe("sequence")
    def _other_sequence(self, _change: Any) -> None:
        if self.tokens:
            with self.hold_sync():
                self.token = self.probe = -1
                self._show_tokens()

    @traitlets.observe("layer")
    def _other_layer(self, _change: Any) -> None:
        if self.tokens:
            with self.hold_sync():
                pattern = self._pattern(self.layer, self.sequence)
                self.heads = [int(number) for number in pattern.coords["head"].values]
                if self.head in self.heads:
                    self._show_map()
                else:
                    self.head = self.heads[0]

    @traitlets.observe("head")
    def _other_head(self, _change: Any) -> None:
        if self.tokens:
            self._show_map()

    @traitlets.observe("token", "probe")
    def _other_token(self, _change: Any) -> None:
        if self.tokens:
            self._show_detail()

    @traitlets.observe("spot")
    def _other_spot(self, _change: Any) -> None:
        if self.tokens:
            self._show_tile()

    def _show_tokens(self) -> None:
        pattern = self._pattern(self.layer, self.sequence)
        texts = [shortened(shown_text(t), _LONGEST) for t in self._names(pattern)]
        positions = [int(p) for p in pattern.coords["key_pos"].values]
        queries = [positions.index(int(p)) for p in pattern.coords["query_pos"].values]
        phases = list(pattern.coords["key_phase"].values) if "key_phase" in pattern.coords else []
        with self.hold_sync():
            self.tokens = {
                "texts": texts,
                "positions": positions,
                "queries": queries,
                "prompt": phases.index("decode") if "decode" in phases else -1,
            }
            self._show_map()

    def _names(self, pattern: Any) -> Sequence[str | bytes]:
        table = self._trace.tokens
        mine = table[table["sequence"] == self.sequence]
        # In a slice there are keys that the table has not.
        whole = len(mine) == pattern.sizes["key"]
        return names(pattern, mine if whole else None, "key_") or [""] * pattern.sizes["key"]

    def _show_map(self) -> None:
        map_ST = self._shown()
        pooled, factors = pooled_bytes(map_ST, MOST_PIXELS)
        with self.hold_sync():
            self.overview = {
                "sequence": self.sequence,
                "layer": self.layer,
                "head": self.head,
                "weights": pooled.tobytes(),
                "shape": list(pooled.shape),
                "factors": list(factors),
                "words": map_in_words(
                    map_ST, self._rows.tolist(), f"layer {self.layer}, head {self.head}", ""
                ),
            }
            self._show_detail()
            self._show_tile()

    def _show_detail(self) -> None:
        """What one token looks at, and who looks at it, exactly."""
        token = self.probe if self.probe >= 0 else self.token
        map_ST, rows_S = self._shown(), self._rows
        known = 0 <= token < map_ST.shape[1]
        asks: list[int] = np.flatnonzero(rows_S == token).tolist() if known else []
        # Numbered, since the page waits for an answer even where it is the same.
        self.detail = {
            "number": int(self.detail.get("number", 0)) + 1,
            "token": token if known else -1,
            "layer": self.layer,
            "head": self.head,
            "row": _floats(map_ST[asks[0]]) if len(asks) else b"",
            "column": _floats(map_ST[:, token]) if known else b"",
        }

    def _show_tile(self) -> None:
        map_ST = self._shown()
        if max(self.overview["factors"]) == 1:
            return
        starts = [
            int(np.clip(at - WINDOW // 2, 0, max(size - WINDOW, 0)))
            for at, size in zip(self.spot, map_ST.shape, strict=True)
        ]
        part = map_ST[starts[0] : starts[0] + WINDOW, starts[1] : starts[1] + WINDOW]
        self.tile = {
            "number": int(self.tile.get("number", 0)) + 1,
            "start": starts,
            "shape": list(part.shape),
            "weights": as_bytes(part).tobytes(),
        }

    def still(self) -> View:
        """The picture that stays where no kernel runs: this head, as `plot_attention` draws it."""
        pattern = self._pattern(self.layer, self.sequence)
        return plot_attention(
            pattern.isel(head=self.heads.index(self.head)),
            layer=self.layer,
            head=self.head,
            tokens=self._names(pattern),
            model=self._source,
        )

    def _repr_mimebundle_(self, **selection: Any) -> Any:
        return with_still(super()._repr_mimebundle_(**selection), self.still(), repr(self))

    def __repr__(self) -> str:
        return (
            f"explore_attention: layer {self.layer} of {self._layers}, head {self.head} of "
            f"{self.heads}, {len(self.tokens['texts'])} tokens. {self.overview['words']}"
        )


def explore_attention(
    trace: HasPatterns,
    *,
    layer: int | None = None,
    head: int | None = None,
    sequence: int | None = None,
    model: str | None = None,
) -> AttentionExplorer:
    """One head's map, to point at: a cell for its weight, a token for where it looks.

    Layer and head are picked by sliders or arrow keys. Pointing at a token of the text below the
    map shades the text by what it looks at, or by who looks at it; a click keeps it. Maps of
    more than 512 tokens are pooled by their maximum, with the part that is pointed at in full
    beside. Needs `keep="attention"`, whole or of some layers and heads, and no model: a trace that
    was loaded from a folder will do. The still picture is `plot_attention`.
    """
    _require_patterns(trace)
    return AttentionExplorer(trace, layer, head, sequence, model)


def _require_patterns(trace: object) -> None:
    if not isinstance(trace, HasPatterns):
        found = type(trace).__name__
        way = "; pass its .trace" if hasattr(trace, "trace") else ""
        raise TypeError(f"explore_attention takes a Trace, not {found}{way}")


def pooled_bytes(map_ST: Floats, most: int) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """`as_bytes` of block maxima, at most `most` a side, and how many cells make a block."""
    factors = tuple(-(-size // most) for size in map_ST.shape)
    down, across = factors
    padding = [(0, -size % f) for size, f in zip(map_ST.shape, factors, strict=True)]
    whole_ST = np.pad(map_ST, padding) if any(map(any, padding)) else map_ST
    # Strided maxima: ten times as fast as a maximum over two axes of a reshaped map.
    rows = np.maximum.reduce([whole_ST[i::down] for i in range(down)])
    return as_bytes(np.maximum.reduce([rows[:, i::across] for i in range(across)])), (down, across)


def as_bytes(weights: Floats) -> NDArray[np.uint8]:
    """Weights in 0..1 as round(255 sqrt(a)): off by at most sqrt(a) / 255, so small ones last."""
    return np.asarray(np.rint(255 * np.sqrt(np.clip(weights, 0, 1))), dtype=np.uint8)


def _floats(weights: Floats) -> bytes:
    return np.ascontiguousarray(weights, dtype="<f4").tobytes()


def _one_of(name: str, value: Any, known: Sequence[int]) -> int:
    """`value`, or the first of `known` for None."""
    if value is None:
        return known[0]
    if value not in known:
        raise ValueError(f"{name}={value!r}: this trace has {list(known)}")
    return int(value)
