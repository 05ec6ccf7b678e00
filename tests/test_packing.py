"""The canonical packed format and tsld::lowbit_linear, against plain integer and float64 arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tsld_fx.errors import BackendError, CheckpointError, PassError
from tsld_fx.lowbit_linear import LowBitLinear
from tsld_fx.packing import check_packed, dequantize, pack, packed_width, unpack
from tsld_fx.quantizers import quantize, scale_shape

FORMATS = [
    ("twn", 2, True), ("absmean", 2, True), ("lsq", 2, True), ("pact", 2, True),
    ("minmax", 4, False), ("absmax", 4, True), ("lsq", 4, False), ("pact", 4, True),
    ("minmax", 8, False), ("absmax", 8, True), ("lsq", 8, True), ("pact", 8, False),
]  # fmt: skip


def layout_by_hand(codes: list[list[int]], bits: int) -> list[list[int]]:
    """The contract, bit by bit: element k at byte k*bits//8, shift (k*bits) % 8; the rest zero."""
    packed = []
    for row in codes:
        line = [0] * ((len(row) * bits + 7) // 8)
        for k, code in enumerate(row):
            line[k * bits // 8] |= code << (k * bits) % 8
        packed.append(line)
    return packed


@st.composite
def code_matrices(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.sampled_from([2, 4, 8]))
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 19))
    code = st.integers(0, 2 if bits == 2 else 2**bits - 1)
    return bits, draw(st.lists(st.lists(code, min_size=columns, max_size=columns), min_size=rows, max_size=rows))


@given(code_matrices())
def test_pack_writes_the_layout_of_the_contract_and_unpack_reads_it(case: tuple[int, list[list[int]]]) -> None:
    bits, codes = case
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == layout_by_hand(codes, bits)
    assert packed.shape[1] == packed_width(len(codes[0]), bits)
    assert torch.equal(unpack(packed, bits, len(codes[0])), tensor)


def test_layout_by_example() -> None:
    assert pack(torch.tensor([[2, 1, 0, 2, 1]], dtype=torch.uint8), 2).tolist() == [[0b10_00_01_10, 0b01]]
    assert pack(torch.tensor([[0xA, 0x3, 0xF]], dtype=torch.uint8), 4).tolist() == [[0x3A, 0x0F]]
    assert pack(torch.tensor([[200, 7]], dtype=torch.uint8), 8).tolist() == [[200, 7]]


@pytest.mark.parametrize("bits, code", [(2, 3), (4, 16), (2, 255)])
def test_code_that_does_not_fit_is_refused(bits: int, code: int) -> None:
    with pytest.raises(PassError, match=f"a code of {code} does not fit {bits} bits"):
        pack(torch.tensor([[0, code]], dtype=torch.uint8), bits)


def make(
    scheme: str, bits: int, symmetric: bool, group: int, rows: int = 6, columns: int = 20, seed: int = 0
) -> tuple[Tensor, tuple, Tensor]:
    """A float32 weight, its packed form (packed, scales, zeros, bits, group, in) and its fake-quantised form."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.3
    weight[0] = 0.0
    scale = zero = None
    if scheme in ("lsq", "pact"):
        shape = scale_shape(rows, columns, group)
        scale = torch.rand(shape, generator=generator) * 0.3 / top(bits) + 0.01
        zero = None if symmetric else torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    found = quantize(weight, scale, zero, scheme, bits, group)
    packed = (pack(found.codes, bits), found.scale, found.zero, bits, group, columns)
    return weight, packed, torch.ops.tsld.fake_quant(weight, scale, zero, scheme, bits, group)


def top(bits: int) -> int:
    return 1 if bits == 2 else 2 ** (bits - 1) - 1


@pytest.mark.parametrize("group", [-1, 0, 4])
@pytest.mark.parametrize("scheme, bits, symmetric", FORMATS)
def test_unpacked_weight_equals_the_fake_quantised_one_bit_for_bit(
    scheme: str, bits: int, symmetric: bool, group: int
) -> None:
    for seed in range(5):
        _, packed, trained = make(scheme, bits, symmetric, group, seed=seed)
        again = dequantize(*packed)
        assert again.dtype == torch.float32
        assert torch.equal(again.view(torch.int32), trained.view(torch.int32))
        assert torch.equal(torch.ops.tsld.dequantize_weight(*packed).view(torch.int32), again.view(torch.int32))


@given(columns=st.integers(1, 33), seed=st.integers(0, 1000), form=st.sampled_from(FORMATS))
def test_odd_widths_survive_bit_for_bit(columns: int, seed: int, form: tuple[str, int, bool]) -> None:
    _, packed, trained = make(*form, group=0, columns=columns, seed=seed)
    assert torch.equal(dequantize(*packed).view(torch.int32), trained.view(torch.int32))


def dequantised_by_hand(packed: tuple) -> np.ndarray:
    """(code - zero) * scale rounded once to float32, read from the bytes by the contract."""
    data, scales, zeros, bits, group, columns = packed
    result = np.zeros((data.shape[0], columns))
    for row in range(data.shape[0]):
        for k in range(columns):
            code = (int(data[row, k * bits // 8]) >> (k * bits) % 8) & (2**bits - 1)
            at = (0, 0) if group == -1 else (row, k // group if group else 0)
            zero = float(zeros[at]) if zeros is not None else (1.0 if bits == 2 else 2.0 ** (bits - 1))
            result[row, k] = np.float32((code - zero) * float(scales[at]))
    return result


@pytest.mark.parametrize("group", [-1, 0, 4])
@pytest.mark.parametrize("scheme, bits, symmetric", [f for f in FORMATS if f[0] in ("twn", "minmax", "absmax")])
def test_lowbit_linear_equals_float64_arithmetic(scheme: str, bits: int, symmetric: bool, group: int) -> None:
    _, packed, _ = make(scheme, bits, symmetric, group)
    weight = dequantised_by_hand(packed)
    x, bias = torch.randn(4, 20, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    for given_bias in (None, bias):
        expected = x.numpy() @ weight.T + (0 if given_bias is None else bias.numpy())
        args = (*packed[:3], given_bias, *packed[3:])
        np.testing.assert_allclose(torch.ops.tsld.lowbit_linear(x, *args).numpy(), expected, rtol=1e-12, atol=1e-14)
        for dtype, close in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
            rounded = x.to(dtype)
            low = None if given_bias is None else bias.to(dtype)
            ours = torch.ops.tsld.lowbit_linear(rounded, *packed[:3], low, *packed[3:])
            exact = rounded.double().numpy() @ weight.T + (0 if low is None else low.double().numpy())
            assert ours.dtype == dtype
            # rounded once: within half a unit in the last place of the exact result (float32: of the sum's terms)
            np.testing.assert_allclose(ours.double().numpy(), exact, rtol=close * 0.55, atol=close * 1e-3 + 1e-6)


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_ternary_weights_with_zero_points_of_their_own(zero: int) -> None:
    codes = torch.randint(0, 3, (5, 13))
    scales, zeros = torch.rand(5, 1) + 0.1, torch.full((5, 1), zero, dtype=torch.uint8)
    expected = (codes.double() - zero) * scales.double()
    weight = dequantize(pack(codes, 2), scales, zeros, 2, 0, 13)
    assert torch.equal(weight, expected.float())
    x = torch.randn(3, 13, dtype=torch.float64)
    y = torch.ops.tsld.lowbit_linear(x, pack(codes, 2), scales, zeros, None, 2, 0, 13)
    torch.testing.assert_close(y, x @ expected.T)


@pytest.mark.parametrize("shape", [(20,), (1, 20), (2, 3, 20), (2, 1, 3, 20), (0, 20), (2, 0, 20)])
def test_leading_dimensions_and_views(shape: tuple[int, ...]) -> None:
    _, packed, trained = make("twn", 2, True, 0)
    args = (*packed[:3], None, *packed[3:])
    x = torch.randn(*shape)
    ours = torch.ops.tsld.lowbit_linear(x, *args)
    assert ours.shape == (*shape[:-1], 6)
    torch.testing.assert_close(ours, x @ trained.T)
    strided = torch.randn(*shape[:-1], 40)[..., ::2]
    torch.testing.assert_close(torch.ops.tsld.lowbit_linear(strided, *args), strided @ trained.T)


def test_activations_that_do_not_fit_are_refused() -> None:
    _, packed, _ = make("twn", 2, True, 0)
    args = (*packed[:3], None, *packed[3:])
    with pytest.raises(BackendError, match="the input has 19 features, the packed weight 20"):
        torch.ops.tsld.lowbit_linear(torch.randn(2, 19), *args)
    with pytest.raises(BackendError, match=r"the input is torch\.int64"):
        torch.ops.tsld.lowbit_linear(torch.ones(2, 20, dtype=torch.int64), *args)


def test_lowbit_linear_passes_the_gradient_to_its_input_and_bias() -> None:
    _, packed, trained = make("minmax", 4, False, 4)
    x = torch.randn(2, 3, 20, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, 6, dtype=torch.float64)
    torch.ops.tsld.lowbit_linear(x, *packed[:3], bias, *packed[3:]).backward(upstream)
    torch.testing.assert_close(x.grad, upstream @ trained.double())
    torch.testing.assert_close(bias.grad, upstream.sum((0, 1)))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scheme, bits, symmetric", [("twn", 2, True), ("minmax", 4, False), ("absmax", 8, True)])
def test_operators_pass_torchs_own_checks(scheme: str, bits: int, symmetric: bool, with_bias: bool) -> None:
    _, packed, _ = make(scheme, bits, symmetric, 4)
    x, bias = torch.randn(2, 20, requires_grad=True), torch.randn(6) if with_bias else None
    torch.library.opcheck(torch.ops.tsld.lowbit_linear.default, (x, *packed[:3], bias, *packed[3:]))
    torch.library.opcheck(torch.ops.tsld.dequantize_weight.default, packed)


def layer_of(scheme: str, bits: int, symmetric: bool, group: int, bias: bool = True) -> tuple[LowBitLinear, Tensor]:
    _, (data, scales, zeros, *_), trained = make(scheme, bits, symmetric, group)
    layer = LowBitLinear(20, 6, bits, group, zero=zeros is not None, bias=bias)
    layer.load_state_dict(
        {"weight_packed": data, "weight_scale": scales}
        | ({} if zeros is None else {"weight_zero": zeros})
        | ({"bias": torch.randn(6)} if bias else {})
    )
    return layer, trained


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_layer_works_under_torch_compile_and_torch_export(backend: str) -> None:
    layer, _ = layer_of("minmax", 4, False, 4)
    model = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(3, 20)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    batch = {"input": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (x,), dynamic_shapes=batch, strict=False)
    for size in (1, 3, 5):
        rows = torch.randn(size, 20)
        torch.testing.assert_close(exported.module()(rows), model(rows))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_layer_keeps_codes_and_scales_under_a_change_of_dtype(dtype: torch.dtype) -> None:
    layer, trained = layer_of("minmax", 4, False, 4)
    for moved in (layer.to(dtype), nn.Sequential(layer).to(dtype)[0]):
        assert moved.weight_packed.dtype == moved.weight_zero.dtype == torch.uint8
        assert moved.weight_scale.dtype == torch.float32
        assert moved.bias.dtype == dtype
        assert torch.equal(moved.dequantize(), trained)
        assert torch.equal(moved.weight, trained)
    assert moved(torch.randn(2, 20, dtype=dtype)).dtype == dtype
    assert "4-bit, per group 4" in repr(layer)


def test_damaged_packed_tensors_are_refused_by_layer_and_tensor() -> None:
    _, (data, scales, zeros, *rest), _ = make("minmax", 4, False, 4)
    _, (codes, ternary_scales, _, *ternary), _ = make("twn", 2, True, 0)
    check_packed("layer", data, scales, zeros, *rest)
    bad = scales.clone()
    bad[0, 0] = float("nan")
    three = codes.clone()
    three[3, 4] = 0b1100_0000
    for arguments, said in (
        ((data[:, :-1], scales, zeros, *rest), r"weight_packed is torch\.uint8 \[6, 9\].*expected uint8 \[out, 10\]"),
        ((data.int(), scales, zeros, *rest), r"weight_packed is torch\.int32"),
        ((data, scales[:, :1], zeros, *rest), r"weight_scale has shape \[6, 1\], expected \[6, 5\]"),
        ((data, bad, zeros, *rest), "weight_scale holds NaN or Inf"),
        ((data, scales, zeros[:1], *rest), r"weight_zero is torch\.uint8 \[1, 5\]"),
        ((data, scales, zeros.int(), *rest), r"weight_zero is torch\.int32"),
        ((three, ternary_scales, None, *ternary), "weight_packed holds the ternary code 3"),
    ):
        with pytest.raises(CheckpointError, match=f"^model.layer: {said}"):
            check_packed("model.layer", *arguments)
