"""Changing what flows: edits as values, applied by a tap that counts what they did.

Public as `el.edit`, `el.at`, `el.edits` (`catalogue`), `el.shared`, `el.experts` and `el.routing`.
The last four are modules that `ernie_lab` imports at first use, and so not imported here.
"""

from ernie_lab.interventions.edits import (
    Edit,
    EditChangedNothingWarning,
    EditCount,
    EditError,
    EditTap,
    Hook,
    edit,
)
from ernie_lab.interventions.here import Here
from ernie_lab.interventions.where import at

__all__ = [
    "Edit",
    "EditChangedNothingWarning",
    "EditCount",
    "EditError",
    "EditTap",
    "Here",
    "Hook",
    "at",
    "edit",
]
