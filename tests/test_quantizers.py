"""The quantisers against plain float64 loops, and the properties that every weight must keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.oracles import fake_quantise, find_scale, lines_of, range_of, top_level
from tsld_fx import quantizers
from tsld_fx.errors import ConfigError
from tsld_fx.quantizers import clipped_scale, initial_scale, scale_shape

DYNAMIC = [("twn", 2), ("absmean", 2), ("minmax", 4), ("minmax", 8), ("absmax", 4), ("absmax", 8)]
LEARNED = [(s, b, sym) for s in ("lsq", "pact") for b, sym in ((2, True), (4, True), (4, False), (8, True), (8, False))]
GROUPS = [-1, 0, 4, 12]


def fake_quant(weight: Tensor, scheme: str, bits: int, group: int, scale=None, zero=None) -> Tensor:
    return torch.ops.tsld.fake_quant(weight, scale, zero, scheme, bits, group)


def weights(rows: int = 5, columns: int = 12, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 0.3 + 0.05).to(dtype)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scheme, bits", DYNAMIC)
def test_found_scales_give_the_formulas_weight(scheme: str, bits: int, group: int) -> None:
    weight = weights()
    ours = fake_quant(weight, scheme, bits, group)
    assert ours.dtype == torch.float64
    expected = fake_quantise(weight.numpy(), scheme, bits, group)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("group", [-1, 0, 64])
@pytest.mark.parametrize("scheme, bits", DYNAMIC)
def test_wide_weights_give_the_formulas_weight(scheme: str, bits: int, group: int) -> None:
    """Thousands of weights near every threshold: a constant that is off by a little shows."""
    weight = weights(16, 512, seed=3)
    ours = fake_quant(weight, scheme, bits, group).numpy()
    np.testing.assert_allclose(ours, fake_quantise(weight.numpy(), scheme, bits, group), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("scheme, bits, symmetric", LEARNED)
def test_learned_scales_give_the_formulas_weight(scheme: str, bits: int, symmetric: bool, group: int) -> None:
    weight = weights()
    shape = scale_shape(5, 12, group)
    scale = torch.rand(shape, dtype=torch.float64) * 0.2 + 0.02
    zero = None if symmetric else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    ours = fake_quant(weight, scheme, bits, group, scale, zero)
    zeros = None if zero is None else zero.numpy().astype(np.float64)
    expected = fake_quantise(weight.numpy(), scheme, bits, group, scale.numpy(), zeros)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, True), (4, False), (8, False)])
def test_first_values_of_a_learned_scale(bits: int, symmetric: bool, group: int) -> None:
    weight = weights()
    scale, zero = initial_scale(weight, bits, symmetric, group)
    scheme = "twn" if bits == 2 else ("absmax" if symmetric else "minmax")
    found = [find_scale(weight.numpy()[place], scheme, bits) for place in lines_of(weight.numpy(), group)]
    np.testing.assert_allclose(scale.numpy().ravel(), [s for s, _ in found], rtol=1e-12)
    if symmetric:
        assert zero is None
    else:
        assert zero.dtype == torch.uint8
        assert zero.flatten().tolist() == [z for _, z in found]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, True), (4, False), (8, False)])
def test_clip_becomes_the_scale_of_quantgpt(bits: int, symmetric: bool, group: int) -> None:
    weight = weights()
    gamma = torch.linspace(0.5, 3.0, scale_shape(5, 12, group)[0] * scale_shape(5, 12, group)[1], dtype=torch.float64)
    scale, zero, _ = clipped_scale(weight, gamma.reshape(scale_shape(5, 12, group)), bits, symmetric, group)
    for number, place in enumerate(lines_of(weight.numpy(), group)):
        line = weight.numpy()[place]
        alpha = float(gamma[number]) * np.abs(line).mean()
        if symmetric:
            assert scale.flatten()[number].item() == pytest.approx(alpha / top_level(bits))
        else:
            expected = range_of(max(line.min(), -alpha), min(line.max(), alpha), bits)
            assert (scale.flatten()[number].item(), zero.flatten()[number].item()) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme, bits", DYNAMIC)
def test_half_precision_weights_are_quantised_in_float32(scheme: str, bits: int, dtype: torch.dtype) -> None:
    weight = weights(dtype=dtype)
    ours = fake_quant(weight, scheme, bits, 0)
    assert ours.dtype == dtype
    assert torch.equal(ours, fake_quant(weight.float(), scheme, bits, 0).to(dtype))
    expected = fake_quantise(weight.double().numpy(), scheme, bits, 0)
    np.testing.assert_allclose(ours.double().numpy(), expected, rtol=torch.finfo(dtype).eps, atol=1e-6)


finite = st.floats(-1e4, 1e4, width=32)
tiny = st.floats(-(2.0**-100), 2.0**-100, width=32)
anything = st.one_of(finite, st.just(0.0), st.just(-0.0), tiny)
rows_of_any_numbers = st.integers(1, 4).flatmap(
    lambda rows: st.lists(st.lists(anything, min_size=8, max_size=8), min_size=rows, max_size=rows)
)


@pytest.mark.parametrize("scheme, bits", DYNAMIC)
@given(rows=rows_of_any_numbers, group=st.sampled_from([-1, 0, 4]))
def test_codes_are_in_range_and_results_finite_without_minus_zero(
    scheme: str, bits: int, rows: list[list[float]], group: int
) -> None:
    weight = torch.tensor(rows, dtype=torch.float32)
    ours = fake_quant(weight, scheme, bits, group)
    found = quantizers.quantize(weight, None, None, scheme, bits, group)
    assert torch.isfinite(ours).all()
    assert int(found.codes.max()) <= (2 if bits == 2 else 2**bits - 1)
    assert not ((ours == 0) & torch.signbit(ours)).any()
    assert (found.scale >= 0).all()
    assert found.scale.shape == scale_shape(len(rows), 8, group)
    middle = 1 if bits == 2 else 2 ** (bits - 1)
    zero = torch.full(found.scale.shape, middle) if found.zero is None else found.zero
    for number, (r, c) in enumerate(lines_of(weight.numpy(), group)):
        levels = found.codes[r, c].float() - zero.flatten()[number].float()
        assert torch.equal(levels * found.scale.flatten()[number], ours[r, c])


@pytest.mark.parametrize("scheme, bits", [d for d in DYNAMIC if d[0] in ("minmax", "absmax")])
@given(rows=rows_of_any_numbers)
def test_range_quantisers_are_off_by_half_a_step_at_most(scheme: str, bits: int, rows: list[list[float]]) -> None:
    weight = torch.tensor(rows, dtype=torch.float64)
    ours = fake_quant(weight, scheme, bits, 0)
    for row in range(len(rows)):
        step, _ = find_scale(weight[row].numpy(), scheme, bits)
        assert (ours[row] - weight[row]).abs().max() <= step * (0.5 if scheme == "absmax" else 1.0) * (1 + 1e-6)


@pytest.mark.parametrize("group", [-1, 0, 4])
@pytest.mark.parametrize("scheme, bits", DYNAMIC)
@pytest.mark.parametrize("value", [0.0, -0.0])
def test_zero_rows_give_zeros(scheme: str, bits: int, group: int, value: float) -> None:
    weight = torch.full((3, 8), value)
    assert torch.equal(fake_quant(weight, scheme, bits, group).view(torch.int32), torch.zeros(3, 8).view(torch.int32))
    mixed = weights(3, 8, dtype=torch.float32)
    mixed[1] = value
    ours = fake_quant(mixed, scheme, bits, group)
    assert torch.isfinite(ours).all()
    assert (ours[1] == 0).all()


@pytest.mark.parametrize("scheme, bits, symmetric", LEARNED)
def test_scale_of_zero_gives_zeros_and_finite_gradients(scheme: str, bits: int, symmetric: bool) -> None:
    weight = weights(2, 8, dtype=torch.float32).requires_grad_()
    scale = torch.zeros(2, 1, requires_grad=True)
    zero = None if symmetric else torch.zeros(2, 1, dtype=torch.uint8)
    ours = fake_quant(weight, scheme, bits, 0, scale, zero)
    ours.sum().backward()
    assert (ours == 0).all()
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(scale.grad).all()


@given(shift=st.floats(0.125, 8.0, width=32), seed=st.integers(0, 100))
def test_ternary_is_equivariant_to_powers_of_the_scale_and_to_signs(shift: float, seed: int) -> None:
    weight = weights(seed=seed)
    for scheme in ("twn", "absmean"):
        ours = fake_quant(weight, scheme, 2, 0)
        torch.testing.assert_close(fake_quant(-weight, scheme, 2, 0), -ours)
        torch.testing.assert_close(fake_quant(weight * shift, scheme, 2, 0), ours * shift)
        order = torch.randperm(12)
        torch.testing.assert_close(fake_quant(weight[:, order], scheme, 2, 0), ours[:, order])


@pytest.mark.parametrize("group", [5, 24, -2])
def test_group_size_that_does_not_divide_is_refused_with_both_numbers(group: int) -> None:
    with pytest.raises(ConfigError, match=rf"group_size={group} does not divide in_features=12.*granularity"):
        fake_quant(weights(), "twn", 2, group)


@pytest.mark.parametrize("scheme, bits", [("twn", 4), ("absmean", 8), ("minmax", 2), ("absmax", 2), ("lsq", 3)])
def test_scheme_at_a_width_it_does_not_have_is_refused(scheme: str, bits: int) -> None:
    with pytest.raises(ConfigError, match=f"'{scheme}' works with bits in .*got {bits}"):
        fake_quant(weights(), scheme, bits, 0, torch.ones(5, 1))


def test_unknown_scheme_and_missing_scale_are_refused() -> None:
    with pytest.raises(ConfigError, match="'sinq' is not one of twn"):
        fake_quant(weights(), "sinq", 2, 0)
    with pytest.raises(ConfigError, match="'lsq' needs a scale"):
        fake_quant(weights(), "lsq", 2, 0)
