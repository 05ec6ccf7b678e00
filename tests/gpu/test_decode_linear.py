"""Products fused with what surrounds them, on a GPU: against the separate operators in float64, and bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tsld_fx import decode_linear_ops, decode_ops
from tsld_fx.codegen import fused_linear as fused
from tsld_fx.codegen import select_config
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.ops import _lowbit_linear

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}  # several roundings
SHAPES = [(12288, 4096), (4096, 4096), (22016, 4096), (96, 1000), (48, 8), (4096, 11008), (1008, 136)]


def layer(rows: int, inputs: int, bits: int, group: int, bias: bool, dtype: torch.dtype) -> LowBitLinear:
    made = LowBitLinear(inputs, rows, bits, group, zero=bits > 2, bias=bias, device="cuda", dtype=dtype)
    if bits == 2:
        digits = torch.randint(0, 3, (*made.weight_packed.shape, 4), device="cuda", dtype=torch.uint8)
        made.weight_packed.copy_((digits << torch.tensor([0, 2, 4, 6], device="cuda", dtype=torch.uint8)).sum(-1))
    else:
        made.weight_packed.random_(0, 256)
        made.weight_zero.random_(0, 2**bits)
    made.weight_scale.uniform_(0.5, 1.0).div_(2**bits * inputs**0.5)
    if bias:
        made.bias.data.normal_()
    made.use_kernels()
    return made.eval()


def arguments(made: LowBitLinear) -> tuple:
    return (
        made.weight_packed, made.weight_scale, made.weight_zero, made.bias, made.bits, made.group_size, made.in_features
    )  # fmt: skip


def relative(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


def gated(y: Tensor) -> Tensor:
    gate, up = y.unflatten(-1, (-1, 2, 8)).unbind(-2)
    return (torch.nn.functional.silu(gate) * up).flatten(-2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("tokens", "digit_tokens"), [(1, 0), (2, 0), (3, 0), (5, 0), (8, 0), (9, 0), (1, 2), (2, 2)])
@pytest.mark.parametrize(("rows", "inputs"), SHAPES)
def test_against_float64(
    rows: int, inputs: int, tokens: int, digit_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_config, "MOST_DIGIT_TOKENS", digit_tokens)
    chunk = 128 if inputs % 128 == 0 else 0
    for bits, group, bias in ((2, 0, False), (2, chunk, True), (4, chunk, True)):
        made = layer(rows, inputs, bits, group, bias, dtype)
        weight = arguments(made)
        x, residual = (torch.randn(1, tokens, inputs, dtype=dtype, device="cuda") * 3 for _ in range(2))
        norm = torch.rand(inputs, dtype=dtype, device="cuda") + 0.5
        normed = decode_ops.rms_norm(x.double(), norm.double(), 1e-5)
        summed = decode_ops.rms_norm((x + residual).double(), norm.double(), 1e-5)
        wide = [None if b is None else b.double() if b.is_floating_point() else b for b in weight[:4]]
        expected, expected_added = (_lowbit_linear(h, *wide, *weight[4:]) for h in (normed, summed))
        limit = TOLERANCE[dtype]
        assert relative(torch.ops.tsld.norm_linear(x, norm, 1e-5, *weight, False), expected) <= limit
        assert relative(torch.ops.tsld.norm_linear(x, norm, 1e-5, *weight, True), gated(expected)) <= 2 * limit
        for _ in range(2):
            y, total = torch.ops.tsld.add_norm_linear(x, residual, norm, 1e-5, *weight, False)
            assert torch.equal(total, x + residual)
            assert relative(y, expected_added) <= limit
        y, total = torch.ops.tsld.add_norm_linear(x, residual, norm, 1e-5, *weight, True)
        assert torch.equal(total, x + residual) and relative(y, gated(expected_added)) <= 2 * limit
        plain = _lowbit_linear(x.double(), *wide, *weight[4:])
        assert relative(torch.ops.tsld.gated_linear(x, *weight), gated(plain)) <= 2 * limit


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gating_gives_the_bits_of_the_separate_kernels(dtype: torch.dtype) -> None:
    made = layer(1024, 512, 2, 0, True, dtype)
    x = torch.randn(4, 1, 512, dtype=dtype, device="cuda")
    assert fused.fused_linear(made_gemm(made), x, made.bias, None, True) is not None
    got = torch.ops.tsld.gated_linear(x, *arguments(made))
    apart = decode_linear_ops.silu_mul_taking_turns(torch.ops.tsld.lowbit_linear(x, *arguments(made)))
    assert torch.equal(got, apart)
    assert relative(apart, gated(torch.ops.tsld.lowbit_linear(x, *arguments(made)).double())) <= TOLERANCE[dtype]


def test_extreme_inputs_come_out_as_from_the_separate_kernels() -> None:
    made = layer(256, 512, 2, 0, False, torch.float16)
    norm = torch.ones(512, dtype=torch.float16, device="cuda")
    for value in (65504.0, -0.0, 6e-8, float("inf"), float("nan")):
        x = torch.randn(3, 1, 512, dtype=torch.float16, device="cuda")
        x[1, 0, 77] = value
        got = torch.ops.tsld.norm_linear(x, norm, 1e-5, *arguments(made), False)
        expected = decode_linear_ops.norm_linear(x, norm, 1e-5, *arguments(made), False)
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3, equal_nan=True)


def made_gemm(made: LowBitLinear) -> object:
    from tsld_fx import cuda_linear

    weight = arguments(made)
    return cuda_linear.find(*weight[:3], *weight[4:])


def test_which_calls_have_a_kernel() -> None:
    made = layer(96, 512, 2, 0, False, torch.float16)
    x = torch.randn(3, 1, 512, dtype=torch.float16, device="cuda")
    norm = torch.ones(512, dtype=torch.float16, device="cuda")
    gemm = made_gemm(made)
    assert fused.fused_linear(gemm, x, None, fused.Norm(norm, 1e-5, x), True) is not None
    assert fused.fused_linear(gemm, x.expand(3, 4, 512), None, fused.Norm(norm, 1e-5), False) is None  # 12 tokens
    assert fused.fused_linear(gemm, x.float(), None, fused.Norm(norm, 1e-5), False) is None
    assert fused.fused_linear(gemm, x, None, fused.Norm(norm.bfloat16(), 1e-5), False) is None
