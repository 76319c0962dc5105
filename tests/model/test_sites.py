"""The list of sites is a contract, and every site keeps its promise when the model runs."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.models import small_config, small_model, small_vl_config, small_vl_model
from support.taps import Collect

from ernie_lab.model.text import TextModel
from ernie_lab.model.vl import VLModel
from ernie_lab.sites import Site, SiteError, all_sites, filtered, lens_name, resolve, select

PINNED = Path(__file__).parent / "sites.txt"
PINNED_VL = Path(__file__).parent / "sites_vl.txt"

SIZES = {
    "b": 2, "s": 5, "t": 5, "d": 32, "h": 4, "g": 2, "a": 8, "v": 61, "e": 8, "k": 2,
}  # fmt: skip


def test_list_is_pinned(model: TextModel) -> None:
    """A changed name breaks users' notebooks; change sites.txt only on purpose."""
    assert listed(all_sites(model)) == PINNED.read_text()
    assert listed(all_sites(small_vl_model())) == PINNED_VL.read_text()


def listed(sites: Sequence[Site]) -> str:
    return "".join(
        f"{s.path:40} {s.dims:8} {s.dtype:8} {'on demand' if s.on_demand else ''}".rstrip() + "\n"
        for s in sites
    )


def test_sites_are_known_without_weights() -> None:
    with torch.device("meta"):
        on_meta, vl_on_meta = TextModel(small_config()), VLModel(small_vl_config())
    assert all_sites(on_meta) == all_sites(small_model())
    assert all_sites(vl_on_meta) == all_sites(small_vl_model())


def test_each_fires_once_in_order_with_its_dims(model: TextModel) -> None:
    tap = Collect()
    model(torch.randint(0, 61, (2, 5)), tap=tap)
    assert [site for site, _ in tap.seen] == list(all_sites(model))
    for site, x in tap.seen:
        hidden = 48 if ".mlp." in site.path else 32 if ".shared." in site.path else 16
        expected = tuple({**SIZES, "f": hidden}[letter] for letter in site.dims.split())
        assert x.shape == expected, site.path
        wanted = torch.float32 if site.dtype == "model" else getattr(torch, site.dtype)
        assert x.dtype == wanted, site.path


VL_SIZES = {"b": 1, "s": 9, "t": 9, "d": 32, "h": 4, "g": 2, "a": 8, "v": 61, "e": 8, "k": 2}
# One image of 4 x 4 patches, 4 tokens between 2 delimiters, in a prompt of 9 tokens.
PICTURE_SIZES = {"p": 16, "u": 16, "i": 1, "o": 4, "m": 4, "w": 24, "h": 2, "a": 12, "x": 96}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_those_of_a_vision_language_model_too(dtype: torch.dtype) -> None:
    model, tap = small_vl_model().to(dtype), Collect()
    ids = torch.tensor([[7, 52, 50, 50, 50, 50, 53, 8, 9]])
    model(ids, pixel_values=torch.randn(16, 12), image_grid_thw=torch.tensor([[1, 4, 4]]), tap=tap)
    assert [site for site, _ in tap.seen] == list(all_sites(model))
    for site, x in tap.seen:
        hidden = 40 if site.row == "p" else 48 if ".mlp." in site.path else 16
        hidden = 32 if ".shared." in site.path else 12 if site.bank == "vision" else hidden
        rows = {"n": 3 if site.bank == "text" else 6, "f": hidden}
        sizes = VL_SIZES | (PICTURE_SIZES if site.of_pictures else {}) | rows
        assert x.shape == tuple(sizes[letter] for letter in site.dims.split()), site.path
        wanted = dtype if site.dtype == "model" else getattr(torch, site.dtype)
        assert x.dtype == wanted, site.path


def test_what_a_site_s_rows_are() -> None:
    sites = {site.path: site for site in all_sites(small_vl_model())}
    logits = sites["blocks.1.moe.vision.router_logits"]
    assert (logits.bank, logits.bank_path, logits.row) == ("vision", "blocks.1.moe.bank", "n")
    assert logits.bank_path in sites
    for path in ("blocks.1.moe.bank", "blocks.1.moe.shared.act", "blocks.1.moe.routed_out"):
        assert sites[path].bank is None and sites[path].bank_path is None
    of_pictures = {path for path, site in sites.items() if site.of_pictures}
    assert of_pictures == {p for p in sites if p.startswith(("vision.", "resampler."))}
    assert {sites[path].row for path in of_pictures if not sites[path].of_patches} == {"m"}


def test_dtypes_in_bf16(model: TextModel) -> None:
    """Routing and norm scales stay fp32; everything else follows the weights."""
    tap = Collect()
    model.bfloat16()(torch.randint(0, 61, (2, 5)), tap=tap)
    for site, x in tap.seen:
        wanted = torch.bfloat16 if site.dtype == "model" else getattr(torch, site.dtype)
        assert x.dtype == wanted, site.path


def test_the_architecture_alone_decides_the_sites(model: TextModel) -> None:
    """A dense model has no mixture sites; one without shared experts no shared sites."""
    dense = all_sites(small_model(moe=None))
    assert not any(".moe." in site.path for site in dense)
    assert sum(site.quantity == "mlp.mlp_out" for site in dense) == 3


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("blocks.1.attn.hook_pattern", "blocks.1.attn.pattern"),
        ("blocks.1.hook_attn_out", "blocks.1.attn.attn_out"),
        ("blocks.0.hook_mlp_out", "blocks.0.mlp.mlp_out"),
        ("blocks.1.hook_mlp_out", "blocks.1.moe.moe_out"),
        ("blocks.1.mlp.gate.hook_out", "blocks.1.moe.router_logits"),
        ("blocks.1.attn.hook_rot_q", "blocks.1.attn.q_rot"),
        ("blocks.2.attn.hook_attn_scores", "blocks.2.attn.scores"),
        ("blocks.0.mlp.hook_post", "blocks.0.mlp.act"),
        ("blocks.1.ln1.hook_normalized", "blocks.1.norm1.normalized"),
        ("hook_embed", "embed"),
        ("blocks.1.mlp.hook_expert_weights", "blocks.1.moe.router_probs"),
        ("blocks.1.mlp.hook_expert_indices", "blocks.1.moe.expert_ids"),
    ],
)
def test_transformer_lens_names(model: TextModel, name: str, path: str) -> None:
    assert resolve(name, all_sites(model)).path == path


def test_a_name_that_means_another_number_is_refused(model: TextModel) -> None:
    with pytest.raises(SiteError, match="is the rms in TransformerLens"):
        resolve("ln_final.hook_scale", all_sites(model))


def test_lens_names_lead_back(model: TextModel) -> None:
    for site in all_sites(model):
        if site.quantity.split(".")[0] in {"attn", "resid_pre", "resid_mid", "resid_post", "mlp"}:
            if site.quantity in {"mlp.gate_proj", "mlp.up", "mlp.act"}:
                continue
            assert resolve(lens_name(site), all_sites(model)) == site
    assert filtered(lambda name: "hook_resid_pre" in name, all_sites(model)) == select(
        "resid_pre", all_sites(model)
    )


def test_select(model: TextModel) -> None:
    sites = all_sites(model)
    assert [s.path for s in select("blocks.*.moe.expert_ids", sites)] == [
        "blocks.1.moe.expert_ids",
        "blocks.2.moe.expert_ids",
    ]
    assert select("moe.expert_ids", sites) == select("blocks.*.moe.expert_ids", sites)
    assert select("attn.*", sites) == select("blocks.*.attn.*", sites)
    assert select(sites[3], sites) == (sites[3],)
    assert len(select(["resid_post", "resid_pre"], sites)) == 6


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("blocks.1.moe.router_logit", "blocks.1.moe.router_logits"),
        ("blocks.0.moe.router_logits", "layer 0 is dense; layers with experts: 1..2"),
        ("blocks.7.resid_post", "layers are 0..2"),
        ("nonsense", "lab.sites()"),
    ],
)
def test_a_wrong_name_says_what_is_near(model: TextModel, name: str, hint: str) -> None:
    for find in (resolve, select):
        with pytest.raises(SiteError, match="no site matches") as error:
            find(name, all_sites(model))
        assert hint in str(error.value)
