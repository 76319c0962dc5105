"""`Trace`: the result of a recording, by name, with real layer numbers and token labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ernie_lab.sites import Phase, Site
from ernie_lab.trace import arrays, fold, html, selection, storage
from ernie_lab.trace.flow import Flow
from ernie_lab.trace.keys import Key, NotKept, lookup, require_kept
from ernie_lab.trace.ledger import RoutingLedger
from ernie_lab.trace.parts import chosen
from ernie_lab.trace.pictures import Picture
from ernie_lab.trace.positions import PositionsLike
from ernie_lab.trace.provenance import Provenance
from ernie_lab.trace.recorded import Recorded
from ernie_lab.trace.routing import Routers
from ernie_lab.trace.tokens import Tokens

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


@dataclass(frozen=True, eq=False, repr=False)
class Trace:
    """What was recorded of one run or generation, one row per token that the model read.

    Padding is in no row. The last token that a generation sampled was never read by the
    model, so it has no routing and no row. Sequences and layers keep their true numbers, also
    in a slice. Arrays are read-only views; nothing here changes a trace.

    `context` are all tokens of the sequences, since attention reads keys outside a slice;
    `rows_N` are those of them that this trace is about. `edited` are the paths of the sites
    that an edit changed. `media` are the pictures of all sequences, in reading order; they stay
    in a slice, so that their numbers do. A copy or a pickle has the values of `grad=True` without
    their graph, so no gradients.
    """

    context: Tokens
    rows_N: Tensor
    values: Mapping[str, Recorded]
    known_sites: tuple[Site, ...]
    routers: Mapping[str, Routers]
    provenance: Provenance
    keep: str
    edited: tuple[str, ...] = ()
    media: tuple[Picture, ...] = ()
    flows: Mapping[str, Flow] = field(default_factory=dict)

    # What there is.

    def __len__(self) -> int:
        return len(self.rows_N)

    @property
    def tokens(self) -> pd.DataFrame:
        """One row per token: sequence, pos, id, text, modality, phase, content, bank, image, …"""
        return self.context.take(self.rows_N.tolist()).table()

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of what was kept, in forward order."""
        return tuple(self.values)

    @property
    def sequences(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.context.sequence[i] for i in self.rows_N.tolist()))

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers of which anything was kept."""
        found = {kept.site.layer for kept in self.values.values()}
        return tuple(sorted(layer for layer in found if layer is not None))

    @property
    def banks(self) -> tuple[str, ...]:
        """The banks of experts: `text` and `vision`, `text` alone, or none in a dense model."""
        return tuple(self.routers)

    @property
    def n_experts(self) -> int:
        """Of each bank."""
        return self._router().n_experts

    @property
    def n_chosen(self) -> int:
        return self._router().n_chosen

    # Routing; see RoutingLedger for what each means.

    def routing(self, bank: str | None = None) -> RoutingLedger:
        """The routing of one bank of experts; a text model has a single one, `bank=None`."""
        return self._ledger(bank)

    @property
    def router_logits(self) -> xr.DataArray:
        return self._ledger(None, ".router_logits").router_logits

    @property
    def router_probs(self) -> xr.DataArray:
        return self._ledger(None, ".router_probs").router_probs

    @property
    def selection_scores(self) -> xr.DataArray:
        return self._ledger(None, ".selection_scores").selection_scores

    @property
    def expert_ids(self) -> xr.DataArray:
        return self._ledger(None, ".expert_ids").expert_ids

    @property
    def expert_weights(self) -> xr.DataArray:
        return self._ledger(None, ".expert_weights").expert_weights

    @property
    def correction_bias(self) -> xr.DataArray:
        return self._ledger(None, ".correction_bias").correction_bias

    def to_frame(self, bank: str | None = None) -> pd.DataFrame:
        """Tidy routing: one row per token x layer x slot; `margin` and `prob` as in the ledger.

        Both banks of a vision-language model, one below the other, unless one is named: there an
        expert is told by `bank` and `expert` together.
        """
        if bank is not None or not self._has_banks:
            return self.routing(bank).to_frame()
        import pandas as pd

        frames = [self.routing(bank).to_frame() for bank in self.banks]
        return pd.concat(frames, ignore_index=True)

    @property
    def _has_banks(self) -> bool:
        return any(site.bank for site in self.known_sites)

    def _ledger(self, bank: str | None, then: str = "") -> RoutingLedger:
        routers = self._router(bank)
        if not self._has_banks:
            bank = None
        elif bank is None:
            ways = " or ".join(f"t.routing({name!r}){then}" for name in self.banks)
            raise ValueError(
                "this model has two banks of experts, and expert 5 of the one is not expert 5 of "
                f"the other; take {ways}"
            )
        model = self.provenance.model
        return RoutingLedger(
            self.values, self.context, routers, bank, frozenset(self.edited), model
        )

    def _router(self, bank: str | None = None) -> Routers:
        if not self.routers:
            raise NotKept("this model is dense: it has no experts and no routing")
        if bank is not None and bank not in self.routers:
            raise ValueError(
                f"bank={bank!r}: "
                + (
                    f"this model has banks {' and '.join(self.banks)}"
                    if self._has_banks
                    else "a text model has one bank of experts; leave it out"
                )
            )
        return self.routers[self.banks[0] if bank is None else bank]

    # Any site.

    def __getitem__(self, key: Key) -> xr.DataArray:
        """A kept site, by path, TransformerLens' name, `("pattern", 3)`, or a Site.

        A name without its layer, `t["resid_post"]`, stacks all layers that were kept:
        (layer, token, …). A site with a key axis is one map per sequence: see `pattern`, and
        `vision_pattern` for one per frame. Sites of the vision tower have patches, (patch, …).
        """
        found = lookup(key, self.known_sites)
        if isinstance(found, Site):
            return self._array(self.values[self._kept(found)])
        kept = [self.values[site.path] for site in found if site.path in self.values]
        if not kept:
            self._kept(found[0])
        if found[0].ragged:
            raise ValueError(f"{key!r} has one map per sequence; take a layer, t[{key!r}, 3]")
        return arrays.layers_array(kept, self.context, str(key))

    def __contains__(self, key: Key) -> bool:
        """Was this site kept? (For a name without layer: in any layer.)"""
        try:
            found = lookup(key, self.known_sites)
        except KeyError:
            return False
        sites = (found,) if isinstance(found, Site) else found
        return any(site.path in self.values for site in sites)

    def pattern(self, layer: int, sequence: int | None = None) -> xr.DataArray:
        """Attention weights (head, query, key), prefill and decode joined; 0 for later keys."""
        return self._map("pattern", layer, sequence)

    def scores(self, layer: int, sequence: int | None = None) -> xr.DataArray:
        """The same before the softmax: scaled, and -inf for later keys."""
        return self._map("scores", layer, sequence)

    def vision_pattern(self, layer: int, image: int = 0, frame: int = 0) -> xr.DataArray:
        """Attention weights (head, query, key) of the vision tower, among the patches of one
        frame of `t.media[image]`."""
        return self._array(self.values[self._of_tower("pattern", layer)], None, image, frame)

    def vision_scores(self, layer: int, image: int = 0, frame: int = 0) -> xr.DataArray:
        """The same before the softmax: scaled."""
        return self._array(self.values[self._of_tower("scores", layer)], None, image, frame)

    def folded(self, of: Key | xr.DataArray, image: int = 0) -> xr.DataArray:
        """A site's rows, or those of any array of this trace, as they lie on one picture.

        Patches, blocks of patches or image tokens become (frame, row, col), in raster order:
        `t.folded("vision.out")`, `t.folded(t.routing("vision").expert_ids, image=1)`.
        """
        array = self[of] if isinstance(of, str | Site | tuple) else of
        return fold.folded(array, image, self.media, self.context)

    def boxes(self) -> pd.DataFrame:
        """One row per image token: its cell and the pixels it covers, `left <= x < right`.

        `left`, `top`, `right` and `bottom` are pixels of `t.media[image].frames`; those with
        `original_` before them, of the picture before it was resized.
        """
        return fold.boxes(self.media, self.context.take(self.rows_N.tolist()))

    def _map(self, name: str, layer: int, sequence: int | None) -> xr.DataArray:
        found = lookup((name, layer, "attn"), self.known_sites)
        assert isinstance(found, Site)
        return self._array(self.values[self._kept(found)], sequence)

    def _of_tower(self, name: str, layer: int) -> str:
        ending = f".attn.{name}"
        tower = [s for s in self.known_sites if s.row == "i" and s.path.endswith(ending)]
        if not -len(tower) <= layer < len(tower):
            raise ValueError(
                f"no layer {layer} in the vision tower, which has {len(tower)}, counted from 0"
            )
        return self._kept(tower[layer])

    def _kept(self, site: Site) -> str:
        if site.of_pictures and not self.media:
            raise NotKept(f"{site.path} did not fire: this run has no pictures")
        return require_kept(site, self.values)

    def _array(
        self,
        kept: Recorded,
        sequence: int | None = None,
        image: int | None = None,
        frame: int | None = None,
    ) -> xr.DataArray:
        part = chosen(kept, self.media, sequence, image, frame)
        return arrays.part_array(kept, part, self.context, self.media)

    # Tensors and gradients.

    def tensor(
        self,
        key: Key,
        sequence: int | None = None,
        *,
        image: int | None = None,
        frame: int | None = None,
    ) -> Tensor:
        """A copy of the stored rows as a torch tensor, in their own dtype.

        `[n …]`, or `[h s t]` of one sequence, or `[h p u]` of one frame of a picture. Under
        `grad` it has its graph: differentiate *it* freely, but for gradients *with respect to*
        the site use `gradient`.
        """
        kept = self.values[self._one(key)]
        values = kept.parts[chosen(kept, self.media, sequence, image, frame)].values
        return values if values.requires_grad else values.clone()

    def gradient(
        self,
        of: Tensor,
        key: Key,
        sequence: int | None = None,
        *,
        image: int | None = None,
        frame: int | None = None,
    ) -> xr.DataArray:
        """d of / d site as an array like `t[key]`; needs a run with `grad=True`.

        No gradient passes top-k, so the effect through *who* is chosen is not in it.
        """
        path = self._one(key)
        if path not in self.flows:
            raise ValueError(
                f"{path} was recorded without its graph; run with grad=True, and take the "
                "gradient before slicing or saving"
            )
        return self._array(self.flows[path].gradient(of), sequence, image, frame)

    def _one(self, key: Key) -> str:
        found = lookup(key, self.known_sites)
        if not isinstance(found, Site):
            raise ValueError(f"{key!r} is a site of every layer; name one, ({key!r}, layer)")
        return self._kept(found)

    # Slices and files.

    def sel(
        self,
        *,
        sequence: int | Iterable[int] | None = None,
        position: PositionsLike | None = None,
        layer: int | Iterable[int] | None = None,
        phase: Phase | None = None,
        content: str | Iterable[str] | None = None,
        modality: str | Iterable[str] | None = None,
        bank: str | Iterable[str] | None = None,
    ) -> Trace:
        """The part of this trace with these labels; selecting nothing raises.

        Positions count in each sequence, negative from its end. `content`, `modality` and `bank`
        are those of `t.tokens`: `content="image"`, `content=["image", "delimiter"]`. Queries of
        attention are narrowed, their keys are not; patches go with their sequence alone. `layer`
        leaves sites outside the decoder's blocks in.
        """
        labels = {"phase": phase, "content": content, "modality": modality, "bank": bank}
        context, rows_N, new_row = selection.narrow(
            self.context, self.rows_N, sequence, position, labels
        )
        values = selection.in_layers(self.values, layer, self.known_sites)
        sequences = {context.sequence[i] for i in rows_N.tolist()}
        narrowed = selection.narrowed(values, new_row, sequences, self.media)
        return replace(self, context=context, rows_N=rows_N, values=narrowed, flows={})

    def save(self, folder: str | PathLike[str], *, overwrite: bool = False) -> Path:
        """Write `values.safetensors` and `trace.json` into `folder`, both or neither."""
        return storage.save(self, Path(folder), overwrite)

    @classmethod
    def load(cls, folder: str | PathLike[str]) -> Trace:
        """Reopen what `save` wrote; needs no model."""
        return cls(**storage.load(Path(folder)))

    def report(
        self, path: str | PathLike[str], *, title: str = "", max_bytes: int = 20_000_000
    ) -> Path:
        """Write one HTML page that needs no network: routing, margins, load and attention.

        It shows what was kept, tells what it leaves out, and stays under `max_bytes` (pictures are
        first drawn again more coarsely). The first six sequences are drawn: `t.sel(...)` narrows.

        Raises:
            NotKept: neither routing nor attention was recorded.
        """
        # The one import to the right of this room, and only when it is asked for.
        from ernie_lab.plots.trace_report import trace_report

        return trace_report(path, self, title=title, max_bytes=max_bytes)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle gets: a graph can be in neither."""
        values = {path: kept.detached() for path, kept in self.values.items()}
        return {**self.__dict__, "values": values, "flows": {}}

    def __repr__(self) -> str:
        return html.as_text(self)

    def _repr_html_(self) -> str:
        return html.as_html(self)
