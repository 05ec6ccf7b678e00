"""Activations rounded to 8 bits on the way into the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.gpu.numerics import TOKENS, TOLERANCE, poison, relative_error, views
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
@pytest.mark.parametrize(("n", "k"), [(264, 1056), (17, 129), (37, 4099), (130, 11008), (4096, 4096), (16, 33000)])
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("k", [1, 129, 1056, 4099])
def test_one_rounding_serves_several_layers(make_layer, kind, dtype, k) -> None:
    gemms = [LowBitGemm.pack(*make_layer(n, k, 2, group).arguments()) for n, group in ((264, 0), (37, -1))]
    for m in (0, 1, 7, 1024, 2048):
        x = torch.randn(m, k, dtype=dtype, device="cuda") * torch.logspace(-2, 2, m, device="cuda")[:, None].to(dtype)
        rounded = gemms[0].quantise(x, kind)
        assert (rounded.shape, rounded.kind, rounded.dtype) == (x.shape, kind, dtype)
        for gemm in gemms:
            bias = torch.randn(gemm.weights.out_features, dtype=dtype, device="cuda") if m % 2 else None
            expected = gemm(x, bias, quantise=kind)
            poison(expected.shape, dtype)
            assert torch.equal(gemm(rounded, bias), expected), m


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounding_of_strides_and_leading_dimensions(make_layer, kind) -> None:
    gemm = LowBitGemm.pack(*make_layer(96, 160, 2, 0).arguments())
    base = torch.randn(6, 5, 400, dtype=torch.float16, device="cuda")
    base[2, 1, 7] = float("nan")
    for x in views(base):
        rounded, plain = gemm.quantise(x, kind), gemm.quantise(x.contiguous(), kind)
        assert torch.equal(rounded.values, plain.values)
        torch.testing.assert_close(rounded.scales, plain.scales, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(rounded.scales.isnan(), x.isnan().any(-1))
        torch.testing.assert_close(gemm(rounded), gemm(x, quantise=kind), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("m", [7, 1500])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_rounded_activations_in_a_cuda_graph(make_layer, kind, m) -> None:
    """Two layers share each rounding, launches overlap, and the next rounding takes the memory of the one before."""
    gemms = [LowBitGemm.pack(*make_layer(n, 512, 2, 0).arguments()) for n in (512, 520)]
    x = torch.randn(m, 512, dtype=torch.float16, device="cuda")

    def chain(together: bool) -> list[Tensor]:
        inputs, results = x, []
        for _ in range(6):
            rounded = gemms[0].quantise(inputs, kind)
            results += [gemm(rounded) if together else gemm(inputs, quantise=kind) for gemm in gemms]
            del rounded
            inputs = results[-2] * 0.05
        return results

    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(True)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = chain(False)
        torch.cuda.synchronize()
        assert all(torch.equal(y, other) for y, other in zip(captured, expected, strict=True))


def test_rounded_activations_that_do_not_fit_are_refused(make_layer) -> None:
    layer = make_layer(64, 256, 2, 0)
    gemm, other = LowBitGemm.pack(*layer.arguments()), LowBitGemm.pack(*make_layer(64, 128, 2, 0).arguments())
    four = LowBitGemm.pack(*make_layer(64, 256, 4, 0).arguments())
    older = LowBitGemm.pack(*layer.arguments(), target="compute_80")
    x = torch.randn(3, 256, dtype=torch.float16, device="cuda")
    rounded = gemm.quantise(x, "int8")
    away = replace(rounded, values=rounded.values.cpu(), scales=rounded.scales.cpu())
    for call, said in (
        (lambda: four(x, quantise="int8"), "only for ternary"),
        (lambda: four.quantise(x, "int8"), "only for ternary"),
        (lambda: four(rounded), "only for ternary"),
        (lambda: older(rounded), "Hopper"),
        (lambda: other(rounded), "in_features=128"),
        (lambda: gemm(away), "x is on cpu"),
        (lambda: gemm(rounded, quantise="int8"), "rounded to int8 already"),
        (lambda: gemm(rounded, plan=gemm.plan(3)), "16-bit activations only"),
    ):
        with pytest.raises(BackendError, match=said):
            call()
