"""Changing what flows: edits as values, applied by a tap that counts what they did.

Public as `el.edit`, `el.at`, `el.edits`, `el.shared`, `el.experts` and `el.routing`.
"""

from ernie_lab.interventions import catalogue as edits_of_any_site
from ernie_lab.interventions import experts, routing, shared
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
    "edits_of_any_site",
    "experts",
    "routing",
    "shared",
]
