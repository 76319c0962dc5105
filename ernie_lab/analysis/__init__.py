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
    "ModalityIsolation",
    "modality_isolation",
    "AttentionMass",
    "Attribution",
    "BiasLedger",
    "Contexts",
    "Dead",
    "Decomposition",
    "ExpertMatching",
    "GradientAttribution",
    "IsolationReport",
    "LayerCKA",
    "Lens",
    "Reference",
    "ResidualGeometry",
    "RoutingDiff",
    "Specialisation",
    "activation_gradient",
    "attention_distances",
    "attention_mass",
    "attention_rows",
    "attention_statistics",
    "attention_summary",
    "balance_by",
    "balance_of_counts",
    "balance_table",
    "bias_ledger",
    "coactivated_pairs",
    "coactivation",
    "coactivation_counts",
    "context_overlap",
    "counts",
    "cross_bank_counterfactual",
    "cross_bank_sites",
    "cv",
    "dead",
    "decompose",
    "decomposition_sites",
    "direct_logit_attribution",
    "domain_specialisation",
    "entropy",
    "expected_bank",
    "expert_information",
    "expert_lens",
    "expert_lens_sites",
    "expert_output_similarity",
    "find",
    "flips_by_margin",
    "frequent_paths",
    "gini",
    "gradient_attribution",
    "input_alignment",
    "isolation_report",
    "label_overlap",
    "layer_cka",
    "least_loaded",
    "lens_logits",
    "linear_cka",
    "load",
    "logit_lens",
    "margin_table",
    "match_experts",
    "matched_neurons",
    "max_violation",
    "multinomial_reference",
    "mutual_information",
    "neuron_attribution",
    "pair_chance",
    "paired_cka",
    "path_counts",
    "path_information",
    "path_steps",
    "position_buckets",
    "repeated_tokens",
    "residual_geometry",
    "router_alignment",
    "router_attribution",
    "router_attribution_sites",
    "router_cosines",
    "router_geometry",
    "router_losses",
    "router_saturation",
    "router_similarity",
    "routing_diff",
    "score_noise",
    "set_agreement",
    "set_flips",
    "shared_to_routed",
    "specialisation",
    "token_id_null",
    "untrained_twin",
    "vision_attention_statistics",
    "vocabulary_specialisation",
    "information_of_counts",
]
