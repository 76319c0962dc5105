"""Pure functions of a trace, or of plain arrays, to labelled numbers."""

from ernie_lab.analysis.balance import (
    Dead,
    Reference,
    balance_table,
    counts,
    cv,
    dead,
    entropy,
    gini,
    load,
    max_violation,
    multinomial_reference,
)
from ernie_lab.analysis.isolation import (
    IsolationReport,
    expected_bank,
    isolation_report,
    router_cosines,
    shared_to_routed,
)

__all__ = [
    "Dead",
    "IsolationReport",
    "Reference",
    "balance_table",
    "counts",
    "cv",
    "dead",
    "entropy",
    "expected_bank",
    "gini",
    "isolation_report",
    "load",
    "max_violation",
    "multinomial_reference",
    "router_cosines",
    "shared_to_routed",
]
