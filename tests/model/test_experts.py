"""Experts by one grouped product: the rows, sites and numbers of the loop over experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ernie_lab.model import experts
from ernie_lab.model.experts import Dispatch, ExpertBank, ExpertSites, grouped_linear, one_product
from ernie_lab.sites import Site

pytestmark = pytest.mark.skipif(
    experts._grouped_mm is None, reason=f"torch {torch.__version__} has no grouped product"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [0, 1, 40])
def test_one_product_for_all_experts_is_the_loop(
    dtype: torch.dtype, n_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_one_product_serves", lambda *_: False)
    torch.manual_seed(0)
    matrices_EFD = torch.randn(8, 48, 64).to(dtype)
    # Neither the first, the last nor expert 4 has rows.
    ids_NK = torch.tensor([1, 2, 3, 5, 6])[torch.rand(n_tokens, 5).topk(2).indices]
    rows, x_JD = Dispatch.of(ids_NK), torch.randn(2 * n_tokens, 64).to(dtype)
    with torch.no_grad():
        expected_JF = grouped_linear(x_JD, matrices_EFD, rows)
        found_JF = one_product(x_JD, matrices_EFD, rows)
    assert found_JF.dtype is dtype
    atol = 0.13 if dtype is torch.bfloat16 else 1e-5  # a step of bf16 at 16 to 32
    torch.testing.assert_close(found_JF, expected_JF, rtol=1e-5, atol=atol)


def test_a_bank_by_one_product_asks_nothing_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Tensor] = {}

    class Kept:
        def wants(self, site: Site, /) -> bool:
            return True

        def __call__(self, site: Site, x: Tensor, /) -> Tensor:
            seen[site.path] = x
            return x

    bank = ExpertBank(8, 64, 48)
    for parameter in bank.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x_ND, ids_NK = torch.randn(20, 64), torch.rand(20, 8).topk(3).indices
    args = x_ND, ids_NK, torch.rand(20, 3), ExpertSites.under("moe", "n"), Kept()
    with torch.no_grad():
        expected = {"out": bank(*args)} | seen
        monkeypatch.setattr(experts, "_one_product_serves", lambda *_: True)
        monkeypatch.setattr(Dispatch, "_on_host", property(lambda _: pytest.fail("it waited")))
        found = {"out": bank(*args)} | seen
    assert len(found) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=name)


def test_only_bf16_without_gradients_takes_one_product() -> None:
    x_JD, matrices_EFD = torch.zeros(4, 64).bfloat16(), torch.zeros(2, 48, 64).bfloat16()
    serves = experts._one_product_serves
    with torch.no_grad():
        assert serves(x_JD, matrices_EFD)
        assert not serves(x_JD.float(), matrices_EFD.float())
        assert not serves(x_JD.float(), matrices_EFD)
        assert not serves(x_JD[:, :60], matrices_EFD[..., :60])
        assert not serves(x_JD.t().contiguous().t(), matrices_EFD)
    assert not serves(x_JD, matrices_EFD)


@pytest.mark.parametrize(("n_tokens", "grad"), [(20, False), (3, True)])
def test_compiled_by_a_user_many_tokens_do_not_each_read_matrices(
    n_tokens: int, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = ExpertBank(4, 8, 6)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_()
    x_ND = torch.randn(n_tokens, 8)
    ids_NK = torch.rand(n_tokens, 4).topk(2).indices
    weights_NK = torch.rand(n_tokens, 2)
    at = ExpertSites.under("blocks.0.moe", rows="n")
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(experts, "gather_experts", lambda *_: pytest.fail("it gathered"))
    with torch.set_grad_enabled(grad):
        found_ND = bank(x_ND, ids_NK, weights_NK, at)
    expected_ND = torch.zeros_like(found_ND)
    for n in range(n_tokens):
        for k in range(2):
            gate_F, up_F = bank.gate_up_E2FD[ids_NK[n, k]] @ x_ND[n]
            act_F = torch.nn.functional.silu(gate_F) * up_F
            expected_ND[n] = expected_ND[n] + weights_NK[n, k] * bank.down_EDF[ids_NK[n, k]] @ act_F
    torch.testing.assert_close(found_ND, expected_ND)
