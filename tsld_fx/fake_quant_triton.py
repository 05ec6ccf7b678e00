"""Triton kernels of tsld::fake_quant: scale and quantised values of a line of weights in one read and one write.

Sums run in float64, so that they do not depend on the order in which a kernel adds: the scales that training, freezing
and packing find on one GPU are the same, whatever the layout of the weight and the dtype of the result.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 32768  # elements of a line that one program holds in registers
_SCHEMES = {"twn": 0, "absmean": 1, "absmax": 2, "minmax": 3, "lsq": 4, "pact": 4}
_TILE = 4096


@triton.jit
def _rounded(x, low, high):
    """x clamped to whole bounds and rounded half to even; adding 1.5 * 2^23 leaves no bits behind the point."""
    return (tl.minimum(tl.maximum(x, low), high) + 12582912.0) - 12582912.0 + 0.0


@triton.jit
def _safe(scale):
    return tl.where(scale == 0.0, 1.0, scale)


@triton.jit
def _address(line, groups, length, row_stride, stride, element):
    """Offsets [lines, elements] of lines that are groups of consecutive columns."""
    row, group = line // groups, line % groups
    start = row * row_stride + group * length * stride
    return start[:, None] + element[None, :] * stride


@triton.jit
def _fake_quant_lines(
    weight, out, scales, zeros, lines, groups, length,
    row_stride, stride, out_row_stride, out_stride, top, half,
    SCHEME: tl.constexpr, GIVEN: tl.constexpr, ZERO: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    element = tl.arange(0, BLOCK).to(tl.int64)
    real = line < lines
    inside = real[:, None] & (element < length)[None, :]
    w = tl.load(weight + _address(line, groups, length, row_stride, stride, element), mask=inside, other=0.0)
    w = w.to(tl.float32)
    size = tl.abs(w)
    scale = tl.zeros([LINES], tl.float32)
    if GIVEN:
        scale = tl.load(scales + line, mask=real, other=1.0)
    if SCHEME == 0:
        mean = (tl.sum(size.to(tl.float64), 1) / length).to(tl.float32)
        threshold = (mean * 0.7)[:, None]
        level = tl.where(w > threshold, 1.0, 0.0) - tl.where(w < -threshold, 1.0, 0.0)
        if not GIVEN:
            total = tl.sum((w * level).to(tl.float64), 1)
            count = tl.sum(tl.abs(level), 1)
            scale = (total / tl.maximum(count, 1.0).to(tl.float64)).to(tl.float32)
    else:
        low, high = -half, top
        if SCHEME == 1:
            scale = (tl.sum(size.to(tl.float64), 1) / length).to(tl.float32)
        elif SCHEME == 2:
            scale = tl.div_rn(tl.max(size, 1), top)
        elif SCHEME == 3:
            least, most = tl.minimum(tl.min(w, 1), 0.0), tl.maximum(tl.max(w, 1), 0.0)
            if not GIVEN:
                scale = tl.div_rn(most - least, top)
        if ZERO:
            if GIVEN:
                point = tl.load(zeros + line, mask=real, other=0).to(tl.float32)
            else:
                point = _rounded(tl.div_rn(-least, _safe(scale)), 0.0, top)
                tl.store(zeros + line, point.to(tl.uint8), mask=real)
            floor, ceiling = -point[:, None], (top - point)[:, None]
            level = _rounded(tl.div_rn(w, _safe(scale)[:, None]), floor, ceiling)
        else:
            level = _rounded(tl.div_rn(w, _safe(scale)[:, None]), low, high)
    if not GIVEN:
        tl.store(scales + line, scale, mask=real)
    quantised = (level * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + _address(line, groups, length, out_row_stride, out_stride, element), quantised, mask=inside)


@triton.jit
def _straight_through_lines(
    grad, weight, scales, zeros, out, grad_scales, lines, groups, length,
    grad_row_stride, grad_stride, row_stride, stride, out_row_stride, out_stride,
    top, half, factor, ZERO: tl.constexpr, LINES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    element = tl.arange(0, BLOCK).to(tl.int64)
    real = line < lines
    inside = real[:, None] & (element < length)[None, :]
    w = tl.load(weight + _address(line, groups, length, row_stride, stride, element), mask=inside, other=0.0)
    g = tl.load(grad + _address(line, groups, length, grad_row_stride, grad_stride, element), mask=inside, other=0.0)
    g = g.to(tl.float32)
    scale = _safe(tl.load(scales + line, mask=real, other=1.0))
    low, high = -half + 0.0 * scale, top + 0.0 * scale
    if ZERO:
        point = tl.load(zeros + line, mask=real, other=0).to(tl.float32)
        low, high = -point, top - point
    ratio = tl.div_rn(w.to(tl.float32), scale[:, None])
    kept = (ratio >= low[:, None]) & (ratio <= high[:, None])
    level = _rounded(ratio, low[:, None], high[:, None])
    part = g * (level - tl.where(kept, ratio, 0.0))
    tl.store(grad_scales + line, (tl.sum(part.to(tl.float64), 1) * factor).to(tl.float32), mask=real)
    passed = tl.where(kept, g, 0.0).to(out.dtype.element_ty)
    tl.store(out + _address(line, groups, length, out_row_stride, out_stride, element), passed, mask=inside)


def _plan(weight: Tensor, group_size: int) -> tuple[int, int, int, dict[str, Any]]:
    """Lines, groups per row, elements of a line, and the launch's sizes."""
    length = group_size or weight.shape[1]
    groups = weight.shape[1] // length
    block = triton.next_power_of_2(length)
    held = max(1, _TILE // block)
    sizes = {"LINES": held, "BLOCK": block, "num_warps": max(4, min(32, held * block // 1024))}
    return weight.shape[0] * groups, groups, length, sizes


def fits(weight: Tensor, group_size: int) -> bool:
    """Whether the kernels take this weight: float32, float16 or bfloat16 [out, in] with lines of at most LONGEST."""
    low = weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
    return low and weight.ndim == 2 and group_size >= 0 and 0 < (group_size or weight.shape[1]) <= LONGEST


def _levels(scheme: str, bits: int, zero: bool) -> tuple[float, float]:
    """Highest level (of an unsigned code with a zero point), and minus the lowest."""
    if bits == 2 and not zero:
        return 1.0, 1.0
    return (float(2**bits - 1), 0.0) if zero else (float(2 ** (bits - 1) - 1), float(2 ** (bits - 1)))


def fake_quantize(
    weight: Tensor, scale: Tensor | None, zero: Tensor | None, scheme: str, bits: int, group_size: int,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Quantised weight [out, in] in `dtype`, scales float32 [lines] and zero points uint8 [lines] or None."""
    lines, groups, length, sizes = _plan(weight, group_size)
    dense = torch.empty_like(weight, dtype=dtype or weight.dtype) if groups == 1 else None
    out = weight.new_empty(weight.shape, dtype=dtype or weight.dtype) if dense is None else dense
    given = scale is not None
    pointed = zero is not None or (scheme == "minmax" and not given)
    scales = weight.new_empty(lines, dtype=torch.float32) if scale is None else scale.float().contiguous().view(-1)
    if pointed:
        zeros = weight.new_empty(lines, dtype=torch.uint8) if zero is None else zero.contiguous().view(-1)
    else:
        zeros = scales
    top, half = _levels(scheme, bits, pointed)
    _fake_quant_lines[(triton.cdiv(lines, sizes["LINES"]),)](
        weight, out, scales, zeros, lines, groups, length, *weight.stride(), *out.stride(), top, half,
        SCHEME=_SCHEMES[scheme] if not given or scheme == "twn" else 4, GIVEN=given, ZERO=pointed, **sizes,
    )  # fmt: skip
    return out, scales, zeros if pointed else None


def straight_through(
    grad: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, scheme: str, bits: int, group_size: int
) -> tuple[Tensor, Tensor]:
    """Gradients of a learned scale's weight and scale (see `quantizers.straight_through`)."""
    from tsld_fx.quantizers import highest_level

    lines, groups, length, sizes = _plan(weight, group_size)
    out, grad_scales = torch.empty_like(weight), weight.new_empty(lines, dtype=torch.float32)
    top, half = _levels(scheme, bits, zero is not None)
    scales = scale.float().contiguous().view(-1)
    factor = (length * highest_level(bits)) ** -0.5 if scheme == "lsq" else 1.0
    _straight_through_lines[(triton.cdiv(lines, sizes["LINES"]),)](
        grad, weight, scales, scales if zero is None else zero.contiguous().view(-1), out, grad_scales,
        lines, groups, length, *grad.stride(), *weight.stride(), *out.stride(), top, half, factor,
        ZERO=zero is not None, **sizes,
    )  # fmt: skip
    return out, grad_scales.view(scale.shape).to(scale.dtype)
