"""The product by oneDNN: the numbers of the BLAS, and only where it may stand in for it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ernie_lab.model import linear as module
from ernie_lab.model.experts import Dispatch, grouped_linear
from ernie_lab.model.linear import Linear, linear, linear_into

pytestmark = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this torch has no oneDNN")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN is given."""
    seen: list[tuple[int, ...]] = []
    real = module._onednn

    def watched(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None) -> Tensor:
        seen.append(tuple(x.shape))
        return real(x, weight_FD, bias_F)

    monkeypatch.setattr(module, "_onednn", watched)
    return seen


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (0, 7), (200,)])
@pytest.mark.parametrize("bias", [True, False])
def test_large_products_in_float32_go_to_onednn(
    calls: list[tuple[int, ...]], shape: tuple[int, ...], bias: bool
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(512, 384, bias=bias), torch.randn(*shape, 512)
    with torch.no_grad():
        found = layer(x)
    assert calls == [(*shape, 512)]
    expected = functional.linear(x.double(), layer.weight.double(), None)
    if bias:
        expected = expected + layer.bias.double()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_elsewhere_the_product_is_the_ordinary_one(calls: list[tuple[int, ...]]) -> None:
    large, small = torch.randn(384, 512), torch.randn(16, 512)
    x = torch.randn(4, 512)
    for weight, given in [
        (small, x),
        (large.bfloat16(), x.bfloat16()),
        (large.double(), x.double()),
        (large, x.clone().requires_grad_()),
        (large.clone().requires_grad_(), x),
    ]:
        assert torch.equal(linear(given, weight), functional.linear(given, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert linear(x, large).dtype is torch.bfloat16
    assert calls == []


def test_gradients_flow_as_ever() -> None:
    layer, x = Linear(512, 384), torch.randn(3, 512, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(3, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("grad", [True, False])
def test_grouped_rows_are_each_times_their_experts_matrix(dtype: torch.dtype, grad: bool) -> None:
    torch.manual_seed(0)
    matrices_EFD = torch.randn(6, 384, 512).to(dtype)
    ids_NK = torch.tensor([[4, 1], [1, 5], [4, 0], [1, 4]])
    rows = Dispatch.of(ids_NK)
    assert (rows.experts, rows.counts) == ([0, 1, 4, 5], [1, 3, 3, 1])
    x_JD = torch.randn(8, 512).to(dtype)
    with torch.set_grad_enabled(grad):
        found_JF = grouped_linear(x_JD, matrices_EFD, rows)
    experts_J = ids_NK.flatten()[rows.order_J]
    expected_JF = torch.einsum("jd,jfd->jf", x_JD.double(), matrices_EFD.double()[experts_J])
    atol = 0.5 if dtype is torch.bfloat16 else 1e-4
    torch.testing.assert_close(found_JF.double(), expected_JF, rtol=1e-2, atol=atol)
    assert torch.equal(rows.by_token(rows.by_expert(ids_NK[..., None])), ids_NK[..., None])


@pytest.mark.parametrize("ids", [[], [[2]]])
def test_grouped_rows_of_none_or_one_expert(ids: list[list[int]]) -> None:
    ids_NK = torch.tensor(ids, dtype=torch.int64).reshape(len(ids), 1)
    matrices_EFD, x_JD = torch.randn(3, 5, 4), torch.randn(len(ids), 4)
    with torch.no_grad():
        found_JF = grouped_linear(x_JD, matrices_EFD, Dispatch.of(ids_NK))
    torch.testing.assert_close(found_JF, x_JD @ matrices_EFD[2].T)


def test_a_product_goes_into_part_of_a_tensor() -> None:
    torch.manual_seed(0)
    out_NF, x_ND = torch.full((6, 384), 7.0), torch.randn(2, 512)
    for weight_FD in (torch.randn(384, 512), torch.randn(384, 512)):
        with torch.no_grad():
            linear_into(out_NF[2:4], x_ND, weight_FD)
        torch.testing.assert_close(out_NF[2:4], x_ND @ weight_FD.T, rtol=1e-4, atol=1e-4)
    assert bool((out_NF[:2] == 7).all()) and bool((out_NF[4:] == 7).all())
