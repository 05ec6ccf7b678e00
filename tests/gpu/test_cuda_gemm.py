"""Numerics of the CUDA kernels against a float64 oracle, on fresh random inputs; outputs are poisoned first."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.gpu.numerics import TOKENS, TOLERANCE, check, relative_error, views
from tsld_fx.codegen import LowBitGemm
from tsld_fx.codegen.config import GemmConfig, shared_limit
from tsld_fx.codegen.select_config import Plan, whole_splits
from tsld_fx.errors import BackendError

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 0, 32, 64, 128, 256])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("target", [None, "compute_80"])
def test_every_kind_of_weight(make_layer, bits, group_size, dtype, target) -> None:
    layer = make_layer(264, 1056, bits, group_size)
    gemm = LowBitGemm.pack(*layer.arguments(), target=target)
    for m in TOKENS:
        check(gemm, layer.weight, m, dtype)


SHAPES = [
    (1, 1),
    (7, 13),
    (16, 128),
    (17, 129),
    (37, 4099),
    (1021, 523),
    (130, 11008),
    (4096, 4096),
    (32003, 515),
]


@pytest.mark.parametrize("target", [None, "compute_80"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(("bits", "group_size"), [(2, 0), (2, 128), (4, 32), (8, 0)])
def test_ragged_shapes(make_layer, bits, group_size, n, k, target) -> None:
    layer = make_layer(n, k, bits, group_size)
    gemm = LowBitGemm.pack(*layer.arguments(), target=target)
    for m in (1, 3, 16, 33, 64, 100, 300):
        check(gemm, layer.weight, m, torch.float16)


@pytest.mark.parametrize("splits", [1, 3, 5])
@pytest.mark.parametrize("tokens", [1, 16, 32, 64, 128])
def test_split_k(make_layer, tokens, splits) -> None:
    layer = make_layer(200, 2100, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    plan = Plan(replace(gemm.plan(tokens).config, digits=False), splits)  # digits are for one block
    for _ in range(3):  # the counters must be back at zero
        check(gemm, layer.weight, tokens, torch.float16, plan)


def test_split_k_of_the_mma_kernel_with_many_tokens(make_layer) -> None:
    layer = make_layer(200, 2100, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    config = GemmConfig(tokens=64, warps_n=4, warps_m=1, warps_k=2, row_tiles=1, stages=3)
    check(gemm, layer.weight, 100, torch.float16, Plan(config, 4))


@pytest.mark.parametrize("kernel", ["stream", "mma"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 0), (2, 64), (4, 128), (4, 0), (8, 32)])
@pytest.mark.parametrize("m", [1, 3, 16, 40])
def test_both_kernels_for_few_tokens(make_layer, m, bits, group_size, kernel) -> None:
    """Fewer units of work than warps, shares that end within a row, several blocks per multiprocessor."""
    for n, k in ((40, 200), (3000, 1100)):
        layer = make_layer(n, k, bits, group_size)
        gemm = LowBitGemm.pack(*layer.arguments())
        tokens = 1 if m == 1 else 16
        shape = (tokens, 1, 1, 16, 1) if kernel == "stream" else (tokens, 2, 1, 4, 1)
        for splits, per_sm in ((1, 1), (1, 2), (2, 1)):
            check(gemm, layer.weight, m, torch.float16, Plan(GemmConfig(*shape, 4, kernel), splits, per_sm))


@pytest.mark.parametrize("group_size", [0, 128])
def test_extreme_activations(make_layer, group_size) -> None:
    layer = make_layer(64, 200, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(4, 200, dtype=torch.float16, device="cuda")
    x[0, :50], x[1, :50], x[2, :50] = 65504.0, -0.0, 6e-8
    exact = x.double() @ layer.weight.T
    expected, y = exact.half(), gemm(x)
    assert torch.equal(y.isinf(), expected.isinf()) and not y.isnan().any()
    # float32 sums are as exact as their largest terms allow, scales of groups have 11 bits; one rounding to fp16 on top
    allowed = (5e-4 if group_size else 1e-6) * (x.double().abs() @ layer.weight.abs().T) + 1e-3 * exact.abs() + 6e-8
    assert ((y.double() - exact).abs() <= allowed)[expected.isfinite()].all()


@pytest.mark.parametrize(("m", "group_size"), [(1, 0), (8, 0), (64, 0), (200, 0), (1, 128), (16, 128), (64, 128)])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_propagate_as_in_the_oracle(make_layer, m, group_size, value) -> None:
    layer = make_layer(64, 200, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(m, 200, dtype=torch.float16, device="cuda")
    x[m // 2, 7] = value
    y, expected = gemm(x), (x.double() @ layer.weight.T).half()
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isneginf(), expected.isneginf())
    others = torch.arange(m, device="cuda") != m // 2
    assert y[others].isfinite().all()


@pytest.mark.parametrize(("m", "group_size"), [(1, 0), (16, 0), (64, 0), (300, 0), (1, 128), (16, 128), (64, 128)])
def test_same_bits_every_time(make_layer, m, group_size) -> None:
    layer = make_layer(1024, 4096, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(m, 4096, dtype=torch.float16, device="cuda")
    first = gemm(x)
    assert all(torch.equal(gemm(x), first) for _ in range(20))


@pytest.mark.parametrize("m", [1, 16, 64, 300])
def test_cuda_graph(make_layer, m) -> None:
    """A chain of two layers, so that overlapping launches would show."""
    a, b = make_layer(512, 1024, 2, 0), make_layer(1024, 512, 4, 128)
    first, second = LowBitGemm.pack(*a.arguments()), LowBitGemm.pack(*b.arguments())
    x = torch.randn(m, 1024, dtype=torch.float16, device="cuda")
    second(first(x))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x
        for _ in range(4):
            y = second(first(y)) * 0.05
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        graph.replay()
        expected = x
        for _ in range(4):
            expected = second(first(expected)) * 0.05
        torch.cuda.synchronize()
        assert torch.equal(y, expected)


def test_strides_and_leading_dimensions(make_layer) -> None:
    layer = make_layer(96, 160, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    base = torch.randn(6, 5, 400, dtype=torch.float16, device="cuda")
    for x in views(base):
        y = gemm(x)
        assert y.shape == (*x.shape[:-1], 96)
        if x.numel():
            assert relative_error(y, x.double() @ layer.weight.T) < 1e-3


def test_two_streams_at_once(make_layer) -> None:
    layer = make_layer(128, 8192, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    plan = Plan(replace(gemm.plan(1).config, digits=False), 4)  # digits are for one block
    x = torch.randn(1, 8192, dtype=torch.float16, device="cuda")
    expected = gemm(x, plan=plan)
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for i in range(40):
        with torch.cuda.stream(streams[i % 2]):
            results.append(gemm(x, plan=plan))
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected) for y in results)


def test_bad_input_is_refused_before_any_launch(make_layer) -> None:
    layer = make_layer(32, 64, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    x = torch.randn(2, 64, dtype=torch.float16, device="cuda")
    for bad, said in (
        (x.cpu(), "x is on cpu"),
        (x.float(), "float32 activations"),
        (x[:, :32], "in_features=64"),
    ):
        with pytest.raises(BackendError, match=said):
            gemm(bad)
    with pytest.raises(BackendError, match="bias must be"):
        gemm(x, torch.zeros(31, dtype=torch.float16, device="cuda"))
    with pytest.raises(BackendError, match="Pass device='cuda'"):
        LowBitGemm.pack(*layer.arguments(), device="cpu")


def test_wgmma_with_sixteen_tokens(make_layer) -> None:
    layer = make_layer(300, 1100, 2, 0)
    gemm = LowBitGemm.pack(*layer.arguments())
    for groups, row_tiles, splits in ((1, 1, 1), (2, 2, 1), (1, 2, 3), (2, 1, 2)):
        plan = Plan(GemmConfig(16, 4 * groups, 1, 1, row_tiles, 4, "wgmma"), splits)
        for m in (1, 9, 16, 35):
            check(gemm, layer.weight, m, torch.float16, plan)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize(("n", "k"), [(40, 200), (1021, 3000), (40000, 1500)])
def test_wgmma_with_clusters_and_buffers_for_weights(make_layer, n, k, group_size, dtype) -> None:
    """Tiles and chunks that end early, several output tiles a block, unequal splits; the same bits every time."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's kernels")
    layer = make_layer(n, k, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments())
    for tokens, warps_n, stages, splits, cluster, ahead in (
        (64, 4, 5, 2, True, 3), (32, 4, 6, 4, True, 0), (32, 8, 5, 3, False, 2), (16, 4, 8, 1, False, 3),
        (64, 8, 3, 8, True, 0), (64, 4, 4, 1, False, 2), (16, 4, 4, 2, True, 2),
    ):  # fmt: skip
        config = GemmConfig(tokens, warps_n, 1, 1, 1, stages, "wgmma", cluster=cluster, ahead=ahead)
        plan = whole_splits(Plan(config, splits), gemm.weights.chunks)
        for m in (1, tokens - 1, tokens + 1):
            check(gemm, layer.weight, m, dtype, plan)
        x = torch.randn(tokens, k, dtype=dtype, device="cuda")
        assert torch.equal(gemm(x, plan=plan), gemm(x, plan=plan))


def digits_plans(gemm: LowBitGemm, target: str | None) -> list[Plan]:
    """Row groups that end within a share, warps without work, tokens that no block of a cluster owns."""
    if target is None and torch.cuda.get_device_capability()[0] == 9:
        shapes = [(16, 16, 4, 4, 2), (16, 8, 4, 5, 1), (8, 12, 4, 3, 4), (32, 8, 4, 4, 8)]
        configs = [(GemmConfig(t, 1, 1, w, r, s, "digits", cluster=True), splits) for t, w, r, s, splits in shapes]
    else:
        shapes = [(16, 16, 2, 3, 2), (16, 8, 3, 3, 1), (8, 12, 1, 4, 3), (32, 8, 1, 4, 2)]
        configs = [(GemmConfig(t, 1, 1, w, r, s, "digits"), splits) for t, w, r, s, splits in shapes]
    chunks, tiles, spec = gemm.weights.chunks, gemm.weights.row_tiles, gemm.spec("fp16")
    found = [whole_splits(Plan(config, splits), chunks) for config, splits in configs]
    return [p for p in found if p.shared_bytes(spec, 64, tiles, chunks, 132) <= shared_limit(spec.capability)]


@pytest.mark.parametrize("target", [None, "compute_80"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize(("n", "k"), [(40, 200), (1021, 523), (3000, 1100), (4797, 2000), (6893, 1030), (37, 4099)])
def test_two_bytes_of_x_for_some_tokens(make_layer, n, k, group_size, dtype, target) -> None:
    """The kernels that take x as 16-bit integers; the same bits every time."""
    layer = make_layer(n, k, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments(), target=target)
    plans = digits_plans(gemm, target)
    assert plans
    for plan in plans:
        tokens = plan.config.tokens
        for m in (1, tokens - 1, tokens + 1, 35):
            check(gemm, layer.weight, m, dtype, plan)
        x = torch.randn(tokens, k, dtype=dtype, device="cuda")
        assert torch.equal(gemm(x, plan=plan), gemm(x, plan=plan))


@pytest.mark.parametrize("target", [None, "compute_80"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 128])
def test_two_bytes_of_extreme_x(make_layer, group_size, dtype, target) -> None:
    """A token with one value, with the largest, with the smallest, with zeros, with Inf and NaN beside plain ones."""
    layer = make_layer(264, 640, 2, group_size)
    gemm = LowBitGemm.pack(*layer.arguments(), target=target)
    x = torch.randn(8, 640, dtype=dtype, device="cuda")
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least above zero
    x[1], x[2], x[3], x[4, 9], x[5, 630], x[6, 100] = 0, tiny, -0.0, float("inf"), float("nan"), -float("inf")
    x[1, 300], x[0, 7] = 65504.0, 1000.0
    exact = x.double() @ layer.weight.T
    for plan in digits_plans(gemm, target):
        y = gemm(x, plan=plan)
        expected = exact.to(dtype)
        assert torch.equal(y.isnan(), expected.isnan())
        assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isneginf(), expected.isneginf())
        for token in range(8):
            finite = expected[token].isfinite()
            error, size = (y[token].double() - exact[token])[finite].norm(), exact[token][finite].norm()
            assert error <= TOLERANCE[dtype] * size + 264 * tiny, f"{plan.config.name}, token {token}"
