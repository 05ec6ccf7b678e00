"""The CPU kernels against float64, at every level that this machine has: shapes, activations, extremes, threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsld_fx.codegen.cpu.gemm import ACTIVATIONS, CpuGemm
from tsld_fx.codegen.cpu.library import LEVELS, library, torch_pool
from tsld_fx.errors import BackendError
from tsld_fx.packing import dequantize, pack

# relative error per row of the result (l2) allowed beyond the rounding of its dtype
TOLERANCE = {"a16": 1e-4, "int8": 3e-2, "add": 1e-5}
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def levels() -> list[str]:
    return list(LEVELS[: int(library().tsld_cpu_level()) + 1])


class Layer:
    """A random layer: codes, scales and zero points, and its float64 weight."""

    def __init__(self, seed: int, n: int, k: int, bits: int, group_size: int, zero: bool) -> None:
        draw = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 3 if bits == 2 else 2**bits, (n, k), dtype=torch.uint8, generator=draw)
        shape = (1, 1) if group_size == -1 else (n, k // group_size if group_size else 1)
        self.scales = torch.rand(shape, generator=draw) + 0.5
        middle = 2 ** (bits - 1)
        zeros = torch.randint(middle - 2, middle + 2, shape, dtype=torch.uint8, generator=draw)
        self.zeros = zeros if zero else None
        self.arguments = (pack(codes, bits), self.scales, self.zeros, bits, group_size, k)
        self.weight = dequantize(*self.arguments).double()

    def gemm(self, activations: str = "a16", level: str | None = None) -> CpuGemm:
        return CpuGemm.pack(*self.arguments, activations=activations, use_level=level)


def relative_error(y: Tensor, expected: Tensor) -> float:
    error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-300)
    return float(error.max()) if y.numel() else 0.0


SHAPES = [  # (n, k, bits, group_size, zero)
    (65, 257, 2, 0, False),
    (130, 384, 2, 64, False),
    (3, 5, 2, -1, False),
    (64, 96, 2, 8, False),
    (70, 100, 4, 0, True),
    (33, 640, 4, 128, True),
    (20, 36, 4, 4, False),
    (129, 1300, 8, 0, False),
    (66, 130, 8, -1, True),
    (40, 192, 8, 32, True),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_every_level_gives_the_same_bits_and_they_are_right(shape: tuple, activations: str) -> None:
    seed = int(torch.randint(1 << 30, ()))
    print("seed", seed)
    layer = Layer(seed, *shape)
    gemms = [layer.gemm(activations, level) for level in levels()]
    for tokens, dtype in ((1, torch.float32), (5, torch.bfloat16), (37, torch.float16), (150, torch.float32)):
        x = torch.randn(tokens, shape[1]).to(dtype)
        bias = torch.randn(shape[0])
        expected = x.double() @ layer.weight.T + bias.double()
        results = [gemm(x, bias) for gemm in gemms]
        tolerance = TOLERANCE["a16" if activations == "add" and shape[2] != 2 else activations]
        assert relative_error(results[0], expected) < tolerance + ROUNDING[dtype]
        for level, result in zip(levels(), results, strict=True):
            assert result.dtype == dtype and torch.equal(result, results[0]), level


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("k", [4096, 27648])
def test_large_integer_activations_are_exact(level: str, k: int) -> None:
    """Sums in int16, or products in pairs, would overflow here (BitNet issue 629)."""
    for bits, top in ((2, 2), (4, 15), (8, 255)):
        codes = torch.full((5, k), top, dtype=torch.uint8)
        codes[1], codes[2, ::2] = 0, 0
        codes[3:] = torch.randint(0, top + 1, (2, k), dtype=torch.uint8)
        weight = codes.double() - (1 if bits == 2 else 2 ** (bits - 1))
        x = torch.randint(100, 128, (17, k)).float()
        x[:, 0] = 127  # the scale of a row is then a power of two in a16 and 1 in int8
        x[1] = -x[1]
        expected = x.double() @ weight.T
        for activations in ("a16", "int8"):
            gemm = CpuGemm.pack(pack(codes, bits), torch.ones(5, 1), None, bits, 0, k, activations, level)
            torch.testing.assert_close(gemm(x).double(), expected, rtol=0 if bits == 2 else 2e-7, atol=0)


@pytest.mark.parametrize("level", levels())
def test_rows_longer_than_an_int32_sum_allows(level: str) -> None:
    k = 140_001
    codes = torch.full((2, k), 255, dtype=torch.uint8)
    x = torch.full((1, k), -127.0)
    for activations in ("a16", "int8"):
        y = CpuGemm.pack(codes, torch.ones(2, 1), None, 8, 0, k, activations, level)(x)
        torch.testing.assert_close(
            y.double(), torch.full((1, 2), -127.0 * 127 * k, dtype=torch.float64), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("largest", [1e-42, 1e-30, 1e-3, 1.0, 1e30, 3e38])
@pytest.mark.parametrize("outlier", [1.0, 30.0, 3000.0])
def test_a16_keeps_its_accuracy_for_any_range_of_activations(largest: float, outlier: float) -> None:
    layer = Layer(3, 64, 4096, 2, 0, False)
    x = torch.randn(3, 4096, dtype=torch.float64)
    x[:, 7] *= outlier
    x = (x / x.abs().max() * largest).float()
    expected = (x.double() @ layer.weight.T / largest * 1e-3).float().double()
    y = layer.gemm()(x).double() / largest * 1e-3
    finite = torch.isfinite(y).all(1)
    assert finite.all() or largest == 3e38  # there the result itself leaves float32
    tolerance = 1e-4 if largest > 1e-40 else 0.5  # subnormal results have few digits left
    assert relative_error(y[finite], expected[finite]) < tolerance


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_are_not_finite_are_nan_and_spoil_no_other_row(activations: str, bad: float) -> None:
    layer = Layer(1, 70, 300, 2, 0, False)
    for tokens in (1, 3, 40):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(tokens, 300).to(dtype)
            clean = layer.gemm(activations)(x)
            x[tokens // 2, 123] = bad
            y = layer.gemm(activations)(x)
            assert y[tokens // 2].isnan().all()
            rest = torch.arange(tokens) != tokens // 2
            assert torch.equal(y[rest], clean[rest])


def test_zero_rows_no_rows_and_views() -> None:
    layer = Layer(2, 70, 130, 4, 0, True)
    gemm, bias = layer.gemm(), torch.randn(70)
    assert torch.equal(gemm(torch.zeros(2, 130), bias), bias.expand(2, 70))
    assert gemm(torch.zeros(0, 130), bias).shape == (0, 70)
    assert gemm(torch.zeros(2, 0, 130)).shape == (2, 0, 70)
    x = torch.randn(130, 6, dtype=torch.float32).T
    assert torch.equal(gemm(x), gemm(x.contiguous()))
    assert gemm(torch.randn(130)).shape == (70,)
    assert torch.equal(gemm(x, bias.bfloat16()), gemm(x, bias.bfloat16().float()))


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("n", [100, 1030])
def test_results_do_not_depend_on_threads_or_other_rows(activations: str, n: int) -> None:
    gemm = Layer(4, n, 1100, 2, 0, False).gemm(activations)
    x = torch.randn(300, 1100)
    x[5, 0] = 100.0  # a row with a third limb
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(gemm(x))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    for rows in (slice(0, 1), slice(5, 8), slice(290, 300)):
        assert torch.equal(gemm(x[rows]), results[0][rows])


def test_threads_are_those_of_torch() -> None:
    assert torch_pool() is not None, "torch's OpenMP runtime has no GNU interface here"


def test_scales_that_differ_wildly_between_groups() -> None:
    layer = Layer(5, 64, 512, 2, 64, False)
    layer.scales.mul_(10.0 ** torch.arange(-12, 4, 2).float())
    weight = dequantize(*layer.arguments).double()
    x = torch.randn(20, 512)
    assert relative_error(layer.gemm()(x), x.double() @ weight.T) < 1e-4


@pytest.mark.parametrize("level", levels())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_once_to_even_whatever_their_size(level: str, dtype: torch.dtype) -> None:
    n = 4096
    ties = (torch.randint(0, 2048, (n // 2,)) + 0.5) * 2.0 ** torch.randint(-26, 8, (n // 2,))
    wide = torch.rand(n // 2) * 2.0 ** torch.randint(-40, 20, (n // 2,))
    values = torch.cat([ties, wide]) / 127  # times 127, which a16 holds exactly
    gemm = CpuGemm.pack(torch.full((n, 1), 129, dtype=torch.uint8), values.view(n, 1), None, 8, 0, 1, "a16", level)
    exact = gemm(torch.tensor([[127.0], [-127.0]]))
    torch.testing.assert_close(exact[0], values * 127, rtol=0, atol=0)
    assert torch.equal(gemm(torch.tensor([[127.0], [-127.0]], dtype=dtype)), exact.to(dtype))


def test_tensors_of_another_format_are_refused() -> None:
    packed, scales = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1)
    for wrong in (
        (packed.int(), scales, None, 2, 0, 64),
        (packed, scales, None, 2, 0, 65),
        (packed, scales, None, 4, 0, 64),
        (packed, torch.ones(8, 2), None, 2, 0, 64),
        (packed, scales, torch.zeros(1, 1, dtype=torch.uint8), 2, 0, 64),
        (packed, scales, None, 3, 0, 42),
    ):
        with pytest.raises(
            BackendError, match=r"CPU kernels.*packed uint8 \[8, \d+\].*scales \[8, \d+\]|2, 4 or 8 bits"
        ):
            CpuGemm.pack(*wrong)
    with pytest.raises(BackendError, match="'sse9': this CPU runs portable"):
        CpuGemm.pack(packed, scales, None, 2, 0, 64, use_level="sse9")
    with pytest.raises(BackendError, match="0 x 64 features"):
        CpuGemm.pack(packed[:0], scales[:0], None, 2, 0, 64)
