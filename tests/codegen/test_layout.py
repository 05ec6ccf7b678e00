"""The kernel layout: round trips, values, and a lane's arithmetic as the kernels do it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tsld_fx.codegen.layout import (
    dequantise,
    kernel_group,
    pack_codes,
    to_kernel_layout,
    unpack_codes,
    unpack_kernel_codes,
)
from tsld_fx.errors import BackendError

PROPERTY = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.integers(1, 300)


def random_codes(n: int, k: int, bits: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3 if bits == 2 else 2**bits, (n, k), dtype=torch.uint8, generator=generator)


@PROPERTY
@given(n=SIZES, k=SIZES, bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**31))
def test_codes_come_back(pack_canonical, n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    assert torch.equal(unpack_codes(pack_canonical(codes, bits), bits, k), codes)
    kernel = pack_codes(codes, bits)
    assert kernel.shape == (-(-n // 16), -(-k // 128), bits // 2, 32, 16)
    assert torch.equal(unpack_kernel_codes(kernel, bits, n, k), codes)


def test_many_rows_are_packed_in_parts(pack_canonical) -> None:
    codes = random_codes(2500, 140, 2, 0)
    weights = to_kernel_layout(pack_canonical(codes, 2), torch.ones(1, 1), None, 2, -1, 140)
    assert torch.equal(unpack_kernel_codes(weights.codes, 2, 2500, 140), codes)


@PROPERTY
@given(
    n=SIZES,
    k=SIZES,
    bits=st.sampled_from([2, 4, 8]),
    group_size=st.sampled_from([-1, 0, 32, 64, 128, 256]),
    default_zero=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_values(pack_canonical, n, k, bits, group_size, default_zero, seed) -> None:
    """Group scales are rounded to fp16 relative to the row's largest; everything else is exact."""
    codes = random_codes(n, k, bits, seed)
    groups = -(-k // group_size) if 0 < group_size < k else 1
    shape = (1, 1) if group_size == -1 else (n, groups)
    scales = torch.rand(shape) + 0.01
    zeros = None if bits == 2 or default_zero else torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    got = dequantise(to_kernel_layout(pack_canonical(codes, bits), scales, zeros, bits, group_size, k))
    zero = torch.full(shape, 1 if bits == 2 else 2 ** (bits - 1)) if zeros is None else zeros
    repeat = group_size if groups > 1 else k
    spread = [t.expand(n, -1).repeat_interleave(repeat, dim=1)[:, :k].double() for t in (scales, zero)]
    expected = (codes.double() - spread[1]) * spread[0]
    torch.testing.assert_close(got.double(), expected, rtol=6e-4 if groups > 1 else 1e-6, atol=0)


def lane_fragment(kernel: np.ndarray, bits: int, tile: int, chunk: int, lane: int, step: int) -> np.ndarray:
    """A operands a0..a3 (two elements each) of one lane for one mma step, by the bit operations of dequant.cuh.

    Ternary: value / 2; otherwise the code, before the zero point is subtracted.
    """
    words = np.frombuffer(kernel[tile, chunk, :, lane].tobytes(), dtype="<u4")
    pair, odd = divmod(step, 2)
    out = np.zeros((4, 2))
    for register in range(4):
        if bits == 2:
            shifted = (int(words[pair]) << (2 * (4 * odd + register))) & 0xC000C000
            halves = np.array([shifted & 0xFFFF, shifted >> 16], dtype=np.uint16).view(np.float16)
            out[register] = halves / 2
        elif bits == 4:
            value = (int(words[step]) >> (4 * register)) & 0x000F000F
            out[register] = value & 0xF, value >> 16
        else:
            word = int(words[2 * step + register // 2])
            out[register] = [(word >> (16 * (register % 2) + 8 * e)) & 0xFF for e in range(2)]
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_lane_gets_its_fragment(bits: int) -> None:
    """Against the operand layout of mma.m16n8k16 in the PTX ISA."""
    codes = random_codes(40, 300, bits, 1)
    padded = torch.nn.functional.pad(codes, (0, 84, 0, 8), value=1 if bits == 2 else 0).numpy().astype(float)
    kernel = pack_codes(codes, bits).numpy()
    for tile, chunk, lane, step in [(0, 0, 0, 0), (0, 1, 5, 3), (1, 0, 31, 7), (2, 2, 14, 1), (1, 1, 17, 4)]:
        got = lane_fragment(kernel, bits, tile, chunk, lane, step)
        g, t = divmod(lane, 4)
        for register in range(4):
            row = 16 * tile + g + 8 * (register % 2)
            k = 128 * chunk + 16 * step + 8 * (register // 2) + 2 * t
            expected = padded[row, k : k + 2] - (1 if bits == 2 else 0)
            assert (got[register] == expected).all(), (tile, chunk, lane, step, register)


@pytest.mark.parametrize(
    ("size", "features", "kernel"), [(0, 64, 0), (-1, 64, 0), (32, 64, 32), (512, 4096, 128), (128, 128, 0)]
)
def test_group_of_the_kernel(size: int, features: int, kernel: int) -> None:
    assert kernel_group(size, features) == kernel


def test_refusals(pack_canonical) -> None:
    packed, ones = pack_canonical(random_codes(8, 64, 2, 0), 2), torch.ones(8, 1)
    with pytest.raises(BackendError, match=r"group of 32, 64, 128"):
        to_kernel_layout(packed, torch.ones(8, 4), None, 2, 16, 64)
    with pytest.raises(BackendError, match="scales must have shape"):
        to_kernel_layout(packed, torch.ones(8, 3), None, 2, 0, 64)
    with pytest.raises(BackendError, match="uint8"):
        to_kernel_layout(packed, ones, None, 2, 0, 70)
    with pytest.raises(BackendError, match="zero point is 1"):
        to_kernel_layout(packed, ones, torch.zeros(8, 1, dtype=torch.uint8), 2, 0, 64)
    with pytest.raises(BackendError, match="3-bit"):
        to_kernel_layout(packed, ones, None, 3, 0, 64)
