"""The straight-through gradients against formulas written out element by element."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import lines_of, top_level
from tsld_fx.quantizers import SCHEMES, scale_shape

GROUPS = [-1, 0, 4]


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64) * 0.4
    return weight, torch.randn(3, 8, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scheme, bits", [("twn", 2), ("absmean", 2), ("minmax", 4), ("minmax", 8), ("absmax", 4)])
def test_found_scales_pass_the_gradient_on_unchanged(scheme: str, bits: int, group: int) -> None:
    weight, upstream = data()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        leaf = weight.detach().clone().to(dtype).requires_grad_()
        torch.ops.tsld.fake_quant(leaf, None, None, scheme, bits, group).backward(upstream.to(dtype))
        assert torch.equal(leaf.grad, upstream.to(dtype))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, True), (4, False), (8, True), (8, False)])
@pytest.mark.parametrize("scheme", ["lsq", "pact"])
def test_learned_scales_get_the_gradient_of_lsq(scheme: str, bits: int, symmetric: bool, group: int) -> None:
    """d q / d s = round(w/s) - w/s inside the clip, its bound outside (arXiv 1902.08153, eq. 3 and section 2.2)."""
    weight, upstream = data()
    shape = scale_shape(3, 8, group)
    generator = torch.Generator().manual_seed(1)
    widest = torch.rand(shape, generator=generator, dtype=torch.float64) * 0.3 + 0.3  # cuts some of the weights off
    scale = widest / top_level(bits)
    zero = None if symmetric else torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    leaf, learned = weight.clone().requires_grad_(), scale.clone().requires_grad_()
    torch.ops.tsld.fake_quant(leaf, learned, zero, scheme, bits, group).backward(upstream)

    expected_weight, expected_scale = np.zeros((3, 8)), np.zeros(shape)
    places, outside = lines_of(weight.numpy(), group), 0
    for number, place in enumerate(places):
        point = None if zero is None else float(zero.flatten()[number])
        if bits == 2:
            low, high = -1.0, 1.0
        elif point is None:
            low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
        else:
            low, high = -point, 2.0**bits - 1 - point
        line, grads = weight.numpy()[place], upstream.numpy()[place]
        step = float(scale.flatten()[number])
        total, out = 0.0, np.zeros_like(line)
        for index, value in np.ndenumerate(line):
            ratio = value / step
            if ratio < low or ratio > high:
                total += grads[index] * (low if ratio < low else high)
                outside += 1
            else:
                total += grads[index] * (np.round(ratio) - ratio)
                out[index] = grads[index]
        expected_weight[place] = out
        factor = 1 / np.sqrt(line.size * top_level(bits)) if scheme == "lsq" else 1.0
        expected_scale.flat[number] = total * factor
    assert 0 < outside < 24
    np.testing.assert_allclose(leaf.grad.numpy(), expected_weight, rtol=1e-12)
    np.testing.assert_allclose(learned.grad.numpy(), expected_scale, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, True), (4, False), (8, False)])
def test_scale_follows_the_clip_with_its_true_derivative(bits: int, symmetric: bool, group: int) -> None:
    weight, _ = data()
    gamma = (torch.rand(scale_shape(3, 8, group), dtype=torch.float64) + 0.9).requires_grad_()

    def scale_of(clip: Tensor) -> Tensor:
        return torch.ops.tsld.learned_clip(weight, clip, bits, symmetric, group)[0]

    torch.autograd.gradcheck(scale_of, (gamma,), eps=1e-7, atol=1e-6)
    (slope,) = torch.autograd.grad(scale_of(gamma).sum(), gamma)
    assert (slope > 0).any()


def test_clip_beyond_every_weight_gets_no_gradient() -> None:
    weight, upstream = data()
    gamma = torch.full((3, 1), 50.0, dtype=torch.float64, requires_grad=True)
    scale, zero = torch.ops.tsld.learned_clip(weight, gamma, 4, False, 0)
    torch.ops.tsld.fake_quant(weight, scale, zero, "pact", 4, 0).backward(upstream)
    assert (gamma.grad == 0).all()


def test_gradient_descent_on_a_learned_scale_lowers_the_error() -> None:
    weight, _ = data()
    for scheme in ("lsq", "pact"):
        scale = torch.full((3, 1), 1.2, dtype=torch.float64, requires_grad=True)
        errors = []
        for _ in range(150):
            error = (torch.ops.tsld.fake_quant(weight, scale, None, scheme, 2, 0) - weight).square().sum()
            (grad,) = torch.autograd.grad(error, scale)
            errors.append(error.item())
            scale = (scale - 0.02 * grad).detach().requires_grad_()
        assert errors[-1] < 0.6 * errors[0], scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_operators_pass_torchs_own_checks(scheme: str) -> None:
    bits = 2 if scheme in ("twn", "absmean") else 4
    weight = torch.randn(6, 8, requires_grad=True)
    learned = scheme in ("pact", "lsq", "seq")
    scale = torch.full((6, 2), 0.2, requires_grad=True) if learned else None
    zero = torch.full((6, 2), 7, dtype=torch.uint8) if learned else None
    torch.library.opcheck(torch.ops.tsld.fake_quant.default, (weight, scale, zero, scheme, bits, 4))


@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, False), (8, True)])
def test_clip_operator_passes_torchs_own_checks(bits: int, symmetric: bool) -> None:
    gamma = torch.full((6, 1), 1.5, requires_grad=True)
    torch.library.opcheck(torch.ops.tsld.learned_clip.default, (torch.randn(6, 8), gamma, bits, symmetric, 0))


def test_gradients_are_the_same_under_torch_compile() -> None:
    weight, upstream = data()

    def quantise(leaf: Tensor, gamma: Tensor) -> Tensor:
        scale, zero = torch.ops.tsld.learned_clip(leaf, gamma, 4, False, 4)
        return torch.ops.tsld.fake_quant(leaf, scale, zero, "pact", 4, 4)

    results = []
    for function in (quantise, torch.compile(quantise, backend="aot_eager", fullgraph=True)):
        leaf = weight.clone().requires_grad_()
        gamma = torch.full((3, 2), 1.1, dtype=torch.float64, requires_grad=True)
        out = function(leaf, gamma)
        out.backward(upstream)
        results.append((out.detach(), leaf.grad, gamma.grad))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
