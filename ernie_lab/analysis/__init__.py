"""Pure functions of a trace, or of plain arrays, to labelled numbers."""

from ernie_lab.analysis.attention import (
    attention_distances,
    attention_statistics,
    repeated_tokens,
    vision_attention_statistics,
)
from ernie_lab.analysis.attention_mass import AttentionMass, attention_mass
from ernie_lab.analysis.attribution import Attribution
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
from ernie_lab.analysis.decomposition import Decomposition, decompose, decomposition_sites
from ernie_lab.analysis.direct import direct_logit_attribution, neuron_attribution
from ernie_lab.analysis.gradients import (
    GradientAttribution,
    activation_gradient,
    gradient_attribution,
)
from ernie_lab.analysis.isolation import (
    IsolationReport,
    expected_bank,
    isolation_report,
    router_cosines,
)
from ernie_lab.analysis.lens import Lens, expert_lens, expert_lens_sites, lens_logits, logit_lens
from ernie_lab.analysis.router_attribution import router_attribution, router_attribution_sites
from ernie_lab.analysis.shared_ratio import shared_to_routed

__all__ = [
    "AttentionMass",
    "Attribution",
    "Dead",
    "Decomposition",
    "GradientAttribution",
    "IsolationReport",
    "Lens",
    "Reference",
    "activation_gradient",
    "attention_distances",
    "attention_mass",
    "attention_statistics",
    "balance_table",
    "counts",
    "cv",
    "dead",
    "decompose",
    "decomposition_sites",
    "direct_logit_attribution",
    "entropy",
    "expected_bank",
    "expert_lens",
    "expert_lens_sites",
    "gini",
    "gradient_attribution",
    "isolation_report",
    "lens_logits",
    "load",
    "logit_lens",
    "max_violation",
    "multinomial_reference",
    "neuron_attribution",
    "repeated_tokens",
    "router_attribution",
    "router_attribution_sites",
    "router_cosines",
    "shared_to_routed",
    "vision_attention_statistics",
]
