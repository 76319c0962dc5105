"""Pure functions of a trace, or of plain arrays, to labelled numbers."""

from ernie_lab.analysis.attention import (
    attention_distances,
    attention_statistics,
    repeated_tokens,
    vision_attention_statistics,
)
from ernie_lab.analysis.attention_mass import AttentionMass, attention_mass
from ernie_lab.analysis.attention_summary import attention_rows, attention_summary
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
    least_loaded,
    load,
    max_violation,
    multinomial_reference,
)
from ernie_lab.analysis.balance_groups import balance_by, balance_of_counts
from ernie_lab.analysis.bias import BiasLedger, bias_ledger
from ernie_lab.analysis.cka import LayerCKA, layer_cka, linear_cka, paired_cka
from ernie_lab.analysis.coactivation import coactivated_pairs, coactivation, coactivation_counts
from ernie_lab.analysis.contexts import context_overlap, label_overlap
from ernie_lab.analysis.counterfactual import cross_bank_counterfactual, cross_bank_sites
from ernie_lab.analysis.decomposition import Decomposition, decompose, decomposition_sites
from ernie_lab.analysis.direct import direct_logit_attribution, neuron_attribution
from ernie_lab.analysis.expert_information import expert_information
from ernie_lab.analysis.expert_matching import ExpertMatching, match_experts
from ernie_lab.analysis.expert_similarity import expert_output_similarity, matched_neurons
from ernie_lab.analysis.geometry import router_geometry, router_similarity
from ernie_lab.analysis.gradients import (
    GradientAttribution,
    activation_gradient,
    gradient_attribution,
)
from ernie_lab.analysis.information import information_of_counts, mutual_information
from ernie_lab.analysis.input_alignment import input_alignment
from ernie_lab.analysis.isolation import (
    IsolationReport,
    expected_bank,
    isolation_report,
    router_cosines,
)
from ernie_lab.analysis.lens import Lens, expert_lens, expert_lens_sites, lens_logits, logit_lens
from ernie_lab.analysis.margins import flips_by_margin, margin_table, score_noise, set_flips
from ernie_lab.analysis.modality_isolation import ModalityIsolation, modality_isolation
from ernie_lab.analysis.nulls import untrained_twin
from ernie_lab.analysis.olmoe import domain_specialisation, vocabulary_specialisation
from ernie_lab.analysis.paths import frequent_paths, path_counts, path_information, path_steps
from ernie_lab.analysis.residual_geometry import ResidualGeometry, residual_geometry
from ernie_lab.analysis.router_alignment import router_alignment
from ernie_lab.analysis.router_attribution import router_attribution, router_attribution_sites
from ernie_lab.analysis.router_losses import router_losses
from ernie_lab.analysis.routing_diff import RoutingDiff, routing_diff
from ernie_lab.analysis.saturation import router_saturation, set_agreement
from ernie_lab.analysis.search import Contexts, find
from ernie_lab.analysis.shared_ratio import shared_to_routed
from ernie_lab.analysis.specialisation import Specialisation, specialisation
from ernie_lab.analysis.subsets import pair_chance
from ernie_lab.analysis.token_groups import position_buckets
from ernie_lab.analysis.token_null import token_id_null

__all__ = [
    # Balance of the load, beside uniform routing
    "load",
    "counts",
    "max_violation",
    "cv",
    "entropy",
    "gini",
    "least_loaded",
    "dead",
    "Dead",
    "multinomial_reference",
    "Reference",
    "balance_table",
    "balance_by",
    "balance_of_counts",
    "position_buckets",
    "router_losses",
    # The correction bias, and how close the choices were
    "bias_ledger",
    "BiasLedger",
    "margin_table",
    "flips_by_margin",
    "score_noise",
    "set_flips",
    # What experts tell of domains and tokens, beside what routers tell that learned nothing
    "mutual_information",
    "information_of_counts",
    "expert_information",
    "specialisation",
    "Specialisation",
    "untrained_twin",
    "token_id_null",
    "domain_specialisation",
    "vocabulary_specialisation",
    # Over training, between runs and between models
    "router_saturation",
    "set_agreement",
    "routing_diff",
    "RoutingDiff",
    "match_experts",
    "ExpertMatching",
    # Experts together, from layer to layer, in context
    "coactivation",
    "coactivation_counts",
    "coactivated_pairs",
    "pair_chance",
    "path_counts",
    "path_information",
    "path_steps",
    "frequent_paths",
    "context_overlap",
    "label_overlap",
    "find",
    "Contexts",
    # What weights say: routers and experts
    "router_geometry",
    "router_similarity",
    "router_alignment",
    "router_cosines",
    "input_alignment",
    "expert_output_similarity",
    "matched_neurons",
    # Text and pictures: are the banks apart, and what do both share
    "modality_isolation",
    "ModalityIsolation",
    "isolation_report",
    "IsolationReport",
    "expected_bank",
    "cross_bank_counterfactual",
    "cross_bank_sites",
    "shared_to_routed",
    "residual_geometry",
    "ResidualGeometry",
    "layer_cka",
    "LayerCKA",
    "linear_cka",
    "paired_cka",
    # Attention
    "attention_statistics",
    "attention_distances",
    "vision_attention_statistics",
    "attention_summary",
    "attention_rows",
    "attention_mass",
    "AttentionMass",
    "repeated_tokens",
    # What an output or a route is made of: lenses, direct and gradient attribution
    "logit_lens",
    "lens_logits",
    "expert_lens",
    "expert_lens_sites",
    "Lens",
    "decompose",
    "decomposition_sites",
    "Decomposition",
    "direct_logit_attribution",
    "neuron_attribution",
    "router_attribution",
    "router_attribution_sites",
    "Attribution",
    "activation_gradient",
    "gradient_attribution",
    "GradientAttribution",
]


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__
