"""Canonical packed weights -> the kernel layout of `cuda_templates/tsld/layout.cuh`, and back.

Canonical: uint8 [N, ceil(K*bits/8)], element k of a row at byte k*bits//8, shift (k*bits) % 8; ternary codes 0/1/2
stand for -1/0/+1; scales float32 [N, groups] (or [1, 1]); zero points uint8 of the same shape.

Kernel: tiles of 16 rows x chunks of 128 inputs, each in the order of a warp's tensor-core fragments. N is padded to
whole tiles and K to whole chunks, with codes that are never stored (rows) or meet a zero activation (inputs).
Everything here is plain torch and runs where the tensors are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tsld_fx.codegen.spec import CHUNK, SUPPORTED_BITS, SUPPORTED_GROUPS, TILE_ROWS
from tsld_fx.errors import BackendError

SLACK_TILES = 3  # row tiles of zeros behind the last: kernels that load several tiles at once may read them
_ROWS_AT_ONCE = 1024  # bounds the memory that packing takes besides its result
# ternary code (0, 1, 2 = -1, 0, +1) -> the two sign-and-exponent bits of the kernels (11, 00, 01), and back
_TO_SIGN = torch.tensor([3, 0, 1, 0], dtype=torch.uint8)
_FROM_SIGN = torch.tensor([1, 2, 1, 0], dtype=torch.uint8)


@dataclass(frozen=True)
class KernelWeights:
    """Weights of one linear layer in kernel layout.

    codes: uint8 [(row_tiles + SLACK_TILES) * chunks * 256 * bits].
    meta: uint8 [(row_tiles + SLACK_TILES) * chunks * bytes], group scales (fp16, relative to row_scale) and zero
        points; None with one scale per row.
    row_scale: float32 [16 * row_tiles], times 1/2 for ternary (whose codes stand for +-2).
    row_zero: uint8 [16 * row_tiles] for bits > 2 with one zero point per row; else None.
    """

    codes: Tensor
    meta: Tensor | None
    row_scale: Tensor
    row_zero: Tensor | None
    bits: int
    group: int
    out_features: int
    in_features: int

    @property
    def row_tiles(self) -> int:
        return -(-self.out_features // TILE_ROWS)

    @property
    def chunks(self) -> int:
        return -(-self.in_features // CHUNK)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that one call reads."""
        tensors = (self.codes, self.meta, self.row_scale, self.row_zero)
        slack = SLACK_TILES * self.chunks * (256 * self.bits)
        if self.meta is not None:
            slack += SLACK_TILES * self.meta.numel() // (self.row_tiles + SLACK_TILES)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None) - slack


def unpack_codes(packed: Tensor, bits: int, in_features: int) -> Tensor:
    """Canonical packed rows uint8 [N, bytes] -> codes uint8 [N, in_features]."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    codes = (packed.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.flatten(1)[:, :in_features]


def _word_positions(bits: int) -> list[tuple[int, int, int, int, int, int]]:
    """(word, shift, pair, step, half of K, half of rows, element) flattened per code of a lane in a chunk.

    The code of row g + 8*rows_half and input pair*32 + step*16 + k_half*8 + 2*t + element sits in this 32-bit word
    of the lane (g, t) at this bit. See dequant.cuh for the reasons.
    """
    positions = []
    for index in range(64):
        pair, step, k_half, rows_half, element = (
            index >> 4,
            index >> 3 & 1,
            index >> 2 & 1,
            index >> 1 & 1,
            index & 1,
        )
        register = 2 * k_half + rows_half
        if bits == 2:
            word, shift = pair, 14 - 2 * (4 * step + register) + 16 * element
        elif bits == 4:
            word, shift = 2 * pair + step, 4 * register + 16 * element
        else:
            word, shift = 4 * pair + 2 * step + k_half, 16 * rows_half + 8 * element
        positions.append((word, shift, pair * 32 + step * 16 + k_half * 8, rows_half, element, index))
    return positions


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [N, K] (ternary: 0/1/2) -> kernel layout uint8 [row_tiles, chunks, bits/2, 32, 16]."""
    n, k = codes.shape
    tiles, chunks = -(-n // TILE_ROWS), -(-k // CHUNK)
    out = torch.empty(tiles, chunks, bits // 2, 32, 16, dtype=torch.uint8, device=codes.device)
    for start in range(0, n if k else 0, _ROWS_AT_ONCE):
        part = codes[start : start + _ROWS_AT_ONCE]
        if bits == 2:
            part = _TO_SIGN.to(codes.device)[part.int()]
        part_tiles = -(-part.shape[0] // TILE_ROWS)
        part = torch.nn.functional.pad(part, (0, chunks * CHUNK - k, 0, part_tiles * TILE_ROWS - part.shape[0]))
        # [tile, rows_half, g, chunk, input / 8, t, element]
        grid = part.view(part_tiles, 2, 8, chunks, CHUNK // 8, 4, 2).int()
        words = torch.zeros(part_tiles, chunks, 2 * bits, 8, 4, dtype=torch.int32, device=codes.device)
        for word, shift, k0, rows_half, element, _ in _word_positions(bits):
            words[:, :, word] |= grid[:, rows_half, :, :, k0 // 8, :, element].permute(0, 2, 1, 3) << shift
        # words of a lane, four to a 16-byte vector: [tile, chunk, vector, lane, word]
        lanes = words.view(part_tiles, chunks, bits // 2, 4, 32).transpose(3, 4).contiguous()
        out[start // TILE_ROWS : start // TILE_ROWS + part_tiles] = lanes.view(torch.uint8)
    return out


def unpack_kernel_codes(kernel: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """Undo `pack_codes`: kernel layout -> codes uint8 [out_features, in_features]."""
    tiles, chunks = -(-out_features // TILE_ROWS), -(-in_features // CHUNK)
    lanes = kernel.flatten()[: tiles * chunks * 256 * bits].view(tiles, chunks, bits // 2, 32, 16).view(torch.int32)
    words = lanes.transpose(3, 4).reshape(tiles, chunks, 2 * bits, 8, 4)
    grid = torch.empty(tiles, 2, 8, chunks, CHUNK // 8, 4, 2, dtype=torch.uint8, device=kernel.device)
    for word, shift, k0, rows_half, element, _ in _word_positions(bits):
        values = (words[:, :, word] >> shift) & (2**bits - 1)
        grid[:, rows_half, :, :, k0 // 8, :, element] = values.permute(0, 2, 1, 3).to(torch.uint8)
    codes = grid.view(tiles * TILE_ROWS, chunks * CHUNK)[:out_features, :in_features]
    return _FROM_SIGN.to(kernel.device)[codes.int()] if bits == 2 else codes.contiguous()


def kernel_group(group_size: int, in_features: int) -> int:
    """Group of the kernel that serves a canonical group size: 0 (per row), 32, 64 or 128.

    Raises:
        BackendError: no kernel serves it.
    """
    if group_size <= 0 or group_size >= in_features:
        return 0
    if group_size in SUPPORTED_GROUPS:
        return group_size
    if group_size % CHUNK == 0:
        return CHUNK
    raise BackendError(
        f"CUDA kernels serve scales per group of 32, 64, 128 or a multiple of 128 inputs, not {group_size}. "
        "Quantise with one of these (QuantConfig group_size), or use backend='reference'."
    )


def _per_group(values: Tensor, group: int, group_size: int, n: int, k: int, fill: float) -> Tensor:
    """[N or 1, groups] -> [16 * row_tiles, chunks * 128 / group] (one column with group 0)."""
    if group and group_size > group:
        values = values.repeat_interleave(group_size // group, dim=1)
    columns = -(-k // CHUNK) * (CHUNK // group) if group else 1
    values = values[:, :columns].expand(n, -1)
    padding = (0, columns - values.shape[1], 0, -n % TILE_ROWS)
    return torch.nn.functional.pad(values, padding, value=fill)


def _pack_meta(scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """Relative scales and zero points [rows, groups] -> uint8 [row_tiles, chunks, bytes]."""
    tiles, per_chunk = scales.shape[0] // TILE_ROWS, CHUNK // group

    def blocks(values: Tensor) -> Tensor:  # [tile, chunk, group of the chunk, row]
        return values.view(tiles, TILE_ROWS, -1, per_chunk).permute(0, 2, 3, 1).contiguous()

    parts = [blocks(scales.half()).view(torch.uint8).flatten(2)]
    if zeros is not None:
        parts.append(blocks(zeros).flatten(2))
    return torch.cat(parts, dim=2)


def check_canonical(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> None:
    """Raise BackendError unless the tensors are one layer in the canonical format."""
    if bits not in SUPPORTED_BITS:
        raise BackendError(f"No CUDA kernel for {bits}-bit weights. Use bits 2 (ternary), 4 or 8.")
    row_bytes = -(-in_features * bits // 8)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != row_bytes:
        raise BackendError(
            f"Packed weights must be uint8 [out_features, {row_bytes}] for in_features={in_features}, bits={bits}; "
            f"got {packed.dtype} {list(packed.shape)}. Pack them with tsld_fx.convert."
        )
    groups = -(-in_features // group_size) if 0 < group_size < in_features else 1
    shapes = [[packed.shape[0], groups]] + ([[1, 1]] if groups == 1 else [])
    for name, values in (("scales", scales), ("zeros", zeros)):
        if values is not None and list(values.shape) not in shapes:
            raise BackendError(
                f"{name} must have shape {shapes[0]} for group_size={group_size}; got {list(values.shape)}. "
                "Use the scales that were packed with these weights."
            )
    if bits == 2 and zeros is not None and bool((zeros != 1).any()):
        raise BackendError("2-bit weights are ternary: their zero point is 1. Use bits=4 for an affine quantiser.")


def to_kernel_layout(
    packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, in_features: int
) -> KernelWeights:
    """Canonical format (see the module) -> `KernelWeights`, on the device of `packed`."""
    check_canonical(packed, scales, zeros, bits, group_size, in_features)
    n, k, group = packed.shape[0], in_features, kernel_group(group_size, in_features)
    parts = [
        pack_codes(unpack_codes(packed[i : i + _ROWS_AT_ONCE], bits, k), bits).flatten()
        for i in range(0, n, _ROWS_AT_ONCE)
    ]
    slack = SLACK_TILES * -(-k // CHUNK) * 256 * bits
    codes = torch.cat([*parts, torch.zeros(slack, dtype=torch.uint8, device=packed.device)])
    if bits == 2:
        zeros = None
    elif zeros is None:
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.uint8)
    spread = _per_group(scales.float(), group, group_size, n, k, 0.0)
    zero = None if zeros is None else _per_group(zeros, group, group_size, n, k, 0)
    meta, row_zero = None, None
    if group:
        row_scale = spread.abs().amax(dim=1)
        relative = spread / row_scale.where(row_scale > 0, torch.ones_like(row_scale)).unsqueeze(1)
        meta = torch.nn.functional.pad(_pack_meta(relative, zero, group), (0, 0, 0, 0, 0, SLACK_TILES)).flatten()
    else:
        row_scale = spread[:, 0]
        row_zero = None if zero is None else zero[:, 0].contiguous()
    row_scale = (row_scale * (0.5 if bits == 2 else 1.0)).contiguous()
    return KernelWeights(codes, meta, row_scale, row_zero, bits, group, n, k)


def dequantise(weights: KernelWeights) -> Tensor:
    """Kernel layout -> float32 [out_features, in_features]: what the kernels multiply with, bit for bit."""
    n, k, group = weights.out_features, weights.in_features, weights.group
    codes = unpack_kernel_codes(weights.codes, weights.bits, n, k).float()
    scale, zero = weights.row_scale[:n, None], torch.ones(n, 1)
    if weights.bits == 2:
        scale = scale * 2.0
    if weights.row_zero is not None:
        zero = weights.row_zero[:n, None].float()
    if weights.meta is not None:
        per_chunk = CHUNK // group
        meta = weights.meta.view(weights.row_tiles + SLACK_TILES, weights.chunks, -1)[: weights.row_tiles]
        size = per_chunk * TILE_ROWS * 2

        def rows(blocks: Tensor) -> Tensor:  # [tile, chunk, group * row] -> [n, k]
            grid = blocks.view(weights.row_tiles, weights.chunks, per_chunk, TILE_ROWS).permute(0, 3, 1, 2)
            return grid.reshape(-1, weights.chunks * per_chunk)[:n].repeat_interleave(group, dim=1)[:, :k].float()

        scale = scale * rows(meta[:, :, :size].contiguous().view(torch.float16))
        if weights.bits > 2:
            zero = rows(meta[:, :, size:].contiguous())
    return (codes - zero) * scale
