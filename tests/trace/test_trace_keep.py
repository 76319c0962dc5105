"""What is selected, what is refused, and what it would cost."""

import numpy as np
import pytest
import torch
from trace_driver import SITES

from ernie_lab.checkpoint import memory
from ernie_lab.display import in_words, ranges
from ernie_lab.sites import SiteError, all_sites
from ernie_lab.trace import budget
from ernie_lab.trace.budget import (
    TraceTooLarge,
    default_budget,
    estimate_bytes,
    require_budget,
)
from ernie_lab.trace.keep import Keep, keep
from ernie_lab.trace.positions import Positions, as_positions

DENSE = tuple(site for site in SITES if ".moe." not in site.path)


def paths(wish, **filters):
    return [rule.site.path for rule in Keep.of(wish, SITES, **filters).kept]


def test_groups():
    assert paths("routing") == [
        f"blocks.{layer}.moe.{name}"
        for layer in (1, 2)
        for name in ("router_logits", "expert_ids", "expert_weights")
    ]
    assert paths("attention") == [f"blocks.{layer}.attn.pattern" for layer in (0, 1, 2)]
    assert len(paths("residual")) == 9
    assert paths("all") == [site.path for site in SITES if not site.on_demand]


def test_routing_of_an_edited_run_takes_what_no_longer_follows():
    assert "blocks.1.moe.selection_scores" in paths("routing", edited=True)
    assert "blocks.1.moe.router_probs" in paths("routing", edited=True)


def test_globs_names_sites_and_mixtures_keep_forward_order():
    wish = ["logits", "blocks.2.*scores", SITES[0], "moe.moe_out", "routing"]
    assert paths(wish) == [
        site.path
        for site in SITES
        if site.path in {"logits", "embed", "blocks.2.attn.scores"}
        or site.path == "blocks.2.moe.selection_scores"
        or site.path.endswith(("moe_out", "router_logits", "expert_ids", "expert_weights"))
    ]


def test_layers_count_from_the_end_and_leave_other_sites():
    assert paths(["residual", "embed"], layers=[-1]) == [
        "embed",
        "blocks.2.resid_pre",
        "blocks.2.resid_mid",
        "blocks.2.resid_post",
    ]


def test_requests_carry_their_own_filters():
    chosen = Keep.of(["routing", keep("attention", layers=2, heads=[1])], SITES, layers=[1, 2])
    attention = [rule for rule in chosen.kept if rule.site.path.endswith("pattern")]
    assert [(rule.site.layer, rule.heads) for rule in attention] == [(2, (1,))]
    assert "attention (layers=(2,), heads=(1,))" in chosen.description


@pytest.mark.parametrize(
    "wish, filters, message",
    [
        ((), {}, "nothing to keep"),
        ("blocks.1.nothing", {}, "no site matches"),
        ("routing", {"layers": [0]}, r"no site in layers \[0\]; it has in layers \[1, 2\]"),
        ("routing", {"layers": [3]}, "layer 3 does not exist"),
        ("routing", {"heads": [0]}, "no query heads"),
        (keep("attn.k", heads=0), {}, "no query heads"),
        ("attention", {"heads": [-1]}, "counted from 0"),
        ("attention", {"heads": [1, 1]}, "distinct"),
        ("attention", {"layers": []}, "empty"),
        ("routing", {"positions": []}, "empty"),
        ("routing", {"positions": slice(None, None, -1)}, "forward"),
        ("routing", {"dtype": "int64"}, "float16"),
        ("routing", {"dtype": "nonsense"}, "float16"),
        (["resid_pre", keep("resid_pre", positions=0)], {}, "asked for twice"),
    ],
)
def test_refusals(wish, filters, message):
    with pytest.raises((ValueError, SiteError), match=message):
        Keep.of(wish, SITES, **filters)


def test_a_dense_model_has_no_routing():
    with pytest.raises(SiteError, match="dense"):
        Keep.of("routing", DENSE)
    with pytest.raises(ValueError, match="groups: routing, attention, residual, all"):
        keep()
    with pytest.raises(TypeError, match="int"):
        keep(3)


def test_per_expert_values_keep_their_dtype():
    rules = {
        rule.site.quantity: rule.dtype for rule in Keep.of("all", SITES, dtype="bfloat16").kept
    }
    assert rules["resid_pre"] == torch.bfloat16
    assert rules["moe.router_logits"] is None


def test_positions():
    assert as_positions(3).among(5) == [3]
    assert as_positions([4, -5, 9]).among(5) == [0, 4]
    assert as_positions(slice(1, None, 2)).among(6) == [1, 3, 5]
    assert as_positions(slice(-2, None)).among(6) == [4, 5]
    assert as_positions(range(2)) == Positions(indices=(0, 1))
    assert as_positions(slice(-2, None)).needs_the_end
    assert as_positions([0, -1]).needs_the_end
    assert not as_positions(slice(2, 5)).needs_the_end
    assert [str(as_positions(p)) for p in (slice(2, 5), slice(None, None, 3), [1])] == [
        "2:5",
        "::3",
        "[1]",
    ]


def test_estimate_by_hand(model):
    def estimate(*wish, lengths=(4,), **options):
        chosen = Keep.of(wish[0], all_sites(model), **options)
        return sum(estimate_bytes(chosen, model.config, lengths).values())

    # 2 layers x 4 tokens x (8 logits x 4 B + 2 ids x 8 B + 2 weights x 4 B)
    assert estimate("routing") == 2 * 4 * (32 + 16 + 8)
    # 3 layers x 4 heads x (4 x 4 + 2 x 2) x 4 B
    assert estimate("attention", lengths=(4, 2)) == 3 * 4 * 20 * 4
    assert estimate("attention", heads=[0], positions=[0], dtype="float16") == 3 * 4 * 2
    assert estimate("moe.shared.act") == 2 * 4 * 32 * 4
    assert estimate("mlp.act") == 4 * 48 * 4


def test_estimate_counts_no_row_for_the_last_sampled_token(model):
    chosen = Keep.of("resid_pre", all_sites(model), layers=0)
    (size,) = estimate_bytes(chosen, model.config, [4], 3, torch.bfloat16).values()
    assert size == (4 + 2) * 32 * 2
    last = Keep.of("resid_pre", all_sites(model), positions=-1)
    with pytest.raises(ValueError, match="generation has not reached"):
        estimate_bytes(last, model.config, [4], 3)
    assert sum(estimate_bytes(last, model.config, [4, 7]).values()) == 3 * 2 * 32 * 4


def test_budget_says_what_is_big_and_how_to_narrow_it(model):
    sizes = estimate_bytes(Keep.of(["routing", "attention"], all_sites(model)), model.config, [500])
    with pytest.raises(TraceTooLarge) as caught:
        require_budget(sizes, 1_000_000)
    message = str(caught.value)
    said = ("12.1 MB", "1.0 MB", "blocks.0.attn.pattern with 4.0 MB", "12.0 MB", "positions=")
    for part in (*said, "keep attn.q_rot and attn.k_rot, and take el.analysis.attention_summary"):
        assert part in message
    assert require_budget(sizes, 10**9) == sum(sizes.values())


def test_the_budget_is_half_of_what_is_free(monkeypatch):
    assert default_budget() > 2**20
    free = {"cpu": 1000, "cuda": None}
    monkeypatch.setattr(budget, "free_bytes", lambda device: free[device.type])
    assert default_budget() == 500
    assert default_budget("cuda") == 4 * 2**30, "not known"
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_container_free", lambda: 64)
    assert default_budget() == 32, "a container's limit counts"


def test_every_device_has_its_own_budget(model, monkeypatch):
    chosen = Keep.of([keep("resid_pre", device="cuda"), "resid_post"], all_sites(model))
    sizes = estimate_bytes(chosen, model.config, [4])
    assert chosen.devices["blocks.0.resid_pre"] == "cuda"
    assert chosen.devices["blocks.0.resid_post"] == "cpu"
    each = 3 * 4 * 32 * 4
    free = {"cpu": 2 * each, "cuda": 2 * each}
    monkeypatch.setattr(budget, "free_bytes", lambda device: free[device.type])
    assert require_budget(sizes, device=chosen.devices) == 2 * each
    free["cuda"] -= 2
    with pytest.raises(TraceTooLarge, match=r"3 sites would take 1\.5 kB on cuda; .*resid_pre"):
        require_budget(sizes, device=chosen.devices)
    with pytest.raises(TraceTooLarge, match=r"6 sites would take 3\.1 kB; the budget is"):
        require_budget(sizes, 2 * each - 1, device=chosen.devices)
    with pytest.raises(TraceTooLarge, match=r"6 sites would take 3\.1 kB on cpu"):
        require_budget(sizes)


def test_grad_holds_whole_tensors(model):
    def estimate(wish, **options):
        chosen = Keep.of(wish, all_sites(model), **options)
        return [
            sum(estimate_bytes(chosen, model.config, [4, 2], grad=grad).values())
            for grad in (False, True)
        ]

    # The stored row of each sequence in 2 bytes, and all 6 rows in 4; 3 layers of width 32.
    stored, held = estimate("resid_pre", positions=0, dtype="bfloat16")
    assert (stored, held) == (3 * 2 * 32 * 2, 3 * 2 * 32 * 2 + 3 * 6 * 32 * 4)
    # 4 heads of (16 + 4) pairs in fp32.
    stored, held = estimate("attention", heads=1)
    assert held - stored == 3 * 4 * 20 * 4


@pytest.mark.parametrize(
    "positions, max_new_tokens, message",
    [
        ([0, 99], 0, r"\[99\] cannot be reached; the longest sequence has 11 tokens$"),
        ([0, -12], 0, r"\[-12\] cannot be reached"),
        ([12, 13], 3, r"\[13\] cannot.*has 13 tokens with max_new_tokens=3, the last.*never read"),
        (11, 1, r"\[11\] cannot be reached"),
        (slice(11, 20), 0, "positions=11:20.*all of them cannot be reached"),
        (slice(3, 3), 0, "all of them"),
    ],
)
def test_positions_that_cannot_be_reached_are_refused_before_the_run(
    model, positions, max_new_tokens, message
):
    chosen = Keep.of("resid_pre", all_sites(model), positions=positions)
    with pytest.raises(ValueError, match=message):
        estimate_bytes(chosen, model.config, [11, 4], max_new_tokens)


def test_positions_that_one_sequence_reaches_will_do(model):
    for positions, max_new_tokens, n_rows in (([0, 10], 0, 3), (12, 3, 1), ([-11], 0, 1)):
        chosen = Keep.of("resid_pre", all_sites(model), layers=0, positions=positions)
        (size,) = estimate_bytes(chosen, model.config, [11, 4], max_new_tokens).values()
        assert size == n_rows * 32 * 4


def test_names_are_those_of_trace_keys():
    assert paths("pattern") == paths("attention")
    assert paths("expert_ids") == ["blocks.1.moe.expert_ids", "blocks.2.moe.expert_ids"]
    assert paths("mlp_out") == [
        "blocks.0.mlp.mlp_out",
        "blocks.1.moe.moe_out",
        "blocks.2.moe.moe_out",
    ]
    assert paths(["k", "attn_scores"], layers=[0]) == ["blocks.0.attn.k", "blocks.0.attn.scores"]
    with pytest.raises(SiteError, match=r"ambiguous; say which of mlp\.gate_proj, moe\.shared"):
        paths("gate_proj")
    with pytest.raises(SiteError, match="ambiguous"):
        paths("normalized")


def test_a_misspelt_group_is_told_the_groups():
    with pytest.raises(
        SiteError, match=r"'routin'.*Groups of sites: routing, attention, residual, all"
    ):
        paths("routin")


def test_numbers_may_be_numpy_s():
    chosen = Keep.of(
        keep("attention", layers=np.int64(1), heads=np.array([0, 2]), positions=np.arange(2)),
        SITES,
    )
    (rule,) = chosen.kept
    assert (rule.site.layer, rule.heads, rule.positions) == (1, (0, 2), Positions(indices=(0, 1)))
    assert type(rule.heads[0]) is int


@pytest.mark.parametrize(
    "wish, filters, message",
    [
        (3, {}, "keep=3: expected a group .routing, attention, residual, all., a path"),
        (None, {}, "keep=None: expected a group"),
        (["routing", 3], {}, "keep=3: expected"),
        (len, {}, "keep=<built-in function len>: expected"),
        ("routing", {"positions": "last"}, "positions='last': expected an index"),
        ("routing", {"positions": len}, "positions=<built-in.*expected an index"),
        ("routing", {"layers": "all"}, "layers='all': expected an integer or several"),
        ("routing", {"layers": 1.5}, r"layers=1\.5: expected"),
        ("attention", {"heads": [True]}, r"heads=\[True\]: expected"),
    ],
)
def test_wrong_types_are_named(wish, filters, message):
    with pytest.raises(TypeError, match=message):
        Keep.of(wish, SITES, **filters)


def test_sizes_and_ranges_in_words():
    figures = (0, 999, 1500, 999_949, 999_951, 10**15, 43.7e9)
    assert [in_words(n) for n in figures] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "999.9 kB",
        "1.0 MB",
        "1000.0 TB",
        "43.7 GB",
    ]
    lists = ([], [3], [1, 2, 3, 4, 5], [1, 3, 5], [0, 1, 2, 7])
    assert [ranges(numbers) for numbers in lists] == ["none", "3", "1..5", "1, 3, 5", "0..2, 7"]
