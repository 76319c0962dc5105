"""Arrays and labels to figures. Nothing here imports a model, and nothing global is touched."""

from ernie_lab.display import visible
from ernie_lab.plots.ablation_bars import plot_ablation_bars
from ernie_lab.plots.attention import plot_attention, plot_attention_heads
from ernie_lab.plots.attention_statistics import plot_attention_statistics
from ernie_lab.plots.attribution_bars import plot_attribution
from ernie_lab.plots.balance import plot_balance
from ernie_lab.plots.banks import plot_banks
from ernie_lab.plots.cka import plot_layer_cka, plot_paired_cka
from ernie_lab.plots.coactivation import plot_coactivation
from ernie_lab.plots.context_text import context_html
from ernie_lab.plots.contexts import plot_contexts
from ernie_lab.plots.correction_bias import plot_correction_bias
from ernie_lab.plots.counterfactual import plot_counterfactual
from ernie_lab.plots.domain_load import plot_domain_load
from ernie_lab.plots.effect_layers import plot_effects_by_layer, plot_routing_drift
from ernie_lab.plots.effect_plot import plot_effects, plot_mediation
from ernie_lab.plots.expert_load import plot_expert_load
from ernie_lab.plots.expert_map import plot_expert_map
from ernie_lab.plots.expert_on_image import plot_expert_on_image
from ernie_lab.plots.expert_paths import plot_expert_paths
from ernie_lab.plots.expert_shift import plot_expert_shift
from ernie_lab.plots.generation import plot_generation
from ernie_lab.plots.image_attention import plot_image_attention
from ernie_lab.plots.image_experts import plot_clip_experts, plot_image_experts
from ernie_lab.plots.image_values import plot_image_value
from ernie_lab.plots.isolation import plot_isolation
from ernie_lab.plots.margins import plot_margin_flips, plot_margins
from ernie_lab.plots.modality_attention import plot_modality_attention
from ernie_lab.plots.next_tokens import plot_next_tokens
from ernie_lab.plots.report import Section, report
from ernie_lab.plots.residual_geometry import plot_residual_geometry
from ernie_lab.plots.router_token import plot_router_token
from ernie_lab.plots.routing_diff import plot_routing_diff
from ernie_lab.plots.saturation import plot_saturation
from ernie_lab.plots.shared_ratio import plot_shared_ratio
from ernie_lab.plots.similarity import plot_similarity
from ernie_lab.plots.specialisation_nulls import plot_specialisation
from ernie_lab.plots.swap_effects import plot_swap_effects
from ernie_lab.plots.token_null import plot_token_null
from ernie_lab.plots.token_text import TokenHTML, token_html
from ernie_lab.plots.view import View

__all__ = [
    "Section",
    "TokenHTML",
    "View",
    "context_html",
    "plot_ablation_bars",
    "plot_attention",
    "plot_attention_heads",
    "plot_attention_statistics",
    "plot_attribution",
    "plot_balance",
    "plot_banks",
    "plot_clip_experts",
    "plot_coactivation",
    "plot_contexts",
    "plot_correction_bias",
    "plot_counterfactual",
    "plot_domain_load",
    "plot_effects",
    "plot_effects_by_layer",
    "plot_expert_load",
    "plot_expert_map",
    "plot_expert_on_image",
    "plot_expert_paths",
    "plot_expert_shift",
    "plot_generation",
    "plot_image_attention",
    "plot_image_experts",
    "plot_image_value",
    "plot_isolation",
    "plot_layer_cka",
    "plot_margin_flips",
    "plot_margins",
    "plot_mediation",
    "plot_modality_attention",
    "plot_next_tokens",
    "plot_paired_cka",
    "plot_residual_geometry",
    "plot_router_token",
    "plot_routing_diff",
    "plot_routing_drift",
    "plot_saturation",
    "plot_shared_ratio",
    "plot_similarity",
    "plot_specialisation",
    "plot_swap_effects",
    "plot_token_null",
    "report",
    "token_html",
    "visible",
]


def __dir__() -> list[str]:
    """Completion offers what is public here, and no imports."""
    return __all__
