"""TransformerLens' cache takes the keys of a trace, gradients included."""

import pytest
import torch
from trace_driver import SITES

from ernie_lab.sites import Site, SiteError
from ernie_lab.trace.activation_cache import ActivationCache

PATHS = ("blocks.1.norm1.scale", "blocks.1.resid_post", "blocks.2.resid_post", "blocks.1.attn.k")
SITE = next(site for site in SITES if site.path == "blocks.1.resid_post")


def cache(*, grad=True):
    names = [path + suffix for path in PATHS for suffix in ("", "_grad")[: 1 + grad]]
    return ActivationCache({name: torch.tensor([i]) for i, name in enumerate(names)}, SITES)


@pytest.mark.parametrize(
    "key, path",
    [
        ("blocks.1.resid_post", "blocks.1.resid_post"),
        ("blocks.1.hook_resid_post", "blocks.1.resid_post"),
        (("resid_post", -1), "blocks.2.resid_post"),
        (("hook_resid_post", 1), "blocks.1.resid_post"),
        (("k", 1, "attn"), "blocks.1.attn.k"),
        (("scale", 1, "ln1"), "blocks.1.norm1.scale"),
    ],
)
def test_keys_are_those_of_a_trace_and_take_a_suffix(key, path):
    mine = cache()
    graded = f"{key}_grad" if isinstance(key, str) else (f"{key[0]}_grad", *key[1:])
    assert torch.equal(mine[key], mine[path])
    assert torch.equal(mine[graded], mine[f"{path}_grad"])
    assert not torch.equal(mine[key], mine[graded])


def test_the_part_of_a_key_counts():
    both = ActivationCache(
        {f"blocks.1.norm{i}.normalized": torch.tensor([i]) for i in (1, 2)}, SITES
    )
    assert [int(both["normalized", 1, f"ln{i}"]) for i in (1, 2)] == [1, 2]
    with pytest.raises(SiteError, match="ambiguous in layer 1"):
        both["normalized", 1]


def test_what_has_no_batch_axis_keeps_its_rows():
    sites = (Site("embed", "b s d", ""), Site("blocks.0.moe.vision.routed_out", "n d", ""))
    values = {"embed": torch.zeros(1, 3, 4), sites[1].path: torch.ones(2, 4)}
    mine = ActivationCache(values, sites).remove_batch_dim()
    assert mine["embed"].shape == (3, 4) and mine[sites[1]].shape == (2, 4)
    with pytest.raises(ValueError, match=r"\[2\] sequences"):
        ActivationCache({"embed": torch.zeros(2, 3, 4)}, sites).remove_batch_dim()


def test_keys_refused():
    mine = cache(grad=False)
    assert torch.equal(mine[SITE], mine[SITE.path])
    with pytest.raises(SiteError, match=r"resid_post_grad exists.*incl_bwd=True"):
        mine["resid_post_grad", 1]
    with pytest.raises(SiteError, match=r"site of every layer; name one, \('resid_post', layer\)"):
        mine["resid_post"]
    with pytest.raises(SiteError, match="no part 'foo'"):
        mine["scale", 1, "foo"]
    with pytest.raises(TypeError, match=r"a key is .*not \('scale', '1'\)"):
        mine["scale", "1"]
