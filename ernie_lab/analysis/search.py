"""Expert search: the contexts in which an expert was chosen, as a concordance."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ernie_lab.analysis.balance import n_experts_of
from ernie_lab.analysis.choices import ids_of, place_of
from ernie_lab.analysis.token_groups import layers_of, routing_of, token_coordinate
from ernie_lab.display import visible

_OPERATORS: dict[str, Callable[[Any, float], Any]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_SIDE = 38  # characters on either side in the plain-text concordance
_SHOWN = 20  # lines of it
_PICTURES = ("image", "video")
_CELL = ("image", "row", "col", "frame")


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Contexts:
    """What `find` found; `el.plots.context_html(found)` shows it with the hits marked.

    `table` has one row per hit: layer, expert, weight, slot, sequence, pos, the token's `text`, and
    what stands `before` and `after` it, whitespace made visible; where hits are in pictures also
    image, row, col and frame. `reading` has one row for each
    token of the sequences found in: sequence, pos, text, content, of a picture its cell, and the
    `weight` that this expert had on it: 0 where it was not chosen, NaN where the token is not of
    this routing (another bank of experts read it, or a slice left it out).
    """

    table: pd.DataFrame
    reading: pd.DataFrame
    layer: int
    expert: int
    query: str
    n_found: int
    n_chosen: int
    n_tokens: int
    largest: float
    window: int

    def __len__(self) -> int:
        return len(self.table)

    @property
    def summary(self) -> str:
        shown = "" if len(self) == self.n_found else f", the {len(self)} of largest weight shown"
        return (
            f"Layer {self.layer}, expert {self.expert}{self.query}: {self.n_found} contexts{shown}"
            f". The expert was chosen for {self.n_chosen} of {self.n_tokens} tokens "
            f"({self.n_chosen / self.n_tokens:.1%}), with weights up to {self.largest:.3f}."
        )

    def __repr__(self) -> str:
        rows: Any = self.table.head(_SHOWN).itertuples()
        lines = [
            f"{_end(row.before):>{_SIDE}} [{_shown(row)}] {_start(row.after):<{_SIDE}} "
            f"{row.weight:.3f}  {row.sequence}:{row.pos}"
            for row in rows
        ]
        more = len(self) - len(lines)
        return "\n".join([self.summary, *lines, *([f"… {more} more in .table"] if more else [])])


def find(
    routing: Any,
    *,
    layer: int,
    expert: int,
    weight: str | float | None = None,
    slot: int | Sequence[int] | None = None,
    text: str | re.Pattern[str] | None = None,
    window: int = 8,
    n: int | None = 100,
) -> Contexts:
    """The contexts in which `expert` of `layer` was chosen, largest weight first.

    Args:
        weight: a bound such as ">0.4", or a number, at least which it must be.
        slot: 0 where it was the first choice, 1 the second; or several of them.
        text: what the token's text contains, or a compiled pattern to be found in it.
        window: tokens on either side. Of a picture, those in a row are one word, [image 0].
        n: hits to keep; None keeps all. `n_found` counts all in any case.

    Raises:
        ValueError: where nothing is found, with how often the expert was chosen, and how much.
    """
    ids = ids_of(routing)
    place = place_of(layer, layers_of(ids))
    n_experts = n_experts_of(routing)
    if not 0 <= expert < n_experts:
        raise ValueError(f"there is no expert {expert}: experts are 0 to {n_experts - 1}")
    ids_NK = np.asarray(ids.values)[place]
    weights_NK = np.asarray(routing_of(routing).expert_weights.values, dtype=float)[place]
    chosen_NK = ids_NK == expert
    weight_N = np.where(chosen_NK, weights_NK, 0.0).sum(1)
    slot_N = np.where(chosen_NK.any(1), chosen_NK.argmax(1), -1)
    texts_N = [str(one) for one in token_coordinate(ids, "text").tolist()]
    hits_N, query = _hits(weight_N, slot_N, texts_N, weight, slot, text)
    tokens = _tokens_of(routing, ids, texts_N, weight_N)
    n_chosen = int((slot_N >= 0).sum())
    if not hits_N.any():
        raise ValueError(_nothing(layer, expert, query, weight_N, slot_N, texts_N))
    order = np.argsort(-weight_N[hits_N], kind="stable")[:n]
    rows = np.flatnonzero(hits_N)[order]
    table = _table(ids, rows, weight_N, slot_N, texts_N, tokens, window)
    table.insert(0, "expert", expert)
    table.insert(0, "layer", layer)
    reading = tokens[tokens["sequence"].isin(table["sequence"])].reset_index(drop=True)
    return Contexts(
        table, reading, layer, expert, query, int(hits_N.sum()), n_chosen, len(weight_N),
        float(weight_N.max()), window,
    )  # fmt: skip


def _hits(
    weight_N: NDArray[Any], slot_N: NDArray[Any], texts_N: list[str], weight: str | float | None,
    slot: int | Sequence[int] | None, text: str | re.Pattern[str] | None,
) -> tuple[NDArray[np.bool_], str]:  # fmt: skip
    """Which tokens, and the question in words."""
    hits_N = slot_N >= 0
    words = []
    if weight is not None:
        compare, bound, sign = _bound(weight)
        hits_N = hits_N & compare(weight_N, bound)
        words.append(f"weight {sign} {bound:g}")
    if slot is not None:
        slots = [slot] if isinstance(slot, int) else [*slot]
        hits_N = hits_N & np.isin(slot_N, slots)
        words.append(f"slot {' or '.join(map(str, slots))}")
    if text is not None:
        if isinstance(text, str):
            fits_N = [text in one for one in texts_N]
        else:
            fits_N = [bool(text.search(one)) for one in texts_N]
        hits_N = hits_N & np.array(fits_N)
        shown = text if isinstance(text, str) else text.pattern
        words.append(f"text with “{visible(shown)}”")
    return np.asarray(hits_N), "".join(f", {word}" for word in words)


def _bound(weight: str | float) -> tuple[Callable[[Any, float], Any], float, str]:
    if not isinstance(weight, str):
        return operator.ge, float(weight), ">="
    match = re.fullmatch(r"\s*(>=|<=|>|<)\s*([0-9.eE+-]+)\s*", weight)
    try:
        if match is not None:
            return _OPERATORS[match[1]], float(match[2]), match[1]
    except ValueError:
        pass
    raise ValueError(f"weight={weight!r}: give a bound such as '>0.4' or '<=0.1', or a number")


def _tokens_of(routing: Any, ids: Any, texts_N: list[str], weight_N: NDArray[Any]) -> pd.DataFrame:
    """All tokens of the sequences in reading order, also those of another bank of experts."""
    own = pd.DataFrame(
        {
            "sequence": token_coordinate(ids, "sequence"), "pos": token_coordinate(ids, "pos"),
            "weight": weight_N,
        }
    )  # fmt: skip
    context = getattr(routing, "context", None)
    if context is None:
        return own.assign(text=pd.Series(texts_N, dtype=object), content="text", image=None)
    every = pd.DataFrame(
        {
            "sequence": context.sequence, "pos": context.pos,
            "text": pd.Series([*context.text], dtype=object), "content": context.content,
            **{name: pd.Series([*getattr(context, name)], dtype=object) for name in _CELL},
        }
    )  # fmt: skip
    return every.merge(own, on=["sequence", "pos"], how="left")


def _table(
    ids: Any, rows: NDArray[Any], weight_N: NDArray[Any], slot_N: NDArray[Any],
    texts_N: list[str], tokens: Any, window: int,
) -> pd.DataFrame:  # fmt: skip
    sequences, positions = (token_coordinate(ids, name)[rows] for name in ("sequence", "pos"))
    place_of_token = {
        place: i for i, place in enumerate(zip(tokens["sequence"], tokens["pos"], strict=True))
    }
    words, before, after, cells = tokens.to_dict("records"), [], [], []
    for sequence, pos in zip(sequences.tolist(), positions.tolist(), strict=True):
        at = place_of_token[sequence, pos]
        sides = range(max(0, at - window), at), range(at + 1, min(len(words), at + 1 + window))
        ahead, behind = ([words[i] for i in side if words[i]["sequence"] == sequence]
                         for side in sides)  # fmt: skip
        before.append(in_words(ahead))
        after.append(in_words(behind))
        cells.append({name: words[at].get(name) for name in _CELL})
    table = pd.DataFrame(
        {
            "weight": weight_N[rows], "slot": slot_N[rows], "sequence": sequences, "pos": positions,
            "before": before, "text": pd.Series([texts_N[row] for row in rows], dtype=object),
            "after": after,
        }
    )  # fmt: skip
    placed = pd.DataFrame(cells).astype("Int64")
    return table if placed["image"].isna().all() else table.join(placed)


def in_words(tokens: Sequence[dict[str, Any]]) -> str:
    """Rows of `Contexts.reading` as one visible text; tokens of a picture in a row are one word."""
    parts: list[str] = []
    for token in tokens:
        if token["content"] in _PICTURES:
            word = f"[{token['content']} {token['image']}]"
            if not parts or parts[-1] != word:
                parts.append(word)
        else:
            parts.append(visible(token["text"]))
    return "".join(parts)


def _nothing(
    layer: int, expert: int, query: str, weight_N: NDArray[Any], slot_N: NDArray[Any],
    texts_N: list[str],
) -> str:  # fmt: skip
    there = slot_N >= 0
    head = f"no context for layer {layer}, expert {expert}{query}"
    if not there.any():
        return f"{head}: it was chosen for none of {len(weight_N)} tokens"
    slots = np.bincount(slot_N[there])
    often = pd.Series(texts_N)[there].value_counts().head(5)
    tokens = ", ".join(f"{visible(str(text))} ×{count}" for text, count in often.items())
    return (
        f"{head}: it was chosen for {there.sum()} of {len(weight_N)} tokens, with weights from "
        f"{weight_N[there].min():.3f} to {weight_N.max():.3f}, "
        f"{', '.join(f'slot {i} {count} times' for i, count in enumerate(slots) if count)}; "
        f"its commonest tokens are {tokens}"
    )


def _shown(row: Any) -> str:
    """A token's text, or of a picture its place in it."""
    if pd.isna(getattr(row, "image", None)):
        return visible(row.text)
    return f"image {row.image}, frame {row.frame}, row {row.row}, column {row.col}"


def _end(text: str) -> str:
    return text if len(text) <= _SIDE else "…" + text[1 - _SIDE :]


def _start(text: str) -> str:
    return text if len(text) <= _SIDE else text[: _SIDE - 1] + "…"
