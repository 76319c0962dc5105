"""The isolation of the two modalities in one look: what is apart, and what they still share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ernie_lab.analysis.attention_mass import AttentionMass, attention_mass
from ernie_lab.analysis.isolation import IsolationReport, expected_bank, isolation_report
from ernie_lab.analysis.router_alignment import router_alignment
from ernie_lab.analysis.shared_ratio import shared_to_routed
from ernie_lab.inputs.batch import Batch
from ernie_lab.model.kinds import Model
from ernie_lab.model.vl import VLModel
from ernie_lab.trace.trace import Trace

if TYPE_CHECKING:
    import pandas as pd


class HasTrace(Protocol):
    @property
    def trace(self) -> Trace: ...


class Runs(Protocol):
    """A `Lab`."""

    @property
    def model(self) -> Model: ...
    @property
    def model_id(self) -> str: ...
    def prepare(self, prompt: Any, *, images: Any = None, videos: Any = None) -> Batch: ...
    def run(
        self,
        prompt: Any,
        *,
        images: Any = None,
        videos: Any = None,
        keep: Any = (),
        edits: Any = (),
        logits: Any = "all",
    ) -> HasTrace: ...


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class ModalityIsolation:
    """`model`: its name, and the edits of the run.

    `report`: which bank every token used, recomputed (`isolation_report`). `routers`: the rows
    of the two routers (`router_alignment`, centred). `shared`: the shared block beside the routed
    experts, None where there is none (`shared_to_routed`). `attention`: who looks at whom
    (`attention_mass`). The first two are what is apart, the last two what the modalities share.
    """

    model: str
    report: IsolationReport
    routers: pd.DataFrame
    shared: pd.DataFrame | None
    attention: AttentionMass

    def __repr__(self) -> str:
        outside = int((self.routers["size"] > self.routers["size_high"]).sum())
        return (
            f"{self.model}: {self.report!r} Router rows of the banks are more alike than shuffled "
            f"coordinates make them in {outside} of {len(self.routers)} layers."
        )


def modality_isolation(
    lab: Runs, prompt: Any, *, images: Any = None, videos: Any = None, edits: Any = ()
) -> ModalityIsolation:
    """Run prompts with pictures and measure all four; `plots.plot_isolation` draws them.

    Every prompt must have a picture. Two passes; the patterns of all layers are kept, so give a few
    prompts, or for long ones use the four functions by themselves with `layers=`.
    """
    model = lab.model
    if not isinstance(model, VLModel):
        raise ValueError(f"{lab.model_id} reads text alone: it has one bank of experts")
    edits = list(edits) if isinstance(edits, list | tuple) else [edits]
    moe = model.config.decoder.moe
    assert moe is not None
    outputs = ["moe.routed_out", *(["moe.shared_out"] if moe.n_shared else [])]
    batch = lab.prepare(prompt, images=images, videos=videos)
    of_pictures_BS = expected_bank(batch.input_ids, model.config.ids).bool() & batch.mask
    if without := [i for i, row_S in enumerate(of_pictures_BS) if not row_S.any()]:
        raise ValueError(
            f"prompt {without[0]} has no picture, and modality_isolation measures text against "
            "pictures: give every prompt its own, images=[picture] or videos="
        )
    report = isolation_report(model, batch, edits=edits)
    trace = lab.run(
        prompt,
        images=images,
        videos=videos,
        keep=["blocks.*.attn.pattern", *outputs],
        edits=edits,
        logits="last",
    ).trace
    shared = None
    if moe.n_shared:
        content = trace.tokens["content"].tolist()
        shared = shared_to_routed(trace["moe.shared_out"], trace["moe.routed_out"], content)
    return ModalityIsolation(
        model=", ".join(filter(None, (lab.model_id, trace.provenance.edited))),
        report=report,
        routers=router_alignment(model, centred=True),
        shared=shared,
        attention=attention_mass(trace),
    )
