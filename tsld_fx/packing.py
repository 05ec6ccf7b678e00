"""The canonical packed format: unsigned codes, least significant bits first, rows padded with zero bits to bytes.

Element k of a row is at byte k * bits // 8, shift (k * bits) % 8. Ternary codes 0, 1, 2 stand for -1, 0, +1.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from tsld_fx.errors import CheckpointError, PassError
from tsld_fx.quantizers import scale_shape


def packed_width(in_features: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-in_features * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes [out, in] into uint8 [out, packed_width(in, bits)].

    Raises:
        PassError: a code does not fit (ternary: above 2).
    """
    top = 2 if bits == 2 else 2**bits - 1
    if codes.numel() and int(codes.max()) > top:
        raise PassError(f"pack: a code of {int(codes.max())} does not fit {bits} bits; the highest code is {top}.")
    per_byte = 8 // bits
    padding = -codes.shape[1] % per_byte
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    parts = codes.reshape(codes.shape[0], -1, per_byte)
    packed = parts[..., 0].clone()
    for index in range(1, per_byte):
        packed |= parts[..., index] << (index * bits)
    return packed


def unpack(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """The uint8 codes [out, in_features] of a packed weight; the inverse of `pack`."""
    if bits == 8:
        return packed[:, :in_features].clone()
    mask = 2**bits - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=-1).reshape(packed.shape[0], -1)[:, :in_features].contiguous()


@functools.cache
def _byte_table(bits: int, device: torch.device) -> Tensor:
    """float32 [256, codes per byte]: the codes in each byte, minus 1 for ternary."""
    codes = unpack(torch.arange(256, dtype=torch.uint8).reshape(-1, 1), bits, 8 // bits)
    return (codes.float() - (1.0 if bits == 2 else 0.0)).to(device)


def dequantize(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """The float32 weight [out, in_features] of a packed one: (code - zero) * scale, bit for bit what was trained."""
    rows = packed.shape[0]
    if packed.is_meta or bits == 8:
        levels = unpack(packed, bits, in_features).float()
    else:
        table = _byte_table(bits, packed.device)
        levels = torch.nn.functional.embedding(packed.int(), table).reshape(rows, -1)[:, :in_features]
    lines = levels.reshape(scales.numel(), -1)
    if zeros is not None:
        lines = lines - (zeros.float().reshape(-1, 1) - (1.0 if bits == 2 else 0.0))  # ternary levels are centred
    elif bits != 2:
        lines = lines - float(2 ** (bits - 1))
    return (lines * scales.reshape(-1, 1)).reshape(rows, in_features)


def check_packed(
    name: str,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
) -> None:
    """Refuse packed tensors whose shapes, dtypes or codes cannot be what `pack` wrote.

    Raises:
        CheckpointError: it names the layer, the tensor and what was expected.
    """

    def fail(what: str) -> None:
        raise CheckpointError(f"{name}: {what}. The checkpoint is damaged or of another format; convert again.")

    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != packed_width(in_features, bits):
        expected = packed_width(in_features, bits)
        fail(f"weight_packed is {packed.dtype} {list(packed.shape)}, expected uint8 [out, {expected}]")
    shape = scale_shape(packed.shape[0], in_features, group_size)
    if tuple(scales.shape) != shape:
        fail(f"weight_scale has shape {list(scales.shape)}, expected {list(shape)}")
    if not bool(torch.isfinite(scales).all()):
        fail("weight_scale holds NaN or Inf")
    if zeros is not None and (zeros.dtype != torch.uint8 or tuple(zeros.shape) != shape):
        fail(f"weight_zero is {zeros.dtype} {list(zeros.shape)}, expected uint8 {list(shape)}")
    if bits == 2 and bool(((packed & (packed >> 1) & 0x55) != 0).any()):
        fail("weight_packed holds the ternary code 3, which stands for nothing")
