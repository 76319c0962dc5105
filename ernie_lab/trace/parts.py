"""Which part of a recorded site is meant: of one sequence, of one frame, or its only one."""

from __future__ import annotations

from collections.abc import Sequence

from ernie_lab.trace.pictures import Picture, frame_number
from ernie_lab.trace.recorded import Recorded


def chosen(
    kept: Recorded,
    media: Sequence[Picture],
    sequence: int | None = None,
    image: int | None = None,
    frame: int | None = None,
) -> int | None:
    """The key in `kept.parts`; where there are several, the one that is asked for."""
    if kept.site.row == "i":
        if sequence is not None:
            raise ValueError(
                f"{kept.site.path} has one map per frame of a picture; say image= and frame="
            )
        return _frame(kept, media, image, frame)
    if image is not None or frame is not None:
        raise ValueError(
            f"{kept.site.path} has no map per frame, so image= and frame= have no meaning here"
        )
    return _sequence(kept, sequence) if kept.site.ragged else None


def _sequence(kept: Recorded, sequence: int | None) -> int:
    path, there = kept.site.path, [one for one in kept.parts if one is not None]
    if sequence is None and len(there) == 1:
        return there[0]
    if sequence is None:
        raise ValueError(
            f"{path} has one map per sequence, here {there}; take "
            "t.pattern(layer, sequence) or t.scores(layer, sequence), or slice first with "
            "t.sel(sequence=...)"
        )
    if sequence not in there:
        raise ValueError(f"no sequence {sequence!r} in {path}; it has {there}")
    return int(sequence)


def _frame(
    kept: Recorded, media: Sequence[Picture], image: int | None, frame: int | None
) -> int | None:
    if image is None and frame is None:
        if len(kept.parts) == 1:
            return next(iter(kept.parts))
        raise ValueError(
            f"{kept.site.path} has one map per frame, here {len(kept.parts)}; take "
            "t.vision_pattern(layer, image, frame) or t.vision_scores(layer, image, frame)"
        )
    number = frame_number(media, image or 0, frame or 0)
    if number not in kept.parts:
        raise ValueError(
            f"picture {image or 0} belongs to sequence {media[image or 0].sequence}, which is not "
            "in this slice of the trace"
        )
    return number
