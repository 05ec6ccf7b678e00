"""Activations rounded to 8 bits on the way into the CUDA kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.numerics import TOKENS, TOLERANCE, poison, relative_error
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.config import GemmConfig
from tsld_fx.codegen.select_config import Plan
from tsld_fx.errors import BackendError

pytestmark = pytest.mark.gpu


def quantised_like_the_kernel(x: Tensor, kind: str) -> Tensor:
    """float64 of what the kernel multiplies: one scale per token, ties to even."""
    largest = x.float().abs().amax(dim=1, keepdim=True)
    if kind == "int8":
        values = (x.float() * (127.0 / largest)).round()
        return values.double() * (largest / 127.0).double()
    values = (x.float() * (448.0 / largest)).to(torch.float8_e4m3fn)
    return values.double() * (largest / 448.0).double()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize(("n", "k"), [(264, 1056), (17, 129), (37, 4099), (130, 11008), (4096, 4096)])
def test_quantised_activations(make_layer, kind, dtype, n, k) -> None:
    layer = make_layer(n, k, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    for m in TOKENS:
        x = torch.randn(m, k, dtype=dtype, device="cuda") * torch.logspace(-2, 2, m, device="cuda")[:, None].to(dtype)
        bias = torch.randn(n, dtype=dtype, device="cuda") if m % 2 else None
        poison((m, n), dtype)
        y = gemm(x, bias, quantise=kind)
        expected = quantised_like_the_kernel(x, kind) @ layer.weight.T + (0 if bias is None else bias.double())
        loose = 4.0 if kind == "fp8" else 1.0  # the tensor cores keep fewer bits of fp8 sums
        assert relative_error(y, expected) <= loose * TOLERANCE[dtype], m


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_quantised_activations_at_the_extremes(make_layer, kind) -> None:
    layer = make_layer(64, 512, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(40, 512, dtype=torch.float16, device="cuda")
    x[3, 7], x[4, 8], x[5], x[6, :] = float("inf"), float("nan"), 0.0, 6e-8
    x[7, 0] = 65504.0
    y = gemm(x, quantise=kind)
    assert y[3:5].isnan().all() and not y[5].any()
    fine = [i for i in range(40) if i not in (3, 4, 5)]
    expected = quantised_like_the_kernel(x[fine], kind) @ layer.weight.T
    assert relative_error(y[fine], expected) <= 4e-3
    assert torch.equal(y[8:], gemm(x[8:], quantise=kind)), "a token depends on its neighbours"


def test_quantised_activations_with_splits_are_exact_sums(make_layer) -> None:
    layer = make_layer(200, 2100, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(70, 2100, dtype=torch.float16, device="cuda")
    for tokens in (16, 32, 64, 128, 256):
        config = GemmConfig(tokens, 4, 1, 1, 1, 3, "wgmma")
        whole = gemm(x, quantise="int8", plan=Plan(config))
        assert torch.equal(whole, gemm(x, quantise="int8", plan=Plan(config, 3))), "integer sums have no order"


def test_four_bit_weights_refuse_quantised_activations(make_layer) -> None:
    gemm = LowBitGemm.pack(*make_layer(64, 256, 4, 0).arguments())
    with pytest.raises(BackendError, match="only for ternary"):
        gemm(torch.randn(3, 256, dtype=torch.float16, device="cuda"), quantise="int8")
