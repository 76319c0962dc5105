"""TransformerLens' verbs and names."""

import pytest
import torch
from support.labs import small_lab
from torch import Tensor

import ernie_lab as el
from ernie_lab.lab import Lab
from ernie_lab.sites import Site


@pytest.fixture
def lab() -> Lab:
    return small_lab()


def test_run_with_cache(lab: Lab) -> None:
    logits, cache = lab.run_with_cache(["hello there", "no"])
    assert torch.allclose(logits, lab.run(["hello there", "no"]).logits, atol=1e-5)
    assert cache["pattern", 1].shape == (2, 4, 11, 11)
    assert torch.equal(cache["pattern", 1], cache["blocks.1.attn.hook_pattern"])
    assert torch.equal(cache["resid_post", -1], cache["blocks.2.hook_resid_post"])
    assert cache["mlp_out", 1].shape == cache["mlp_out", 0].shape == (2, 11, 32)
    assert cache["blocks.1.mlp.gate.hook_out"].shape == (2, 11, 8)
    assert "blocks.1.moe.expert_out" not in cache


def test_names_filter(lab: Lab) -> None:
    for names in ("blocks.1.moe.expert_out", ["expert_out", "moe.expert_out"][1:]):
        _, cache = lab.run_with_cache("hello", names)
        assert cache["blocks.1.moe.expert_out"].shape == (1, 5, 2, 32)
    _, cache = lab.run_with_cache("hello", lambda name: name.endswith("resid_post"))
    assert list(cache) == [f"blocks.{i}.resid_post" for i in range(3)]
    with pytest.raises(el.SiteError, match="exists but was not cached"):
        cache["pattern", 1]
    with pytest.raises(el.SiteError, match="no site passes the filter"):
        lab.run_with_cache("hello", lambda name: False)


def test_remove_batch_dim(lab: Lab) -> None:
    _, cache = lab.run_with_cache("hello", remove_batch_dim=True)
    assert cache["resid_pre", 0].shape == (5, 32)
    with pytest.raises(ValueError, match="the batch has"):
        lab.run_with_cache(["a", "b"], remove_batch_dim=True)


def test_gradients_come_with_incl_bwd(lab: Lab) -> None:
    _, cache = lab.run_with_cache("hello", ["resid_mid", "blocks.1.moe.expert_ids"], incl_bwd=True)
    run = lab.run("hello", keep="blocks.1.resid_mid", grad=True)
    expected = torch.from_numpy(run.trace.gradient(run.loss, "blocks.1.resid_mid").values.copy())
    torch.testing.assert_close(cache["blocks.1.resid_mid_grad"][0], expected)
    assert torch.equal(cache["resid_mid_grad", 1], cache["blocks.1.hook_resid_mid_grad"])
    assert lab.model.embed_VD.grad is None


def test_backward_hooks_see_the_gradients_of_the_cache(lab: Lab) -> None:
    names = ["blocks.2.attn.hook_pattern", "blocks.1.hook_resid_mid", "blocks.1.mlp.gate.hook_out"]
    _, cache = lab.run_with_cache("hello", names, incl_bwd=True)
    seen: dict[str, Tensor] = {}

    def look(gradient: Tensor, hook: Site) -> None:
        seen[hook.path] = gradient.clone()

    loss = lab.run_with_hooks("hello", bwd_hooks=[(n, look) for n in names], return_type="loss")
    # In the order in which gradients flow.
    assert list(seen) == ["blocks.2.attn.pattern", "blocks.1.moe.router_logits",
                          "blocks.1.resid_mid"]  # fmt: skip
    for path, gradient in seen.items():
        torch.testing.assert_close(gradient, cache[f"{path}_grad"])
    torch.testing.assert_close(loss, lab.run("hello").loss)
    assert not loss.requires_grad
    assert all(parameter.grad is None for parameter in lab.model.parameters())


def test_what_a_backward_hook_returns_flows_on(lab: Lab) -> None:
    later, earlier = "blocks.2.hook_resid_pre", "blocks.1.hook_resid_pre"
    seen: list[Tensor] = []
    hooks = [
        (later, lambda gradient, hook: 2 * gradient),
        (earlier, lambda gradient, hook: seen.append(gradient.clone())),
    ]
    lab.run_with_hooks("hello", bwd_hooks=hooks)
    lab.run_with_hooks("hello", bwd_hooks=hooks[1:])
    torch.testing.assert_close(seen[0], 2 * seen[1])


def test_backward_hooks_behind_forward_hooks(lab: Lab) -> None:
    seen: list[Tensor] = []
    site = "blocks.1.attn.hook_z"
    loss = lab.run_with_hooks(
        "hello",
        [(site, lambda z, hook: z * 0)],
        [(site, lambda gradient, hook: seen.append(gradient))],
        return_type="loss",
        grad=True,
    )
    assert loss.requires_grad and seen[0].abs().max() > 0
    torch.autograd.grad(loss, lab.model.embed_VD)  # the graph is still there
    with pytest.raises(el.EditError, match=r"no gradient flows to blocks\.1\.moe\.expert_ids"):
        lab.run_with_hooks("hello", bwd_hooks=[("blocks.1.moe.expert_ids", lambda g, hook: None)])


def test_run_with_hooks(lab: Lab) -> None:
    seen: list[Site] = []

    def zero_head(z: Tensor, hook: Site) -> Tensor:
        seen.append(hook)
        z[:, :, 2] = 0.0
        return z

    def in_place(z: Tensor, hook: Site) -> None:
        z[:, :, 2] = 0.0

    plain = lab.run("hello").logits
    edited = lab.run_with_hooks("hello", [("blocks.1.attn.hook_z", zero_head)])
    assert not torch.allclose(edited, plain, atol=1e-4)
    assert torch.equal(lab.run_with_hooks("hello", [("blocks.1.attn.hook_z", in_place)]), edited)
    assert [site.name for site in seen] == ["blocks.1.attn.z"]
    assert torch.equal(lab.run("hello").logits, plain)
    logits, loss = lab.run_with_hooks("hello", return_type="both")
    assert torch.equal(logits, plain)
    assert torch.equal(lab.run_with_hooks("hello", return_type="loss"), loss)


def test_hooks_by_filter(lab: Lab) -> None:
    seen = []
    lab.run_with_hooks(
        "hello", [(lambda name: name.endswith(".z"), lambda x, hook: seen.append(hook.path))]
    )
    assert seen == [f"blocks.{i}.attn.z" for i in range(3)]
    with pytest.raises(el.SiteError, match="no site matches"):
        lab.run_with_hooks("hello", [("blocks.0.hook_nothing", lambda x, hook: x)])
