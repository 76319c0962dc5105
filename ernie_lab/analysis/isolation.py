"""Do text and picture tokens really keep to their own experts?

Vision-language models of this family have two banks of experts, each with a gate of its own.
Which bank a token takes is no choice of the model: its id says so. Placeholders of pictures and
the four delimiters around them go to the vision bank, all other tokens of a prompt to the text
bank (ernie-facts 3.4; in decoding every token is text, which this module does not look at).

An engine that loses the token types on the way sends every token to the text bank and says
nothing. `isolation_report` therefore believes no label: it takes the router logits that flowed,
recomputes them from what the routers read and the gate of *each* bank, and calls that bank used
whose gate gives them back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear

from ernie_lab.analysis.components import HasModel, model_of
from ernie_lab.checkpoint.config import VisualIds
from ernie_lab.display import ranges
from ernie_lab.inference.prefill import prefill, prefill_step
from ernie_lab.inputs.batch import Batch
from ernie_lab.inputs.media import Grid
from ernie_lab.inputs.visual_layout import BANKS, visual_layout
from ernie_lab.interventions.edits import Edit, EditTap
from ernie_lab.model.kinds import Model
from ernie_lab.model.vl import VLModel
from ernie_lab.sites import Site, Step, all_sites

Used: TypeAlias = Literal["text", "vision", "either", "neither"]
# By bank, by layer: the router weights `[e d]`.
Gates: TypeAlias = Mapping[str, Mapping[int, Tensor]]

_TEXT, _VISION, _EITHER, _NEITHER = range(4)
_USED: tuple[Used, ...] = ("text", "vision", "either", "neither")
# fp32 products of the released widths agree to 1e-5 between kernels, and to 1e-3 under TF32.
_TOLERANCE = 2e-3
# Rows whose fp32 copy exists at one time: 40 MB at the 28B model's width.
_ROWS = 4096


@dataclass(frozen=True, slots=True, repr=False)
class IsolationReport:
    """Which bank every token of a prompt used in every mixture layer, against the one expected.

    `leaks` has one row for each (token, layer) whose bank is another than its id says, or whose
    logits are of no gate ("neither"): layer, sequence, pos, id, expected, used. `table` has one
    row for each layer and bank: how many tokens were expected there, how many used it, leaks
    among the expected ones, `deviation`, the worst of the gate that was used, and `other_gate`,
    the smallest of the gate that was not, which must be far above `tolerance` for the answer to
    mean anything. `n_undecided` counts tokens whose logits both gates give.

    Deviations are max_e |recorded - recomputed| / max(1, max_e |recorded|).
    """

    layers: tuple[int, ...]
    n_tokens: int
    leaks: pd.DataFrame
    table: pd.DataFrame
    n_undecided: int
    tolerance: float

    @property
    def isolated(self) -> bool:
        """Every token in every layer used the bank that its id says, beyond doubt."""
        return self.leaks.empty and self.n_undecided == 0

    @property
    def deviation(self) -> float:
        """The worst deviation of a gate that was used; NaN where none was."""
        return float(self.table["deviation"].max())

    @property
    def other_gate(self) -> float:
        """The smallest deviation of a gate that was not used."""
        return float(self.table["other_gate"].min())

    def __repr__(self) -> str:
        expected = dict(zip(BANKS, self.table["expected"], strict=False))
        shares = ", ".join(f"{n} {bank}" for bank, n in expected.items())
        what = f"layers {ranges(self.layers)}, {self.n_tokens} tokens each ({shares})"
        if not self.leaks.empty:
            where = ranges(sorted(set(self.leaks["layer"])))
            verdict = f"{len(self.leaks)} leaks in layers {where}; see .leaks"
        elif self.n_undecided:
            verdict = f"no leak seen, but {self.n_undecided} logits fit both gates: undecided"
        else:
            verdict = "no leaks"
        return (
            f"Isolation of {what}: {verdict}. Logits recomputed to {self.deviation:.1g} with the "
            f"gate used, off by at least {self.other_gate:.1g} with the other (tolerance "
            f"{self.tolerance:.1g})."
        )


def expected_bank(input_ids: Int[Tensor, "b s"], ids: VisualIds) -> Int[Tensor, "b s"]:
    """0 text, 1 vision, from the ids of a prompt alone: placeholders and delimiters are vision."""
    vision = torch.tensor(dataclasses.astuple(ids), device=input_ids.device)
    return torch.isin(input_ids, vision).long()


@torch.no_grad()
def isolation_report(
    model: VLModel | HasModel,
    inputs: Batch | Tensor,
    attention_mask: Tensor | None = None,
    *,
    edits: Sequence[Edit] = (),
    gates: Gates | None = None,
    tolerance: float = _TOLERANCE,
    **pictures: Tensor,
) -> IsolationReport:
    """Run a prompt and say which bank of experts each token really used, layer by layer.

    Works at any size, dtype and device: one layer's router input and logits are looked at as
    they flow, and only a few numbers a token are kept.

    Args:
        model: of two banks, or its `Lab`.
        inputs: what `lab.prepare(...)` returns; or token ids `[b s]`, and then `attention_mask`
            and, as for the model, `pixel_values=`, `image_grid_thw=` and those of videos.
        edits: what to change on the way, as for `lab.run`. Edited logits are of neither gate.
        gates: the routers' weights `[e d]` by bank and layer, for example read anew from the
            checkpoint, in place of the model's own. Those are the ones that run, so they cannot
            show that the model's weights are damaged.
        tolerance: logits are a gate's if they differ by at most this share of the largest of
            them (or by this, if all are below 1).
    """
    if isinstance(inputs, Batch) and (attention_mask is not None or pictures):
        raise ValueError("a batch holds its own mask and pictures; give it alone")
    if not isinstance(inputs, Batch | Tensor):
        raise TypeError(
            "isolation_report takes the batch of lab.prepare(prompt, images=…), or token ids in a "
            f"tensor, not a {type(inputs).__name__}"
        )
    model = _two_banks(model)
    gates = gates or {
        bank: {layer: router.weight_ED for layer, router in by_layer.items()}
        for bank, by_layer in model.routers().items()
    }
    probe = _Probe(_moe_sites(model), gates, tolerance)
    tap = EditTap.of(edits, all_sites(model), then=probe, model=model)
    runs = tap.model
    assert isinstance(runs, VLModel)
    if isinstance(inputs, Batch):
        prefill(runs, inputs, tap.bind(prefill_step(inputs)))
        return _report(probe.seen, inputs.input_ids, inputs.mask, model.config.ids, tolerance)
    real_BS = torch.ones_like(inputs) if attention_mask is None else attention_mask
    tap_here = tap.bind(_step(model, inputs, real_BS.bool(), pictures))
    runs(inputs, attention_mask, **pictures, logits_to_keep=1, tap=tap_here)
    return _report(probe.seen, inputs, real_BS.bool(), model.config.ids, tolerance)


def _two_banks(model: Model | HasModel) -> VLModel:
    own = model_of(model)
    if not isinstance(own, VLModel):
        raise ValueError("a text model has one bank of experts: nothing to keep apart")
    return own


@dataclass(frozen=True, slots=True, eq=False)
class _Seen:
    """Of one layer, by token `[b s]`: the bank used, and how well each gate fits `[b s 2]`."""

    used_BS: NDArray[np.int64]
    deviation_BS2: NDArray[np.float64]


@dataclass(slots=True, eq=False)
class _Probe:
    """A tap that checks every row of router logits when it flows, and then forgets it."""

    sites: Mapping[str, tuple[int, str]]
    gates: Gates
    tolerance: float
    seen: dict[int, _Seen] = field(default_factory=dict)
    _x_BSD: Tensor | None = None
    _bank_BS: Tensor | None = None

    def wants(self, site: Site, /) -> bool:  # noqa: ARG002
        return False

    def __call__(self, site: Site, x: Tensor, /) -> Tensor:
        layer, what = self.sites.get(site.path, (0, ""))
        if what == "in":
            self._x_BSD = x
            n_sequences, n_tokens = x.shape[:2]
            self.seen[layer] = _Seen(
                np.full((n_sequences, n_tokens), _NEITHER),
                np.full((n_sequences, n_tokens, len(BANKS)), np.nan),
            )
        elif what == "bank":
            self._bank_BS = x
        elif what in BANKS:
            assert self._x_BSD is not None
            assert self._bank_BS is not None
            mine_BS = self._bank_BS == BANKS.index(what)
            self._check(layer, self._x_BSD[mine_BS], x, mine_BS.cpu().numpy())
            if what == BANKS[-1]:
                self._x_BSD = self._bank_BS = None
        return x

    def _check(
        self, layer: int, x_ND: Tensor, logits_NE: Tensor, mine_BS: NDArray[np.bool_]
    ) -> None:
        pieces = [
            torch.stack(
                [_deviation(own_ND, own_NE, self.gates[bank][layer]) for bank in BANKS], dim=-1
            )
            for own_ND, own_NE in zip(x_ND.split(_ROWS), logits_NE.split(_ROWS), strict=True)
        ]
        deviation_N2 = torch.cat(pieces).double().cpu().numpy()
        fits_N2 = deviation_N2 <= self.tolerance
        used_N = np.select(
            [fits_N2.all(1), fits_N2[:, 0], fits_N2[:, 1]], [_EITHER, _TEXT, _VISION], _NEITHER
        )
        self.seen[layer].used_BS[mine_BS] = used_N
        self.seen[layer].deviation_BS2[mine_BS] = deviation_N2


def _deviation(x_ND: Tensor, logits_NE: Tensor, weight_ED: Tensor) -> Tensor:
    """`[n]`; in fp32, as the router computes at any dtype of the model."""
    with torch.autocast(x_ND.device.type, enabled=False):
        again_NE = linear(x_ND.float(), weight_ED.to(x_ND.device).float())
    difference_N = (again_NE - logits_NE).abs().amax(-1)
    return difference_N / logits_NE.abs().amax(-1).clamp(min=1.0)


def _moe_sites(model: VLModel) -> dict[str, tuple[int, str]]:
    """What the probe looks at: the layer, and which of four values it is, by path."""
    watched: dict[str, tuple[int, str]] = {}
    for layer in model.routers()["text"]:
        at = f"blocks.{layer}.moe"
        watched |= {f"{at}.in": (layer, "in"), f"{at}.bank": (layer, "bank")}
        watched |= {f"{at}.{bank}.router_logits": (layer, bank) for bank in BANKS}
    return watched


def _step(
    model: VLModel, input_ids: Tensor, real_BS: Tensor, pictures: Mapping[str, Tensor]
) -> Step:
    """What edits may select on."""
    images, videos = (
        [Grid(*map(int, grid)) for grid in pictures.get(f"{kind}_grid_thw", torch.empty(0, 3))]
        for kind in ("image", "video")
    )
    layout = visual_layout(input_ids, model.config.ids, images, videos, real_BS)
    return Step(
        "prefill",
        0,
        layout.positions_BSR,
        real_BS,
        modality=layout.modality_BS,
        bank=layout.bank_BS,
        grids=tuple(block.grid for block in layout.blocks),
    )


def _report(
    seen: Mapping[int, _Seen],
    input_ids: Tensor,
    real_BS: Tensor,
    ids: VisualIds,
    tolerance: float,
) -> IsolationReport:
    real, expected_BS = real_BS.cpu().numpy(), expected_bank(input_ids, ids)
    # Counted without padding, as in the tokens table of a trace.
    tokens = pd.DataFrame(
        {
            "sequence": np.nonzero(real)[0],
            "pos": (np.cumsum(real, axis=1) - 1)[real],
            "id": input_ids.cpu().numpy()[real],
            "expected": [BANKS[bank] for bank in expected_BS.cpu().numpy()[real]],
        }
    )
    leaks, rows, n_undecided = [], [], 0
    for layer, one in seen.items():
        used = pd.Series([_USED[bank] for bank in one.used_BS[real]])
        leaked = (used != tokens["expected"]) & (used != "either")
        n_undecided += int((used == "either").sum())
        found = tokens[leaked].assign(used=used[leaked])
        found.insert(0, "layer", layer)
        leaks.append(found)
        rows += list(_rows(layer, tokens["expected"], used, leaked, one.deviation_BS2[real]))
    return IsolationReport(
        layers=tuple(seen),
        n_tokens=len(tokens),
        leaks=pd.concat(leaks, ignore_index=True),
        table=pd.DataFrame(rows).set_index(["layer", "bank"]),
        n_undecided=n_undecided,
        tolerance=tolerance,
    )


def _rows(
    layer: int,
    expected: pd.Series[str],
    used: pd.Series[str],
    leaked: pd.Series[bool],
    deviation_N2: NDArray[np.float64],
) -> Iterator[dict[str, Any]]:
    for number, bank in enumerate(BANKS):
        mine = (used == bank).to_numpy()
        own, other = deviation_N2[mine, number], deviation_N2[mine, 1 - number]
        yield {
            "layer": layer,
            "bank": bank,
            "expected": int((expected == bank).sum()),
            "used": int(mine.sum()),
            "leaks": int((leaked & (expected == bank)).sum()),
            "deviation": own.max() if mine.any() else np.nan,
            "other_gate": other.min() if mine.any() else np.nan,
        }


def router_cosines(text_ED: Tensor, vision_ED: Tensor) -> NDArray[np.float64]:
    """cos(w_i, v_j) between every text and every vision router row, `[e e]`.

    The vision bank of the released models was trained after the text bank; rows that kept a
    common direction show up as large entries. Two random rows of width d have deviation
    1/sqrt(d) around 0.
    """
    unit = [torch.nn.functional.normalize(w.double(), dim=-1) for w in (text_ED, vision_ED)]
    cosines: NDArray[np.float64] = (unit[0] @ unit[1].T).detach().cpu().numpy()
    return cosines
