"""Stretched elastic quantisation: the formulas in alpha, element by element in float64, and what packs them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.oracles import lines_of
from tsld_fx import AffineWeight, QuantConfig, TernaryWeight
from tsld_fx.errors import ConfigError
from tsld_fx.packing import dequantize, pack
from tsld_fx.quantizers import initial_scale, quantize, scale_shape

LEVELS = {2: (1.5, 0.0), 4: (2.0, 0.5)}  # by stored bits: half the number of levels, and their offset


def quantised(value: float, alpha: float, bits: int) -> float:
    """w_q of one weight (arXiv 2502.02631, with the authors' clip of 0.99)."""
    half, offset = LEVELS[bits]
    return (np.round(np.clip(value / alpha, -0.99, 0.99) * half - offset) + offset) / half * alpha


@pytest.mark.parametrize("group", [-1, 0, 8])
@pytest.mark.parametrize("bits", [2, 4])
def test_weights_and_gradients_equal_the_formulas(bits: int, group: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    weight, upstream = (torch.randn(6, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    shape = scale_shape(6, 24, group)
    alphas = 1.2 + torch.rand(shape, generator=generator, dtype=torch.float64)  # cuts some of the weights off
    half = LEVELS[bits][0]
    stretch = half if bits == 2 else 2 * half  # alpha / s
    leaf, scale = weight.clone().requires_grad_(), (alphas / stretch).requires_grad_()
    out = torch.ops.tsld.fake_quant(leaf, scale, None, "seq", bits, group)
    out.backward(upstream)
    outside = 0
    for number, place in enumerate(lines_of(weight.numpy(), group)):
        line, grads, alpha = weight.numpy()[place], upstream.numpy()[place], float(alphas.flatten()[number])
        expected = np.array([[quantised(v, alpha, bits) for v in row] for row in line])
        np.testing.assert_allclose(out.detach().numpy()[place], expected, rtol=1e-12, atol=1e-14)
        inside = np.abs(line / alpha) <= 0.99
        outside += int((~inside).sum())
        np.testing.assert_allclose(leaf.grad.numpy()[place], grads * inside, rtol=1e-12)
        slope = np.where(inside, (expected - line) / alpha, expected / alpha)  # d w_q / d alpha
        total = (grads * slope).sum() * stretch / np.sqrt(line.size)
        np.testing.assert_allclose(float(scale.grad.flatten()[number]), total, rtol=1e-9, atol=1e-13)
    assert 0 < outside < weight.numel() / 2


@pytest.mark.parametrize(("bits", "levels"), [(2, [-1, 0, 1]), (4, [-3, -1, 1, 3])])
def test_levels_pack_and_come_back_bit_for_bit(bits: int, levels: list[int]) -> None:
    weight = torch.randn(9, 40)
    scale, zero = initial_scale(weight, bits, True, 0, "seq")
    assert zero is None
    torch.testing.assert_close(scale, weight.abs().amax(1, keepdim=True) / (1.5 if bits == 2 else 4))
    scale = scale / 2
    codes = quantize(weight, scale, None, "seq", bits, 0)
    middle = 1 if bits == 2 else 8
    assert sorted(set((codes.codes.int() - middle).flatten().tolist())) == levels
    again = dequantize(pack(codes.codes, bits), codes.scale, None, bits, 0, 40)
    assert torch.equal(again, torch.ops.tsld.fake_quant(weight, scale, None, "seq", bits, 0))
    zeros = torch.ops.tsld.fake_quant(torch.zeros(2, 8), torch.zeros(2, 1), None, "seq", bits, 0)
    assert torch.equal(zeros, torch.zeros(2, 8))


def test_descent_on_the_scale_lowers_the_error() -> None:
    weight = torch.randn(3, 64, dtype=torch.float64)
    for bits in (2, 4):
        scale = initial_scale(weight, bits, True, 0, "seq")[0].requires_grad_()
        errors = []
        for _ in range(120):
            error = (torch.ops.tsld.fake_quant(weight, scale, None, "seq", bits, 0) - weight).square().sum()
            (grad,) = torch.autograd.grad(error, scale)
            errors.append(error.item())
            scale = (scale - 0.01 * grad).detach().requires_grad_()
        assert errors[-1] < 0.8 * errors[0], bits


def test_other_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match="bits=4, symmetric=True"):
        AffineWeight(bits=8, symmetric=True, scale="seq")
    with pytest.raises(ConfigError, match="bits=4, symmetric=True"):
        AffineWeight(scale="seq")
    with pytest.raises(ConfigError, match="got 8"):
        torch.ops.tsld.fake_quant(torch.randn(2, 4), torch.ones(2, 1), None, "seq", 8, 0)
    config = QuantConfig(TernaryWeight("seq"), {"*": AffineWeight(4, True, "seq")})
    assert QuantConfig.from_dict(config.to_dict()) == config
